"""Sizes as a file keeps them: `Writer` lists expressions of `sizes.py` as JSON, `Formulas` checks such a list and computes it.

A list of nodes, each an op and its operands: ints, or `[n]`, the value of an earlier node. So nothing nests and nothing runs in circles, whatever a
file says. Values are ints below 2^62 in magnitude, or floats; one that cannot be computed matters only where something asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from duo_backends.aot.sizes import Size
from duo_ir.errors import FormatError, ShapeError

MOST = 1 << 62  # magnitudes below it fit an i64 with room to spare

_OPS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "floordiv": (2, lambda a, b: a // b),
    "div": (2, lambda a, b: a / b),
    "max": (2, max),
    "trunc": (1, math.trunc),
    "ceil": (1, math.ceil),
    "bit_length": (1, lambda a: a.bit_length()),
    "bit_count": (1, lambda a: a.bit_count()),
}
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "ne": lambda a, b: a != b,
}


class Writer:
    """Collects expressions; equal ones are one node."""

    def __init__(self) -> None:
        self.nodes: list[list[Any]] = []
        self._known: dict[Size, int] = {}

    def __call__(self, x: Any) -> Any:
        """A number or Size as an operand."""
        if not isinstance(x, Size):
            return x
        found = self._known.get(x)
        if found is None:
            if x.op == "dim":
                node = ["dim", x.args[0]]
            elif x.op == "select":
                node = ["select", x.args[0], *map(self, x.args[1:])]
            else:
                assert x.op in _OPS, x.op
                node = [x.op, *map(self, x.args)]
            found = self._known[x] = len(self.nodes)
            self.nodes.append(node)
        return [found]


class Formulas:
    """A checked list of nodes over the free dims `dims`. Raises FormatError for one that is not as it should be."""

    def __init__(self, nodes: Any, dims: Sequence[str]) -> None:
        if not isinstance(nodes, list):
            raise FormatError("its sizes are not a list")
        self._nodes: list[list[Any]] = []
        for node in nodes:
            self._check(node, dims)
            self._nodes.append(node)

    def operand(self, x: Any) -> Any:
        """`x`, checked."""
        if x.__class__ is int and abs(x) < MOST:
            return x
        if x.__class__ is float and math.isfinite(x):
            return x
        if x.__class__ is list and len(x) == 1 and x[0].__class__ is int and 0 <= x[0] < len(self._nodes):
            return x
        raise FormatError(f"{str(x)[:40]} is not a number of it")

    def _check(self, node: Any, dims: Sequence[str]) -> None:
        if not isinstance(node, list) or not node or not isinstance(node[0], str):
            raise FormatError("a size of it is no expression")
        op, *args = node
        if op == "dim":
            if len(args) != 1 or args[0] not in dims:
                raise FormatError("a size of it is of no program")
            return
        if op == "select":
            if not args or args[0] not in _TESTS or len(args) != 5:
                raise FormatError("a size of it chooses by no test")
            args = args[1:]
        elif op not in _OPS or len(args) != _OPS[op][0]:
            raise FormatError(f"{op[:40]!r} is no operation on sizes")
        for x in args:
            self.operand(x)

    def values(self, sizes: Mapping[str, int]) -> Values:
        """What all nodes are for these sizes."""
        made = Values()
        for op, *args in self._nodes:
            made.append(sizes[args[0]] if op == "dim" else _computed(op, args, made))
        return made


class Values(list[Any]):
    """Values of nodes; None for one that has none."""

    def of(self, x: Any) -> int:
        """The int that an operand is. Raises ShapeError for one that has no value."""
        found = self[x[0]] if x.__class__ is list else x
        if found is None or found.__class__ is not int:
            raise ShapeError("with these sizes a number of the program is too large")
        return found


def _computed(op: str, args: list[Any], made: Values) -> Any:
    test = args.pop(0) if op == "select" else ""
    got = [made[x[0]] if x.__class__ is list else x for x in args]
    if test:
        a, b, yes, no = got
        return None if a is None or b is None else yes if _TESTS[test](a, b) else no
    if any(x is None for x in got):
        return None
    try:
        out = _OPS[op][1](*got)
    except (ArithmeticError, ValueError, AttributeError, TypeError):
        return None
    return out if abs(out) < MOST else None
