"""Initialisers: objects called with (shape, dtype) that give a variable's first value, with TensorFlow's names and formulas.

Variance scaling: scale / n with n the fan in, the fan out or their mean; fans count a convolution's window (Glorot & Bengio 2010,
He et al. 2015, LeCun et al. 1998).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from duo.graph.random_ops import random_normal, random_uniform, truncated_normal
from duo.graph.tensor import constant
from duo_ir.errors import ArgumentError
from duo_ir.types import dtype as as_dtype
from duo_ir.types import f32

_CUT = 0.87962566103423978  # standard deviation of a standard normal cut at -2 and 2


class Initializer:
    """Base. `dtype` is what is made when the call names none."""

    def __init__(self, dtype: Any = f32) -> None:
        self.dtype = as_dtype(dtype)

    def __call__(self, shape: Any, dtype: Any = None, partition_info: Any = None) -> Any:
        return self.make(tuple(shape), self.dtype if dtype is None else as_dtype(dtype))

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        raise NotImplementedError


class Zeros(Initializer):
    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return constant(np.zeros(shape, dtype.numpy))


class Ones(Initializer):
    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return constant(np.ones(shape, dtype.numpy))


class Constant(Initializer):
    """Every element `value`, or the elements of a list in row-major order."""

    def __init__(self, value: Any = 0, dtype: Any = f32, verify_shape: bool = False) -> None:
        super().__init__(dtype)
        self.value = value

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        values = np.asarray(self.value, dtype.numpy)
        return constant(np.full(shape, values) if values.ndim == 0 else values.reshape(shape))


class RandomNormal(Initializer):
    def __init__(self, mean: float = 0.0, stddev: float = 1.0, seed: int | None = None, dtype: Any = f32) -> None:
        super().__init__(dtype)
        self.mean, self.stddev, self.seed = mean, stddev, seed

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return random_normal(shape, self.mean, self.stddev, dtype, self.seed)


class TruncatedNormal(RandomNormal):
    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return truncated_normal(shape, self.mean, self.stddev, dtype, self.seed)


class RandomUniform(Initializer):
    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None, dtype: Any = f32) -> None:
        super().__init__(dtype)
        self.minval, self.maxval, self.seed = minval, maxval, seed

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return random_uniform(shape, self.minval, self.maxval, dtype, self.seed)


class VarianceScaling(Initializer):
    """Samples of variance scale / n. mode: n is 'fan_in', 'fan_out' or 'fan_avg'; distribution: 'truncated_normal' ('normal'),
    'untruncated_normal' or 'uniform'."""

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
        dtype: Any = f32,
    ) -> None:
        super().__init__(dtype)
        if scale <= 0:
            raise ArgumentError(f"variance_scaling: scale must be positive, not {scale}")
        if mode not in ("fan_in", "fan_out", "fan_avg"):
            raise ArgumentError(f"variance_scaling: mode is fan_in, fan_out or fan_avg, not {mode!r}")
        if distribution not in ("normal", "truncated_normal", "untruncated_normal", "uniform"):
            raise ArgumentError(f"variance_scaling: distribution {distribution!r} is not known")
        self.scale, self.mode, self.distribution, self.seed = scale, mode, distribution, seed

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        fan_in, fan_out = fans(shape)
        n = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2.0}[self.mode]
        variance = self.scale / max(1.0, n)
        if self.distribution == "uniform":
            limit = math.sqrt(3.0 * variance)
            return random_uniform(shape, -limit, limit, dtype, self.seed)
        if self.distribution == "untruncated_normal":
            return random_normal(shape, 0.0, math.sqrt(variance), dtype, self.seed)
        return truncated_normal(shape, 0.0, math.sqrt(variance) / _CUT, dtype, self.seed)


class Orthogonal(Initializer):
    """An orthogonal matrix (rows of [prod(shape[:-1]), shape[-1]]), drawn with NumPy when the graph is built."""

    def __init__(self, gain: float = 1.0, seed: int | None = None, dtype: Any = f32) -> None:
        super().__init__(dtype)
        self.gain, self.seed = gain, seed

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        if len(shape) < 2:
            raise ArgumentError(f"orthogonal_initializer needs two dims at least, not {list(shape)}")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        random = np.random.default_rng(self.seed)
        q, r = np.linalg.qr(random.standard_normal((max(rows, columns), min(rows, columns))))
        q *= np.sign(np.diag(r))
        return constant((self.gain * (q if rows >= columns else q.T)).reshape(shape).astype(dtype.numpy))


class Identity(Initializer):
    """gain times the identity matrix."""

    def __init__(self, gain: float = 1.0, dtype: Any = f32) -> None:
        super().__init__(dtype)
        self.gain = gain

    def make(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return constant((self.gain * np.eye(shape[0], shape[-1])).astype(dtype.numpy))


def fans(shape: tuple[int, ...]) -> tuple[float, float]:
    """(fan in, fan out): of a matrix its rows and columns, of a convolution those of its channels times the window."""
    if not shape:
        return 1.0, 1.0
    if len(shape) == 1:
        return float(shape[0]), float(shape[0])
    window = math.prod(shape[:-2])
    return float(shape[-2] * window), float(shape[-1] * window)


def glorot_uniform_initializer(seed: int | None = None, dtype: Any = f32) -> VarianceScaling:
    """Uniform in +-sqrt(6 / (fan_in + fan_out))."""
    return VarianceScaling(1.0, "fan_avg", "uniform", seed, dtype)


def glorot_normal_initializer(seed: int | None = None, dtype: Any = f32) -> VarianceScaling:
    return VarianceScaling(1.0, "fan_avg", "truncated_normal", seed, dtype)


def he_uniform(seed: int | None = None, dtype: Any = f32) -> VarianceScaling:
    return VarianceScaling(2.0, "fan_in", "uniform", seed, dtype)


def he_normal(seed: int | None = None, dtype: Any = f32) -> VarianceScaling:
    return VarianceScaling(2.0, "fan_in", "truncated_normal", seed, dtype)


def lecun_uniform(seed: int | None = None, dtype: Any = f32) -> VarianceScaling:
    return VarianceScaling(1.0, "fan_in", "uniform", seed, dtype)


def lecun_normal(seed: int | None = None, dtype: Any = f32) -> VarianceScaling:
    return VarianceScaling(1.0, "fan_in", "truncated_normal", seed, dtype)


zeros = zeros_initializer = Zeros
ones = ones_initializer = Ones
constant_initializer = Constant
random_normal_initializer = RandomNormal
truncated_normal_initializer = TruncatedNormal
random_uniform_initializer = RandomUniform
variance_scaling_initializer = variance_scaling = VarianceScaling
orthogonal_initializer = orthogonal = Orthogonal
identity_initializer = identity = Identity
glorot_uniform, glorot_normal = glorot_uniform_initializer, glorot_normal_initializer
xavier_initializer = glorot_uniform_initializer
