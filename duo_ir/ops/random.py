"""Random bits: a counter-based stream, so that program order, fusion and threads do not change what is drawn.

Distributions are composites over these bits (uniform, normal by inversion...), shared by both frontends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duo_ir.core import Op, Value
from duo_ir.errors import DTypeError, ShapeError
from duo_ir.opdef import Elementwise, Generate, OpDef, same_type
from duo_ir.ops import broadcasting as nd
from duo_ir.ops.checks import check_shape
from duo_ir.scalar import math
from duo_ir.types import DimLike, Shape, TensorType, i32, i64, product


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


def _word(s: Any, key: Any, counter: Any, position: Any) -> Any:
    block = s.add(counter, s.lshr(position, s.const(2, i64)))
    zero = s.const(0, i32)
    words = math.philox_4x32_10(s, (*_words(s, block), zero, zero), _words(s, key))
    lane = s.and_(position, s.const(3, i64))
    out = words[3]
    for n in (2, 1, 0):
        out = s.select(s.eq(lane, s.const(n, i64)), words[n], out)
    return out


def _random_bits(s: Any, indices: Any, linear: Any, key: Any, counter: Any, *, shape: Shape) -> Any:
    return _word(s, key, counter, linear)


def _random_word_type(*operands: TensorType) -> TensorType:
    if operands[0].dtype is not i64:
        raise DTypeError(f"keys, counters and positions are i64, not {operands[0].dtype.name}; cast them")
    return same_type("random_word", *operands).with_dtype(i32)


def _random_bits_batch(op: Op, operands: Sequence[Value], batched: Sequence[bool], size: DimLike) -> Value:
    """Every sample has a key or a counter of its own."""
    shape = op.attrs["shape"]
    position = nd.reshape(nd.iota((product(shape),), 0), shape)
    own = [nd.reshape(x, (size, *(1,) * len(shape))) if b else x for x, b in zip(operands, batched)]
    out: Value = random_word(*[nd.broadcast_to(x, (size, *shape)) for x in (*own, position)])
    return out


random_word = OpDef(
    "random_word",
    _random_word_type,
    Elementwise(_word, cheap=False),
    doc="random_word(key, counter, position), all i64 -> i32: what `random_bits` of that key and counter has at that position.",
)
random_bits = OpDef(
    "random_bits",
    _random_bits_type,
    Generate(_random_bits),
    batch=_random_bits_batch,
    doc="random_bits(key i64[], counter i64[]; shape) -> i32[shape]. Word i (row-major) is word i mod 4 of Philox-4x32-10 with"
    " the 64-bit key and the 128-bit counter `counter + i div 4` (64-bit wrap, high half 0).",
)
