"""The interpreter's trace and profile hooks while a function is recorded: full attention in the user's code, next to none in duo's.

`observe.py` wants each instruction, call and return of code outside duo. Most of what runs meanwhile is duo's own, where each event would cost
as much as the call it tells of. So the profile hook is off (`_quiet`) from the call that leads from the user's code into duo's until it
returns, or until duo calls the user's code again; and the trace hook knows the code that it needs not look at by its identity.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from duo.nn.module import Module

_DUO = ("duo", "duo_ir", "duo_backends", "importlib", "_frozen_importlib", "_frozen_importlib_external", "zipimport")
_CALLED_BY_DUO = (
    "numpy",
    "ml_dtypes",
    "ctypes",
    "llvmlite",
    "pycuda",
    "functools",
    "weakref",
    "abc",
    "threading",
    "typing",
    "dataclasses",
)
_MODULE_CALL = Module.__call__.__code__
# From Python 3.12 on a change of hooks makes the interpreter rewrite the code that runs next: there the profile hook stays on.
_PAUSES = sys.version_info < (3, 12)
# By id (hashing a code object is slow): code that need not be looked at when duo calls it.
_calm: dict[int, CodeType] = {}


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Lets duo's own code run, which may compile a program, without any hook."""
    trace, profile = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)
        sys.settrace(trace)


class Hooks:
    """Calls the methods at the end of this class, for code outside duo, between `start` and `stop`."""

    def __init__(self) -> None:
        self._quiet = False
        self._aside = False  # where hooks do not pause: nothing that begins is watched
        self._woke: set[Any] = set()  # frames of the user's that duo called

    def start(self) -> None:
        """From duo's own code. Nobody else must be tracing."""
        self._quiet = _PAUSES
        if not _PAUSES:
            sys.setprofile(self.profile)
            sys._getframe().f_trace_opcodes = True  # Python 3.12 tells of instructions if a frame wanted them before
        sys.settrace(self._enter)

    def stop(self) -> None:
        sys.settrace(None)
        sys.setprofile(None)
        self._woke.clear()

    def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(*arguments)`, called while this watches, without the hooks: it runs no code but duo's."""
        if not _PAUSES:
            before, self._aside = self._aside, True
            try:
                return work(*arguments)
            finally:
                self._aside = before
        profile = sys.getprofile()
        sys.settrace(None)
        sys.setprofile(None)
        try:
            return work(*arguments)
        finally:
            sys.setprofile(profile)
            sys.settrace(self._enter)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if self._quiet and id(code) in _calm:
            return None
        if event != "call" or self._aside:
            return None
        name = frame.f_globals.get("__name__", "").split(".", 1)[0]
        if name in _DUO or code.co_filename.startswith("<frozen importlib"):
            if code is _MODULE_CALL:
                self.module_called(frame.f_locals.get("self"), frame)
            else:
                _calm[id(code)] = code
            return None if self._quiet or not _PAUSES else self._calm_down(frame)
        if name in _CALLED_BY_DUO and (self._quiet or not self.watches(frame.f_back)):
            _calm[id(code)] = code
            return None
        if self._quiet:
            self._quiet = False
            self._woke.add(frame)
            sys.setprofile(self.profile)
        frame.f_trace = self._step  # from Python 3.13 on instructions are told of only where this is set first
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        self.begin(frame)
        return self._step

    def _calm_down(self, frame: Any) -> Any:
        """The user's code calls duo's: quiet until `frame` is left."""
        self.called(frame.f_back)
        frame.f_trace_lines = False
        self._quiet = True
        sys.setprofile(None)
        return self._leave

    def _leave(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "return":
            self._quiet = False
            sys.setprofile(self.profile)  # which is told of this return, too
        return self._leave

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "return":
            if frame in self._woke:
                self._woke.discard(frame)
                self.profile(frame, "return", arg)
                self._quiet = True
                sys.setprofile(None)
        else:
            self.step(frame, event)
        return self._step

    # ------------------------------------------------------------------------------------------- what an observer does
    def begin(self, frame: Any) -> None:
        """A frame of the user's begins, or a generator's goes on."""
        raise NotImplementedError

    def step(self, frame: Any, event: str) -> None:
        """An instruction ('opcode') of a frame of the user's is about to run, or an 'exception' came."""
        raise NotImplementedError

    def profile(self, frame: Any, event: str, arg: Any) -> None:
        """See `sys.setprofile`."""
        raise NotImplementedError

    def watches(self, frame: Any) -> bool:
        """Whether `frame` has begun."""
        raise NotImplementedError

    def called(self, frame: Any) -> None:
        """`frame` called code of duo's."""
        raise NotImplementedError

    def module_called(self, module: Any, frame: Any) -> None:
        """`module(...)`, in frame `frame`."""
        raise NotImplementedError
