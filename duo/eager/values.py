"""Values outside of ops: material ones, the values of leaves, and the note that an in-place op has replaced one."""

from __future__ import annotations

from typing import Any

from duo import runtime
from duo.devices import CPU
from duo.eager.autograd import GradLeaf
from duo.eager.segments import Origin
from duo.eager.trace import Val, aside, commit, note_overwritten, note_overwritten_here, open_trace, settle, state
from duo.eager.trie import MARK, Info
from duo_ir.core import Value
from duo_ir.ops.broadcasting import broadcast_to, cast_to
from duo_ir.types import DType, Shape, TensorType


def material(buffer: Any, type: TensorType, requires_grad: bool = False) -> Val:
    """A value that is there, on the buffer's device."""
    val = Val(None, -1, None, Info(type, requires_grad, buffer.device))
    val.buf = buffer
    if state.capture is not None:
        state.capture.made.add(val)
    return val


def filled(value: Any, type: TensorType, device: str = CPU) -> Val:
    """Every element a Python number or NumPy scalar."""
    return material(aside(runtime.filled, value, type, device), type)


def conform(new: Value, dtype: DType, shape: Shape) -> Value:
    """A body: `new` cast and broadcast."""
    return broadcast_to(cast_to(new, dtype), shape)


def as_leaf(val: Val, leaf: GradLeaf) -> Val:
    """`val` as the value of a leaf."""
    while True:
        trace = open_trace()
        if val.trace is trace:
            made = commit(trace, (MARK, val.index))
            if made is None:
                continue
            made[0].extra = leaf
            trace.link(leaf, made[0].index)
            return made[0]
        out = material(settle(val), val.info.type, True)
        out.extra = leaf
        return out


def overwrite(vals: tuple[Val, ...], by: Val) -> None:
    """Notes that an in-place op has replaced `vals`, those of a tensor and of its storage, by what it computed, `by`, for backward's check."""
    if by.buf is not None and isinstance(by.extra, Origin) and by.extra.segment is not None:
        for val in vals:
            by.extra.segment.note_overwritten(val, by.extra.number)
    trace = state.trace
    node = trace.entries[-1].node
    tracked = node is not None and node.tracked
    numbers = {val.index if val.trace is trace else trace.leaves.get(val) for val in vals} if tracked else set()
    for val in vals:
        if val.stamp is not None and val.stamp.trace is trace:
            val.stamp.numbers = [n for n in val.stamp.numbers if n not in numbers] if tracked else []
        note_overwritten(val)
    for number in numbers:
        if number is not None:
            note_overwritten_here(trace, number, by.index if by.trace is trace else -1)
