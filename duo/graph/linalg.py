"""`tf.linalg`: what it has of products, parts of matrices and norms."""

from __future__ import annotations

from typing import Any

from duo.functional._args import integer
from duo.functional.movement import lower_triangle
from duo.graph.arrays import eye, matrix_transpose
from duo.graph.math import einsum, global_norm, matmul, tensordot, trace
from duo.graph.nn import l2_normalize
from duo.graph.tensor import GraphTensor, convert_to_tensor, named
from duo_ir.core import Value
from duo_ir.errors import ShapeError
from duo_ir.ops import broadcasting as nd

transpose = matrix_transpose


def band_part(input: Any, num_lower: int, num_upper: int, name: str | None = None) -> GraphTensor:
    """The diagonal of the last two dims, num_lower diagonals below it and num_upper above (negative: all of them); the rest 0."""
    x = convert_to_tensor(input)
    if x.ndim < 2:
        raise ShapeError(f"band_part: it takes matrices (at least 2 dims), got {x._type}")
    attrs = (integer("band_part", "num_lower", num_lower), integer("band_part", "num_upper", num_upper))
    return named(x.graph, "MatrixBandPart", name, lambda: x.graph.apply(_band_part, (x,), attrs), (x,))


def _band_part(x: Value, lower: int, upper: int) -> Value:
    zero = nd.constant_of(0, x.type.dtype)
    if upper >= 0:
        x = nd.where(lower_triangle(x.type.shape, upper), x, zero)
    return nd.where(lower_triangle(x.type.shape, -lower - 1), zero, x) if lower >= 0 else x


__all__ = [
    "band_part", "einsum", "eye", "global_norm", "l2_normalize", "matmul", "matrix_transpose", "tensordot", "trace", "transpose",
]  # fmt: skip
