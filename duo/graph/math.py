"""Arithmetic, comparisons, reductions and products, with TensorFlow's names: `tf.add`, `tf.reduce_sum`, ... and `tf.math`.

Operands that are not tensors become constants of the other operand's dtype (Python numbers, run-time scalars). Two tensors must have
one dtype, as in TensorFlow: mixing them raises DTypeError rather than promoting.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from duo import functional as F
from duo.functional import elementwise as elem
from duo.functional import linalg, reduce
from duo.graph.sorting import (
    argsort,
    bincount,
    cumprod,
    cumulative_logsumexp,
    histogram_fixed_width,
    searchsorted,
    sort,
    top_k,
    unique,
)
from duo.graph.tensor import convert_to_tensor, named
from duo.tensor import Tensor
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.types import dtype as as_dtype
from duo_ir.types import i64, product

Name = str | None
_NUMBERS = (bool, int, float)


def _pair(type: str, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """Operands of one dtype, and the graph; a Python number beside a tensor stays one."""
    if isinstance(x, Tensor) and y.__class__ in _NUMBERS:
        x = convert_to_tensor(x)
        return x, y, x.graph
    if isinstance(y, Tensor) and x.__class__ in _NUMBERS:
        y = convert_to_tensor(y)
        return x, y, y.graph
    a = convert_to_tensor(x, like=y if isinstance(y, Tensor) else None)
    b = convert_to_tensor(y, like=a)
    if a.dtype is not b.dtype:
        raise DTypeError(f"{type}: operands have dtypes {a.dtype.name} and {b.dtype.name}; use tf.cast")
    return a, b, a.graph


def _binary(type: str, body: Callable[..., Any], doc: str) -> Callable[..., Any]:
    def function(x: Any, y: Any, name: Name = None) -> Any:
        a, b, graph = _pair(type, x, y)
        return named(graph, type, name, lambda: graph.apply(body, (a, b)), (a, b))

    function.__name__ = function.__qualname__ = type.lower()
    function.__doc__ = doc
    return function


def _unary(type: str, of: Callable[..., Any], doc: str) -> Callable[..., Any]:
    def function(x: Any, name: Name = None) -> Any:
        a = convert_to_tensor(x)
        return named(a.graph, type, name, lambda: of(a), (a,))

    function.__name__ = function.__qualname__ = type.lower()
    function.__doc__ = doc
    return function


# ------------------------------------------------------------------------------------------------ of two tensors
def _squared_difference(x: Any, y: Any) -> Value:
    d = elem._sub(x, y)
    return elem._mul(d, d)


def _divide_no_nan(x: Any, y: Any) -> Value:
    none = elem._eq(y, 0)
    return nd.where(none, 0, elem._div(x, nd.where(none, 1, y)))


def _divide(x: Any, y: Any) -> Value:
    """Python's / : integers divide as floats."""
    return elem._div(x, y)


add = _binary("Add", elem._add, "x + y.")
subtract = sub = _binary("Sub", elem._sub, "x - y.")
multiply = mul = _binary("Mul", elem._mul, "x * y.")
divide = truediv = _binary("RealDiv", _divide, "x / y; integers divide as float32.")
realdiv = divide
floordiv = floor_div = _binary("FloorDiv", elem._floor_divide, "The quotient rounded towards minus infinity.")
mod = floormod = floor_mod = _binary("FloorMod", elem._remainder, "The remainder, with the sign of y.")
truncatemod = _binary("TruncateMod", elem._fmod, "The remainder, with the sign of x.")
maximum = _binary("Maximum", elem._maximum, "The larger of both; NaN wins.")
minimum = _binary("Minimum", elem._minimum, "The smaller of both; NaN wins.")
squared_difference = _binary("SquaredDifference", _squared_difference, "(x - y)^2.")
div_no_nan = divide_no_nan = _binary("DivNoNan", _divide_no_nan, "x / y, 0 where y is 0.")
equal = _binary("Equal", elem._eq, "Whether x == y.")
not_equal = _binary("NotEqual", elem._ne, "Whether x != y.")
less = _binary("Less", elem._lt, "Whether x < y.")
less_equal = _binary("LessEqual", elem._le, "Whether x <= y.")
greater = _binary("Greater", elem._gt, "Whether x > y.")
greater_equal = _binary("GreaterEqual", elem._ge, "Whether x >= y.")
logical_and = _binary("LogicalAnd", elem._logical_and, "x and y.")
logical_or = _binary("LogicalOr", elem._logical_or, "x or y.")
logical_xor = _binary("LogicalXor", elem._logical_xor, "One of x and y, not both.")


def div(x: Any, y: Any, name: Name = None) -> Any:
    """x / y; integers divide as Python's // does."""
    a, b, graph = _pair("div", x, y)
    whole = not any(isinstance(v, float) or (isinstance(v, Tensor) and v.dtype.is_float) for v in (a, b))
    return named(graph, "div", name, lambda: graph.apply(elem._floor_divide if whole else elem._div, (a, b)), (a, b))


def pow(x: Any, y: Any, name: Name = None) -> Any:
    """x to the power y; a Python int as y is the exact integer power."""
    if isinstance(x, Tensor) and isinstance(y, (int, float)):
        a = convert_to_tensor(x)
        return named(a.graph, "Pow", name, lambda: F.pow(a, y), (a,))
    a, b, graph = _pair("pow", x, y)
    return named(graph, "Pow", name, lambda: F.pow(a, b), (a, b))


def add_n(inputs: Any, name: Name = None) -> Any:
    """The sum of tensors of one type, added from the first on."""
    parts = [convert_to_tensor(v) for v in inputs]
    if not parts:
        raise ArgumentError("add_n needs one tensor at least")

    def make() -> Any:
        total = parts[0]
        for p in parts[1:]:
            total = total.graph.apply(elem._add, (total, p))
        return total

    return named(parts[0].graph, "AddN", name, make, tuple(parts))


accumulate_n = add_n


# ------------------------------------------------------------------------------------------------ of one tensor
abs = _unary("Abs", F.absolute, "|x|.")
negative = neg = _unary("Neg", F.neg, "-x.")
sign = _unary("Sign", F.sign, "-1, 0 or 1.")
square = _unary("Square", F.square, "x * x.")
sqrt = _unary("Sqrt", F.sqrt, "The square root.")
rsqrt = _unary("Rsqrt", F.rsqrt, "1 / sqrt(x).")
exp = _unary("Exp", F.exp, "e^x.")
expm1 = _unary("Expm1", F.expm1, "e^x - 1.")
log = _unary("Log", F.log, "The natural logarithm.")
log1p = _unary("Log1p", F.log1p, "log(1 + x).")
sin, cos, tan = _unary("Sin", F.sin, "sin(x)."), _unary("Cos", F.cos, "cos(x)."), _unary("Tan", F.tan, "tan(x).")
asin, acos, atan = (
    _unary("Asin", F.asin, "asin(x)."),
    _unary("Acos", F.acos, "acos(x)."),
    _unary("Atan", F.atan, "atan(x)."),
)
sinh, cosh = _unary("Sinh", F.sinh, "sinh(x)."), _unary("Cosh", F.cosh, "cosh(x).")
tanh = _unary("Tanh", F.tanh, "tanh(x).")
sigmoid = _unary("Sigmoid", F.sigmoid, "1 / (1 + e^-x).")
log_sigmoid = _unary("LogSigmoid", F.logsigmoid, "log(sigmoid(x)).")
erf, erfc = _unary("Erf", F.erf, "The error function."), _unary("Erfc", F.erfc, "1 - erf(x).")
reciprocal = _unary("Reciprocal", F.reciprocal, "1 / x.")
floor, ceil = _unary("Floor", F.floor, "Rounded down."), _unary("Ceil", F.ceil, "Rounded up.")
round = _unary("Round", F.round, "To the nearest integer, halves to even.")
rint = round
is_nan = _unary("IsNan", F.isnan, "Whether x is NaN.")
is_inf = _unary("IsInf", F.isinf, "Whether x is infinite.")
is_finite = _unary("IsFinite", F.isfinite, "Whether x is neither NaN nor infinite.")
logical_not = _unary("LogicalNot", F.logical_not, "not x.")
softplus = _unary("Softplus", F.softplus, "log(1 + e^x).")


def cast(x: Any, dtype: Any, name: Name = None) -> Any:
    """x in another dtype; floats become integers by truncation."""
    a = convert_to_tensor(x)
    return named(a.graph, "Cast", name, lambda: F.cast(a, as_dtype(dtype)), (a,))


def to_float(x: Any, name: Name = None) -> Any:
    return cast(x, "float32", name)


def to_double(x: Any, name: Name = None) -> Any:
    return cast(x, "float64", name)


def to_int32(x: Any, name: Name = None) -> Any:
    return cast(x, "int32", name)


def to_int64(x: Any, name: Name = None) -> Any:
    return cast(x, "int64", name)


def clip_by_value(t: Any, clip_value_min: Any, clip_value_max: Any, name: Name = None) -> Any:
    """t with every element brought into [min, max]."""
    a = convert_to_tensor(t)
    return named(a.graph, "clip_by_value", name, lambda: F.clamp(a, clip_value_min, clip_value_max), (a,))


def clip_by_norm(t: Any, clip_norm: Any, axes: Any = None, name: Name = None) -> Any:
    """t * clip_norm / max(norm(t), clip_norm), the L2 norm over `axes` (all)."""
    a = convert_to_tensor(t)
    over = nd.axes_of(a.graph.value_of(a), axes)
    return named(a.graph, "clip_by_norm", name, lambda: a.graph.apply(_clipped, (a, clip_norm), (over,)), (a,))


def _clipped(x: Value, limit: Any, axes: tuple[int, ...]) -> Value:
    limit = limit if limit.__class__ is Value else nd.constant_of(limit, x.type.dtype)
    total = nd.sum(x * x, axes, keepdims=True)
    some = nd.gt(total, 0.0)
    norm = nd.where(some, nd.broadcast_to(_root(nd.where(some, total, 1.0)), total.type.shape), total)
    return x * limit / nd.maximum(norm, limit)


def _root(x: Value) -> Value:
    from_ops: Value = ew.sqrt(x)
    return from_ops


def global_norm(t_list: Any, name: Name = None) -> Any:
    """The L2 norm of all elements of the tensors together."""
    parts = [convert_to_tensor(t) for t in t_list if t is not None]
    graph = parts[0].graph
    return named(graph, "global_norm", name, lambda: graph.apply(_global_norm, tuple(parts)), tuple(parts))


def _global_norm(*xs: Value) -> Value:
    total = nd.sum(xs[0] * xs[0])
    for x in xs[1:]:
        total = total + nd.sum(x * x)
    return _root(total)


def clip_by_global_norm(t_list: Any, clip_norm: Any, use_norm: Any = None, name: Name = None) -> tuple[list[Any], Any]:
    """(each t * clip_norm / max(norm, clip_norm), norm), `norm` that of all together."""
    norm = use_norm if use_norm is not None else global_norm(t_list)
    graph = norm.graph
    out = [
        None
        if t is None
        else named(graph, "clip_by_global_norm", name, partial(graph.apply, _scaled_to, (t, norm, clip_norm)))
        for t in t_list
    ]
    return out, norm


def _scaled_to(x: Value, norm: Value, limit: Any) -> Value:
    limit = limit if limit.__class__ is Value else nd.constant_of(limit, x.type.dtype)
    return x * (limit / nd.maximum(norm, limit))


# ------------------------------------------------------------------------------------------------ reductions
def _axes(axis: Any, reduction_indices: Any) -> Any:
    return reduction_indices if axis is None else axis


def _reduction(type: str, body: Callable[..., Any], doc: str, *more: Any) -> Callable[..., Any]:
    def function(
        input_tensor: Any,
        axis: Any = None,
        keepdims: bool | None = None,
        name: Name = None,
        reduction_indices: Any = None,
        keep_dims: bool | None = None,
    ) -> Any:
        x = convert_to_tensor(input_tensor)
        axes = _axes(axis, reduction_indices)
        over = nd.axes_of(x.graph.value_of(x), tuple(axes) if isinstance(axes, (list, tuple)) else axes)
        keep = bool(keepdims if keepdims is not None else keep_dims)
        return named(x.graph, type, name, lambda: x.graph.apply(body, (x,), (over, keep, *more)), (x,))

    function.__name__ = function.__qualname__ = f"reduce_{type.lower()}"
    function.__doc__ = doc
    return function


def _sum(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return nd.sum(x, axes, keep)


def _prod(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return nd.prod(x, axes, keep)


def _mean(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    """Of floats sum / n; of integers the sum divided rounding towards zero, as TensorFlow's."""
    if x.type.dtype.is_float:
        return reduce._mean(x, axes, keep, None)
    n = nd.size_of(product([x.type.shape[a] for a in axes]), x.type.dtype)
    return elem._trunc_divide(nd.sum(x, axes, keep), n)


reduce_sum = _reduction("Sum", _sum, "The sum over `axis` (all), in the tensor's dtype.")
reduce_prod = _reduction("Prod", _prod, "The product over `axis` (all), in the tensor's dtype.")
reduce_mean = _reduction("Mean", _mean, "The mean over `axis` (all).")
reduce_max = _reduction("Max", reduce._amax, "The largest element over `axis` (all).")
reduce_min = _reduction("Min", reduce._amin, "The smallest element over `axis` (all).")
reduce_any = _reduction("Any", reduce._any, "Whether any element holds.")
reduce_all = _reduction("All", reduce._all, "Whether all elements hold.")
reduce_logsumexp = _reduction("ReduceLogSumExp", reduce._logsumexp, "log(sum(exp(x))).")


def _variance(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return reduce._var(x, axes, 0.0, keep)


def _deviation(x: Value, axes: tuple[int, ...], keep: bool) -> Value:
    return reduce._std(x, axes, 0.0, keep)


reduce_variance = _reduction("Variance", _variance, "The mean squared distance from the mean.")
reduce_std = _reduction("Std", _deviation, "The square root of reduce_variance.")


def argmax(
    input: Any, axis: int | None = None, name: Name = None, dimension: int | None = None, output_type: Any = i64
) -> Any:
    """The index of the largest element along `axis` (0), the first among equals."""
    return _position("ArgMax", F.argmax, input, axis, dimension, name, output_type)


def argmin(
    input: Any, axis: int | None = None, name: Name = None, dimension: int | None = None, output_type: Any = i64
) -> Any:
    """The index of the smallest element along `axis` (0), the first among equals."""
    return _position("ArgMin", F.argmin, input, axis, dimension, name, output_type)


def _position(type: str, of: Callable[..., Any], input: Any, axis: Any, dimension: Any, name: Name, dtype: Any) -> Any:
    x = convert_to_tensor(input)
    along = dimension if axis is None else axis
    return named(x.graph, type, name, lambda: F.cast(of(x, 0 if along is None else along), as_dtype(dtype)), (x,))


arg_max, arg_min = argmax, argmin


def cumsum(x: Any, axis: int = 0, exclusive: bool = False, reverse: bool = False, name: Name = None) -> Any:
    """Sums of the elements up to each place; `exclusive` without the place itself, `reverse` from the end."""
    a = convert_to_tensor(x)

    def make() -> Any:
        y = F.flip(a, axis) if reverse else a
        total = F.cumsum(y, axis, dtype=a.dtype)
        total = total - y if exclusive else total
        return F.flip(total, axis) if reverse else total

    return named(a.graph, "Cumsum", name, make, (a,))


# ------------------------------------------------------------------------------------------------ products
def matmul(
    a: Any,
    b: Any,
    transpose_a: bool = False,
    transpose_b: bool = False,
    adjoint_a: bool = False,
    adjoint_b: bool = False,
    name: Name = None,
) -> Any:
    """The matrix product over the last two dims (two at least), either transposed first."""
    x, y, graph = _pair("matmul", a, b)
    if x.ndim < 2 or y.ndim < 2:
        raise DTypeError(f"matmul: operands are matrices, got {x._type} and {y._type}; use tf.tensordot or expand_dims")
    flags = (transpose_a or adjoint_a, transpose_b or adjoint_b)
    return named(graph, "MatMul", name, lambda: graph.apply(_product, (x, y), flags), (x, y))


def _product(a: Value, b: Value, transpose_a: bool, transpose_b: bool) -> Value:
    return linalg._matmul(nd.swap_last(a) if transpose_a else a, nd.swap_last(b) if transpose_b else b)


batch_matmul = matmul


def tensordot(a: Any, b: Any, axes: Any, name: Name = None) -> Any:
    """The product summed over the last `axes` dims of a and the first of b, or over the pairs given."""
    x, y, graph = _pair("tensordot", a, b)
    return named(graph, "Tensordot", name, lambda: F.tensordot(x, y, axes), (x, y))


def einsum(equation: str, *inputs: Any, name: Name = None) -> Any:
    parts = [convert_to_tensor(i) for i in inputs]
    return named(parts[0].graph, "einsum", name, lambda: F.einsum(equation, *parts), tuple(parts))


def trace(x: Any, name: Name = None) -> Any:
    a = convert_to_tensor(x)
    return named(a.graph, "trace", name, lambda: F.trace(a), (a,))


def count_nonzero(input_tensor: Any, axis: Any = None, dtype: Any = i64, name: Name = None) -> Any:
    x = convert_to_tensor(input_tensor)
    return named(x.graph, "count_nonzero", name, lambda: F.cast(F.count_nonzero(x, axis), as_dtype(dtype)), (x,))


__all__ = [
    "abs", "accumulate_n", "acos", "add", "add_n", "arg_max", "arg_min", "argmax", "argmin", "argsort", "asin", "atan",
    "batch_matmul", "bincount", "cast", "ceil", "clip_by_global_norm", "clip_by_norm", "clip_by_value", "cos", "cosh",
    "count_nonzero", "cumprod", "cumsum", "cumulative_logsumexp", "div", "div_no_nan", "divide", "divide_no_nan", "einsum", "equal", "erf", "erfc",
    "exp", "expm1", "floor", "floor_div", "floor_mod", "floordiv", "floormod", "global_norm", "greater",
    "greater_equal", "histogram_fixed_width", "is_finite", "is_inf", "is_nan", "less", "less_equal", "log", "log1p", "log_sigmoid",
    "logical_and", "logical_not", "logical_or", "logical_xor", "matmul", "maximum", "minimum", "mod", "mul",
    "multiply", "neg", "negative", "not_equal", "pow", "realdiv", "reciprocal", "reduce_all", "reduce_any",
    "reduce_logsumexp", "reduce_max", "reduce_mean", "reduce_min", "reduce_prod", "reduce_std", "reduce_sum",
    "reduce_variance", "rint", "round", "rsqrt", "searchsorted", "sigmoid", "sign", "sin", "sinh", "softplus", "sort", "sqrt", "square",
    "squared_difference", "sub", "subtract", "tan", "tanh", "tensordot", "to_double", "to_float", "to_int32",
    "to_int64", "top_k", "trace", "truediv", "truncatemod", "unique",
]  # fmt: skip
