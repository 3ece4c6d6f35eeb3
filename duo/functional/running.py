"""Running sums, products, extrema and log-sum-exp along a dim, one element after another: the same order in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duo.dispatch import apply
from duo.functional._args import maybe_dtype, one_axis, type_of
from duo.functional.reduce import ValuesIndices, _counting
from duo_ir.core import Value
from duo_ir.errors import DTypeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import running
from duo_ir.types import DType, bool_, i64


def _cumsum(x: Value, axis: int, dtype: DType | None) -> Value:
    y = _counting(x, dtype)
    return running.cumsum(y, axis=axis) if x.type.shape else y


def _cumprod(x: Value, axis: int, dtype: DType | None) -> Value:
    y = _counting(x, dtype)
    return running.cumprod(y, axis=axis) if x.type.shape else y


def _logcumsumexp(x: Value, axis: int) -> Value:
    return running.logcumsumexp(x, axis=axis) if x.type.shape else x


def _extremum(x: Value, axis: int, op: Callable[..., Any]) -> tuple[Value, Value]:
    if not x.type.shape:
        return x, nd.full((), 0, i64)
    found: tuple[Value, Value] = op(x, axis=axis)
    return found


def _cummax(x: Value, axis: int) -> tuple[Value, Value]:
    return _extremum(x, axis, running.cummax)


def _cummin(x: Value, axis: int) -> tuple[Value, Value]:
    return _extremum(x, axis, running.cummin)


def cumsum(input: Any, dim: int, *, dtype: Any = None) -> Any:
    """The sums of all elements up to each, one after another along `dim`."""
    return apply(_cumsum, (input,), (one_axis("cumsum", dim, type_of(input).rank), maybe_dtype(dtype)))


def cumprod(input: Any, dim: int, *, dtype: Any = None) -> Any:
    """The products of all elements up to each, one after another along `dim`; integers and bools as int64. The gradient divides by nothing, so
    zeros are as good as any number."""
    return apply(_cumprod, (input,), (one_axis("cumprod", dim, type_of(input).rank), maybe_dtype(dtype)))


def logcumsumexp(input: Any, dim: int) -> Any:
    """log of the sum of exp of all elements up to each along `dim`, as max + log1p(exp(min - max)) at each step: nothing overflows."""
    if not type_of(input).dtype.is_float:
        raise DTypeError(f"logcumsumexp: the input holds floats, not {type_of(input).dtype.name}; cast it")
    return apply(_logcumsumexp, (input,), (one_axis("logcumsumexp", dim, type_of(input).rank),))


def _number(name: str, input: Any) -> None:
    if type_of(input).dtype is bool_:
        raise DTypeError(f"{name}: the input holds numbers, not bool; cast it to uint8")


def cummax(input: Any, dim: int) -> ValuesIndices:
    """(values, indices) of the greatest element up to each along `dim`, the last of equals. From the first NaN on, NaN."""
    _number("cummax", input)
    return ValuesIndices(*apply(_cummax, (input,), (one_axis("cummax", dim, type_of(input).rank),)))


def cummin(input: Any, dim: int) -> ValuesIndices:
    """(values, indices) of the least element up to each along `dim`, the last of equals. From the first NaN on, NaN."""
    _number("cummin", input)
    return ValuesIndices(*apply(_cummin, (input,), (one_axis("cummin", dim, type_of(input).rank),)))
