"""Smooth activations as ops of two results, value and slope: a gradient is cotangent * slope, whichever kernel has the slope.

Fusion computes the slope beside the value where memory is saved by that, and leaves it out where nothing reads it. Further derivatives
are ordinary ops.
"""

from __future__ import annotations

import math as pymath
from collections.abc import Callable, Sequence

from duo_ir.core import Op, Value
from duo_ir.errors import DTypeError
from duo_ir.opdef import Elementwise, OpDef
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.scalar import activation
from duo_ir.scalar.protocol import Recipe
from duo_ir.types import TensorType


def _type(x: TensorType) -> tuple[TensorType, TensorType]:
    if not x.dtype.is_float:
        raise DTypeError(f"it takes floats, not {x.dtype.name}; cast the operand")
    return x, x


def _activation(name: str, recipe: Recipe, bend: Callable[[Value], Value], doc: str) -> OpDef:
    """`bend`: the second derivative in ops."""

    def pull(op: Op, g: Value, g_slope: Value) -> tuple[Value]:
        out = g * op.results[1]
        # nothing reads the slope but gradients, so its cotangent is usually the zeros put in for none
        return (out if nd.literal(g_slope) == 0 else out + g_slope * bend(op.operands[0]),)

    def push(op: Op, tangents: Sequence[Value | None]) -> tuple[Value, Value]:
        (t,) = tangents
        assert t is not None
        return t * op.results[1], t * bend(op.operands[0])

    return OpDef(name, _type, Elementwise(recipe, cheap=False), vjp=pull, jvp=push, doc=doc)


def _logistic_bend(x: Value, exponent: Value, steep: Value, steeper: Value | None) -> Value:
    """Of x * p with p the logistic function of `exponent`, whose first and second derivatives are given."""
    p = ew.sigmoid(exponent)
    q = p * (1.0 - p)
    out = q * steep * (2.0 + x * steep * (1.0 - p * 2.0))
    return out if steeper is None else out + x * q * steeper


def _gelu_tanh_bend(x: Value) -> Value:
    square = x * x
    exponent = x * (square * activation.GELU_CUBIC + activation.GELU_LINEAR)
    steep = square * (3.0 * activation.GELU_CUBIC) + activation.GELU_LINEAR
    return _logistic_bend(x, exponent, steep, x * (6.0 * activation.GELU_CUBIC))


def _gelu_bend(x: Value) -> Value:
    square = x * x
    return ew.exp(square * -0.5) * (2.0 - square) * (1.0 / pymath.sqrt(2.0 * pymath.pi))


gelu_tanh = _activation(
    "gelu_tanh", activation.gelu_tanh, _gelu_tanh_bend, "x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), and its slope."
)  # fmt: skip
gelu = _activation("gelu", activation.gelu, _gelu_bend, "x times the normal distribution function of x, and its slope.")
silu = _activation(
    "silu", activation.silu, lambda x: _logistic_bend(x, x, nd.ones_like(x), None), "x / (1 + e^-x), and its slope."
)  # fmt: skip
