"""Names of devices: 'cpu', and 'cuda:N' for GPU number N; and which of them new tensors are made on.

A name in its canonical form is one string object, so programs and values keep it and compare it by identity. Nothing here looks
whether a device is there (`duo.runtime.check_device` does), and nothing of CUDA is touched.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from typing import Any

from duo_ir.errors import DeviceError

CPU = "cpu"
_FORM = re.compile(r"(cpu)(?::0)?|(cuda)(?::(\d+))?")


class _Ambient(threading.local):
    """Per thread: names that `with duo.device(...)` set, and the GPU that 'cuda' means."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gpu = 0


_ambient = _Ambient()
_default = [CPU]
_listeners: list[Callable[[], None]] = []  # called when the default changes


def canonical(device: Any) -> str:
    """'cpu' or 'cuda:N' for a name, a Device, the number of a GPU, or None, which is the default device. Raises DeviceError for what names
    no device."""
    if device is None:
        return default()
    if isinstance(device, Device):
        return device.name
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return sys.intern(f"cuda:{device}")
    found = _FORM.fullmatch(device) if isinstance(device, str) else None
    if found is None:
        raise DeviceError(f"{device!r} names no device; there are 'cpu', 'cuda' and 'cuda:N' for GPU number N")
    if found[1]:
        return CPU
    return sys.intern(f"cuda:{int(found[3]) if found[3] else _ambient.gpu}")


def names_device(x: Any) -> bool:
    """Whether an argument of `to` is meant as a device rather than as a dtype."""
    return isinstance(x, (Device, int)) or (isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda"))


class Device:
    """A place where tensors live and programs run: `duo.device("cuda:0")`, `duo.device("cuda", 0)`, `duo.device("cpu")`. As a context manager, where
    this thread makes new tensors. `type` is 'cpu' or 'cuda'; `index` the GPU's number, None for the CPU. Equal to its own name."""

    __slots__ = ("index", "name", "type")

    def __init__(self, device: Any, index: int | None = None) -> None:
        self.name = canonical(device if index is None else f"{device}:{index}")
        self.type, _, number = self.name.partition(":")
        self.index = int(number) if number else None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return (
            f"device(type={self.type!r})" if self.index is None else f"device(type={self.type!r}, index={self.index})"
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Device):
            return self.name == other.name
        return isinstance(other, str) and _FORM.fullmatch(other) is not None and canonical(other) == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __enter__(self) -> Device:
        _ambient.names.append(self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        _ambient.names.pop()


def default() -> str:
    """Where new tensors are made unless told otherwise: as the innermost `with duo.device(...)` says, else the default device."""
    names = _ambient.names
    return names[-1] if names else _default[0]


def set_default(name: str) -> None:
    """Makes a device, by its canonical name, the default of all threads."""
    _default[0] = name
    for listener in _listeners:
        listener()


def get_default_device() -> Device:
    """Where new tensors are made unless told otherwise."""
    return Device(default())


def on_change(listener: Callable[[], None]) -> None:
    """Calls `listener()` whenever the default device changes."""
    _listeners.append(listener)


def current_gpu() -> int:
    """The number of the GPU that 'cuda' means in this thread."""
    return _ambient.gpu


def set_current_gpu(index: int) -> None:
    """Sets the number of the GPU that 'cuda' means in this thread."""
    _ambient.gpu = index
