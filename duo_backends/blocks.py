"""What the allocators of all devices share: sizes of blocks, statistics, and the error when there is no memory."""

from __future__ import annotations

from dataclasses import dataclass

from duo_ir.errors import DeviceError

ALIGNMENT = 64


class OutOfMemory(DeviceError, MemoryError):
    """The system, or the device, has no memory for a buffer."""


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes, counted in whole blocks: taken from the system, of those in free lists, and the most ever taken."""

    reserved: int
    cached: int
    peak: int

    @property
    def allocated(self) -> int:
        """Bytes in live buffers (and slabs' remainders)."""
        return self.reserved - self.cached


def class_size(nbytes: int) -> int:
    """Size of the block that serves a request: at least `nbytes`, at most an eighth more above 512 bytes, and whole
    pages from 1 MiB on."""
    if nbytes <= 512:
        return max(-(-nbytes // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
    step = 1 << ((nbytes - 1).bit_length() - 4)
    return -(-nbytes // step) * step
