"""GraphTensor: a value of a graph, which has a value only while a Session runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import numpy as np

from duo.dispatch import View
from duo.eager.tensor import EagerTensor
from duo.functional import creation
from duo.graph.errors import InvalidArgumentError, NoValueError
from duo.graph.graph import Graph, get_default_graph, graph_of
from duo.graph.items import Operation
from duo.symbolic import Number, plain, symbolic
from duo.tensor import Tensor
from duo_ir.core import Op, Value
from duo_ir.errors import DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import shape as movement
from duo_ir.types import Dim, DType, TensorType, bool_, f32, i32, shape_str
from duo_ir.types import dtype as as_dtype


class TensorShape(tuple):
    """A shape: a tuple whose unknown sizes are Dims; `as_list()` gives None for those."""

    __slots__ = ()

    def as_list(self) -> list[int | None]:
        return [None if isinstance(d, Dim) else d for d in self]

    @property
    def ndims(self) -> int:
        return len(self)

    rank = ndims
    dims = property(as_list)

    def is_fully_defined(self) -> bool:
        return not any(isinstance(d, Dim) for d in self)

    def num_elements(self) -> int | None:
        return int(np.prod(self)) if self.is_fully_defined() else None

    def __repr__(self) -> str:
        return f"({', '.join('?' if isinstance(d, Dim) else str(d) for d in self)}{',' * (len(self) == 1)})"


class GraphElement(Tensor):
    """What placeholders, results of ops and variables have in common. `graph` is the graph, `op` its operation."""

    __slots__ = ()
    _priority = 10
    _mutable = False
    graph: Graph
    _minimizer: ClassVar[Callable[[Any, Any], Any]]  # set by train.py: what `duo.optim`'s minimize(loss) calls

    # ------------------------------------------------------------------------------------------- ops and views
    @staticmethod
    def _apply(body: Callable, tensors: tuple, attrs: tuple) -> Any:
        return graph_of(tensors).apply(body, tensors, attrs)

    @staticmethod
    def _view(view: View, tensor: Any, attrs: tuple) -> Any:
        return tensor.graph.apply(view.read, (tensor,), attrs)

    @staticmethod
    def _update(state: EagerTensor, new: Any) -> None:
        """The eager tensor `state` takes the value of `new` when the graph runs."""
        graph = new.graph
        graph.update(graph.share(state), new)

    def _lift(self, array: Any) -> Any:
        array = np.asarray(array)
        return self.graph.wrap(self.graph.constant(array.astype(as_dtype(array.dtype).numpy)))

    @classmethod
    def _minimize(cls, optimizer: Any, loss: Any) -> Any:
        return GraphElement._minimizer(optimizer, loss)

    def _assign(self, new: Any) -> NoReturn:
        raise InvalidArgumentError(
            f"tensor {self.name!r} of a graph is not written in place; use the op that returns a new tensor, or a tf.Variable "
            "and its assign()"
        )

    def _no_value(self) -> NoReturn:
        raise NoValueError(
            f"tensor {self.name!r} of a graph has no value until a Session runs it: session.run(tensor) or tensor.eval(). For a "
            "decision in the program use tf.cond or tf.where"
        )

    def item(self) -> NoReturn:
        self._no_value()

    def numpy(self) -> NoReturn:
        self._no_value()

    def __bool__(self) -> bool:
        self._no_value()

    # ------------------------------------------------------------------------------------------- what it is
    @property
    def op(self) -> Operation:
        raise NotImplementedError

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def shape(self) -> Any:
        return TensorShape(map(symbolic, self._type.shape))

    def get_shape(self) -> TensorShape:
        return TensorShape(map(symbolic, self._type.shape))

    def set_shape(self, shape: Sequence[Any]) -> None:
        """Declares sizes that were unknown. Raises ShapeError where a known one differs."""
        mine = self._type.shape
        if len(mine) != len(shape):
            raise ShapeError(f"set_shape: {self.name!r} has {len(mine)} dims, not {len(shape)}")
        sizes = {}
        for have, want in zip(mine, shape):
            if want is None or have == want:
                continue
            if not isinstance(have, Dim) or len(have.terms) != 1 or have.terms[0][1] != 1 or len(have.terms[0][0]) != 1:
                raise ShapeError(f"set_shape: {self.name!r} has shape {shape_str(mine)}, which cannot be {list(shape)}")
            sizes[have.names[0]] = want
        self.graph.set_sizes(sizes)

    @property
    def device(self) -> str:
        """Where its operation is to run, as far as `tf.device` says: '/device:GPU:0', or ''."""
        return self.op.device

    @property
    def requires_grad(self) -> bool:
        """Every float of a graph can be differentiated."""
        return self._type.dtype.is_float

    def eval(self, feed_dict: Mapping | None = None, session: Any = None) -> Any:
        """Its value in the session given or the default one."""
        return self.graph.session_for(session, self.name).run(self, feed_dict)

    def __repr__(self) -> str:
        return f"<duo.graph.{type(self).__name__} {self.name!r} shape={self.shape!r} dtype={self.dtype.name}>"


class GraphTensor(GraphElement):
    """A value of the graph. `known`: its contents, if they are sizes or a constant that shapes may be made of."""

    __slots__ = ("_index", "_made", "_op", "_value", "graph", "known")

    def __init__(self, graph: Graph, value: Value) -> None:
        self.graph, self._value = graph, value
        self._op: Operation | None = None
        self._index = 0
        self._made: tuple[Op, ...] = ()
        self.known: Any = None

    @property
    def _type(self) -> TensorType:  # type: ignore[override]
        return self._value.type

    @property
    def op(self) -> Operation:
        if self._op is None:
            self.graph.name_results("tensor", None, [self])
        assert self._op is not None
        return self._op

    @property
    def value_index(self) -> int:
        return self._index

    @property
    def name(self) -> str:
        return f"{self.op.name}:{self._index}"

    def __getitem__(self, index: Any) -> Any:
        if self.known is not None and isinstance(index, (int, slice)) and isinstance(self.known, tuple):
            return sizes_tensor(self.graph, self.known[index], self.dtype)
        return Tensor.__getitem__(self, index)

    def __hash__(self) -> int:
        return id(self) >> 4

    __eq__ = Tensor.__eq__


Graph.tensor_class = GraphTensor
Number._apply = GraphElement._apply


# ----------------------------------------------------------------------------------------------- making tensors
@contextmanager
def quiet(graph: Graph) -> Any:
    """Ops made inside get no names; whoever asked for them names the result."""
    graph._quiet += 1
    try:
        yield
    finally:
        graph._quiet -= 1


def named(graph: Graph, type: str, name: str | None, make: Callable[[], Any], inputs: tuple = ()) -> Any:
    """What `make()` returns, a tensor or several, as the outputs of one operation of that type and name."""
    with quiet(graph):
        out = make()
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    fresh = []
    for r in results:
        if isinstance(r, GraphTensor) and r._op is None:
            fresh.append(r)
        else:
            copy = identity_of(r, graph)
            copy.known = getattr(r, "known", None)
            fresh.append(copy)
    graph.name_results(type, name, fresh, inputs)
    return out.__class__(fresh) if isinstance(out, (tuple, list)) else fresh[0]


def identity_of(x: Any, graph: Graph | None = None) -> GraphTensor:
    """A value of its own equal to x's, read here and now if x is a variable."""
    graph = graph or graph_of((x,))
    frame = graph.frame
    value = graph.value_of(x)
    with frame:
        return graph.wrap(movement.reshape(value, shape=value.type.shape))


def sizes_tensor(graph: Graph, known: Any, dtype: DType) -> GraphTensor:
    """A tensor of sizes (ints and Dims): `known` is one or a tuple of them."""
    out = graph.apply(
        _sizes, (), (known if isinstance(known, tuple) else (known,), isinstance(known, tuple), dtype), "Shape"
    )
    out.known = known
    return out


def _sizes(sizes: tuple, several: bool, dtype: DType) -> Value:
    parts = [nd.size_of(d, dtype) for d in sizes]
    if not several:
        return parts[0]
    if not parts:
        return nd.full((0,), 0, dtype)
    return movement.concat(*[nd.reshape(p, (1,)) for p in parts], axis=0)


def array_of(value: Any, dtype: Any = None) -> np.ndarray:
    """`value` as TensorFlow converts it: Python ints are int32, floats float32, arrays keep their dtype."""
    wanted = None if dtype is None else as_dtype(dtype)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ShapeError(f"the nested lists are ragged: {error}") from None
    if array.dtype == object or array.dtype.kind in "USO":
        raise DTypeError(f"cannot make a tensor of {value!r:.80}")
    if wanted is not None:
        if array.dtype.kind == "f" and wanted.is_integer and not isinstance(value, (np.ndarray, np.generic)):
            raise DTypeError(f"{value!r:.60} is not of dtype {wanted.name}; convert it or give a float dtype")
        return array.astype(wanted.numpy)
    if isinstance(value, (np.ndarray, np.generic)):
        return array.astype(as_dtype(array.dtype).numpy)
    if array.size == 0 and array.dtype == np.float64:
        return array.astype(np.float32)
    kinds = {"f": f32, "i": i32, "u": i32, "b": bool_}
    out = array.astype(kinds[array.dtype.kind].numpy)
    if out.dtype.kind == "i" and (out != array).any():
        return array.astype(np.int64)
    return out


def constant(value: Any, dtype: Any = None, shape: Sequence[int] | None = None, name: str = "Const") -> GraphTensor:
    """A tensor with this value (repeated to fill `shape`); it is an input of the compiled program, not part of it."""
    graph = get_default_graph()
    array = array_of(value, dtype)
    if shape is not None:
        array = np.broadcast_to(array, tuple(shape)) if array.size == 1 else array.reshape(tuple(shape))
    made = graph.wrap(graph.constant(array, name))
    if array.dtype.kind in "iu" and array.ndim <= 1 and array.size <= 64:
        made.known = tuple(array.tolist()) if array.ndim else array.item()
    graph.name_results("Const", name, [made])
    return made


def convert_to_tensor(value: Any, dtype: Any = None, name: str | None = None, like: Any = None) -> Any:
    """`value` as a tensor of the graph: tensors and variables as they are, eager tensors as what they hold when the graph
    runs, anything else as a constant (of `like`'s dtype, where that can hold it)."""
    if isinstance(value, GraphElement):
        if dtype is not None and value.dtype is not as_dtype(dtype):
            raise DTypeError(
                f"tensor {value.name!r} has dtype {value.dtype.name}, not {as_dtype(dtype).name}; use tf.cast"
            )
        return value
    if isinstance(value, EagerTensor):
        return named(get_default_graph(), "Read", name, lambda: identity_of(value))
    if isinstance(value, Number):
        wanted = as_dtype(dtype) if dtype is not None else like.dtype if like is not None else _NUMBERS[value.kind]
        out = get_default_graph().apply(creation._numbers, (value,), (False, wanted), "Size")
        out.known = plain(value) if isinstance(value, Dim) else None
        return out
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in _leaves(value)):
        known = tuple([v.known if isinstance(v, GraphTensor) else v for v in value])
        parts = [convert_to_tensor(v, dtype) for v in value]
        out = parts[0].graph.apply(_packed, tuple(parts), (), "Pack")
        if all(isinstance(k, (int, Dim)) and not isinstance(k, bool) for k in known):
            out.known = known
        return out
    if dtype is None and like is not None and not isinstance(value, (np.ndarray, np.generic)):
        wanted = like.dtype
        array = np.asarray(value)
        if wanted.is_float or array.dtype.kind in "iub":
            dtype = wanted
    return constant(value, dtype, name=name or "Const")


_NUMBERS = {int: i32, float: f32}  # dtypes of numbers that stand alone


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in _leaves(v)]
    return [value]


def _packed(*parts: Value) -> Value:
    return movement.concat(*[nd.expand_dims(p, 0) for p in parts], axis=0)
