"""Activation functions, with PyTorch's values and its choice of gradient at kinks. NaN passes through all of them.

Parameters given as Python numbers are run-time values. Compositions compute f16 and bf16 in float32 and round once.
"""

from __future__ import annotations

from typing import Any

from duo.dispatch import apply
from duo.functional._args import choice, one_axis, type_of
from duo.functional._ssa import align, float_dtype, floating, wide
from duo_ir import ops
from duo_ir.core import Value
from duo_ir.errors import ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew

_SELU_ALPHA = 1.6732632423543772848170429916717  # Klambauer et al. 2017, "Self-Normalizing Neural Networks", eq. 14
_SELU_SCALE = 1.0507009873554804934193349852946


def _wide_with(x: Value, *parameters: Any) -> tuple[Value, ...]:
    """x in float32 at least, and the parameters beside it."""
    y = wide(x)
    return align(y, *[nd.cast_to(p, y.type.dtype) if p.__class__ is Value else p for p in parameters])


# ---------------------------------------------------------------------------------------------------- piecewise linear
def _relu(x: Value) -> Value:
    """The gradient asks where the result is positive, not the input: so only the result need be kept."""
    zero = nd.zeros_like(x)
    y = ew.where(ew.le(x, zero), zero, x)
    return ew.straight_through(y, ew.where(ew.le(y, zero), zero, x))


def _between(x: Value, low: Any, high: Any) -> Value:
    """Clamped, with gradient 0 on the bounds themselves."""
    x, low, high = align(x, low, high)
    return ew.where(ew.le(x, low), low, ew.where(ew.ge(x, high), high, x))


def _relu6(x: Value) -> Value:
    return _between(x, 0, 6)


def _leaky_relu(x: Value, slope: Any) -> Value:
    x, slope = align(floating(x), slope)
    return ew.where(ew.gt(x, nd.zeros_like(x)), x, x * slope)


def _prelu(x: Value, w: Value) -> Value:
    if x.type.rank > 1:
        w = nd.reshape(w, (w.type.size, *([1] * (x.type.rank - 2))))
    x, w = align(x, w)
    return ew.where(ew.gt(x, nd.zeros_like(x)), x, x * w)


def _hardsigmoid(x: Value) -> Value:
    return nd.cast_to(_between(wide(x) + 3.0, 0.0, 6.0) / 6.0, float_dtype(x))


def _hardswish(x: Value) -> Value:
    y, low, high = _wide_with(x, -3.0, 3.0)
    inner = ew.where(ew.le(y, high), y * (y + 3.0) / 6.0, y)
    return nd.cast_to(ew.where(ew.lt(y, low), nd.zeros_like(y), inner), float_dtype(x))


def _threshold(x: Value, threshold: Any, value: Any) -> Value:
    x, threshold, value = align(x, threshold, value)
    return ew.where(ew.le(x, threshold), value, x)


def _hardshrink(x: Value, lambd: Any) -> Value:
    x, limit = align(x, lambd)
    return ew.where(ew.le(ew.abs(x), limit), nd.zeros_like(x), x)


def _softshrink(x: Value, lambd: Any) -> Value:
    x, limit = align(x, lambd)
    return ew.where(ew.gt(x, limit), x - limit, ew.where(ew.lt(x, ew.neg(limit)), x + limit, x * 0.0))


def relu(input: Any) -> Any:
    """max(input, 0); gradient 0 at 0."""
    return apply(_relu, (input,))


def relu6(input: Any) -> Any:
    """min(max(input, 0), 6)."""
    return apply(_relu6, (input,))


def leaky_relu(input: Any, negative_slope: Any = 0.01) -> Any:
    """input where positive, else negative_slope * input."""
    return apply(_leaky_relu, (input, negative_slope))


def prelu(input: Any, weight: Any) -> Any:
    """input where positive, else weight * input; weight has one element, or one per channel (dim 1)."""
    x, w = type_of(input), type_of(weight)
    channels = x.shape[1] if x.rank > 1 else 1
    if w.rank > 1 or w.size not in (1, channels):
        raise ShapeError(f"prelu: the weight needs 1 or {channels} elements, got {w}")
    return apply(_prelu, (input, weight))


def hardtanh(input: Any, min_val: Any = -1.0, max_val: Any = 1.0) -> Any:
    """input, but not below min_val nor above max_val; gradient 0 on the bounds."""
    return apply(_between, (input, min_val, max_val))


def hardsigmoid(input: Any) -> Any:
    """relu6(input + 3) / 6."""
    return apply(_hardsigmoid, (input,))


def hardswish(input: Any) -> Any:
    """input * relu6(input + 3) / 6."""
    return apply(_hardswish, (input,))


def threshold(input: Any, threshold: Any, value: Any) -> Any:
    """input where it is above the threshold, else value."""
    return apply(_threshold, (input, threshold, value))


def hardshrink(input: Any, lambd: Any = 0.5) -> Any:
    """0 where |input| <= lambd, else input."""
    return apply(_hardshrink, (input, lambd))


def softshrink(input: Any, lambd: Any = 0.5) -> Any:
    """input moved towards 0 by lambd, and 0 where |input| <= lambd."""
    return apply(_softshrink, (input, lambd))


# -------------------------------------------------------------------------------------------------------- exponential
def _below_zero(x: Value) -> Value:
    """x where it is not positive, else 0: what keeps an unused branch finite."""
    zero = nd.zeros_like(x)
    return ew.where(ew.gt(x, zero), zero, x)


def _elu(x: Value, alpha: Any) -> Value:
    y, alpha = _wide_with(x, alpha)
    out = ew.where(ew.gt(y, nd.zeros_like(y)), y, alpha * ew.expm1(_below_zero(y)))
    return nd.cast_to(out, float_dtype(x))


def _celu(x: Value, alpha: Any) -> Value:
    y, alpha = _wide_with(x, alpha)
    out = ew.where(ew.gt(y, nd.zeros_like(y)), y, alpha * ew.expm1(_below_zero(y) / alpha))
    return nd.cast_to(out, float_dtype(x))


def _selu(x: Value) -> Value:
    y = wide(x)
    out = ew.where(ew.gt(y, nd.zeros_like(y)), y, ew.expm1(_below_zero(y)) * _SELU_ALPHA) * _SELU_SCALE
    return nd.cast_to(out, float_dtype(x))


def softplus_of(x: Value) -> Value:
    """log(1 + exp(x)) of an f32 or f64 value: max(x, 0) + log1p(exp(-|x|)), formed so that its derivative is sigmoid(x)
    everywhere, at 0 too."""
    zero = nd.zeros_like(x)
    positive = ew.gt(x, zero)
    return ew.where(positive, x, zero) + ew.log1p(ew.exp(ew.where(positive, ew.neg(x), x)))


def _softplus(x: Value, beta: Any, threshold: Any) -> Value:
    y, beta, threshold = _wide_with(x, beta, threshold)
    scaled = y * beta
    out = ew.where(ew.gt(scaled, threshold), y, softplus_of(scaled) / beta)
    return nd.cast_to(out, float_dtype(x))


def _logsigmoid(x: Value) -> Value:
    return nd.cast_to(ew.neg(softplus_of(ew.neg(wide(x)))), float_dtype(x))


def _gelu(x: Value) -> Value:
    return nd.cast_to(ops.gelu(wide(x))[0], float_dtype(x))


def _gelu_tanh(x: Value) -> Value:
    return nd.cast_to(ops.gelu_tanh(wide(x))[0], float_dtype(x))


def _silu(x: Value) -> Value:
    return nd.cast_to(ops.silu(wide(x))[0], float_dtype(x))


def _mish(x: Value) -> Value:
    y = wide(x)
    return nd.cast_to(y * ew.tanh(softplus_of(y)), float_dtype(x))


def _softsign(x: Value) -> Value:
    y = wide(x)
    return nd.cast_to(y / (ew.abs(y) + 1.0), float_dtype(x))


def _tanhshrink(x: Value) -> Value:
    y = wide(x)
    return nd.cast_to(y - ew.tanh(y), float_dtype(x))


def _glu(x: Value, axis: int) -> Value:
    n = x.type.shape[axis]
    if not isinstance(n, int) or n % 2:
        raise ShapeError(f"glu: dim {axis} of {x.type} must be known and even")
    a, b = nd.slice_axis(x, axis, 0, n // 2), nd.slice_axis(x, axis, n // 2, n)
    return nd.cast_to(wide(a) * ew.sigmoid(wide(b)), float_dtype(x))


def elu(input: Any, alpha: Any = 1.0) -> Any:
    """input where positive, else alpha * (exp(input) - 1)."""
    return apply(_elu, (input, alpha))


def celu(input: Any, alpha: Any = 1.0) -> Any:
    """input where positive, else alpha * (exp(input / alpha) - 1)."""
    return apply(_celu, (input, alpha))


def selu(input: Any) -> Any:
    """scale * elu(input, alpha) with the constants of self-normalising networks."""
    return apply(_selu, (input,))


def softplus(input: Any, beta: Any = 1.0, threshold: Any = 20.0) -> Any:
    """log(1 + exp(beta * input)) / beta; input itself where beta * input > threshold."""
    return apply(_softplus, (input, beta, threshold))


def logsigmoid(input: Any) -> Any:
    """log(sigmoid(input))."""
    return apply(_logsigmoid, (input,))


def gelu(input: Any, approximate: str = "none") -> Any:
    """input * Phi(input), Phi the normal distribution function; approximate='tanh' takes Hendrycks and Gimpel's formula for it."""
    choice("gelu", "approximate", approximate, ("none", "tanh"))
    return apply(_gelu if approximate == "none" else _gelu_tanh, (input,))


def silu(input: Any) -> Any:
    """input * sigmoid(input)."""
    return apply(_silu, (input,))


swish = silu


def mish(input: Any) -> Any:
    """input * tanh(softplus(input))."""
    return apply(_mish, (input,))


def softsign(input: Any) -> Any:
    """input / (1 + |input|)."""
    return apply(_softsign, (input,))


def tanhshrink(input: Any) -> Any:
    """input - tanh(input)."""
    return apply(_tanhshrink, (input,))


def glu(input: Any, dim: int = -1) -> Any:
    """The first half along `dim` times the sigmoid of the second."""
    return apply(_glu, (input,), (one_axis("glu", dim, type_of(input).rank),))
