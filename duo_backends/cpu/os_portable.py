"""The answers of `os_linux.py` for any other system: a poll in place of futex, and ctypes' own memory.

Without pthreads (Windows) there is no pool: `wait_text` is None and programs run on the caller's thread.
"""

from __future__ import annotations

import ctypes
import os
import sys

SIG_SETMASK = 3  # of macOS and the BSDs

_blocks: dict[int, ctypes.Array] = {}
_PAGE = 4096


def wait_text() -> str | None:
    """@duo.wait polls every 50 microseconds, so @duo.wake has nothing to do."""
    if os.name == "nt":
        return None
    return """
declare i32 @usleep(i32)
define internal void @duo.wait(ptr %word, i32 %seen) nounwind {
  %now = load atomic i32, ptr %word seq_cst, align 4
  %same = icmp eq i32 %now, %seen
  br i1 %same, label %sleep, label %done
sleep:
  %r = call i32 @usleep(i32 50)
  br label %done
done:
  ret void
}
define internal void @duo.wake(ptr %word) nounwind {
  ret void
}
"""


def clock_text() -> str:
    """@duo.now() as in `os_linux.py`: macOS's clock; 0, which profiles refuse, on other systems."""
    if sys.platform != "darwin":
        return "define internal i64 @duo.now() nounwind {\n  ret i64 0\n}\n"
    return """
declare i64 @clock_gettime_nsec_np(i32)
define internal i64 @duo.now() nounwind {
  %now = call i64 @clock_gettime_nsec_np(i32 8)
  ret i64 %now
}
"""


def cpu_features() -> frozenset[str]:
    """See `os_linux.cpu_features`: not known here."""
    return frozenset()


def usable_cores() -> int:
    return os.cpu_count() or 1


def physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def map_block(nbytes: int) -> int:
    """Address of a fresh zeroed block, aligned to a page; 0 when there is no memory."""
    try:
        memory = (ctypes.c_char * (nbytes + _PAGE))()
    except MemoryError:
        return 0
    block = -(-ctypes.addressof(memory) // _PAGE) * _PAGE
    _blocks[block] = memory
    return block


def unmap_block(address: int, nbytes: int) -> None:
    del _blocks[address]


def return_heap() -> None:
    """There is no portable way."""
