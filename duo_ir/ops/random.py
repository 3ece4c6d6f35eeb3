"""Random bits: a counter-based stream, so that program order, fusion and threads do not change what is drawn.

Distributions are composites over these bits (uniform, normal by inversion...), shared by both frontends.
"""

from __future__ import annotations

from typing import Any

from duo_ir.errors import DTypeError, ShapeError
from duo_ir.opdef import Generate, OpDef
from duo_ir.ops.checks import check_shape
from duo_ir.scalar import math
from duo_ir.types import Shape, TensorType, i32, i64


def _random_bits_type(key: TensorType, counter: TensorType, *, shape: Shape) -> TensorType:
    for name, t in (("key", key), ("counter", counter)):
        if t.dtype is not i64:
            raise DTypeError(f"the {name} is i64, not {t.dtype.name}; cast it")
        if t.shape != ():
            raise ShapeError(f"the {name} is one number (shape []), not {t}")
    check_shape(shape)
    return TensorType(i32, shape)


def _words(s: Any, x: Any) -> tuple[Any, Any]:
    """The low and the high 32 bits of an i64, as i32."""
    return s.convert(x, i32), s.convert(s.lshr(x, s.const(32, i64)), i32)


def _random_bits(s: Any, indices: Any, linear: Any, key: Any, counter: Any, *, shape: Shape) -> Any:
    block = s.add(counter, s.lshr(linear, s.const(2, i64)))
    zero = s.const(0, i32)
    words = math.philox_4x32_10(s, (*_words(s, block), zero, zero), _words(s, key))
    lane = s.and_(linear, s.const(3, i64))
    out = words[3]
    for n in (2, 1, 0):
        out = s.select(s.eq(lane, s.const(n, i64)), words[n], out)
    return out


random_bits = OpDef(
    "random_bits",
    _random_bits_type,
    Generate(_random_bits),
    doc="random_bits(key i64[], counter i64[]; shape) -> i32[shape]. Word i (row-major) is word i mod 4 of Philox-4x32-10 with"
    " the 64-bit key and the 128-bit counter `counter + i div 4` (64-bit wrap, high half 0).",
)
