"""Guards: what a recording read of the world outside, and how a replay finds out that it is still so.

Immutable values are compared (with their types, and every bit of a float), other objects by identity, containers of such things by
contents. A `Guard` is one condition as a Python expression, so that a replay checks all of them in one generated function.
"""

from __future__ import annotations

from typing import Any

from duo.eager.tensor import EagerTensor
from duo.nn.module import Module

IMMUTABLE = (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, slice)
CONTAINERS = (list, dict, set, frozenset, tuple)
MOST_ELEMENTS = 512
MISSING = object()


class Unguardable(Exception):
    """What was read cannot be compared later; the argument says what it is."""


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same for a program: identical, or equal immutables of one type."""
    if a is b:
        return True
    cls = a.__class__
    if cls is not b.__class__:
        return False
    if cls is float:
        return a.hex() == b.hex()
    if cls is complex:
        return repr(a) == repr(b)
    if cls is tuple:
        return len(a) == len(b) and all(map(same, a, b))
    if cls is slice:
        return same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return (cls in IMMUTABLE and a == b) or (cls is frozenset and a == b and all(x.__class__ in IMMUTABLE for x in a))


class Contents:
    """A snapshot of a mutable container, nested ones included."""

    __slots__ = ("items", "kind")

    def __init__(self, container: Any, room: list[int]) -> None:
        self.kind = container.__class__
        room[0] -= len(container)
        if room[0] < 0:
            raise Unguardable(f"a {self.kind.__name__} with more than {MOST_ELEMENTS} elements")
        self.items = [freeze(x, room) for x in _elements(container)]

    def holds(self, container: Any) -> bool:
        """Whether the container's contents are what they were."""
        if container.__class__ is not self.kind or len(container) * (2 if isinstance(container, dict) else 1) != len(
            self.items
        ):
            return False
        return all(map(unchanged, _elements(container), self.items))


def _elements(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    if isinstance(container, set):
        return sorted(container, key=repr)
    return list(container)


def freeze(value: Any, room: list[int]) -> Any:
    """What to keep of an element: itself, and its contents when they may change."""
    if isinstance(value, (list, dict, set)):
        return value, Contents(value, room)
    if value.__class__ is tuple and not all(x.__class__ in IMMUTABLE for x in value):
        return value, tuple([freeze(x, room) for x in value])
    return value, None


def unchanged(value: Any, frozen: tuple[Any, Any]) -> bool:
    """Whether an element is what `freeze` saw."""
    before, inside = frozen
    if inside is None:
        return same(value, before)
    if inside.__class__ is tuple:
        return value.__class__ is tuple and len(value) == len(inside) and all(map(unchanged, value, inside))
    return value is before and inside.holds(value)


class Guard:
    """One condition. `test` is an expression of `names`; `what` and `where` say it to people; `now` reads the value again."""

    __slots__ = ("names", "now", "test", "value", "what", "where")

    def __init__(self, test: str, names: dict[str, Any], now: str, value: Any, what: str, where: str) -> None:
        self.test, self.names, self.now, self.value, self.what, self.where = test, names, now, value, what, where

    def holds(self) -> bool:
        try:
            return bool(eval(self.test, dict(_GLOBALS), self.names))
        except Exception:
            return False

    def report(self) -> str:
        """What has changed."""
        try:
            now = brief(eval(self.now, dict(_GLOBALS), self.names))
        except Exception:
            now = "(gone)"
        return f"{self.what} changed {brief(self.value)} -> {now} (read at {self.where})"


_GLOBALS = {"same": same, "unchanged": unchanged, "MISSING": MISSING}


def brief(value: Any) -> str:
    """A value in a few characters."""
    if value is MISSING:
        return "(nothing)"
    if isinstance(value, EagerTensor):
        return f"a tensor {value._val.info.type}"
    if isinstance(value, Module) or not isinstance(value, (*IMMUTABLE, *CONTAINERS)):
        name = getattr(value, "__qualname__", None)
        return f"{name or type(value).__name__} at {id(value):#x}"
    text = repr(value) if not _holds_tensor(value) else f"a {type(value).__name__} of {len(value)}"  # type: ignore[arg-type]
    return text if len(text) < 60 else text[:57] + "..."


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, EagerTensor) or (isinstance(value, CONTAINERS) and any(map(_holds_tensor, value)))


def _condition(now: str, value: Any) -> tuple[str, dict[str, Any]]:
    """The test that the expression `now` still gives `value`."""
    room = [MOST_ELEMENTS]
    frozen = freeze(value, room)
    if frozen[1] is not None:
        return f"unchanged({now}, frozen)", {"frozen": frozen}
    if value.__class__ in (bool, type(None), type(Ellipsis)) or not isinstance(value, (*IMMUTABLE, tuple, frozenset)):
        return f"{now} is value", {"value": value}
    return f"({now} is value or same({now}, value))", {"value": value}


def read(expression: str, names: dict[str, Any], value: Any, what: str, where: str) -> Guard:
    """The guard that `expression`, evaluated with `names`, still gives `value`. Raises Unguardable."""
    test, more = _condition(expression, value)
    return Guard(test, {**names, **more}, expression, value, what, where)


def item(table: Any, name: Any, value: Any, what: str, where: str) -> Guard:
    """table[name] (globals, an instance's dict)."""
    if value is MISSING or name.__class__ is not str:
        return read("table.get(name, MISSING)", {"table": table, "name": name}, value, what, where)
    return read(f"table[{name!r}]", {"table": table}, value, what, where)


def attribute(owner: Any, name: str, value: Any, what: str, where: str) -> Guard:
    """getattr(owner, name)."""
    if value is MISSING or not name.isidentifier():
        return read("getattr(owner, name, MISSING)", {"owner": owner, "name": name}, value, what, where)
    return read(f"owner.{name}", {"owner": owner}, value, what, where)


def member(cls: type, name: str, value: Any, what: str, where: str) -> Guard:
    """What a class's own dict holds."""
    if name.isidentifier() and not name.startswith("__") and getattr(cls, name, MISSING) is value:
        return read(f"cls.{name}", {"cls": cls}, value, what, where)  # a plain function: cheaper to find so
    return read("cls.__dict__.get(name, MISSING)", {"cls": cls, "name": name}, value, what, where)


def cell(cell: Any, value: Any, what: str, where: str) -> Guard:
    """The contents of a closure's cell."""
    return read("cell.cell_contents", {"cell": cell}, value, what, where)
