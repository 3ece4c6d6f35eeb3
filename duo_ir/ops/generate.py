"""Ops that make values from attributes alone: constants, positions along an axis, run-time sizes.

They have no operands, so no derivative rules; their recipes are their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import Generate, OpDef
from duo_ir.ops.checks import check_shape
from duo_ir.scalar import math
from duo_ir.types import Dim, DimLike, DType, Shape, TensorType, i64


def _constant_type(*, value: float | int | bool, dtype: DType) -> TensorType:
    if dtype.kind == "b":
        if not isinstance(value, bool):
            raise DTypeError(f"a bool constant is True or False, not {value!r}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DTypeError(f"a constant of {dtype.name} is an int or a float, not {value!r}")
    elif dtype.is_integer:
        limits = np.iinfo(dtype.numpy)
        if isinstance(value, float):
            raise DTypeError(
                f"a constant of {dtype.name} is an int, not {value!r}; convert the value or take a float dtype"
            )
        if not limits.min <= value <= limits.max:
            raise ArgumentError(f"{value} does not fit {dtype.name}, which holds {limits.min} to {limits.max}")
    return TensorType(dtype)


def _iota_type(*, shape: Shape, axis: int, dtype: DType) -> TensorType:
    check_shape(shape)
    if dtype.kind == "b":
        raise DTypeError("iota makes numbers, not bool")
    if not 0 <= axis < len(shape):
        raise ArgumentError(f"axis {axis} is outside shape {list(shape)}")
    return TensorType(dtype, shape)


def _size_type(*, dim: DimLike, least: int | None = None) -> TensorType:
    if isinstance(dim, bool) or not isinstance(dim, (int, Dim)):
        raise ArgumentError(f"size takes an int or a Dim, not {dim!r}")
    if least is not None and isinstance(dim, int) and dim < least:
        raise ShapeError(f"the program divides by a size that is {dim}; it needs {least} at least")
    return TensorType(i64)


def _constant(s: Any, indices: Any, linear: Any, *, value: float | int | bool, dtype: DType) -> Any:
    return s.const(value, dtype)


def _iota(s: Any, indices: Any, linear: Any, *, shape: Shape, axis: int, dtype: DType) -> Any:
    return math.cast(s, indices[axis], dtype)


def _size(s: Any, indices: Any, linear: Any, *, dim: DimLike, least: int | None = None) -> Any:
    return s.const(dim, i64) if isinstance(dim, int) else s.dim(dim)


constant = OpDef(
    "constant", _constant_type, Generate(_constant), doc="The number `value`, 0-d, rounded to `dtype` once."
)
iota = OpDef("iota", _iota_type, Generate(_iota, position=True), doc="Each element is its position along `axis`, cast to `dtype`.")
def _known_size(op: Op) -> Sequence[Value] | None:
    dim = op.attrs["dim"]
    return (constant(value=dim, dtype=i64),) if isinstance(dim, int) else None


size = OpDef(
    "size", _size_type, Generate(_size), canonicalize=_known_size,
    doc="The value of the size `dim` at run time, as i64, 0-d. `least`: the program is none for smaller ones.",
)  # fmt: skip
