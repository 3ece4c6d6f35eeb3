"""Nested lists, tuples and dicts of tensors: their leaves, their shape as code that takes one apart or builds one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def leaves(nest: Any) -> Iterator[Any]:
    """What is not a list, tuple or dict, in order."""
    cls = nest.__class__
    if cls is list or isinstance(nest, tuple):
        for x in nest:
            yield from leaves(x)
    elif cls is dict:
        for x in nest.values():
            yield from leaves(x)
    else:
        yield nest


def key(nest: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """A hashable form of a nest, equal for nests that the same program can take."""
    cls = nest.__class__
    if cls is list or isinstance(nest, tuple):
        return (cls, *[key(x, of_leaf) for x in nest])
    if cls is dict:
        return (cls, *[(name, key(x, of_leaf)) for name, x in nest.items()])
    return of_leaf(nest)


def taking(
    nest: Any, source: str, lines: list[str], names: dict[str, Any], of_leaf: Callable[[Any, str], None], fail: str
) -> None:
    """Appends statements that check that `source` is a nest like this one; of_leaf(leaf, its expression) appends what checks a leaf."""
    cls = nest.__class__
    if cls is list or isinstance(nest, tuple) or cls is dict:
        kind = f"k{len(names)}"
        names[kind] = cls
        mine = f"n{len(names)}"
        lines.append(f"{mine} = {source}")
        lines.append(f"if {mine}.__class__ is not {kind} or len({mine}) != {len(nest)}: {fail}")
        for i, x in enumerate(nest) if cls is not dict else nest.items():
            if cls is dict:
                lines.append(f"if {i!r} not in {mine}: {fail}")
            taking(x, f"{mine}[{i!r}]", lines, names, of_leaf, fail)
        return
    of_leaf(nest, source)


def building(nest: Any, names: dict[str, Any], of_leaf: Callable[[Any], str]) -> str:
    """An expression that makes a nest like this one, of_leaf(leaf) being a leaf's expression."""
    cls = nest.__class__
    if cls is list:
        return f"[{', '.join([building(x, names, of_leaf) for x in nest])}]"
    if isinstance(nest, tuple):
        inside = ", ".join([building(x, names, of_leaf) for x in nest])
        if cls is tuple:
            return f"({inside},)" if nest else "()"
        kind = f"k{len(names)}"
        names[kind] = cls
        return f"{kind}({inside})" if hasattr(cls, "_fields") else f"{kind}(({inside},))"
    if cls is dict:
        out = []
        for name, x in nest.items():
            label = f"k{len(names)}"
            names[label] = name
            out.append(f"{label}: {building(x, names, of_leaf)}")
        return "{" + ", ".join(out) + "}"
    return of_leaf(nest)
