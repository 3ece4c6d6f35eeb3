"""Packing a contraction's operand one block ahead, in pieces between the micro-kernels of the block before.

An operand that is packed is read in short rows far apart, and all at once they would be waited for. So before each micro-kernel some k steps of the
next block (or of the next unit's first) are packed into a second slot, and the micro-kernel asks for what the one after it will find packed
(`gemm_epilogue.py` says how). Only the first block of a call is packed all at once.
"""

from __future__ import annotations

from typing import NamedTuple

from duo_backends.cpu.gemm_plan import Plan
from duo_backends.cpu.gemm_tile import LINE
from duo_backends.cpu.llvm import Function


class Block(NamedTuple):
    """SSA names: what is to be packed of a block. `source`: the operand at its first k step; `first`: how many bytes from there its lanes begin;
    `step`: bytes between k steps; `k`: its k steps; `to`: where they go; `low`, `high`: the row tiles or panels of its unit; `piece`: k steps that
    are packed before each micro-kernel."""

    source: str
    first: str
    step: str
    k: str
    to: str
    low: str
    high: str
    piece: str


def ahead_offsets(plan: Plan) -> list[int]:
    """Offsets in bytes from the start of a k step's lanes of what meets all lines that they lie in; none where nothing is packed ahead."""
    if not plan.ahead:
        return []
    nbytes = plan.ahead_bytes
    last = [] if nbytes % LINE == 0 else [nbytes - 1]
    return [*range(0, nbytes, LINE), *last]


def piece_of(f: Function, block: Block, number: str) -> tuple[str, str]:
    """K steps [begin, end) that are packed before micro-kernel `number`."""
    begin = f.min(f.mul(number, block.piece), block.k)
    return begin, f.min(f.add(begin, block.piece), block.k)


def emit_ahead_asks(f: Function, plan: Plan, block: Block, begin: str, table: str) -> str:
    """Puts down the addresses of the lines that the piece from k step `begin` on lies in; gives their number."""
    offsets = ahead_offsets(plan)
    steps = f.min(f.min(f.sub(block.k, begin), block.piece), str(plan.ahead_steps))
    first = f.gep("i8", block.source, f.add(f.mul(begin, block.step), block.first))
    with f.loop("0", steps, 1, [("ptr", first), ("ptr", table)]) as loop:
        source, at = loop.values
        for offset in offsets:
            f.emit(f"store ptr {f.gep('i8', source, str(offset))}, ptr {at}, align 8")
            at = f.op(f"getelementptr i8, ptr {at}, i64 8")
        loop.next = [f.op(f"getelementptr i8, ptr {source}, i64 {block.step}"), at]
    return f.mul(steps, str(len(offsets)))
