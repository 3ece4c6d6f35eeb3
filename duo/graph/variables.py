"""Variables: `tf.Variable`, `get_variable` and variable scopes, assignment, initialisers' operations.

A Variable is a name and a type in the graph; its value belongs to a Session. Each use reads it at that point of the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from duo.eager.infer import user_location
from duo.functional import elementwise as elem
from duo.graph.errors import InvalidArgumentError
from duo.graph.graph import Graph, get_default_graph, located
from duo.graph.initializers import glorot_uniform_initializer, zeros_initializer
from duo.graph.items import Operation
from duo.graph.states import VariableState
from duo.graph.tensor import GraphElement, GraphTensor, array_of, convert_to_tensor, identity_of, named, quiet
from duo.tensor import Tensor
from duo_ir.errors import DTypeError, ShapeError
from duo_ir.types import Dim, TensorType, f32
from duo_ir.types import dtype as as_dtype


class GraphKeys:
    """Names of the collections that duo fills."""

    GLOBAL_VARIABLES = "variables"
    TRAINABLE_VARIABLES = "trainable_variables"
    LOCAL_VARIABLES = "local_variables"
    GLOBAL_STEP = "global_step"
    LOSSES = "losses"
    REGULARIZATION_LOSSES = "regularization_losses"
    UPDATE_OPS = "update_ops"
    TRAIN_OP = "train_op"
    SUMMARIES = "summaries"
    INIT_OP = "init_op"


class Variable(GraphElement):
    """A tensor that a Session keeps from run to run.

    initial_value: a number, an array, a graph tensor, or a function that makes one; it is computed by `initializer`."""

    __slots__ = ("_initial", "_operation", "_state", "graph", "initializer", "trainable")

    def __init__(
        self,
        initial_value: Any = None,
        trainable: bool = True,
        collections: Iterable[str] | None = None,
        validate_shape: bool = True,
        caching_device: Any = None,
        name: str | None = None,
        dtype: Any = None,
        **ignored: Any,
    ) -> None:
        if initial_value is None:
            raise InvalidArgumentError(
                "a Variable needs an initial_value; tf.get_variable takes a shape and an initializer"
            )
        graph = self.graph = get_default_graph()
        if graph.frame is not graph.root:
            raise InvalidArgumentError("a Variable is made outside tf.cond and tf.while_loop; move it before them")
        loc = user_location()
        op = self._operation = graph.operation("Variable", name)
        op.outputs.append(self)
        self.trainable = trainable
        with graph.name_scope(op.name + "/"), graph.control_dependencies(None):
            given = (
                initial_value() if callable(initial_value) and not isinstance(initial_value, Tensor) else initial_value
            )
            if not isinstance(given, Tensor):
                given = array_of(given, dtype)
            self._initial = convert_to_tensor(given, dtype, name="initial_value")
            kind = self._initial._type
            if any(isinstance(d, Dim) for d in kind.shape):
                raise ShapeError(f"variable {op.name!r} needs a known shape; its initial value is {kind}")
            self._state = VariableState(op.name, kind, loc)
            if op.device:
                graph.place(self._state, op)
            self.initializer = assign(self, self._initial, name="Assign").op
        wanted = [GraphKeys.GLOBAL_VARIABLES] if collections is None else list(collections)
        if trainable and GraphKeys.TRAINABLE_VARIABLES not in wanted:
            wanted.append(GraphKeys.TRAINABLE_VARIABLES)
        for key in wanted:
            graph.add_to_collection(key, self)

    @property
    def _type(self) -> TensorType:  # type: ignore[override]
        return self._state.type

    @property
    def op(self) -> Operation:
        return self._operation

    @property
    def name(self) -> str:
        return f"{self._operation.name}:0"

    @property
    def initial_value(self) -> Any:
        return self._initial

    def initialized_value(self) -> Any:
        """The initial value, for other variables to start from."""
        return self._initial

    def value(self) -> GraphTensor:
        """What it is at this point of the program."""
        return named(self.graph, "read", None, lambda: identity_of(self))

    read_value = value

    def assign(
        self, value: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True
    ) -> GraphTensor:
        """Gives it a new value; the result is that value, and computing it performs the assignment."""
        return assign(self, value, name=name)

    def assign_add(
        self, delta: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True
    ) -> GraphTensor:
        return assign_add(self, delta, name=name)

    def assign_sub(
        self, delta: Any, use_locking: bool = False, name: str | None = None, read_value: bool = True
    ) -> GraphTensor:
        return assign_sub(self, delta, name=name)

    def load(self, value: Any, session: Any = None) -> None:
        """Writes an array into the variable of a Session, outside the graph."""
        self.graph.session_for(session, self.name).load(self, value)

    def __hash__(self) -> int:
        return id(self) >> 4

    def __eq__(self, other: Any) -> Any:
        """With another variable, whether they are the same one (so that `v in list` works); else element by element."""
        return self is other if isinstance(other, Variable) else Tensor.__eq__(self, other)  # type: ignore[call-arg]

    def __ne__(self, other: Any) -> Any:
        return self is not other if isinstance(other, Variable) else Tensor.__ne__(self, other)  # type: ignore[call-arg]


Graph.variable_class = Variable


def assign(
    ref: Variable, value: Any, validate_shape: bool = True, use_locking: Any = None, name: str | None = None
) -> GraphTensor:
    """ref = value, when the result or what depends on it runs. Raises DTypeError and ShapeError when the types differ."""
    graph = ref.graph
    new = convert_to_tensor(value, like=ref)
    if new.dtype is not ref.dtype:
        raise DTypeError(
            f"assign: variable {ref.name!r} has dtype {ref.dtype.name}, the value {new.dtype.name}; use tf.cast"
        )
    if new._type.shape != ref._type.shape:
        known = {
            d.names[0]: n for d, n in zip(new._type.shape, ref._type.shape) if isinstance(d, Dim) and len(d.names) == 1
        }
        if known and len(new._type.shape) == len(ref._type.shape):
            graph.set_sizes(known)
    if new._type.shape != ref._type.shape:
        raise ShapeError(f"assign: variable {ref.name!r} is {ref._type}, the value is {new._type}")
    result = graph.wrap(graph.assign(ref._state, graph.value_of(new)))
    op = graph.name_results("Assign", name, [result], (ref, new))
    op.effects.append(result)
    return result


def assign_add(ref: Variable, value: Any, use_locking: Any = None, name: str | None = None) -> GraphTensor:
    """ref = ref + value."""
    with quiet(ref.graph):
        new = ref.graph.apply(elem._add, (ref, convert_to_tensor(value, like=ref)))
    return assign(ref, new, name=name or "AssignAdd")


def assign_sub(ref: Variable, value: Any, use_locking: Any = None, name: str | None = None) -> GraphTensor:
    """ref = ref - value."""
    with quiet(ref.graph):
        new = ref.graph.apply(elem._sub, (ref, convert_to_tensor(value, like=ref)))
    return assign(ref, new, name=name or "AssignSub")


def group(*inputs: Any, name: str | None = None) -> Operation:
    """An operation that runs all of these."""
    listed = [x for i in inputs for x in (i if isinstance(i, (list, tuple)) else (i,)) if x is not None]
    graph = listed[0].graph if listed else get_default_graph()
    with graph.control_dependencies(listed):
        return graph.operation("group_deps", name)


def no_op(name: str | None = None) -> Operation:
    """An operation that does nothing but wait for its control dependencies."""
    return get_default_graph().operation("NoOp", name)


def tuple_(tensors: Sequence[Any], name: str | None = None, control_inputs: Iterable[Any] = ()) -> list[Any]:
    """The tensors, each available only once all of them (and `control_inputs`) have been computed."""
    graph = get_default_graph()
    with graph.control_dependencies([*tensors, *control_inputs]):
        return [named(graph, "tuple", name, functools.partial(identity_of, t)) for t in tensors]


# ------------------------------------------------------------------------------------------------ collections
def _collection(key: str) -> Callable[..., list[Any]]:
    def members(scope: str | None = None) -> list[Any]:
        """What the collection holds, of those whose name begins with `scope`."""
        return get_default_graph().get_collection(key, scope)

    return members


global_variables = _collection(GraphKeys.GLOBAL_VARIABLES)
local_variables = _collection(GraphKeys.LOCAL_VARIABLES)
trainable_variables = _collection(GraphKeys.TRAINABLE_VARIABLES)
all_variables = global_variables


def add_to_collection(name: str, value: Any) -> None:
    get_default_graph().add_to_collection(name, value)


def get_collection(key: str, scope: str | None = None) -> list[Any]:
    return get_default_graph().get_collection(key, scope)


def variables_initializer(var_list: Iterable[Variable], name: str = "init") -> Operation:
    """An operation that gives each variable its initial value. Shared cells (module parameters, generators) are not touched."""
    return group(*[v.initializer for v in var_list], name=name)


def global_variables_initializer() -> Operation:
    return variables_initializer(global_variables())


def local_variables_initializer() -> Operation:
    return variables_initializer(local_variables())


initialize_all_variables = global_variables_initializer


# ------------------------------------------------------------------------------------------------ variable scopes
class _AutoReuse:
    def __repr__(self) -> str:
        return "tf.AUTO_REUSE"


AUTO_REUSE = _AutoReuse()


class VariableScope:
    """Where get_variable puts names, whether it reuses them, and its defaults."""

    def __init__(self, name: str, reuse: Any = False, initializer: Any = None, dtype: Any = f32) -> None:
        self.name, self.reuse, self.initializer, self.dtype = name, reuse, initializer, dtype

    def reuse_variables(self) -> None:
        """From here on get_variable gives variables that are there."""
        self.reuse = True

    @property
    def original_name_scope(self) -> str:
        return f"{self.name}/"


def get_variable_scope() -> VariableScope:
    scopes = get_default_graph().variable_scopes
    if not scopes:
        scopes.append(VariableScope(""))
    return scopes[-1]


@contextmanager
def variable_scope(
    name_or_scope: Any,
    default_name: str | None = None,
    values: Any = None,
    initializer: Any = None,
    regularizer: Any = None,
    reuse: Any = None,
    dtype: Any = None,
    auxiliary_name_scope: bool = True,
    **ignored: Any,
) -> Iterator[VariableScope]:
    """Variables made inside by get_variable are called `name/...`. reuse: True, False, None (as outside) or tf.AUTO_REUSE."""
    graph = get_default_graph()
    outer = get_variable_scope()
    if isinstance(name_or_scope, VariableScope):
        full, plain = name_or_scope.name, name_or_scope.name.rsplit("/", 1)[-1]
        base = name_or_scope
    else:
        if name_or_scope is None:
            if default_name is None:
                raise InvalidArgumentError("variable_scope needs a name or a default_name")
            name_or_scope = _free_scope(graph, outer, default_name)
        full = f"{outer.name}/{name_or_scope}" if outer.name else name_or_scope
        plain, base = name_or_scope, outer
    inner = VariableScope(
        full,
        base.reuse if reuse is None else reuse,
        base.initializer if initializer is None else initializer,
        base.dtype if dtype is None else as_dtype(dtype),
    )
    if outer.reuse is True and reuse is None:
        inner.reuse = True
    graph.variable_scopes.append(inner)
    try:
        if auxiliary_name_scope and plain:
            with graph.name_scope(plain):
                yield inner
        else:
            yield inner
    finally:
        graph.variable_scopes.pop()


def _free_scope(graph: Graph, outer: VariableScope, default: str) -> str:
    prefix = f"{outer.name}/" if outer.name else ""
    n, name = 0, default
    while any(v.startswith(f"{prefix}{name}/") for v in graph.variables):
        n += 1
        name = f"{default}_{n}"
    return name


def get_variable(
    name: str,
    shape: Any = None,
    dtype: Any = None,
    initializer: Any = None,
    regularizer: Callable[[Any], Any] | None = None,
    trainable: bool = True,
    collections: Iterable[str] | None = None,
    **ignored: Any,
) -> Variable:
    """The variable `scope/name`: made, or under `reuse` the one that is there. The default initializer is glorot_uniform (zeros for
    integers). Raises InvalidArgumentError when the scope's reuse says otherwise."""
    graph = get_default_graph()
    scope = get_variable_scope()
    full = f"{scope.name}/{name}" if scope.name else name
    found = graph.variables.get(full)
    if found is not None:
        if not scope.reuse:
            raise InvalidArgumentError(
                f"variable {full!r} exists already{located(found._state.loc)}; use reuse=True or reuse=tf.AUTO_REUSE in "
                "variable_scope to share it"
            )
        if shape is not None and tuple(_ints(shape)) != found._type.shape:
            raise ShapeError(f"variable {full!r} is {found._type}; get_variable asks for shape {list(_ints(shape))}")
        if dtype is not None and as_dtype(dtype) is not found.dtype:
            raise DTypeError(f"variable {full!r} has dtype {found.dtype.name}, not {as_dtype(dtype).name}")
        return found
    if scope.reuse is True:
        raise InvalidArgumentError(
            f"variable {full!r} does not exist, and the scope reuses variables; make it first, or use reuse=tf.AUTO_REUSE"
        )
    wanted = as_dtype(dtype) if dtype is not None else scope.dtype
    made = initializer if initializer is not None else scope.initializer
    if made is None:
        made = glorot_uniform_initializer() if wanted.is_float else zeros_initializer()
    if isinstance(made, type):
        made = made()
    if callable(made) and not isinstance(made, Tensor):
        if shape is None:
            raise ShapeError(f"get_variable({name!r}) needs a shape, as its initializer is a function of it")
        sizes = tuple(_ints(shape))
        initial: Any = functools.partial(made, sizes, wanted)
    elif isinstance(made, Tensor):
        initial = made
    else:
        initial = array_of(made, dtype if dtype is not None or isinstance(made, np.ndarray) else None)
        if shape is not None and initial.ndim == 0:
            initial = np.full(tuple(_ints(shape)), initial)
    before, graph._scope = graph._scope, ""
    try:
        variable = Variable(
            initial, trainable, collections, name=full, dtype=None if isinstance(made, Tensor) else dtype
        )
    finally:
        graph._scope = before
    graph.variables[full] = variable
    if regularizer is not None:
        graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, regularizer(variable))
    return variable


def _ints(shape: Any) -> list[int]:
    return [int(d) for d in (shape if isinstance(shape, (list, tuple)) else (shape,))]


__all__ = [
    "AUTO_REUSE", "GraphKeys", "Variable", "VariableScope", "add_to_collection", "all_variables", "assign",
    "assign_add", "assign_sub", "get_collection", "get_variable", "get_variable_scope", "global_variables",
    "global_variables_initializer", "group", "initialize_all_variables", "local_variables",
    "local_variables_initializer", "no_op", "trainable_variables", "variable_scope", "variables_initializer",
]  # fmt: skip
