"""Loaded code: a shared library in memory and a model of it, called by addresses. Nothing of the compiler is imported.

The library comes from a file (`/proc/self/fd` of memory that has no name), so the system's own loader puts it in place. A model serves one call at a
time, so that calls take a lock.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from duo_backends.cpu.system import system
from duo_ir.errors import ArgumentError, DeviceError, DuoError, FormatError, IndexOutOfRange, ShapeError

_CODES = {
    1: ArgumentError, 2: ShapeError, 3: MemoryError, 4: IndexOutOfRange, 5: ArgumentError, 6: DeviceError, 7: ArgumentError,
    8: FormatError,
}  # fmt: skip
_NAMES = {
    3: "there is not enough memory",
    7: "an option is not possible",
}


_numbers = itertools.count(1)
_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _renew_locks() -> None:
    for model in _models:
        model.lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Code:
    """The library of an artefact called `name`. Raises DeviceError where the system does not load it."""

    def __init__(self, library: bytes | memoryview, name: str) -> None:
        self.name = name
        self.handle = _load(library, name)

    def function(self, name: str, arguments: int, result: Any = ctypes.c_int64) -> Any:
        """The C function of that name, after the prefix, of so many 64-bit arguments."""
        found = getattr(self.handle, f"{self.name}_{name}")
        found.argtypes, found.restype = [ctypes.c_int64] * arguments, result
        return found


class Model:
    """A model of a library. `weights`: the address of its weights; `keep`: what they belong to; `lock` is held during a call."""

    def __init__(self, code: Code, weights: int, threads: int, keep: Any) -> None:
        self._code, self._keep = code, keep
        self.lock = threading.Lock()
        _models.add(self)
        self._destroy = code.function("destroy", 1, None)
        self._message = code.function("message", 1, ctypes.c_char_p)
        self._model = 0
        options = (ctypes.c_int64 * 5)(threads, 0, 0, 0, weights)
        place = ctypes.c_int64()
        self.check(code.function("create", 2)(ctypes.addressof(options), ctypes.addressof(place)))
        self._model = place.value

    def check(self, code: int) -> None:
        """Raises what a result code means."""
        if code == 0:
            return
        said = _NAMES.get(code, "")
        if code == 6 or (self._model and code != 7):
            said = (self._message(self._model) or b"").decode() or said
        raise _CODES.get(code, DuoError)(said)

    def program(self, name: str, arguments: int) -> Any:
        """A function that runs a program on sizes and addresses, `arguments` in all, and raises what went wrong."""
        run = self._code.function(name, 1 + arguments)

        def call(*given: int) -> None:
            with self.lock:
                code = run(self._model, *given)
                if code:
                    self.check(code)

        return call

    def init(self, seed: int) -> None:
        """All states as at the start, drawn anew from a seed."""
        with self.lock:
            self.check(self._code.function("init", 2)(self._model, (seed + (1 << 63)) % (1 << 64) - (1 << 63)))

    def save(self, path: str) -> None:
        """Writes a checkpoint. Raises FormatError."""
        self._with_path("save", path)

    def load(self, path: str) -> None:
        """Reads a checkpoint. Raises FormatError, with nothing changed."""
        self._with_path("load", path)

    def _with_path(self, name: str, path: str) -> None:
        encoded = ctypes.create_string_buffer(os.fsencode(path))
        with self.lock:
            self.check(self._code.function(name, 2)(self._model, ctypes.addressof(encoded)))

    def state(self, name: str) -> memoryview:
        """The bytes of a state, as they are now."""
        encoded, nbytes = ctypes.create_string_buffer(name.encode()), ctypes.c_int64()
        with self.lock:
            find = self._code.function("state", 3)
            at = find(self._model, ctypes.addressof(encoded), ctypes.addressof(nbytes))
            if not at:
                raise ArgumentError(f"{self._code.name} has no state {name!r}")
            return memoryview(ctypes.string_at(at, nbytes.value))

    def set_state(self, name: str, content: bytes) -> None:
        """Replaces a state's bytes."""
        encoded, nbytes = ctypes.create_string_buffer(name.encode()), ctypes.c_int64()
        with self.lock:
            find = self._code.function("state", 3)
            at = find(self._model, ctypes.addressof(encoded), ctypes.addressof(nbytes))
            if not at or nbytes.value != len(content):
                raise ArgumentError(f"{self._code.name} has no state {name!r} of {len(content)} bytes")
            ctypes.memmove(at, content, len(content))

    def direct(self, name: str, arguments: int) -> tuple[Any, int]:
        """The C function of a program without free sizes, to be called with `lock` held, and its first argument."""
        return self._code.function(name, 1 + arguments), self._model

    def scratch_bytes(self, name: str, sizes: Sequence[int]) -> int:
        """Bytes of temporaries of a program for these sizes."""
        with self.lock:
            got = self._code.function(f"{name}_scratch_bytes", 1 + len(sizes))(self._model, *sizes)
            if got < 0:
                self.check(-got)
        return got  # type: ignore[no-any-return]

    def __del__(self) -> None:
        if getattr(self, "_model", 0):
            self._destroy(self._model)
            self._model = 0


def _load(library: bytes | memoryview, name: str) -> ctypes.CDLL:
    make = getattr(os, "memfd_create", None)
    if make is None:
        raise DeviceError("artefacts load on Linux only")
    fd = make(f"duo:{name}")
    try:
        left = memoryview(library)
        while left:
            left = left[os.write(fd, left) :]
        # The loader takes a library whose path it knows for one that is there already, and numbers of files come again.
        bits = f"{next(_numbers):b}".replace("0", "/").replace("1", "/.")
        return ctypes.CDLL(f"/proc/self{bits}/fd/{fd}")
    except OSError as error:
        raise DeviceError(f"the code of {name} does not load: {error}") from None
    finally:
        os.close(fd)


def has_features(needs: Sequence[str]) -> bool:
    """Whether this machine's CPU has all of these. They are looked at again when a model is made, by asking the CPU."""
    return not needs or set(needs) <= system.cpu_features()
