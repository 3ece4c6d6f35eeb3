"""Containers that say when they change, so that a compiled function need not look through them at every call.

`Epoch.count` is bumped by any change of a module, of an optimiser's structure or of a setting that recordings depend on; a compiled
function compares one int, and looks closer only when it differs. Hyperparameters change often, so a group has its own count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duo.eager.trace import state


class Epoch:
    """Bumped whenever something changes in a way that a compiled function could see."""

    count = 0


def changed() -> None:
    """Something that recordings depend on has changed."""
    Epoch.count += 1


def _bumping(name: str, base: type) -> Callable[..., Any]:
    method = getattr(base, name)

    def bumping(self: Any, *args: Any, **kwargs: Any) -> Any:
        Epoch.count += 1
        return method(self, *args, **kwargs)

    bumping.__name__ = bumping.__qualname__ = name
    bumping.__doc__ = method.__doc__
    return bumping


_DICT_CHANGES = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
_LIST_CHANGES = (
    "__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
)  # fmt: skip


class WatchedDict(dict):
    """A dict whose changes bump the epoch."""

    __slots__ = ()


class WatchedList(list):
    """A list whose changes bump the epoch."""

    __slots__ = ()


for _name in _DICT_CHANGES:
    setattr(WatchedDict, _name, _bumping(_name, dict))
for _name in _LIST_CHANGES:
    setattr(WatchedList, _name, _bumping(_name, list))


class Slots(WatchedDict):
    """Parameter -> its slots. A parameter that is asked for gets empty ones, which is no change."""

    __slots__ = ()

    def __missing__(self, key: Any) -> WatchedDict:
        made = WatchedDict()
        dict.__setitem__(self, key, made)
        return made


class Group(dict):
    """A parameter group. `version` counts its changes; its list of parameters belongs to the structure. `settings` is the optimiser's note
    of what it made of the group."""

    __slots__ = ("settings", "version")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.version = 0
        self.settings: Any = None

    def _changes(self, names: Any) -> None:
        self.version += 1
        if "params" in names:
            Epoch.count += 1
        if state.capture is not None:
            state.capture.impure("a parameter group of an optimizer is changed inside")

    def __setitem__(self, key: str, value: Any) -> None:
        self._changes((key,))
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._changes((key,))
        super().__delitem__(key)

    def __ior__(self, other: Any) -> Group:  # type: ignore[override,misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        new = dict(*args, **kwargs)
        self._changes(new)
        super().update(new)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        self._changes((key,))
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        self._changes(self)
        return super().popitem()

    def clear(self) -> None:
        self._changes(self)
        super().clear()

    def __reduce__(self) -> Any:
        return Group, (dict(self),)
