"""Matrix multiplication. `broadcasting.matmul` adds NumPy's batch broadcasting and 1-d operands."""

from __future__ import annotations

from collections.abc import Sequence

from duo_ir.core import Op, Value
from duo_ir.errors import DTypeError, ShapeError
from duo_ir.opdef import Contraction, OpDef
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import reference
from duo_ir.types import TensorType


def _matmul_type(a: TensorType, b: TensorType) -> TensorType:
    if a.dtype is not b.dtype:
        raise DTypeError(f"operands need one dtype, got {a.dtype.name} and {b.dtype.name}; cast one")
    if a.dtype.kind == "b":
        raise DTypeError("it takes numbers, not bool; cast both")
    if a.rank < 2 or b.rank < 2:
        raise ShapeError(
            f"operands are matrices, [batch..., m, k] and [batch..., k, n], not {a} and {b}; reshape a vector"
        )
    if a.shape[:-2] != b.shape[:-2]:
        raise ShapeError(f"batch sizes differ: {a} and {b}; broadcast one")
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"the inner sizes differ: axis {a.rank - 1} of {a} is {a.shape[-1]}, axis {b.rank - 2} of {b} is {b.shape[-2]};"
            " transpose one?"
        )
    return a.with_shape((*a.shape[:-1], b.shape[-1]))


def _matmul_vjp(op: Op, g: Value) -> tuple[Value, Value]:
    a, b = op.operands
    return matmul(g, nd.swap_last(b)), matmul(nd.swap_last(a), g)


def _matmul_jvp(op: Op, tangents: Sequence[Value | None]) -> Value:
    (a, b), (s, t) = op.operands, tangents
    left = matmul(s, b) if s is not None else None
    right = matmul(a, t) if t is not None else None
    if left is None or right is None:
        out = left if right is None else right
        assert out is not None
        return out
    return left + right


matmul = OpDef(
    "matmul", _matmul_type, Contraction(), reference=reference.matmul, vjp=_matmul_vjp, jvp=_matmul_jvp,
    doc="[batch..., m, k] x [batch..., k, n] -> [batch..., m, n], by fma in the contract's order of k.",
)  # fmt: skip
