"""Session: runs parts of a graph and keeps its variables' values.

A run is prepared once for its fetches, the tensors it feeds and their shapes: pruned, lowered, compiled. After that it costs a look-up, reading
the inputs, the program, and writing results and states back.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from duo import numeric_mode, runtime
from duo.devices import CPU
from duo.eager.tensor import EagerTensor, material
from duo.eager.trace import Val, settle
from duo.eager.trace import state as recording
from duo.graph.config import ConfigProto
from duo.graph.errors import FailedPreconditionError, InvalidArgumentError
from duo.graph.graph import Graph, get_default_graph, located
from duo.graph.in_place import quicken
from duo.graph.items import Assign, Deferred, Operation, Read
from duo.graph.lowering import Needed, deferred_of, lowered, sizes_of
from duo.graph.states import Constant, Live, Number, SeededState, SharedState, State, number_of
from duo.graph.tensor import GraphElement, array_of
from duo_ir.errors import DeviceError, DuoError, ShapeError
from duo_ir.transforms.rewrite import without_unread
from duo_ir.types import TensorType

STRICT = "strict"
MAX_CALLS = 512  # sets of fetches and feeds that a session remembers


class Program:
    """One compiled run: where its inputs come from, and where its results go. `device`: where it runs, and its variables live."""

    def __init__(
        self,
        session: Session,
        call: Call,
        shapes: Sequence[tuple[int, ...]],
        variants: dict[Deferred, tuple],
        numerics: str,
    ) -> None:
        self.device = session.device_of(call)
        sizes = sizes_of(session.graph, call.feeds, shapes)
        low = lowered(session.graph, call.targets, [f._value for f in call.feeds], sizes, variants)
        function, kept = without_unread(low.function)  # a state that is only written needs no value
        self.function, self.states = function, low.states
        self.fed = [i for i in kept if i < len(call.feeds)]  # the feeds that are read
        self.template: list[Any] = [None] * len(function.params)
        self.owned: list[tuple[int, State]] = []
        self.cells: list[tuple[int, SharedState]] = []
        live: dict[Callable[[], tuple], list[tuple[int, int]]] = {}
        scalars = []
        for i, origin in enumerate([low.origins[k] for k in kept]):
            if isinstance(origin, Number):
                scalars.append(i)
                self.template[i] = number_of(origin.value, function.params[i].type.dtype)
            elif isinstance(origin, Live):
                scalars.append(i)
                live.setdefault(origin.read, []).append((i, origin.index))
            elif isinstance(origin, Constant):
                self.template[i] = runtime.moved(origin.buffer, function.params[i].type, self.device)
            elif isinstance(origin, State):
                cell = session.cell(origin)
                if cell is not None:
                    self.cells.append((i, cell))
                else:
                    self.owned.append((i, origin))
        self.live = list(live.items())
        self.quick: Any = None  # of in_place.py, once every variable has a value; False: there is none
        self.executable = runtime.runnable(function, True, scalars, self.device, numerics)
        self._plan_results(session, low.fetched)

    def _plan_results(self, session: Session, fetched: int) -> None:
        """A fetched value that is also an input or the next value of a state is copied, so that nobody else sees it change."""
        results = self.function.results
        params, after = set(self.function.params), set(results[fetched:])
        self.fetched: list[tuple[TensorType, bool]] = []
        for k, r in enumerate(results[:fetched]):
            self.fetched.append((r.type, r in params or r in after or r in results[:k]))
        self.writes: list[tuple[int, State, SharedState | None, TensorType, bool]] = []
        for k, state in enumerate(self.states):
            r = results[fetched + k]
            shared = r in params or r in results[: fetched + k]
            self.writes.append((fetched + k, state, session.cell(state), r.type, shared))
        # On a GPU, variables that nobody else sees are overwritten; on the CPU in_place.py sees to that.
        number = {state: i for i, state in self.owned}
        mine = [(k, number[s]) for k, s, cell, _, shared in self.writes if cell is None and not shared and s in number]
        self.updates = mine if self.device is not CPU and hasattr(self.executable, "begin") else []
        self.given = frozenset([i for _, i in self.updates])


class Call:
    """What is fetched and fed: `targets` without repetition, `shape(values)` puts fetched values into the user's structure."""

    def __init__(self, session: Session, fetches: Any, feed_dict: Mapping | None) -> None:
        graph = session.graph
        self.keep = (fetches, tuple(feed_dict) if feed_dict else ())  # so that their ids stay theirs
        self.cacheable = True
        numbers: dict[Any, int] = {}
        self.targets: list[Any] = []
        count = 0

        def visit(x: Any) -> Callable[[list], Any]:
            nonlocal count
            if isinstance(x, Mapping):
                self.cacheable = False
                made = {k: visit(v) for k, v in x.items()}
                return lambda values: {k: f(values) for k, f in made.items()}
            if isinstance(x, (list, tuple)):
                parts = [visit(v) for v in x]
                kind = x.__class__
                if hasattr(kind, "_fields"):
                    return lambda values: kind(*[f(values) for f in parts])
                if kind is tuple:
                    return lambda values: tuple([f(values) for f in parts])
                return lambda values: [f(values) for f in parts]
            element = session.element(x)
            if isinstance(element, Operation):
                if id(element) not in numbers:
                    numbers[id(element)] = -1
                    self.targets.append(element)
                return lambda values: None
            if id(element) not in numbers:
                numbers[id(element)] = count
                count += 1
                self.targets.append(element)
            k = numbers[id(element)]
            return lambda values: values[k]

        self.shape = visit(fetches)
        if isinstance(fetches, (list, tuple)) and any(isinstance(f, (list, tuple, Mapping)) for f in fetches):
            self.cacheable = False
        self.single = isinstance(session.element(fetches), GraphElement) if not _is_nest(fetches) else False
        self.flat_list = isinstance(fetches, list) and self.cacheable and count == len(fetches)
        self.feeds: list[Any] = []
        for key in feed_dict or ():
            element = session.element(key)
            if getattr(element, "_value", None) is None:
                raise InvalidArgumentError(
                    f"{element!r} cannot be fed; feed placeholders and results of ops (a variable: variable.load(value, session))"
                )
            self.feeds.append(element)
        self.dtypes = [f.dtype.numpy for f in self.feeds]
        needed = Needed(graph, self.targets, [f._value for f in self.feeds])
        self.deferred = deferred_of(needed)
        self.writes = any(isinstance(item, (Assign, Deferred)) for item in needed.items)
        self.places = graph.places_of(needed, self.targets)
        # a run that only looks at variables takes place where they are
        self.looks = [] if any(not isinstance(i, Read) for i in needed.items) else [
            t._state for t in self.targets if getattr(t, "_state", None) is not None
        ]  # fmt: skip
        self.version = graph.version
        self.programs: dict[Any, Program] = {}
        self.on_gpu = any(p.spec.gpu is not None for p in self.places)
        self.recent: Program | None = None
        self.recent_numerics = STRICT
        self.recent_shapes: list[tuple[int, ...]] = []


def _is_nest(x: Any) -> bool:
    return isinstance(x, (list, tuple, Mapping))


class Session:
    """Runs a graph (the default one unless given). A context manager: inside `with`, it is what `.eval()` and `.run()` use."""

    def __init__(self, target: str = "", graph: Graph | None = None, config: ConfigProto | None = None) -> None:
        self.graph = graph if graph is not None else get_default_graph()
        self.config = config if config is not None else ConfigProto()
        self._values: dict[
            State, EagerTensor
        ] = {}  # of variables and seeded generators, as tensors that nobody else sees
        self._exposed: dict[State, SharedState] = {}  # variables that eager mode sees as tensors
        self._calls: dict[Any, Call] = {}
        self._structures: dict[Any, Call] = {}
        self._closed = False
        self._lock = threading.RLock()
        _sessions.add(self)

    # ------------------------------------------------------------------------------------------------ running
    def run(self, fetches: Any, feed_dict: Mapping | None = None, options: Any = None, run_metadata: Any = None) -> Any:
        """The values of `fetches`, in their structure (any nest of lists, tuples and dicts; None for operations).

        Tensors, variables and operations may be given by name ("loss:0", "train"). feed_dict: tensor or name -> array. Values are NumPy
        arrays, 0-d ones NumPy scalars. A variable that is fetched has the value it has at the end of the run.
        """
        if recording.capture is not None:
            recording.capture.impure("a Session ran a graph")
        kind = fetches.__class__
        ids = tuple(map(id, fetches)) if kind is list or kind is tuple else id(fetches)
        key = (kind, ids, tuple(map(id, feed_dict)) if feed_dict else None)
        call = self._calls.get(key)
        if call is None or call.version != self.graph.version:
            call = self._call(key, fetches, feed_dict)
        if self._closed:
            raise FailedPreconditionError("this Session has been closed; open another one")
        fed: list[np.ndarray] = []
        shapes: list[tuple[int, ...]] = []
        if feed_dict:
            for value, dtype in zip(feed_dict.values(), call.dtypes):
                if value.__class__ is not np.ndarray or value.dtype != dtype or not value.flags.carray:
                    value = self._fed(call.feeds[len(fed)], value)
                fed.append(value)
                shapes.append(value.shape)
        if call.writes:
            with self._lock:  # reading, computing and writing a state is one step to other threads
                values = self._compute(call, shapes, fed)
        else:
            values = self._compute(call, shapes, fed)
        if call.single:
            return values[0]
        return values if call.flat_list else call.shape(values)

    def _compute(self, call: Call, shapes: list[tuple[int, ...]], fed: list[np.ndarray]) -> list[Any]:
        """Finds or prepares the program, and runs it; gives what is fetched."""
        numerics = numeric_mode.current() if call.on_gpu else STRICT
        if not call.deferred:
            recent = call.recent_shapes == shapes and call.recent_numerics == numerics
            program = call.recent if recent else call.programs.get((tuple(shapes), (), numerics))
            if program is None:
                program = self._program(call, shapes, {}, numerics)
            return self._execute(program, fed)
        variants = {d: d.variant() for d in call.deferred}
        try:
            program = call.programs.get((tuple(shapes), tuple(variants.values()), numerics))
            if program is None:
                program = self._program(call, shapes, variants, numerics)
            return self._execute(program, fed)
        except BaseException:
            for d, variant in variants.items():
                d.cancel(variant)
            raise

    def _execute(self, program: Program, fed: list[np.ndarray]) -> list[Any]:
        """Runs the program on fed arrays and its other inputs; writes states back; gives what is fetched."""
        quick = program.quick
        if quick is None and all(state in self._values for _, state in program.owned):
            quick = program.quick = quicken(self, program) or False
        if quick and recording.capture is None:
            found: list[Any] | None = quick(fed)
            if found is not None:
                return found
        inputs = program.template.copy()
        device = program.device
        for i, k in enumerate(program.fed):
            inputs[i] = runtime.from_numpy(fed[k], False, device)
        for i, state in program.owned:
            inputs[i] = self._buffer(state, device)
        for i, shared_cell in program.cells:
            inputs[i] = shared_cell.load(device)
        for read, places in program.live:
            numbers = read()
            for i, k in places:
                inputs[i] = numbers[k]
        if not program.given:
            return self._land(program, program.executable.run(inputs))
        # Variables that the run assigns give their memory to the new values. An interrupt may come between the two.
        call = program.executable.begin(inputs, program.given, program.updates)
        values: list[Any] = []
        try:
            call.run()
        finally:
            if call.done:
                values = self._land(program, call.results)
        call.close()
        return values

    def _buffer(self, state: State, device: str) -> Any:
        """The value of a state of this Session, which lives on that device from now on."""
        found = self._values.get(state)
        tensor = found if found is not None else self._first(state)
        buffer = settle(tensor._val)
        if tensor._val.info.device is not device:
            buffer = runtime.moved(buffer, state.type, device)
            tensor._val = material(buffer, state.type)
        return buffer

    def _land(self, program: Program, outs: list[Any]) -> list[Any]:
        """Writes the states back that a run has assigned; gives what is fetched."""
        for k, state, cell, type_, shared in program.writes:
            buffer = runtime.copied(outs[k], type_) if shared else outs[k]
            if cell is None:
                self.set_value(state, material(buffer, type_))
            else:
                cell.store(buffer)
        values = []
        for (type_, copy), buffer in zip(program.fetched, outs):
            array = runtime.to_numpy(buffer, type_, copy)
            values.append(array if type_.shape else array[()])
        return values

    def set_value(self, state: State, val: Val) -> None:
        """Makes `val` the value of a state of this Session."""
        tensor = self._values.get(state)
        if tensor is None:
            self._values[state] = EagerTensor(val)
        else:
            tensor._val = val

    def _call(self, key: Any, fetches: Any, feed_dict: Mapping | None) -> Call:
        self._check_open()
        call = Call(self, fetches, feed_dict)
        if len(self._calls) >= MAX_CALLS:
            self._calls.clear()
        # A nest made anew for each run is found again by what is in it.
        same = (tuple(map(id, call.targets)), tuple(map(id, call.feeds)))
        twin = self._structures.get(same)
        if twin is not None and twin.version == call.version:
            call.programs = twin.programs
        else:
            if len(self._structures) >= MAX_CALLS:
                self._structures.clear()
            self._structures[same] = call
        if call.cacheable:
            self._calls[key] = call
        return call

    def _program(
        self, call: Call, shapes: list[tuple[int, ...]], variants: dict[Deferred, tuple], numerics: str
    ) -> Program:
        key = (tuple(shapes), tuple(variants.values()), numerics)
        with self._lock:
            program = call.programs.get(key)
            if program is None:
                program = call.programs[key] = Program(self, call, shapes, variants, numerics)
        call.recent, call.recent_shapes, call.recent_numerics = program, shapes, numerics
        return program

    def _fed(self, tensor: Any, value: Any) -> np.ndarray:
        """A fed value as a C-contiguous array of the tensor's dtype. Raises InvalidArgumentError when it cannot be one."""
        if isinstance(value, GraphElement):
            raise InvalidArgumentError(
                f"the value fed for {tensor.name!r} is a tensor of a graph, {value.name!r}; feed arrays (run it first)"
            )
        if isinstance(value, EagerTensor):
            value = value.detach().numpy()
        wanted = tensor.dtype.numpy
        try:
            array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else np.asarray(array_of(value))
        except DuoError as error:
            raise InvalidArgumentError(f"cannot feed {tensor.name!r}{located(tensor.op.loc)}: {error}") from None
        if array.dtype != wanted:
            if not _holds(array, wanted):
                raise InvalidArgumentError(
                    f"cannot feed an array of dtype {array.dtype} for {tensor.name!r}{located(tensor.op.loc)}, which is "
                    f"{tensor.dtype.name}; convert it with .astype({wanted.name!r})"
                )
            array = array.astype(wanted)
        array = np.ascontiguousarray(array).reshape(array.shape)
        return array if array.flags.carray else array.copy()

    def device_of(self, call: Call) -> str:
        """Where a run takes place: a GPU if anything of it is placed there and the Session's config has it, else the CPU. Raises
        InvalidArgumentError for a GPU that is not there, without allow_soft_placement."""
        device = CPU
        place = next((p for p in call.places if p.spec.gpu is not None), None)
        if place is not None:
            try:
                device = self.config.gpu(place.spec.gpu or 0)
            except DeviceError as error:
                if not self.config.allow_soft_placement:
                    raise InvalidArgumentError(
                        f"operation {place.name!r}{located(place.loc)} is placed on {place.spec.to_string()!r}, where it cannot run: "
                        f"{error}. To run it on the CPU instead, use tf.Session(config=tf.ConfigProto(allow_soft_placement=True))"
                    ) from None
        elif call.looks:
            found = [self._values[state]._val.info.device for state in call.looks if state in self._values]
            device = next((name for name in found if name is not CPU), CPU)
        if self.config.log_device_placement:
            for p in call.places:
                print(f"{p.name}: {p.spec.to_string()} runs on {device}", file=sys.stderr)
        return device

    # ------------------------------------------------------------------------------------------------ values
    def element(self, x: Any) -> Any:
        """The tensor, variable or operation of this graph that `x` is or names."""
        if isinstance(x, str):
            return self.graph.as_graph_element(x)
        if not isinstance(x, (GraphElement, Operation)):
            raise InvalidArgumentError(
                f"{x!r} ({type(x).__name__}) is neither a tensor nor an operation of a graph, nor the name of one; for an eager tensor "
                "use tf.convert_to_tensor"
            )
        if x.graph is not self.graph:
            raise InvalidArgumentError(
                f"{x.name!r}{located(x.op.loc if not isinstance(x, Operation) else x.loc)} belongs to another graph than this Session; "
                "open one with tf.Session(graph=...)"
            )
        return x

    def cell(self, state: State) -> SharedState | None:
        """The eager tensor that holds the state, if one does."""
        return state if isinstance(state, SharedState) else self._exposed.get(state)

    def _first(self, state: State) -> Any:
        if isinstance(state, SeededState):
            tensor = self._values[state] = EagerTensor(material(runtime.from_numpy(state.start()), state.type))
            return tensor
        raise FailedPreconditionError(
            f"variable {state.name!r}{located(state.loc)} has not been initialized in this Session; run "
            "tf.global_variables_initializer() first, or restore a checkpoint"
        )

    def load(self, variable: Any, value: Any) -> None:
        """Writes an array into a variable."""
        self._check_open()
        state = self.element(variable)._state
        array = array_of(value, state.type.dtype)
        if array.shape != state.type.shape:
            raise ShapeError(f"variable {state.name!r} is {state.type}, the value has shape {list(array.shape)}")
        self.put(state, np.ascontiguousarray(array))

    def put(self, state: State, array: np.ndarray) -> None:
        """The state's new value, an array of its type (a copy is taken)."""
        cell = self.cell(state)
        buffer = runtime.from_numpy(array)
        if cell is None:
            self.set_value(state, material(buffer, state.type))
        else:
            cell.store(buffer)

    def get(self, state: State) -> np.ndarray | None:
        """A copy of the state's value; None when it has none yet."""
        cell = self.cell(state)
        if cell is not None:
            return cell.tensor.detach()._array(share=False)
        tensor = self._values.get(state)
        return None if tensor is None else runtime.to_numpy(settle(tensor._val), state.type, copy=True)

    def is_initialized(self, variable: Any) -> bool:
        return self.cell(variable._state) is not None or variable._state in self._values

    def variable_tensor(self, variable: Any) -> EagerTensor:
        """The variable of this Session as an eager leaf tensor: the Session reads and writes it from here on, gradients of eager programs that
        use it collect in its `.grad`."""
        self._check_open()
        state = self.element(variable)._state
        cell = self._exposed.get(state)
        if cell is None:
            found = self._values.get(state)
            tensor = EagerTensor((found if found is not None else self._first(state))._val)
            if variable.trainable and state.type.dtype.is_float:
                tensor.requires_grad_()
            cell = self._exposed[state] = SharedState(state.name, tensor, state.loc)
            self._values.pop(state, None)
            self._forget()
        return cell.tensor

    def as_function(self, inputs: Sequence[Any], outputs: Any) -> Any:
        """`outputs` as a function of `inputs` on eager tensors: a layer of an eager model that uses this Session's variables."""
        return Session.function_maker(self, inputs, outputs)

    function_maker: ClassVar[Callable[..., Any]]  # set by function.py

    # ------------------------------------------------------------------------------------------------ its life
    def _check_open(self) -> None:
        if self._closed:
            raise FailedPreconditionError("this Session has been closed; open another one")

    def close(self) -> None:
        """Drops the variables' values; it cannot run afterwards."""
        self._closed = True
        self._values.clear()
        self._forget()

    def _forget(self) -> None:
        """Drops what was prepared: the next run prepares it again."""
        self._calls.clear()
        self._structures.clear()

    def __enter__(self) -> Session:
        self._check_open()
        _stack.sessions.append(self)
        self._default = self.graph.as_default()
        self._default.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._default.__exit__(*exc)
        _stack.sessions.remove(self)
        self.close()

    @contextmanager
    def as_default(self) -> Any:
        """Makes it the session of `.eval()` and `.run()`; it stays open afterwards."""
        _stack.sessions.append(self)
        try:
            with self.graph.as_default():
                yield self
        finally:
            _stack.sessions.remove(self)


class InteractiveSession(Session):
    """A Session that is the default one from its creation on."""

    def __init__(self, target: str = "", graph: Graph | None = None, config: ConfigProto | None = None) -> None:
        super().__init__(target, graph, config)
        _stack.sessions.append(self)

    def close(self) -> None:
        if self in _stack.sessions:
            _stack.sessions.remove(self)
        super().close()


def _holds(array: np.ndarray, wanted: np.dtype) -> bool:
    """Whether a feed of that dtype is taken: within a kind (float64 for float32, as TensorFlow does), ints for floats."""
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        return bool((array.astype(wanted).astype(array.dtype) == array).all())
    kinds = {"f": 2, "V": 2, "i": 1, "u": 1, "b": 0}
    have, want = kinds.get(array.dtype.kind, 9), kinds.get(wanted.kind, 9)
    return have == want or (have == 1 and want == 2)


class _Sessions(threading.local):
    def __init__(self) -> None:
        self.sessions: list[Session] = []


_stack = _Sessions()


def get_default_session() -> Session | None:
    """The session of the innermost `with`, or None."""
    return _stack.sessions[-1] if _stack.sessions else None


def _forget_programs() -> None:
    for session in list(_sessions):
        session._forget()


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
runtime.cache_listeners.append(_forget_programs)
Graph.default_session = staticmethod(get_default_session)
__all__ = ["InteractiveSession", "Session", "get_default_session"]
