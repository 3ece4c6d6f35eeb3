"""A part of a graph as a function of eager tensors: a layer of an eager model, with gradients through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from duo.eager.creation import as_tensor
from duo.eager.tensor import EagerTensor, tensor_of
from duo.graph.errors import InvalidArgumentError
from duo.graph.lowering import lowered
from duo.graph.session import Session
from duo.graph.states import Constant, Live, Number, SharedState, State, VariableState, number_of
from duo.graph.tensor import GraphElement
from duo_ir.core import Function, Value, bind_dims, current_builder
from duo_ir.errors import DuoError, ShapeError
from duo_ir.transforms.sizes import with_sizes
from duo_ir.types import Dim, DimLike


class GraphFunction:
    """`outputs` of a Session's graph as a function of `inputs`: eager tensors in, eager tensors out.

    The Session's variables take part as leaf tensors (`session.variable_tensor(v)`), module parameters as themselves: `backward()` collects the
    gradients of both in `.grad`. Generators and other states that the graph writes move on with each call."""

    def __init__(self, session: Session, inputs: Sequence[Any], outputs: Any) -> None:
        self.session = session
        self.inputs = [session.element(i) for i in inputs]
        self._single = not isinstance(outputs, (list, tuple))
        targets = [session.element(o) for o in ([outputs] if self._single else outputs)]
        if not all(isinstance(t, GraphElement) for t in targets):
            raise InvalidArgumentError("a graph function's outputs are tensors; run operations with session.run")
        low = lowered(session.graph, targets, [i._value for i in self.inputs], {})
        if low.deferred:
            raise InvalidArgumentError("a graph function cannot contain an optimizer's step; run that with session.run")
        for state in low.raw_states:
            if isinstance(state, VariableState):
                raise InvalidArgumentError(
                    f"a graph function cannot assign variable {state.name!r}; fetch the assignment with session.run"
                )
        self._function, self._states, self._count = low.raw, low.raw_states, low.fetched
        self._body = _body_of(low.raw)
        self._origins = [
            _fixed(o, p) for o, p in zip(low.raw_origins[len(self.inputs) :], low.raw.params[len(self.inputs) :])
        ]
        self._variables = {v._state: v for v in session.graph.collections.get("variables", [])}

    def __call__(self, *args: Any) -> Any:
        if len(args) != len(self.inputs):
            raise InvalidArgumentError(f"the graph function takes {len(self.inputs)} arguments, got {len(args)}")
        given = [as_tensor(a) for a in args]
        for a, i in zip(given, self.inputs):
            if a.dtype is not i.dtype or len(a.shape) != i.ndim:
                raise ShapeError(f"the graph function takes {i.name!r}, {i._type}, but is given {a._type}")
        operands = [*given, *[self._operand(o) for o in self._origins]]
        out = EagerTensor._apply(self._body, tuple(operands), ())
        results = list(out) if isinstance(out, tuple) else [out]
        for state, new in zip(self._states, results[self._count :]):
            if isinstance(state, SharedState):
                state.tensor._write(new._value())
            else:
                self.session.put(state, new.detach()._array(share=False))
        return results[0] if self._single else tuple(results[: self._count])

    def _operand(self, origin: Any) -> Any:
        if isinstance(origin, EagerTensor):
            return origin
        if isinstance(origin, Live):
            return as_tensor(np.float64(origin.read()[origin.index]))
        return self._cell(origin)

    def _cell(self, state: State) -> EagerTensor:
        if isinstance(state, SharedState):
            return state.tensor
        if state in self._variables:
            return self.session.variable_tensor(self._variables[state])
        array = self.session.get(state)
        return as_tensor(array if array is not None else state.start())  # type: ignore[attr-defined]

    @property
    def parameters(self) -> list[EagerTensor]:
        """The leaf tensors that gradients reach: variables of the Session and module parameters, in order of use."""
        cells = [self._cell(o) for o in self._origins if isinstance(o, State)]
        return [c for c in cells if c.requires_grad]


def _fixed(origin: Any, param: Value) -> Any:
    """Numbers and captured arrays as eager tensors; other origins as they are."""
    if isinstance(origin, Number):
        return tensor_of(np.asarray(number_of(origin.value, param.type.dtype), param.type.dtype.numpy))
    return tensor_of(origin.array) if isinstance(origin, Constant) else origin


def _body_of(function: Function) -> Callable[..., Any]:
    """The Function as a body for `apply`: its unknown sizes are those of the operands."""

    def graph_function(*values: Value) -> tuple[Value, ...]:
        try:
            sizes: dict[str, DimLike] = dict(bind_dims(function.param_types, [_static(v) for v in values]))
        except DuoError as error:
            raise ShapeError(f"a graph function: {error}") from None
        sized = with_sizes(function, sizes) if sizes else function
        return current_builder().inline(sized, values)

    return graph_function


def _static(value: Value) -> tuple[int, ...]:
    if any(isinstance(d, Dim) for d in value.type.shape):
        raise ShapeError(f"a graph function takes operands of known sizes, got {value.type}")
    return value.type.static_shape()


def function_layer(session: Session, inputs: Sequence[Any], outputs: Any) -> GraphFunction:
    """`outputs` as a function of `inputs` that eager code calls, with the values of that Session's variables."""
    return GraphFunction(session, inputs, outputs)


Session.function_maker = staticmethod(GraphFunction)
