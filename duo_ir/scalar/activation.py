"""Recipes of smooth activations: (value, slope), so that a gradient is one multiplication by what the forward pass knew anyway.

All are x times a distribution function of x. As everywhere: f32 or f64, no branches, NaN stays.
"""

from __future__ import annotations

import math

from duo_ir.scalar import explog
from duo_ir.scalar.common import Builder, H, float_of, literals
from duo_ir.scalar.special import erf

# Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016): 0.5 * (1 + tanh(z)) with z = sqrt(2/pi) * (x + 0.044715 x^3), which is
# the logistic function of 2z = x * (GELU_LINEAR + GELU_CUBIC * x^2).
GELU_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR


def gelu_tanh(s: Builder, x: H) -> tuple[H, H]:
    """x * p and p + x * p * (1 - p) * (2z)', with p the logistic function of 2z."""
    k = literals(s, float_of(s, x, "gelu_tanh"))
    square = s.mul(x, x)
    exponent = s.mul(x, s.fma(square, k(GELU_CUBIC), k(GELU_LINEAR)))
    p = s.div(k(1.0), s.add(k(1.0), explog.exp(s, s.neg(exponent))))
    steep = s.fma(square, k(3.0 * GELU_CUBIC), k(GELU_LINEAR))
    return s.mul(x, p), s.fma(s.mul(x, s.fma(s.neg(p), p, p)), steep, p)


def gelu(s: Builder, x: H) -> tuple[H, H]:
    """x * P(x) and P(x) + x * exp(-x^2/2) / sqrt(2 pi), with P the normal distribution function."""
    k = literals(s, float_of(s, x, "gelu"))
    p = s.fma(erf(s, s.mul(x, k(math.sqrt(0.5)))), k(0.5), k(0.5))
    density = s.mul(explog.exp(s, s.mul(s.mul(x, x), k(-0.5))), k(1.0 / math.sqrt(2.0 * math.pi)))
    return s.mul(x, p), s.fma(x, density, p)


def silu(s: Builder, x: H) -> tuple[H, H]:
    """x * p and p + x * p * (1 - p), with p the logistic function of x."""
    one = s.const(1.0, float_of(s, x, "silu"))
    p = explog.sigmoid(s, x)
    value = s.mul(x, p)
    return value, s.fma(value, s.sub(one, p), p)
