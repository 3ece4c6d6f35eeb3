"""Sizes that are known when an artefact runs: expressions over the named dims of a program.

Emitters say by plain Python functions of sizes how many work units a kernel has, what scratch it needs and about what it costs. `traced` runs such a
function on `Size`s instead of ints and gives an expression for what it computes. A comparison decides which way the function goes, so it
is run once for each way, and what comes out is chosen by `select`s. `value` evaluates an expression in Python; `emit.py` writes it as LLVM text.
Ints wrap nowhere: `module.py` refuses dims whose sizes do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from duo_backends.cpu.table import threads_for
from duo_ir.errors import ArgumentError

MOST_WAYS = 512  # ways through one function
_Number: TypeAlias = "int | float | Size"


class Size:
    """`op` applied to `args`: a number that is an i64, or a double where `real`. Equal expressions are equal objects to `==` and `hash`."""

    __slots__ = ("_hash", "args", "op", "real")

    def __init__(self, op: str, args: tuple[Any, ...], real: bool = False) -> None:
        self.op, self.args, self.real = op, args, real
        self._hash = hash((op, args))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Size) and self.op == other.op and self.args == other.args)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return self.args[0] if self.op == "dim" else f"{self.op}({', '.join(map(repr, self.args))})"

    # Arithmetic as Python's: `//` and `%` are used of numbers that are not negative only, or to round up by `-(-a // b)`.
    def __add__(self, other: Any) -> Any:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary("mul", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _binary("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary("floordiv", other, self)

    def __mod__(self, other: Any) -> Any:
        return self - self // other * other

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __truediv__(self, other: Any) -> Any:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary("div", other, self)

    def __neg__(self) -> Any:
        return _binary("sub", 0, self)

    def __lshift__(self, other: int) -> Any:
        return self * (1 << other)

    def __rshift__(self, other: int) -> Any:
        return self // (1 << other)

    def __trunc__(self) -> Any:
        return Size("trunc", (self,)) if self.real else self

    def __ceil__(self) -> Any:
        return Size("ceil", (self,)) if self.real else self

    def bit_length(self) -> Any:
        return Size("bit_length", (self,))

    def bit_count(self) -> Any:
        return Size("bit_count", (self,))

    def __lt__(self, other: Any) -> Any:
        return Comparison("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return Comparison("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return Comparison("lt", other, self)

    def __ge__(self, other: Any) -> Any:
        return Comparison("le", other, self)

    def __bool__(self) -> bool:
        return bool(Comparison("ne", self, 0))

    def __index__(self) -> int:
        raise ArgumentError(f"{self!r} is known when the artefact runs only")

    __int__ = __float__ = __index__  # type: ignore[assignment]


class Comparison:
    """`a op b`; what depends on it is traced for either answer."""

    __slots__ = ("a", "b", "op")

    def __init__(self, op: str, a: Any, b: Any) -> None:
        self.op, self.a, self.b = op, a, b

    def __bool__(self) -> bool:
        if not _tracing:
            raise ArgumentError(f"{self.a!r} {self.op} {self.b!r} is known when the artefact runs only")
        return _tracing[-1].decide(self)


class _Way:
    """One run of a function: the answers that lead there, and the comparisons that were asked."""

    def __init__(self, answers: tuple[bool, ...]) -> None:
        self.answers = answers
        self.asked: list[Comparison] = []
        self.known: dict[tuple, bool] = {}

    def decide(self, comparison: Comparison) -> bool:
        key = (comparison.op, comparison.a, comparison.b)
        if key in self.known:
            return self.known[key]
        n = len(self.asked)
        self.asked.append(comparison)
        answer = self.known[key] = self.answers[n] if n < len(self.answers) else True
        return answer


_tracing: list[_Way] = []


def dim(name: str) -> Size:
    """The size of that name."""
    return Size("dim", (name,))


def traced(function: Callable[[], Any]) -> Any:
    """What `function` computes of Sizes, for all of them: a number, or a tuple of numbers. Raises ArgumentError for one with too many ways
    through it."""
    left = [MOST_WAYS]

    def follow(answers: tuple[bool, ...]) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ArgumentError("a kernel's sizes depend on the free dims in too many ways; fix some of them")
        way = _Way(answers)
        _tracing.append(way)
        try:
            result = function()
        finally:
            _tracing.pop()
        for n in range(len(way.asked) - 1, len(answers) - 1, -1):  # the last question first
            other = follow((*answers, *[True] * (n - len(answers)), False))
            result = _select(way.asked[n], result, other)
        return result

    return follow(())


def _select(test: Comparison, a: Any, b: Any) -> Any:
    if isinstance(a, tuple):
        return tuple([_select(test, x, y) for x, y in zip(a, b)])
    if a is b or (a.__class__ is b.__class__ and a == b):
        return a
    return Size("select", (test.op, test.a, test.b, a, b), _real(a) or _real(b))


def larger(*numbers: _Number) -> Any:
    """The largest of them."""
    known = [n for n in numbers if not isinstance(n, Size)]
    rest = list(dict.fromkeys(n for n in numbers if isinstance(n, Size)))
    best = max(known, default=None)
    out: Any = best
    for n in rest:
        out = n if out is None or (best is out and best == 0) else Size("max", (out, n), n.real or _real(out))
    return 0 if out is None else out


def _real(x: Any) -> bool:
    return x.real if isinstance(x, Size) else isinstance(x, float)


def _binary(op: str, a: Any, b: Any) -> Any:
    """A Size, or a number where it does not depend on any."""
    if not isinstance(a, Size) and not isinstance(b, Size):
        return _KNOWN[op](a, b)
    if op == "add" and not isinstance(a, Size):
        a, b = b, a
    if op == "mul" and not isinstance(a, Size):
        a, b = b, a
    if op in ("add", "sub") and b.__class__ is int and b == 0:
        return a
    if op in ("mul", "floordiv") and b.__class__ is int and b == 1:
        return a
    if op == "mul" and b.__class__ is int and b == 0:
        return 0
    if op == "add" and b.__class__ is int and isinstance(a, Size) and a.op == "add" and a.args[1].__class__ is int:
        return _binary("add", a.args[0], a.args[1] + b)
    if op == "mul" and b.__class__ is int and isinstance(a, Size) and a.op == "mul" and a.args[1].__class__ is int:
        return _binary("mul", a.args[0], a.args[1] * b)
    return Size(op, (a, b), op == "div" or _real(a) or _real(b))


_KNOWN: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "div": lambda a, b: a / b,
}
_UNARY: dict[str, Callable[[Any], int]] = {
    "trunc": math.trunc,
    "ceil": math.ceil,
    "bit_length": lambda a: a.bit_length(),
    "bit_count": lambda a: a.bit_count(),
}
_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "ne": lambda a, b: a != b,
}


def value(x: Any, sizes: Mapping[str, int]) -> Any:
    """The number that an expression is for these sizes."""
    if not isinstance(x, Size):
        return x
    if x.op == "dim":
        return sizes[x.args[0]]
    if x.op == "select":
        test, a, b, yes, no = x.args
        return value(yes if _TESTS[test](value(a, sizes), value(b, sizes)) else no, sizes)
    args = [value(a, sizes) for a in x.args]
    if x.op == "max":
        return max(args)
    if x.op in ("patient", "eager"):
        return threads_for(*args)[x.op == "eager"]
    return _UNARY[x.op](*args) if x.op in _UNARY else _KNOWN[x.op](*args)
