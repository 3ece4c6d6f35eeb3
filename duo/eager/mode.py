"""Grad mode: `no_grad`, `enable_grad`, `inference_mode`, `set_grad_enabled`, as context managers and decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from duo.eager.trace import END, Trace, commit, forks, state
from duo.eager.trie import GRAD_MODE


def _switch(mine: dict[str, Any], enabled: bool) -> None:
    """The mode is part of the path: results recorded without gradients end every history. What the trace says is looked at each time, as an
    interrupt may have come between the two. `mine`: this thread's state, looked up once."""
    mine["grad"] = enabled
    trace = mine["trace"]
    entries = trace.entries
    last = entries[-1]
    if last is END or last.node.grad == enabled:
        return
    if len(entries) == 1:
        mine["trace"] = _empty(mine, trace, enabled)
    else:
        commit(trace, (GRAD_MODE, enabled))


def _empty(mine: dict[str, Any], trace: Trace, enabled: bool) -> Trace:
    """A trace of that mode in place of an empty one of the other, which waits for the next change."""
    if trace.__class__ is not Trace:
        return type(trace)(enabled, trace.device)  # of a function that is being compiled
    other, mine["spare"] = mine["spare"], trace
    if other is None or len(other.entries) != 1 or other.leaves or other.born != forks[0]:
        return Trace(enabled, trace.device)  # it was used meanwhile, or has the locks of a parent process
    node = other.entries[0].node
    mode = trace.entries[0].node.numerics  # type: ignore[union-attr]
    fits = node is not None and node.grad == enabled and other.device is trace.device and node.numerics == mode
    return other if fits else Trace(enabled, trace.device)


class _GradMode:
    """Sets the grad mode inside a `with` block or a decorated function."""

    __slots__ = ("before", "enabled")

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.before: list[bool] = []

    def __enter__(self) -> None:
        mine = state.__dict__
        before = mine["grad"]
        self.before.append(before)
        try:
            _switch(mine, self.enabled)
        except BaseException:  # an interrupt: __exit__ will not be called
            self.before.pop()
            _switch(mine, before)
            raise

    def __exit__(self, *exc: object) -> None:
        _switch(state.__dict__, self.before.pop())

    def __call__(self, fn: Callable) -> Callable:
        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with _GradMode(self.enabled):
                return fn(*args, **kwargs)

        return wrapped


def no_grad(fn: Callable | None = None) -> Any:
    """Records no gradients: `with no_grad():` or `@no_grad()`."""
    return _GradMode(False)(fn) if fn is not None else _GradMode(False)


def enable_grad(fn: Callable | None = None) -> Any:
    """Records gradients again inside no_grad."""
    return _GradMode(True)(fn) if fn is not None else _GradMode(True)


def inference_mode(mode: Any = True) -> Any:
    """no_grad under the name that PyTorch users know."""
    return _GradMode(False)(mode) if callable(mode) else _GradMode(not mode)


class set_grad_enabled(_GradMode):
    """Sets the grad mode at once; as a context manager, puts the earlier one back."""

    def __init__(self, mode: bool) -> None:
        super().__init__(mode)
        self.earlier = state.grad
        _switch(state.__dict__, mode)

    def __enter__(self) -> None:
        self.before.append(self.earlier)


def is_grad_enabled() -> bool:
    """Whether gradients are being recorded."""
    return state.grad
