"""`duo.cond` and `duo.while_loop`: control flow that depends on values, inside the program.

The functions given are called once on tensors that stand for their arguments and become Functions of the IR; tensors that they use from
outside become operands. Gradients flow through `cond`; through `while_loop` only forward-mode derivatives do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duo.dispatch import apply
from duo.tensor import Tensor
from duo.tracing import Tracing, closed, outside_of, trace
from duo_ir import ops
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.types import TensorType, bool_

_WHERE = "cond or while_loop"
_NO_RANDOM = "random ops and other writes to shared state cannot be inside cond or while_loop; draw before and pass the result in"


def _trace(function: Callable, tensors: Sequence[Any], name: str) -> tuple[Tracing, list[Value], Any]:
    tracing, structure = trace(function, [t._type for t in tensors], name, _WHERE, _NO_RANDOM, tensors)
    flat = list(structure) if isinstance(structure, (tuple, list)) else [structure]
    values = []
    for x in flat:
        if not isinstance(x, Tensor):
            raise ArgumentError(f"the function of {name} returns tensors, not {type(x).__name__}")
        values.append(tracing.value_of(x))
    return tracing, values, structure


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
    then, then_values, structure = _trace(true_fn, operands, "then")
    orelse, orelse_values, _ = _trace(false_fn, operands, "orelse")
    mine, theirs = [v.type for v in then_values], [v.type for v in orelse_values]
    if mine != theirs:
        raise ShapeError(
            f"cond: true_fn returns {mine}, false_fn returns {theirs}; they must agree (cast or broadcast)"
        )
    outside = outside_of(then, orelse)
    branches = tuple(closed(t, values, outside) for t, values in ((then, then_values), (orelse, orelse_values)))
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
    test, test_values, _ = _trace(cond_fn, carried, "test")
    body, body_values, _ = _trace(body_fn, carried, "body")
    if len(test_values) != 1 or test_values[0].type != TensorType(bool_, ()):
        raise ShapeError(f"while_loop: cond_fn returns one bool of shape (), not {[str(v.type) for v in test_values]}")
    if [v.type for v in body_values] != types:
        raise ShapeError(
            f"while_loop: body_fn returns {[str(v.type) for v in body_values]}, but carries {[str(t) for t in types]}"
        )
    outside = outside_of(test, body)
    functions = (closed(test, test_values, outside), closed(body, body_values, outside))
    out = apply(_while, (*carried, *outside), (*functions, len(types)))
    return out if isinstance(out, tuple) else (out,)
