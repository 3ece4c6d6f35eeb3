"""Nests of tensors: lists, tuples and dicts taken apart into leaves and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from duo_ir.errors import ArgumentError


class Form(NamedTuple):
    """How a nest is made: its class (None for a leaf), the keys of a dict, and the forms of its parts."""

    cls: Any
    keys: tuple = ()
    parts: tuple[Form, ...] = ()

    def build(self, leaves: Iterator[Any]) -> Any:
        """A nest of this form with the next leaves."""
        if self.cls is None:
            return next(leaves)
        parts = [p.build(leaves) for p in self.parts]
        if issubclass(self.cls, dict):
            return self.cls(zip(self.keys, parts))
        return self.cls(*parts) if hasattr(self.cls, "_fields") else self.cls(parts)

    def leaf_count(self) -> int:
        """How many leaves it has."""
        return 1 if self.cls is None else sum(p.leaf_count() for p in self.parts)


LEAF = Form(None)


def flatten(nest: Any) -> tuple[list[Any], Form]:
    """The leaves in order (of dicts: that of their keys), and the form to build the nest again."""
    if isinstance(nest, dict):
        pairs = [flatten(x) for x in nest.values()]
        keys = tuple(nest)
    elif isinstance(nest, (list, tuple)):
        pairs, keys = [flatten(x) for x in nest], ()
    else:
        return [nest], LEAF
    return [x for leaves, _ in pairs for x in leaves], Form(nest.__class__, keys, tuple([f for _, f in pairs]))


def spread(prefix: Any, form: Form, is_leaf: Callable[[Any], bool], what: str) -> list[Any]:
    """One value for each leaf of `form`: `prefix` has the form's structure, or stops early where one value is for all below.

    Raises ArgumentError, naming `what`, where the two do not fit.
    """
    if is_leaf(prefix):
        return [prefix] * form.leaf_count()
    keys = tuple(prefix) if isinstance(prefix, dict) else ()
    if form.cls is None or not isinstance(prefix, (list, tuple, dict)) or len(prefix) != len(form.parts):
        raise ArgumentError(f"{what} {prefix!r} does not have the structure that it is for: {_shown(form)}")
    if isinstance(prefix, dict) != issubclass(form.cls, dict) or set(keys) != set(form.keys):
        raise ArgumentError(f"{what} {prefix!r} does not have the keys that it is for: {_shown(form)}")
    inner = [prefix[k] for k in form.keys] if form.keys else list(prefix)
    return [x for p, f in zip(inner, form.parts) for x in spread(p, f, is_leaf, what)]


def _shown(form: Form) -> str:
    if form.cls is None:
        return "tensor"
    if form.keys:
        return "{" + ", ".join(f"{k!r}: {_shown(p)}" for k, p in zip(form.keys, form.parts)) + "}"
    inside = ", ".join(map(_shown, form.parts))
    return f"[{inside}]" if issubclass(form.cls, list) else f"({inside})"
