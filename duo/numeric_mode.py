"""Numerics: 'strict', in which a program has the same bits on every device, or 'fast', in which a GPU may use tensor cores and cuBLASLt.

The mode belongs to a program from its recording on: what is recorded inside `with duo.numerics("fast"):` is compiled so, whenever it runs. On the CPU
both give the same bits, as nothing there would be quicker for others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from duo_ir.errors import ArgumentError

MODES = ("strict", "fast")


class _Ambient(threading.local):
    """Per thread: what `with duo.numerics(...)` set."""

    def __init__(self) -> None:
        self.modes: list[str] = []


_ambient = _Ambient()
_default = ["strict"]
_listeners: list[Callable[[], None]] = []  # called when a thread's mode may have changed


def checked(mode: Any) -> str:
    """The mode's name. Raises ArgumentError."""
    for known in MODES:
        if mode == known:
            return known
    raise ArgumentError(f"numerics {mode!r} are not known; there are 'strict' and 'fast'")


def current() -> str:
    """The mode of what this thread records now."""
    modes = _ambient.modes
    return modes[-1] if modes else _default[0]


def get_numerics() -> str:
    """'strict' or 'fast': see `set_numerics`."""
    return current()


def set_numerics(mode: str) -> None:
    """Sets the numerics of programs from now on, in all threads, outside of `with duo.numerics(...)`.

    'strict' (the default): results have the same bits on every device. 'fast': a GPU computes matrix products, convolutions and what they are
    fused with on tensor cores or by cuBLASLt: bf16 and f16 exactly multiplied, summed in f32 in the hardware's order; f32 operands rounded to tf32
    (10 bits after the point: a relative error of up to 2^-11 each). f64, integers and all other ops stay as they are. On the CPU it changes nothing.
    Raises ArgumentError for another name.
    """
    _default[0] = checked(mode)
    _changed()


class numerics:
    """Sets the numerics (see `set_numerics`) inside a `with` block or a decorated function, for this thread: `with duo.numerics("fast"): ...`."""

    def __init__(self, mode: str) -> None:
        self.mode = checked(mode)

    def __enter__(self) -> numerics:
        _ambient.modes.append(self.mode)
        try:
            _changed()
        except BaseException:  # __exit__ will not be called
            _ambient.modes.pop()
            raise
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        _ambient.modes.pop()
        if kind is None:
            _changed()

    def __call__(self, fn: Callable) -> Callable:
        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with numerics(self.mode):
                return fn(*args, **kwargs)

        return wrapped


def on_change(listener: Callable[[], None]) -> None:
    """Calls `listener()` when this thread's mode may have changed."""
    _listeners.append(listener)


def _changed() -> None:
    for listener in _listeners:
        listener()
