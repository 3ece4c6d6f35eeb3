"""`duo.cond` and `duo.while_loop`: control flow that depends on values, inside the program.

The functions given are called once on tensors that stand for their arguments and become Functions of the IR; tensors that they use from
outside become operands. Gradients flow through `cond`; through `while_loop` only forward-mode derivatives do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from duo.dispatch import View, apply
from duo.eager.infer import user_location
from duo.tensor import Tensor
from duo_ir import ops
from duo_ir.core import Builder, Function, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError, TraceError
from duo_ir.types import TensorType, bool_


class _Tracing:
    """One function being traced: its Builder, and the tensors from outside with the parameters that stand for them."""

    def __init__(self, types: Sequence[TensorType], name: str) -> None:
        self.builder = Builder(name)
        self.given = [Traced(self, self.builder.parameter(t)) for t in types]
        self.captured: dict[int, tuple[Any, Value]] = {}

    def value_of(self, x: Any) -> Any:
        if isinstance(x, (float, int, bool)):
            return x
        if isinstance(x, Traced) and x.tracing is self:
            return x.value
        found = self.captured.get(id(x))
        if found is None:
            found = self.captured[id(x)] = (x, self.builder.parameter(x._type))
        return found[1]


class Traced(Tensor):
    """A tensor inside a branch or a loop body."""

    __slots__ = ("tracing", "value")
    _priority = 20
    _mutable = False

    def __init__(self, tracing: _Tracing, value: Value) -> None:
        self.tracing, self.value = tracing, value

    @property
    def _type(self) -> TensorType:  # type: ignore[override]
        return self.value.type

    @staticmethod
    def _apply(body: Callable, tensors: tuple, attrs: tuple) -> Any:
        tracing = next(t.tracing for t in reversed(tensors) if isinstance(t, Traced))
        tracing.builder.loc = user_location()
        values = [tracing.value_of(t) for t in tensors]
        with tracing.builder:
            out = body(*values, *attrs)
        made = [Traced(tracing, v) for v in (out if isinstance(out, (tuple, list)) else (out,))]
        return tuple(made) if isinstance(out, (tuple, list)) else made[0]

    @staticmethod
    def _view(view: View, tensor: Any, attrs: tuple) -> Any:
        return Traced._apply(view.read, (tensor,), attrs)

    @staticmethod
    def _update(state: Any, new: Any) -> NoReturn:
        raise TraceError(
            "random ops and other writes to shared state cannot be inside cond or while_loop; draw before and pass the result in"
        )

    def _assign(self, new: Any) -> NoReturn:  # type: ignore[override]
        raise TraceError(
            f"a tensor {self._type} inside cond or while_loop is not written in place; use the op that returns a new tensor"
        )

    def _lift(self, array: Any) -> NoReturn:  # type: ignore[override]
        raise TraceError("make tensors of NumPy arrays outside cond and while_loop and pass them in")

    def item(self) -> NoReturn:  # type: ignore[override]
        raise TraceError(
            f"the value of a tensor {self._type} is not known inside cond or while_loop, where only types are"
        )

    def numpy(self) -> np.ndarray:  # type: ignore[override]
        return self.item()


def _trace(function: Callable, types: Sequence[TensorType], name: str) -> tuple[_Tracing, list[Value], Any]:
    tracing = _Tracing(types, name)
    structure = function(*tracing.given)
    flat = list(structure) if isinstance(structure, (tuple, list)) else [structure]
    values = []
    for x in flat:
        if not isinstance(x, Tensor):
            raise ArgumentError(f"the function of {name} returns tensors, not {type(x).__name__}")
        values.append(tracing.value_of(x))
    return tracing, values, structure


def _closed(tracing: _Tracing, results: Sequence[Value], lead: int, outside: Sequence[Any]) -> Function:
    """The traced Function with `lead` parameters of its own and then one for each tensor of `outside`."""
    builder = Builder(tracing.builder.name)
    params = tracing.builder.params
    with builder:
        env = {p: builder.parameter(p.type) for p in params[:lead]}
        for x in outside:
            stand_in = builder.parameter(x._type)
            if id(x) in tracing.captured:
                env[tracing.captured[id(x)][1]] = stand_in
        traced = Function(params, tracing.builder.ops, results)
        return _interned(builder.build(builder.inline(traced, [env[p] for p in params])))


_functions: dict[str, Function] = {}


def _interned(function: Function) -> Function:
    """Equal Functions as one object, so that a program seen before is found again."""
    if len(_functions) > 4096:
        _functions.clear()
    return _functions.setdefault(function.hash, function)


def _cond(predicate: Value, *rest: Any) -> Any:
    *operands, then, orelse = rest
    return ops.cond(predicate, *operands, then=then, orelse=orelse)


def cond(pred: Any, true_fn: Callable, false_fn: Callable, operands: Sequence[Any] = ()) -> Any:
    """true_fn(*operands) where the bool `pred` (a tensor of one element, or a Python bool) holds, else false_fn(*operands); only that one runs.
    Both return tensors of the same types (one, or a tuple). Differentiable."""
    if isinstance(pred, bool):
        return (true_fn if pred else false_fn)(*operands)
    if pred._type.dtype is not bool_:
        raise DTypeError(f"cond: the predicate is a bool, not {pred._type}; compare it with zero")
    if pred._type.size != 1:
        raise ShapeError(f"cond: the predicate has one element, not {pred._type}; use where for one choice per element")
    pred = pred.reshape(()) if pred.ndim else pred
    types = [t._type for t in operands]
    then, then_values, structure = _trace(true_fn, types, "then")
    orelse, orelse_values, _ = _trace(false_fn, types, "orelse")
    mine, theirs = [v.type for v in then_values], [v.type for v in orelse_values]
    if mine != theirs:
        raise ShapeError(
            f"cond: true_fn returns {mine}, false_fn returns {theirs}; they must agree (cast or broadcast)"
        )
    outside = list(
        {**{k: x for k, (x, _) in then.captured.items()}, **{k: x for k, (x, _) in orelse.captured.items()}}.values()
    )
    branches = tuple(
        _closed(t, values, len(types), outside) for t, values in ((then, then_values), (orelse, orelse_values))
    )
    out = apply(_cond, (pred, *operands, *outside), branches)
    return (
        out
        if isinstance(structure, (tuple, list)) and isinstance(out, tuple)
        else (out,)
        if isinstance(structure, (tuple, list))
        else out
    )


def _while(*rest: Any) -> Any:
    *operands, test, body, carried = rest
    return ops.while_(*operands, test=test, body=body, carried=carried)


def while_loop(cond_fn: Callable, body_fn: Callable, carried: Sequence[Any]) -> Any:
    """carried = body_fn(*carried) as long as cond_fn(*carried), a bool of one element, holds. `carried` keeps its types."""
    carried = tuple(carried)
    types = [t._type for t in carried]
    test, test_values, _ = _trace(cond_fn, types, "test")
    body, body_values, _ = _trace(body_fn, types, "body")
    if len(test_values) != 1 or test_values[0].type != TensorType(bool_, ()):
        raise ShapeError(f"while_loop: cond_fn returns one bool of shape (), not {[str(v.type) for v in test_values]}")
    if [v.type for v in body_values] != types:
        raise ShapeError(
            f"while_loop: body_fn returns {[str(v.type) for v in body_values]}, but carries {[str(t) for t in types]}"
        )
    outside = list(
        {**{k: x for k, (x, _) in test.captured.items()}, **{k: x for k, (x, _) in body.captured.items()}}.values()
    )
    functions = (_closed(test, test_values, len(types), outside), _closed(body, body_values, len(types), outside))
    out = apply(_while, (*carried, *outside), (*functions, len(types)))
    return out if isinstance(out, tuple) else (out,)
