"""Control flow: ops that hold closed Functions. Their derivatives are derivatives of Functions, which
`transforms/autodiff.py` makes from these (it asks for the kind `Control`)."""

from __future__ import annotations

from collections.abc import Sequence

from duo_ir.core import Function, Op, Value, current_builder
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import Control, OpDef
from duo_ir.ops import broadcasting as nd
from duo_ir.types import TensorType, bool_


def _listed(types: Sequence[TensorType]) -> str:
    return f"({', '.join(map(str, types))})"


def _takes(name: str, region: Function, types: Sequence[TensorType]) -> None:
    if not isinstance(region, Function):
        raise ArgumentError(f"{name} is a Function, not {region!r}")
    if region.param_types != tuple(types):
        raise ShapeError(f"{name} takes {_listed(region.param_types)}, but is given {_listed(types)}")


def _cond_type(pred: TensorType, *operands: TensorType, then: Function, orelse: Function) -> tuple[TensorType, ...]:
    if pred.dtype is not bool_:
        raise DTypeError(f"the predicate is bool[], not {pred}; compare it with zero")
    if pred.shape != ():
        raise ShapeError(f"the predicate is one bool[], not {pred}; reduce it with any or all, or use where")
    _takes("then", then, operands)
    _takes("orelse", orelse, operands)
    if then.result_types != orelse.result_types:
        raise ShapeError(
            f"both branches give the same types, but then gives {_listed(then.result_types)} and orelse"
            f" {_listed(orelse.result_types)}; cast or reshape in one"
        )
    return then.result_types


def _while_type(*operands: TensorType, test: Function, body: Function, carried: int) -> tuple[TensorType, ...]:
    if isinstance(carried, bool) or not isinstance(carried, int) or not 0 <= carried <= len(operands):
        raise ArgumentError(f"carried is how many of the {len(operands)} operands are carried, not {carried!r}")
    _takes("test", test, operands)
    _takes("body", body, operands)
    if test.result_types != (TensorType(bool_),):
        raise DTypeError(
            f"test gives one bool[], not {_listed(test.result_types)}; compare, and reduce with any or all"
        )
    if body.result_types != tuple(operands[:carried]):
        raise ShapeError(
            f"body gives {_listed(body.result_types)}, but the carried values are {_listed(operands[:carried])};"
            " a carried value keeps its type"
        )
    return body.result_types


def _cond_canonical(op: Op) -> Sequence[Value] | None:
    known = nd.literal(op.operands[0])
    if known is None:
        return None
    return current_builder().inline(op.attrs["then" if known else "orelse"], op.operands[1:])


cond = OpDef(
    "cond", _cond_type, Control("cond"), canonicalize=_cond_canonical,
    doc="cond(pred, *operands; then, orelse): the results of one of the two Functions; the other does not run.",
)  # fmt: skip
while_ = OpDef(
    "while", _while_type, Control("while"),
    doc="while(*carried, *constants; test, body, carried): while test(carried, constants): carried = body(carried, constants).",
)  # fmt: skip
