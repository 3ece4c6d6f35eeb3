"""What the CPU runtime asks of Linux: sleeping on a word of memory (futex), blocks backed by huge pages, usable cores.

`os_portable.py` answers the same questions elsewhere; `system.py` picks one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform

HUGE = 2 << 20
SIG_SETMASK = 2
_MADV_HUGEPAGE = 14
_LLVM_NAMES = {"pni": "sse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "bmi1": "bmi", "abm": "lzcnt", "lahf_lm": "sahf"}
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def wait_text(arch: str | None = None) -> str:
    """LLVM text of @duo.wait(word, seen), which sleeps while *word == seen (it may also wake for no reason), and
    @duo.wake(word), which wakes all sleepers of that word. `arch`: without, this machine's."""
    number = {"x86_64": 202, "aarch64": 98, "riscv64": 98}[arch or platform.machine()]
    return f"""
declare i64 @syscall(i64, ...)
define internal void @duo.wait(ptr %word, i32 %seen) nounwind {{
  %r = call i64 (i64, ...) @syscall(i64 {number}, ptr %word, i32 {_FUTEX_WAIT_PRIVATE}, i32 %seen, ptr null)
  ret void
}}
define internal void @duo.wake(ptr %word) nounwind {{
  %r = call i64 (i64, ...) @syscall(i64 {number}, ptr %word, i32 {_FUTEX_WAKE_PRIVATE}, i32 2147483647)
  ret void
}}
"""


def clock_text() -> str:
    """LLVM text of @duo.now(), nanoseconds of the clock of `time.perf_counter_ns`."""
    return """
declare i32 @clock_gettime(i32, ptr)
define internal i64 @duo.now() nounwind {
  %time = alloca [2 x i64]
  %r = call i32 @clock_gettime(i32 1, ptr %time)
  %seconds = load i64, ptr %time
  %rest = getelementptr i64, ptr %time, i64 1
  %nanoseconds = load i64, ptr %rest
  %whole = mul i64 %seconds, 1000000000
  %now = add i64 %whole, %nanoseconds
  ret i64 %now
}
"""


def cpu_features() -> frozenset[str]:
    """Features of the CPU by LLVM's names, as /proc/cpuinfo lists them (x86-64)."""
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read(8192).split("\n\n")[0].splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in first if line.startswith("flags")), [])
    return frozenset([_LLVM_NAMES.get(flag, flag) for flag in flags])


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def map_block(nbytes: int) -> int:
    """Address of a fresh zeroed block of at least 1 MiB, aligned and advised for huge pages; 0 when there is no memory."""
    align = HUGE if nbytes >= HUGE else mmap.PAGESIZE
    length = nbytes + align - mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if start in (None, _FAILED):
        return 0
    block = -(-start // align) * align
    if block > start:
        _libc.munmap(start, block - start)
    if start + length > block + nbytes:
        _libc.munmap(block + nbytes, start + length - block - nbytes)
    _libc.madvise(block, nbytes, _MADV_HUGEPAGE)
    return block


def protect(address: int, nbytes: int, executable: bool) -> None:
    """Makes whole pages read-only, for code `executable` too."""
    if _libc.mprotect(address, nbytes, mmap.PROT_READ | (mmap.PROT_EXEC if executable else 0)) != 0:
        raise OSError(ctypes.get_errno(), "mprotect refuses to make code executable")


def unmap_block(address: int, nbytes: int) -> None:
    _libc.munmap(address, nbytes)


def return_heap() -> None:
    """Gives what the C library's heap holds free back to the system, where it can (glibc): a code generator leaves megabytes."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
