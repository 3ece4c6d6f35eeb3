"""The vocabulary in which a frontend says how a program finds its arguments: addresses, numbers, or cells that hold values.

A cell is an object of the frontend that holds a value, which holds a buffer. READ reads the buffer; OWNED overwrites it, if nothing but
the cell holds the value and nothing but the value the buffer; GRADIENT is an object that holds such a cell, of class `type`, which
nothing else holds; GRADIENT_READ one whose cell is read. ANY is READ of a cell that may have a storage. The call is refused, with nothing
changed, where that does not hold. ARRAY is a NumPy array, whose memory is read or written (`Bound.takes_arrays`).
"""

from __future__ import annotations

from typing import NamedTuple

NUMBER, POINTER = -1, 0
READ, OWNED, GRADIENT, ANY, GRADIENT_READ, SAME, ARRAY = range(10, 17)
CELL_LAYOUT = (
    "none", "type", "empty", "cell.value", "cell.storage", "cell.leaf", "cell.chain", "cell.seen",
    "value.buf", "value.info", "value.extra", "value.trace", "value.stamp", "storage.val", "storage.shared", "storage.version",
    "buffer.ptr", "buffer.home", "buffer.shared", "leaf.grad",
)  # fmt: skip


class Argument(NamedTuple):
    """How an argument of a cell entry is given: `kind` is NUMBER, POINTER (an address), ARRAY or a kind of cell, with the info and extra that its
    value must have (SAME: the value itself in place of its info). slots: the program's inputs and outputs that it is. others: how many
    references to an OWNED value, and how many to its buffer, the caller has itself."""

    kind: int
    slots: tuple[int, ...]
    info: object = None
    extra: object = None
    others: int = 0
