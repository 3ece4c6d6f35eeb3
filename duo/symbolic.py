"""Sizes that are known when a program runs, as Python numbers: what `x.shape` holds where a size is free.

`Size` is a `Dim` that a user computes with: sums and products are sizes again, and shapes can be made of them; quotients, powers and what has
floats in it are `Computed`. Beside a tensor either is what the Python number would be: weak, and computed as Python computes it (integers exactly,
floats in 64 bits), then rounded once to the tensor's dtype. A decision that depends on one is an error, because one program serves all sizes.
Graph mode supplies `Number._apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.types import Dim, DimLike, f64, i64

Known = Callable[[DimLike], DimLike]  # a size noted earlier -> what it is known to be now


class FreeSizeError(ShapeError, TypeError):
    """Python needs the number that a free size is."""


class NeedsGraph(ShapeError):
    """An eager op that takes a free size: it belongs to the program whose size that is."""


class Number:
    """Arithmetic of Python's int (or float: `kind`), of a number that is known later."""

    __slots__ = ()
    __array_ufunc__ = None
    _priority = 10  # beside eager tensors, it decides that the op goes into a graph
    _apply: Callable[..., Any]  # what `duo.dispatch.apply` does with it; set by graph mode
    kind: type = int

    def __add__(self, other: Any) -> Any:
        return _binary("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary("*", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _binary("/", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary("/", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _binary("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return _binary("%", self, other)

    def __rmod__(self, other: Any) -> Any:
        return _binary("%", other, self)

    def __pow__(self, exponent: Any) -> Any:
        """`n ** 2`, and `n ** 0.5`, which is the square root rounded once."""
        if exponent.__class__ is int and exponent >= 0 and self.kind is int:
            out: Any = 1
            for _ in range(exponent):
                out = out * self
            return out
        if exponent.__class__ is float and exponent == 0.5:
            return Computed("sqrt", (self,), float)
        raise ArgumentError(
            f"{self!r} ** {exponent!r}: of a free size there are powers of integers at least 0, and 0.5; write 1 / n ** 0.5, or make a tensor"
            " of it: duo.tensor(n)"
        )

    def __neg__(self) -> Any:
        return _binary("-", 0, self)

    def __pos__(self) -> Any:
        return self

    # Comparisons have an answer where it is the same for all sizes.
    def __lt__(self, other: Any) -> Any:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Any:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Any:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Any:
        return self._compare(">=", other)

    def __eq__(self, other: object) -> Any:
        return self._compare("==", other)

    def __ne__(self, other: object) -> Any:
        return self._compare("!=", other)

    def __hash__(self) -> int:
        return id(self) >> 4

    def _compare(self, op: str, other: Any) -> Any:
        if isinstance(other, np.generic):
            other = other.item()
        if not _is_number(other):
            return NotImplemented
        least, most = _range(_binary("-", self, other))
        for answer in (True, False):
            if _certain(op if answer else _OPPOSITE[op], least, most):
                return answer
        raise _unknown(f"{self!r} {op} {other!r}", self, other)

    def __bool__(self) -> bool:
        return bool(self._compare("!=", 0))

    def __index__(self) -> int:
        raise _unknown(f"the number {self!r}", self)

    def __int__(self) -> int:
        raise _unknown(f"int({self!r})", self)

    def __float__(self) -> float:
        raise _unknown(f"float({self!r})", self, hint="; n / m, n ** 0.5 and the like need no float()")

    def __round__(self, digits: int = 0) -> Any:
        return self if self.kind is int else float(self)

    __trunc__ = __floor__ = __ceil__ = __round__


class Size(Number, Dim):
    """A free size, or a polynomial of free sizes."""

    __slots__ = ()
    __hash__ = Dim.__hash__


class Computed(Number):
    """`op` of `args`, which no shape can be made of."""

    __slots__ = ("args", "kind", "op")

    def __init__(self, op: str, args: tuple[Any, ...], kind: type) -> None:
        self.op, self.args, self.kind = op, args, kind  # type: ignore[misc]

    def __repr__(self) -> str:
        if self.op == "sqrt":
            return f"({self.args[0]!r}) ** 0.5"
        return f" {self.op} ".join([f"({a!r})" if isinstance(a, Computed) else repr(a) for a in self.args])


def symbolic(d: DimLike) -> DimLike:
    """A size of a type, as users see it."""
    return Size(d.terms) if isinstance(d, Dim) else d


def plain(value: Any) -> Any:
    """An attribute with sizes as types have them, in tuples too."""
    if value.__class__ is Size:
        return Dim(value.terms)
    if value.__class__ is tuple and any(v.__class__ is Size or v.__class__ is tuple for v in value):
        return tuple([plain(v) for v in value])
    return value


def has_size(value: Any) -> bool:
    """Whether there is a free size in an attribute."""
    return isinstance(value, Dim) or (value.__class__ is tuple and any(map(has_size, value)))


def value_of(number: Any, known: Known, divides: bool = False) -> Value:
    """The number as a 0-d Value, i64 or f64. `divides`: programs for which it is 0 are refused, as Python would raise."""
    if isinstance(number, Dim):
        return nd.size_of(known(Dim(number.terms)), i64, 1 if divides else None)
    if not isinstance(number, Number):
        if divides and number == 0:
            raise ArgumentError("a free size is divided by 0")
        return nd.constant_of(number, f64 if isinstance(number, float) else i64)
    assert isinstance(number, Computed)
    op, args = number.op, number.args
    if divides and op not in ("*", "/", "sqrt"):
        raise ArgumentError(f"a number is divided by {number!r}, which may be 0 for some sizes; multiply, or divide a tensor")
    if op == "sqrt":
        return ew.sqrt(nd.cast_to(value_of(args[0], known, divides), f64))
    a = value_of(args[0], known, divides)
    b = value_of(args[1], known, divides or op in ("/", "//", "%"))
    if op == "//":
        return nd.floor_divide(a, b)
    if op == "%":
        return nd.remainder(a, b)
    if number.kind is float:
        a, b = nd.cast_to(a, f64), nd.cast_to(b, f64)
    return {"+": nd.add, "-": nd.sub, "*": nd.mul, "/": nd.div}[op](a, b)


# ------------------------------------------------------------------------------------------------------- inside
_OPPOSITE = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="}


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, Dim, Computed)) and not isinstance(x, bool)


def _kind(x: Any) -> type:
    return x.kind if isinstance(x, Number) else float if isinstance(x, float) else int


def _binary(op: str, a: Any, b: Any) -> Any:
    a, b = (x.item() if isinstance(x, np.generic) else int(x) if isinstance(x, bool) else x for x in (a, b))
    if not _is_number(a) or not _is_number(b):
        return NotImplemented
    kind = float if op == "/" or float in (_kind(a), _kind(b)) else int
    if kind is int and op in ("+", "-", "*") and not isinstance(a, Computed) and not isinstance(b, Computed):
        a, b = plain(a), plain(b)
        return symbolic(a + b if op == "+" else a - b if op == "-" else a * b)
    if op in ("//", "%") and kind is float:
        raise ArgumentError(f"{a!r} {op} {b!r}: of a free size, // and % take integers")
    if op in ("/", "//", "%") and isinstance(b, (int, float)) and b == 0:
        raise ZeroDivisionError(f"{a!r} {op} 0")
    return Computed(op, (a, b), kind)


def _range(difference: Any) -> tuple[float, float]:
    """Between which numbers it is, for sizes of 0 and more."""
    if not isinstance(difference, Number):
        return difference, difference
    if isinstance(difference, Computed):
        return -np.inf, np.inf
    assert isinstance(difference, Size)
    constant = sum(c for names, c in difference.terms if not names)
    signs = {c > 0 for names, c in difference.terms if names}
    return (-np.inf if False in signs else constant, np.inf if True in signs else constant)


def _certain(op: str, least: float, most: float) -> bool:
    """Whether `d op 0` for all d from `least` to `most`."""
    if op in ("<", "<="):
        return most < 0 or (op == "<=" and most == 0)
    if op in (">", ">="):
        return least > 0 or (op == ">=" and least == 0)
    return least > 0 or most < 0 if op == "!=" else least == most == 0


def _unknown(what: str, *numbers: Any, hint: str = "") -> FreeSizeError:
    names = sorted({n for x in numbers for n in _names(x)})
    many = len(names) > 1
    return FreeSizeError(
        f"{what} is known only when the program runs: {' and '.join(names)} {'are' if many else 'is'} free, and one program serves all sizes."
        f" Give {'them' if many else 'it'} as a number (one export for each size that needs a program of its own), or choose between values by"
        f" duo.where{hint}"
    )


def _names(x: Any) -> set[str]:
    if isinstance(x, Dim):
        return set(x.names)
    return {n for a in x.args for n in _names(a)} if isinstance(x, Computed) else set()
