"""The loader of object files: what it loads computes the same as under LLVM's linker, and what it cannot load it refuses."""

import ctypes
import gc
import platform
import sys
import threading
import time

import pytest

from duo_backends.cpu import jit
from duo_backends.cpu.objects import Unsupported, load_objects
from duo_ir.errors import DeviceError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the loader is for x86-64 Linux"
)

# Constants, a variable, zeroed memory, calls inside and outside, a call in tail position.
TEXT = """
@table = internal constant [4 x i64] [i64 3, i64 5, i64 7, i64 11]
@count = internal global i64 100
@room = internal global [64 x i8] zeroinitializer, align 64
declare ptr @memcpy(ptr, ptr, i64)
declare i64 @strlen(ptr)
declare i64 @duo_given(i64)
define internal i64 @pick(i64 %k) noinline nounwind {
  %at = getelementptr [4 x i64], ptr @table, i64 0, i64 %k
  %v = load i64, ptr %at
  ret i64 %v
}
define i64 @next(i64 %k) nounwind {
  %old = load i64, ptr @count
  %new = add i64 %old, 1
  store i64 %new, ptr @count
  %v = call i64 @pick(i64 %k)
  %sum = add i64 %new, %v
  ret i64 %sum
}
define i64 @length(ptr %text, i64 %n) nounwind {
  %c = call ptr @memcpy(ptr @room, ptr %text, i64 %n)
  %r = tail call i64 @strlen(ptr @room)
  ret i64 %r
}
define i64 @asks(i64 %k) nounwind {
  %r = call i64 @duo_given(i64 %k)
  ret i64 %r
}
define <8 x float> @wide(<8 x float> %x) nounwind {
  %y = fadd <8 x float> %x, <float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0, float 8.0>
  ret <8 x float> %y
}
"""
SYMBOLS = ("next", "length", "asks", "wide")
GIVEN = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(lambda k: 10 * k)
IMPORTS = {"duo_given": ctypes.cast(GIVEN, ctypes.c_void_p).value}


@pytest.fixture(scope="module")
def code():
    return jit.object_codes([TEXT], jit.machine())[0]


def check(addresses):
    number = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    step, asks = number(addresses["next"]), number(addresses["asks"])
    assert [step(k) for k in (0, 3, 2)] == [101 + 3, 102 + 11, 103 + 7]
    assert asks(7) == 70
    length = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)(addresses["length"])
    assert length(b"seven..", 8) == 7 and length(b"one", 4) == 3


def test_same_results_as_llvm_s_linker(code):
    addresses, memory = load_objects([code], IMPORTS)
    check(addresses[0])
    assert set(SYMBOLS) <= set(addresses[0]) and memory.nbytes % 4096 == 0
    library = jit.link(code, SYMBOLS, IMPORTS)
    check(library.addresses)


def test_objects_loaded_together_keep_their_own_variables(code):
    addresses, _memory = load_objects([code] * 3, IMPORTS)
    for each in addresses:
        check(each)  # `count` starts at 100 in each
    assert len({a["next"] for a in addresses}) == 3


def test_memory_outlives_all_but_its_last_user(code):
    library = jit.load(code, SYMBOLS, IMPORTS)
    second = jit.load(code, SYMBOLS, IMPORTS)
    del second
    gc.collect()
    check(library.addresses)


def test_code_is_never_writable_and_executable(code):
    addresses, memory = load_objects([code], IMPORTS)
    seen = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, rights, *_ = line.split()
            begin, end = (int(x, 16) for x in span.split("-"))
            if begin < memory.address + memory.nbytes and end > memory.address:
                seen.add(rights[:3])
                if begin <= addresses[0]["next"] < end:
                    assert rights[:3] == "r-x"
    assert "r-x" in seen and not any("w" in r and "x" in r for r in seen)


def test_an_unknown_function_is_named(code):
    with pytest.raises(DeviceError, match="no function 'duo_given'"):
        load_objects([code])
    with pytest.raises(DeviceError, match="duo_given"):
        jit.load(code, SYMBOLS)


def test_what_is_not_an_object_is_refused(code):
    for bad in (b"", b"\x7fELF", b"x" * 200, code[:16] + b"\x02\x00" + code[18:], code[:18] + b"\xb7\x00" + code[20:]):
        with pytest.raises(Unsupported):
            load_objects([bad])


def test_truncated_objects_are_refused(code):
    for size in range(0, len(code), 97):
        with pytest.raises((Unsupported, DeviceError)):
            load_objects([code[:size]], IMPORTS)


def test_threads_that_compile_together_leave_the_switch_interval_as_it_was():
    """The second thread comes while the first has lowered it."""
    before = sys.getswitchinterval()
    other = threading.Thread(target=lambda: jit.object_codes([], jit.machine()))
    with jit._lock:
        sys.setswitchinterval(before / 10)
        other.start()
        time.sleep(0.1)
        sys.setswitchinterval(before)
    other.join()
    assert sys.getswitchinterval() == pytest.approx(before)
