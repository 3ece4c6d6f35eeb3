"""Hooks that Python code registers, and the handle that takes them off again."""

from __future__ import annotations

from collections.abc import Callable

from duo.eager.trace import state
from duo.eager.watch import changed


class RemovableHook:
    """Handle of a registered hook; `remove()` takes it off."""

    def __init__(self, hooks: list, hook: Callable) -> None:
        self._hooks, self._hook = hooks, hook
        _hooks_changed()
        hooks.append(hook)

    def remove(self) -> None:
        if self._hook in self._hooks:
            _hooks_changed()
            self._hooks.remove(self._hook)


def _hooks_changed() -> None:
    changed()
    if state.capture is not None:
        state.capture.impure("a hook is registered or removed inside")
