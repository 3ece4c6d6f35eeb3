"""The graph: SSA ops in creation order, reads and writes of states between them, and TensorFlow's names for it all.

Everything that runs is an *item* in creation order: an SSA op, a read of a state, an assignment. A run takes the items that its fetches need,
in that order (`lowering.py`), so a read sees the last assignment before it. Items created under `control_dependencies` wait for those
operations; an assignment that belongs to an op (a generator moving on) happens whenever the op runs. Branches of control flow are
built in a `Frame` of their own, which captures what it uses from outside.
"""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from duo import symbolic
from duo.dispatch import distinct
from duo.eager.infer import explained, scalar_types, user_location
from duo.eager.tensor import EagerTensor
from duo.graph.errors import InvalidArgumentError, NotFoundError
from duo.graph.items import Assign, Deferred, Frame, Operation, Read
from duo.graph.placement import Place, Scope, Unnamed, innermost, scope_of
from duo.graph.states import Constant, Number, SeededState, SharedState, Source, State
from duo.random import default_generator
from duo.symbolic import has_size, plain
from duo_ir.core import Builder, Function, Loc, Op, Value
from duo_ir.errors import DuoError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import shape as movement
from duo_ir.transforms.sizes import sized, sized_type
from duo_ir.types import Dim, DimLike, DType, TensorType, substitute
from duo_ir.types import dtype as as_dtype


class Graph:
    """A program under construction. `with graph.as_default():` makes it the one that ops go to."""

    tensor_class: ClassVar[Any]  # set by tensor.py
    variable_class: ClassVar[Any]  # set by variables.py
    default_session: ClassVar[Callable[[], Any]]  # set by session.py

    def __init__(self) -> None:
        self.root = self.frame = Frame(self)
        self.items: list[Op | Read | Assign | Deferred] = []
        self.waits: dict[Any, tuple[Operation, ...]] = {}
        self.follows: dict[Op, list[Assign]] = {}
        self.sources: dict[Value, Source] = {}
        self.reads: dict[Value, Read] = {}
        self.shared: dict[int, SharedState] = {}
        self.shared_variables: dict[int, Any] = {}
        self.operations: dict[str, Operation] = {}
        self.collections: dict[str, list[Any]] = {}
        self.seed: int | None = None
        self._seeded: SeededState | None = None
        self._seeds = itertools.count()
        self._names: dict[str, int] = {}
        self._scope = ""
        self._control: list[tuple[Operation, ...]] = []
        self._devices: list[Scope] = []  # of `device`, outermost first
        self.places: dict[Any, Place] = {}  # items, states and sources that scopes have placed
        self._inner_place: Place | None = None  # on a GPU, in a branch under construction
        self._known: list[dict[State, Value]] = [{}]  # reads that still hold, per control context
        self.branch_reads: dict[State, Value] = self._known[0]  # what branches under construction have read
        self._quiet = 0
        self._sizes = itertools.count()
        self._renamed: dict[str, DimLike] = {}  # sizes that turned out to be others
        self.fixed_sizes: list[tuple[int, Loc | None]] = []  # those that an operand of known size decided, and where
        self.variables: dict[str, Any] = {}  # what get_variable made, by name
        self.variable_scopes: list[Any] = []
        self.finalized = False
        self.version = (
            0  # moves when what exists changes (sizes turn out to be equal); new ops change nothing that was prepared
        )

    # ------------------------------------------------------------------------------------------------------ names
    def unique_name(self, name: str, mark_as_used: bool = True) -> str:
        """`name` in the current scope, with _1, _2, ... when it is taken (letter case does not tell names apart)."""
        full = self._scope + name
        key = full.lower()
        count = self._names.get(key, 0)
        if mark_as_used:
            self._names[key] = count + 1
        if not count:
            return full
        while True:
            candidate = f"{full}_{count}"
            count += 1
            if candidate.lower() not in self._names:
                break
        if mark_as_used:
            self._names[key] = count
            self._names[candidate.lower()] = 1
        return candidate

    @contextmanager
    def name_scope(self, name: str | None) -> Iterator[str]:
        """Names made inside begin with `name/`; one that ends in '/' is taken as it is."""
        before = self._scope
        if not name:
            self._scope = ""
        elif name.endswith("/"):
            self._scope = name
        else:
            self._scope = self.unique_name(name) + "/"
        try:
            yield self._scope
        finally:
            self._scope = before

    def operation(self, type: str, name: str | None, inputs: Iterable[Any] = ()) -> Operation:
        """A new operation under a unique name."""
        if self.finalized:
            raise InvalidArgumentError("the graph is finalized and cannot be changed")
        if name is not None and name.endswith("/"):
            full = name[:-1]
        else:
            full = self.unique_name(name or type)
        op = Operation(self, full, type, inputs, self._waiting())
        if self._devices:
            op.device = innermost(self._devices, op).to_string()
        self.operations[full] = op
        return op

    def get_operations(self) -> list[Operation]:
        return list(self.operations.values())

    def get_operation_by_name(self, name: str) -> Operation:
        """The operation of that name. Raises NotFoundError."""
        found = self.operations.get(name)
        if found is None:
            raise NotFoundError(f"the graph has no operation {name!r}{self._close_names(name)}")
        return found

    def get_tensor_by_name(self, name: str) -> Any:
        """The tensor 'operation:number'. Raises NotFoundError."""
        op_name, colon, number = name.partition(":")
        if not colon or not number.isdigit():
            raise InvalidArgumentError(f"a tensor's name is 'operation:number', such as 'loss:0', not {name!r}")
        outputs = self.get_operation_by_name(op_name).outputs
        if int(number) >= len(outputs):
            raise NotFoundError(f"operation {op_name!r} has {len(outputs)} outputs, so there is no {name!r}")
        return outputs[int(number)]

    def as_graph_element(self, obj: Any, allow_tensor: bool = True, allow_operation: bool = True) -> Any:
        """The tensor or operation that `obj` is or names."""
        if isinstance(obj, str):
            return self.get_tensor_by_name(obj) if ":" in obj else self.get_operation_by_name(obj)
        return obj

    def _close_names(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.operations, 3)
        return f"; did you mean {', '.join(map(repr, near))}?" if near else "; see graph.get_operations()"

    def session_for(self, session: Any, name: str) -> Any:
        """The session given, or the default one, in which `name` is to run."""
        found = session if session is not None else Graph.default_session()
        if found is None:
            raise InvalidArgumentError(
                f"{name!r} has no Session to run in: use it inside `with tf.Session():`, or pass session=..."
            )
        return found

    # ------------------------------------------------------------------------------------------------ collections
    def add_to_collection(self, name: str, value: Any) -> None:
        self.collections.setdefault(name, []).append(value)

    def get_collection(self, name: str, scope: str | None = None) -> list[Any]:
        """What was added under that name, of those whose name begins with `scope`."""
        found = self.collections.get(name, [])
        return [v for v in found if not scope or getattr(v, "name", "").startswith(scope)]

    def get_collection_ref(self, name: str) -> list[Any]:
        return self.collections.setdefault(name, [])

    def finalize(self) -> None:
        """Refuses further changes."""
        self.finalized = True

    @contextmanager
    def as_default(self) -> Iterator[Graph]:
        """Ops made inside go to this graph."""
        _stack.graphs.append(self)
        try:
            yield self
        finally:
            _stack.graphs.pop()

    # ------------------------------------------------------------------------------------------------ control
    @contextmanager
    def control_dependencies(self, control_inputs: Iterable[Any] | None) -> Iterator[None]:
        """What is made inside runs only together with, and after, these operations and tensors; None forgets all outer ones."""
        control, known = self._control, self._known
        if control_inputs is None:
            self._control = []
        else:
            self._control = [*control, tuple([self._as_operation(c) for c in control_inputs])]
        self._known = [*known, {}]
        try:
            yield
        finally:
            self._control, self._known = control, known

    @contextmanager
    def device(self, device_name_or_function: Any) -> Iterator[None]:
        """What is made inside is to run there: '/gpu:0', '/cpu:0', a function of the operation that gives such a name, or None, which forgets the
        scopes around."""
        scope = scope_of(device_name_or_function)
        before = self._devices
        self._devices = [*before, scope]
        try:
            yield
        finally:
            self._devices = before

    def place(self, thing: Any, operation: Any) -> None:
        """Notes what the scopes around say of an item, state or source (None: something in a branch)."""
        spec = innermost(self._devices, operation)
        operation.device = spec.to_string()
        if spec.device_type is None:
            return
        place = Place(operation.name or operation.type, spec, user_location())
        if thing is not None:
            self.places[thing] = place
        elif spec.gpu is not None:
            self._inner_place = self._inner_place or place

    def forget_branches(self) -> None:
        """A branch under construction came to nothing."""
        self._inner_place = None

    def places_of(self, needed: Any, targets: Iterable[Any]) -> list[Place]:
        """What scopes have placed of what a run needs (a `lowering.Needed`) for `targets`: sources, variables, and items in program order."""
        if not self.places:
            return []
        states = [t._state for t in targets if getattr(t, "_state", None) is not None]
        items = [t for i in self.items if i in needed.items for t in (getattr(i, "state", None), i)]
        return [self.places[t] for t in dict.fromkeys([*needed.sources, *states, *items]) if t in self.places]

    def _waiting(self) -> tuple[Operation, ...]:
        return tuple(dict.fromkeys(op for group in self._control for op in group))

    def _as_operation(self, element: Any) -> Operation:
        found = self.as_graph_element(element)
        op = found if isinstance(found, Operation) else getattr(found, "op", None)
        if not isinstance(op, Operation):
            raise InvalidArgumentError(f"a control dependency is an operation or a tensor of a graph, not {element!r}")
        if op.graph is not self:
            raise InvalidArgumentError(f"control dependency {op.name!r} belongs to another graph")
        return op

    def _placed(self, item: Any) -> None:
        """Takes an item of the root frame into program order."""
        self.items.append(item)
        if self._devices and not isinstance(item, Read):
            name = item.definition.name if isinstance(item, Op) else type(item).__name__
            self.place(item, Unnamed(name))
        if self._inner_place is not None and self.frame is self.root and _holds_functions(item):
            self.places[item], self._inner_place = self._inner_place, None
        if self._control and self.frame is self.root:  # a branch waits as a whole
            self.waits[item] = self._waiting()

    # ------------------------------------------------------------------------------------------------ values
    def source(self, source: Source, type: TensorType) -> Value:
        """A new value from outside, seen from the current frame."""
        value = self.root.parameter(type, source.name)
        self.sources[value] = source
        return self.frame.resolve(value)

    def constant(self, array: np.ndarray, name: str = "") -> Value:
        """A captured array."""
        array = np.array(array, order="C")
        return self.source(Constant(array, name), TensorType(as_dtype(array.dtype), array.shape))

    def share(self, tensor: EagerTensor) -> State:
        """The state that is this eager tensor."""
        if tensor is default_generator.cell and self.seed is not None:
            return self.seeded(None)
        found = self.shared.get(id(tensor))
        if found is None:
            if tensor.requires_grad and not tensor.is_leaf:
                raise InvalidArgumentError(
                    f"an eager tensor {tensor._type} that was computed from tensors that require grad entered the graph, where its "
                    "gradient would be lost; compute it from graph tensors (tf.convert_to_tensor(parameter)), or detach() it"
                )
            names = {True: "parameter", False: "tensor"}
            name = f"{names[tensor.requires_grad]}_{len(self.shared)}"
            if tensor is default_generator.cell:
                name = "generator"
            found = self.shared[id(tensor)] = SharedState(name, tensor, user_location())
            found.roams = tensor is default_generator.cell
        return found

    def seeded(self, seed: int | None) -> SeededState:
        """A generator started by the graph's seed (shared by all ops without one of their own), or by an op's."""
        if seed is None:
            if self._seeded is None:
                assert self.seed is not None
                self._seeded = SeededState("generator", self.seed)
            return self._seeded
        mixed = seed if self.seed is None else seed ^ (self.seed * 0x9E3779B97F4A7C15)
        return SeededState(f"generator_{next(self._seeds)}", mixed)

    def read(self, state: State) -> Value:
        """The state's value at this point, in the current frame."""
        frame: Frame | None = self.frame
        while frame is not None and frame.parent is not None:
            if state in frame.current:
                return self.frame.resolve(frame.current[state])
            frame = frame.parent
        known = self._known[-1] if self.frame is self.root else self.branch_reads
        value = known.get(state)
        if value is None:
            value = self.root.parameter(state.type, state.name)
            read = self.reads[value] = Read(state, value)
            self._placed(read)
            known[state] = value
        return self.frame.resolve(value)

    def assign(self, state: State, value: Value, after: Op | None = None) -> Value:
        """Writes the state; the result is `value` as a value of its own, whose use entails the write. With `after`, the write
        happens whenever that op runs."""
        frame = self.frame
        with frame:
            if after is None:
                value = movement.reshape(value, shape=value.type.shape)
        if frame.parent is not None:
            frame.current[state] = value
            return value
        item = Assign(state, value)
        self._placed(item)
        for known in self._known:
            known.pop(state, None)
        self.follows.setdefault(after or value.op, []).append(item)  # type: ignore[arg-type]
        return value

    def value_of(self, tensor: Any) -> Value:
        """The SSA value, in the current frame, of a tensor of this graph or of eager mode."""
        if isinstance(tensor, EagerTensor):
            return self.read(self.share(tensor))
        if tensor.graph is not self:
            raise InvalidArgumentError(
                f"tensor {tensor.name!r} belongs to another graph than the op's other operands; build both under one `with "
                "graph.as_default():`"
            )
        state = getattr(tensor, "_state", None)
        return self.frame.resolve(tensor._value) if state is None else self.read(state)

    def wrap(self, value: Value) -> Any:
        return self.tensor_class(self, value)

    def apply(self, body: Callable[..., Any], tensors: tuple, attrs: tuple = (), type: str = "") -> Any:
        """`body(*values, *attrs)` as nodes of the graph; Python numbers among `tensors` become run-time scalars."""
        if self.finalized:
            raise InvalidArgumentError("the graph is finalized and cannot be changed")
        frame = self.frame
        frame.loc = loc = user_location()
        attrs = plain(attrs)
        if self._renamed and has_size(attrs):
            attrs = sized(attrs, {n: self.size(Dim.symbol(n)) for n in self._renamed})  # type: ignore[assignment]
        kinds = tuple([self._kind(t) for t in tensors])
        dtypes = iter(scalar_types(tuple([k.type if k.__class__ is Value else k for k in kinds])))
        start, first = len(frame.ops), len(self.items)
        operands = [k if k.__class__ is Value else self._number(t, next(dtypes)) for k, t in zip(kinds, tensors)]
        try:
            with frame:
                out = distinct(body(*operands, *attrs), operands)
        except ShapeError as error:
            self._undo(frame, start, first)
            sizes = self._fitting_sizes(body, operands, attrs)
            if sizes is None:
                raise explained(error, body, tuple([v.type for v in operands])) from None
            self.set_sizes(sizes)
            self.fixed_sizes += [(d, loc) for d in sizes.values() if isinstance(d, int)]
            with frame:
                out = distinct(body(*operands, *sized(attrs, sizes)), operands)  # type: ignore[misc]
        except DuoError as error:
            self._undo(frame, start, first)
            raise explained(error, body, tuple([v.type for v in operands])) from None
        except BaseException:
            self._undo(frame, start, first)
            raise
        finally:
            frame.loc = None
        results = [self.wrap(v) for v in (out if isinstance(out, (tuple, list)) else (out,))]
        made = tuple(frame.ops[start:])
        for r in results:
            r._made = made
        if not self._quiet:
            self.name_results(type or body.__name__.strip("_"), None, results, tensors)
            results[0].op.loc = loc
        return tuple(results) if isinstance(out, (tuple, list)) else results[0]

    def _kind(self, operand: Any) -> Any:
        """The Value of a tensor; the class of a number."""
        if isinstance(operand, symbolic.Number):
            return operand.kind
        return operand.__class__ if operand.__class__ in (float, int, bool) else self.value_of(operand)

    def _number(self, number: Any, dtype: DType) -> Value:
        """A number beside tensors, in the dtype that it takes there."""
        if not isinstance(number, symbolic.Number):
            return self.source(Number(number), TensorType(dtype))
        with self.frame:
            return nd.cast_to(symbolic.value_of(number, self.size), dtype)

    def _undo(self, frame: Frame, start: int, first: int) -> None:
        del frame.ops[start:]
        if frame.parent is None:
            del self.items[first:]

    def name_results(
        self, type: str, name: str | None, results: Sequence[Any], inputs: Iterable[Any] = ()
    ) -> Operation:
        """An operation with these tensors as outputs."""
        op = self.operation(type, name, [t for t in inputs if getattr(t, "graph", None) is self])
        for i, r in enumerate(results):
            r._op, r._index = op, i
            op.outputs.append(r)
            if op.device:
                self._name_places(r, op)
        return op

    def _name_places(self, result: Any, op: Operation) -> None:
        """What stands behind a result of a placed operation has its name."""
        if result._value in self.sources:
            self.place(result._value, op)
        for item in result._made:
            place = self.places.get(item)
            if place is not None:
                self.places[item] = replace(place, name=op.name)

    def update(self, state: State, new: Any) -> None:
        """The state takes the value of the graph tensor `new` whenever an op that was made together with it runs."""
        made = new._made
        value = self.frame.resolve(new._value)
        if self.frame.parent is not None:
            self.frame.current[state] = value
            return
        self.assign(state, value, after=value.op)
        item = self.items[-1]
        assert isinstance(item, Assign)
        for op in made:
            if op is not value.op:
                self.follows.setdefault(op, []).append(item)

    # ------------------------------------------------------------------------------------------------ sizes
    def new_size(self, name: str | None = None) -> Dim:
        """A size not known yet; equal names given by the user are equal sizes."""
        return Dim.symbol(name if name is not None else f"n{next(self._sizes)}")

    def _fitting_sizes(
        self, body: Callable[..., Any], operands: Sequence[Value], attrs: tuple
    ) -> dict[str, DimLike] | None:
        """Which unknown sizes must be one for the body to accept its operands."""
        shapes = [v.type.shape for v in operands]
        for sizes in _guesses(shapes):
            scratch = Builder()
            try:
                with scratch:
                    values = [scratch.parameter(sized_type(v.type, sizes)) for v in operands]
                    body(*values, *sized(attrs, sizes))  # type: ignore[misc]
            except DuoError:
                continue
            return sizes
        return None

    def set_sizes(self, sizes: Mapping[str, DimLike]) -> None:
        """Declares what unknown sizes are: other sizes, or ints. All types of the graph follow."""
        frame: Frame | None = self.frame
        while frame is not None:
            for op in frame.ops:
                for r in op.results:
                    if r.type.names:
                        r.type = sized_type(r.type, sizes)
                op.attrs = {k: sized(v, sizes) for k, v in op.attrs.items()}
            for p in frame.params:
                if p.type.names:
                    p.type = sized_type(p.type, sizes)
            frame = frame.parent
        self._renamed.update(sizes)
        self.version += 1

    def size(self, size: DimLike) -> DimLike:
        """A size noted earlier, as it is known now."""
        while isinstance(size, Dim) and any(n in self._renamed for n in size.names):
            size = substitute(size, self._renamed)
        return size


def _holds_functions(item: Any) -> bool:
    return isinstance(item, Op) and any(isinstance(v, Function) for v in item.attrs.values())


_MOST_GUESSES = 3000  # bodies take some 0.1 ms each; only what will be refused comes that far


def _guesses(shapes: Sequence[tuple[DimLike, ...]]) -> Iterator[dict[str, DimLike]]:
    """Ways to make unknown sizes equal, to each other or to known ones: one equation, then two, then three; all that stand at one place from
    the right, from the left; then all. The fewest come first, as what is equal here without need refuses feeds later."""
    names = list(dict.fromkeys(n for s in shapes for d in s if isinstance(d, Dim) for n in d.names))
    known = list(dict.fromkeys(d for s in shapes for d in s if isinstance(d, int) and d != 1))
    equations: list[tuple[str, str | int]] = [(b, a) for a, b in itertools.combinations(names, 2)]
    equations += [(n, d) for n in names for d in known]
    chosen = itertools.chain.from_iterable(itertools.combinations(equations, count) for count in (1, 2, 3))
    for some in itertools.islice(chosen, _MOST_GUESSES):
        sizes = _solved(some)
        if len(sizes) == len(some):  # else equations that say the same, or that contradict each other
            yield sizes
    for from_right in (True, False):
        placed: list[tuple[str, str | int]] = []
        for place in range(max(map(len, shapes), default=0)):
            row = [s[-1 - place] if from_right else s[place] for s in shapes if place < len(s)]
            same: list[str | int] = [d.names[0] for d in row if isinstance(d, Dim) and len(d.names) == 1]
            to = [d for d in row if isinstance(d, int) and d != 1] + same
            placed += [(n, to[0]) for n in same if isinstance(n, str) and n != to[0]]
        if placed:
            yield _solved(placed)
    if len(names) > 2:
        yield _solved([(n, names[0]) for n in names[1:]])


def _solved(equations: Iterable[tuple[str, str | int]]) -> dict[str, DimLike]:
    """What names are by these equations: a number, or the name that stands for all that are equal; empty where two numbers would be one."""
    sizes: dict[str, DimLike] = {}
    for left, right in equations:
        a, b = (sizes.get(x, Dim.symbol(x)) if isinstance(x, str) else x for x in (left, right))
        if a == b:
            continue
        if not isinstance(a, Dim):
            a, b = b, a
        if not isinstance(a, Dim):
            return {}
        sizes = {n: b if d == a else d for n, d in sizes.items()}
        sizes[a.names[0]] = b
    return sizes


class _Graphs(threading.local):
    def __init__(self) -> None:
        self.graphs: list[Graph] = []


_stack = _Graphs()
_default = [Graph()]


def get_default_graph() -> Graph:
    """The graph that ops go to: that of the innermost `as_default()`, else the process's."""
    return _stack.graphs[-1] if _stack.graphs else _default[0]


def reset_default_graph() -> None:
    """Starts a new default graph."""
    if _stack.graphs:
        raise InvalidArgumentError("reset_default_graph inside `with graph.as_default():`; leave it first")
    _default[0] = Graph()


def graph_of(tensors: Iterable[Any]) -> Graph:
    """The graph of the first graph tensor, else the default one."""
    for t in tensors:
        graph = getattr(t, "graph", None)
        if isinstance(graph, Graph):
            return graph
    return get_default_graph()


def located(loc: Loc | None) -> str:
    """' (file:line)' for messages."""
    return f" ({loc.full()})" if loc is not None else ""
