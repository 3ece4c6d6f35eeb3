"""Random numbers as functions of a state: i64[2], (key, counter) of Philox-4x32-10.

Every body takes the state and returns (sample, new state). A sample of n 32-bit words uses ceil(n / 4) counters, so what is drawn depends on
the state and the program order alone. float64 takes two words an element, integers two, everything else one; f16 and bf16 are
rounded from float32 (uniform ones are made with as many bits as they hold, so that 1 is never reached).
"""

from __future__ import annotations

import math
from typing import Any

from duo.dispatch import apply
from duo.functional._args import some_axes, type_of
from duo.functional._ssa import float_dtype, floating, insert_axis, wide
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import random
from duo_ir.ops import reduce as red
from duo_ir.ops import shape as movement
from duo_ir.types import DType, Shape, bf16, f16, f32, f64, i32, i64, product

Drawn = tuple[Value, Value]


# ------------------------------------------------------------------------------------------------------ state and bits
def _bits(state: Value, shape: Shape) -> Drawn:
    """One i32 word per element, and the state after them."""
    if state.type.dtype is not i64 or state.type.shape != (2,):
        raise DTypeError(f"the state of a generator is i64[2], (key, counter), not {state.type}")
    key = nd.reshape(nd.slice_axis(state, 0, 0, 1), ())
    counter = nd.reshape(nd.slice_axis(state, 0, 1, 2), ())
    used = ew.floor_divide(nd.size_of(product(shape) + 3, i64), nd.constant_of(4, i64))
    after = movement.concat(nd.reshape(key, (1,)), nd.reshape(counter + used, (1,)), axis=0)
    return random.random_bits(key, counter, shape=shape), after


def _top(word: Value, bits: int) -> Value:
    """The highest bits of an i32 word as an i32 number."""
    return ew.shift_right_logical(word, nd.full(word.type.shape, 32 - bits, i32))


def _two_words(state: Value, shape: Shape) -> tuple[Value, Value, Value]:
    words, after = _bits(state, (*shape, 2))
    first, second = (nd.reshape(nd.slice_axis(words, len(shape), n, n + 1), shape) for n in (0, 1))
    return first, second, after


def _need_float(dtype: DType) -> None:
    if not dtype.is_float:
        raise DTypeError(f"random: this distribution has float samples, not {dtype.name}")


# ------------------------------------------------------------------------------------------------------ distributions
def _uniform(state: Value, shape: Shape, dtype: DType) -> Drawn:
    """k / 2^b in [0, 1), k of b bits: 24 for f32, 53 for f64 (27 + 26), 11 for f16, 8 for bf16."""
    _need_float(dtype)
    if dtype is f64:
        first, second, after = _two_words(state, shape)
        k = nd.cast_to(_top(first, 27), f64) * 2.0**26 + nd.cast_to(_top(second, 26), f64)
        return k * 2.0**-53, after
    words, after = _bits(state, shape)
    bits = {f16: 11, bf16: 8}.get(dtype, 24)
    return nd.cast_to(nd.cast_to(_top(words, bits), f32) * 2.0**-bits, dtype), after


def _open_uniform(state: Value, shape: Shape, dtype: DType) -> Drawn:
    """(k + 1/2) / 2^b in the open interval (0, 1), exact: b = 23 for f32, 52 for f64. For f16 and bf16 as f32."""
    _need_float(dtype)
    if dtype is f64:
        first, second, after = _two_words(state, shape)
        k = nd.cast_to(_top(first, 26), f64) * 2.0**26 + nd.cast_to(_top(second, 26), f64)
        return (k + 0.5) * 2.0**-52, after
    words, after = _bits(state, shape)
    return (nd.cast_to(_top(words, 23), f32) + 0.5) * 2.0**-23, after


def _normal(state: Value, shape: Shape, dtype: DType) -> Drawn:
    """Standard normal by inversion: normal_quantile((k + 1/2) / 2^b), so |sample| < 5.5 for f32 and < 8.3 for f64."""
    u, after = _open_uniform(state, shape, dtype)
    return nd.cast_to(ew.normal_quantile(u), dtype), after


def _uniform_between(state: Value, low: Any, high: Any, shape: Shape, dtype: DType) -> Drawn:
    """low + u * (high - low)."""
    u, after = _uniform(state, shape, dtype)
    low, high = _number(low, dtype), _number(high, dtype)
    return u * (high - low) + low, after


def _normal_of(state: Value, mean: Any, std: Any, shape: Shape, dtype: DType) -> Drawn:
    """mean + std * z; mean and std are numbers or tensors that broadcast to the shape."""
    z, after = _normal(state, shape, dtype)
    return z * _number(std, dtype) + _number(mean, dtype), after


def _truncated_normal(state: Value, mean: Any, std: Any, low: float, high: float, shape: Shape, dtype: DType) -> Drawn:
    """mean + std * z with z standard normal between low and high: the quantile of u between their probabilities."""
    a, b = (0.5 * math.erfc(-z / math.sqrt(2.0)) for z in (low, high))
    u, after = _open_uniform(state, shape, dtype)
    z = ew.normal_quantile(u * (b - a) + a)
    z = nd.minimum(nd.maximum(z, low), high)
    return nd.cast_to(nd.cast_to(z, dtype) * _number(std, dtype) + _number(mean, dtype), dtype), after


def _exponential(state: Value, shape: Shape, dtype: DType) -> Drawn:
    """-log(u), of rate 1."""
    u, after = _open_uniform(state, shape, dtype)
    return nd.cast_to(-ew.log(u), dtype), after


def _bernoulli(state: Value, p: Any, shape: Shape, dtype: DType) -> Drawn:
    """1 with probability p (a number, or a tensor that broadcasts to the shape), else 0."""
    u, after = _uniform(state, shape, f32)
    p = p if p.__class__ is Value else nd.constant_of(p, f32)
    return nd.cast_to(nd.lt(u, nd.broadcast_to(floating(p), shape)), dtype), after


def _randint(state: Value, low: Any, high: Any, shape: Shape, dtype: DType) -> Drawn:
    """low + (a 63-bit number) mod (high - low): integers in [low, high)."""
    first, second, after = _two_words(state, shape)
    v = nd.cast_to(_top(first, 31), i64) * 2**32 + ew.and_(nd.cast_to(second, i64), nd.full(shape, 2**32 - 1, i64))
    low, high = _number(low, i64), _number(high, i64)
    return nd.cast_to(nd.remainder(v, high - low) + low, dtype), after


def _categorical(state: Value, logits: Value) -> Drawn:
    """One index along the last axis with probability softmax(logits): argmax(logits - log(-log(u)))."""
    logits = wide(logits)
    u, after = _open_uniform(state, logits.type.shape, logits.type.dtype)
    return red.argmax(logits - ew.log(-ew.log(u)), axes=(logits.type.rank - 1,)), after


def _multinomial(state: Value, weights: Value, num_samples: int) -> Drawn:
    """num_samples indices along the last axis, drawn with replacement in proportion to the weights: [..., num_samples]."""
    logits = insert_axis(ew.log(wide(weights)), weights.type.rank - 1)
    *lead, _, n = logits.type.shape
    return _categorical(state, nd.broadcast_to(logits, (*lead, num_samples, n)))


def _number(x: Any, dtype: DType) -> Value:
    return nd.cast_to(x, dtype) if x.__class__ is Value else nd.constant_of(x, dtype)


# ------------------------------------------------------------------------------------------------------------ dropout
def _dropout(state: Value, x: Value, p: Any) -> Drawn:
    """x / (1 - p) with probability 1 - p, else 0; p may be 1. f16 and bf16 divide in float32."""
    return _dropout_shared(state, x, p, ())


def _dropout_shared(state: Value, x: Value, p: Any, shared: tuple[int, ...]) -> Drawn:
    """Dropout in which places along the axes `shared` live or die together (a feature map, say)."""
    u, after = _uniform(state, tuple([1 if a in shared else d for a, d in enumerate(x.type.shape)]), f32)
    y = wide(x)
    p = floating(p) if p.__class__ is Value else nd.constant_of(p, f32)
    keep = nd.ge(u, p)
    q = nd.cast_to(1.0 - p, y.type.dtype)
    q = nd.where(nd.eq(q, 0.0), 1.0, q)  # nothing is kept then, and 0/0 must not appear in a gradient
    return nd.cast_to(nd.where(keep, y / q, nd.constant_of(0, y.type.dtype)), float_dtype(x)), after


def check_probability(name: str, p: Any) -> Any:
    if isinstance(p, (int, float)):
        if not 0.0 <= p <= 1.0:
            raise ArgumentError(f"{name}: p is a probability, between 0 and 1, not {p}")
        return float(p)
    return p


def dropout_with(input: Any, state: Any, p: Any = 0.5) -> Any:
    """(dropout of input, new state): elements are 0 with probability p, the others divided by 1 - p."""
    return apply(_dropout, (state, input, check_probability("dropout", p)))


def feature_dropout_with(input: Any, state: Any, p: Any = 0.5) -> Any:
    """(dropout of whole channels, new state): all behind dims 0 and 1 live or die together."""
    rank = type_of(input).rank
    if rank < 2:
        raise ShapeError(f"feature dropout: it takes [batch, channel, ...], got {type_of(input)}")
    shared = some_axes("dropout", tuple(range(2, rank)), rank) if rank > 2 else ()
    return apply(_dropout_shared, (state, input, check_probability("dropout", p)), (shared,))


__all__ = ["dropout_with", "feature_dropout_with"]
