"""The native part of the runtime, loaded once a process: the thread pool and the program runner.

`native()` compiles (or takes from disk) the text of `pool_text.py` and `runner_text.py`; `make_entry` turns the address
of a bound program's plan into the Python function that runs it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable, Sequence
from typing import Any

from duo_backends.cache import disk_cache
from duo_backends.cpu import pool_text, runner_text, threads
from duo_backends.cpu.fingerprint import fingerprint
from duo_backends.cpu.library import Library, build_for_host, compiler, host_key
from duo_backends.cpu.system import system

METH_KEYWORDS, METH_FASTCALL = 0x02, 0x80  # Include/methodobject.h


class MethodDef(ctypes.Structure):
    """PyMethodDef, of Include/methodobject.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def python_symbols(names: Sequence[str]) -> dict[str, int]:
    """Addresses taken from the running interpreter: its symbols need not be visible to a linker."""
    return {name: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0 for name in names}


class Native:
    """The loaded runtime. The control functions release the GIL."""

    def __init__(self) -> None:
        symbols = (*pool_text.SYMBOLS, *runner_text.SYMBOLS)
        imports = python_symbols(runner_text.PYTHON)
        self.library: Library = build_for_host(
            _text(), symbols, fingerprint(), imports, None if _making is None else _making.code()
        )
        addresses = self.library.addresses
        number = ctypes.CFUNCTYPE(None, ctypes.c_int64)
        self.resize = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(addresses["duo_resize"])
        self.set_spins = number(addresses["duo_set_spins"])
        self.relax_times = number(addresses["duo_relax_times"])
        self.forget = ctypes.CFUNCTYPE(None)(addresses["duo_forget"])
        self.set_profile = number(addresses["duo_set_profile"])
        self.copy = addresses["duo_copy"]
        self._method = MethodDef(b"duo_program", addresses["duo_entry"], METH_FASTCALL, None)
        new = ctypes.pythonapi.PyCMethod_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p],
        )
        self._new = new
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def make_entry(self, plan: int) -> Callable[..., int]:
        """A Python function that runs the plan at that address (see `runner_text.py`); the plan must outlive it."""
        return self._new(ctypes.addressof(self._method), plan, None, None)


def _text() -> str:
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    text = pool_text.pool_text(arch, system.wait_text(), system.SIG_SETMASK)
    return text + system.clock_text() + runner_text.runner_text()


def prepare() -> None:
    """Begins to generate the runtime's object code if it is not on disk. For someone who has other work to do before `native` is called."""
    global _making
    if _native is not None or _making is not None:
        return
    text, host = _text(), fingerprint()
    if host is None or not disk_cache().has(host_key(text, host)):
        _making = compiler().Early(text)


_making: Any = None  # a `jit.Early`
_native: Native | None = None
_lock = threading.Lock()


def native() -> Native:
    """The runtime, loaded at the first call."""
    global _making, _native
    if _native is not None:
        return _native
    with _lock:
        if _native is None:
            made = Native()
            threads.attach(made)
            _native, _making = made, None
    return _native
