"""Types of the IR: dtypes, symbolic dimensions, tensor types, and the promotion table.

A `TensorType` is a dtype and a shape; a dimension is an int or a `Dim`, a polynomial with integer coefficients
over named sizes, kept in a normal form so that equal polynomials are equal objects. Everything here is immutable
and hashable; this file imports nothing of duo but its errors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeAlias

import ml_dtypes
import numpy as np

from duo_ir.errors import DTypeError, ShapeError


class DType:
    """An element type. `kind` is 'f' (float), 'i' (signed), 'u' (unsigned) or 'b' (bool)."""

    __slots__ = ("bits", "itemsize", "kind", "name", "numpy")

    def __init__(self, name: str, kind: str, itemsize: int, numpy: np.dtype) -> None:
        self.name, self.kind, self.itemsize, self.bits, self.numpy = name, kind, itemsize, itemsize * 8, numpy

    def __repr__(self) -> str:
        return f"duo.{LONG_NAMES[self.name]}"

    def __reduce__(self) -> tuple:
        return dtype, (self.name,)

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_integer(self) -> bool:
        """Signed or unsigned integer; bool is neither."""
        return self.kind in "iu"

    @property
    def is_floating_point(self) -> bool:
        return self.kind == "f"

    @property
    def is_narrow_float(self) -> bool:
        """f16 or bf16: computed in f32 and rounded once (numerics contract, rule 4)."""
        return self.kind == "f" and self.itemsize == 2


f16 = DType("f16", "f", 2, np.dtype(np.float16))
bf16 = DType("bf16", "f", 2, np.dtype(ml_dtypes.bfloat16))
f32 = DType("f32", "f", 4, np.dtype(np.float32))
f64 = DType("f64", "f", 8, np.dtype(np.float64))
i8 = DType("i8", "i", 1, np.dtype(np.int8))
i16 = DType("i16", "i", 2, np.dtype(np.int16))
i32 = DType("i32", "i", 4, np.dtype(np.int32))
i64 = DType("i64", "i", 8, np.dtype(np.int64))
u8 = DType("u8", "u", 1, np.dtype(np.uint8))
bool_ = DType("bool", "b", 1, np.dtype(np.bool_))

DTYPES: dict[str, DType] = {d.name: d for d in (f16, bf16, f32, f64, i8, i16, i32, i64, u8, bool_)}
LONG_NAMES = {
    "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "i8": "int8", "i16": "int16",
    "i32": "int32", "i64": "int64", "u8": "uint8", "bool": "bool",
}  # fmt: skip
_BY_NAME = DTYPES | {long: DTYPES[short] for short, long in LONG_NAMES.items()}
_BY_NUMPY = {d.numpy: d for d in DTYPES.values()}
_BY_PYTHON = {float: f32, int: i64, bool: bool_}


def dtype(spec: object) -> DType:
    """The DType that `spec` names: a DType, a name such as 'f32' or 'float32', a NumPy dtype, or float/int/bool."""
    if isinstance(spec, DType):
        return spec
    if isinstance(spec, str) and spec in _BY_NAME:
        return _BY_NAME[spec]
    if isinstance(spec, type) and spec in _BY_PYTHON:
        return _BY_PYTHON[spec]
    try:
        if spec is None or isinstance(spec, str):  # to NumPy None is float64, 'f8' eight bytes and 'i8' not duo's i8
            raise TypeError
        return _BY_NUMPY[np.dtype(spec)]  # type: ignore[call-overload]
    except (TypeError, KeyError):
        raise DTypeError(f"{spec!r} is not a dtype of duo; it has {', '.join(DTYPES)}") from None


# Promotion: NumPy's table for the array API, with bf16 beside f16 (their join is f32).
_INT_RANK = {"i8": 1, "i16": 2, "i32": 3, "i64": 4}


@cache
def promote(a: DType, b: DType) -> DType:
    """The dtype that holds both: bool < integers < floats; u8 with i8 gives i16; f16 with bf16 gives f32."""
    if a is b:
        return a
    if a is bool_:
        return b
    if b is bool_:
        return a
    if a.is_float and b.is_float:
        return f32 if a.itemsize == b.itemsize else (a if a.itemsize > b.itemsize else b)
    if a.is_float or b.is_float:
        return a if a.is_float else b
    if a is u8 or b is u8:
        other = b if a is u8 else a
        return i16 if other is i8 else other
    return a if _INT_RANK[a.name] > _INT_RANK[b.name] else b


def promote_scalar(d: DType, scalar: type) -> DType:
    """The dtype of an op between dtype `d` and a Python scalar of class `scalar` (scalars are weak)."""
    if scalar is float:
        return d if d.is_float else f32
    if scalar is int:
        return i64 if d is bool_ else d
    if scalar is bool:
        return d
    raise DTypeError(f"cannot mix a tensor with a {scalar.__name__}; give a tensor, a float, an int or a bool")


# ---------------------------------------------------------------------------------------------------- dimensions
Monomial: TypeAlias = tuple[str, ...]  # sorted names, repeated for powers; () is the constant term


class Dim:
    """A symbolic size: a non-constant polynomial over named sizes, e.g. `b`, `b*t`, `2*t + 1`.

    A named size stands for an integer of at least 2 (0 and 1 are compiled as themselves), so a Dim never
    broadcasts and never equals an int.
    """

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._hash = hash(terms)

    @staticmethod
    def symbol(name: str) -> Dim:
        if not name.isidentifier():
            raise ShapeError(f"a dimension's name must be an identifier, not {name!r}")
        return Dim((((name,), 1),))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({n for mono, _ in self.terms for n in mono}))

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """Its value when each name has the size given."""
        total = 0
        for mono, coefficient in self.terms:
            for name in mono:
                coefficient *= sizes[name]
            total += coefficient
        return total

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: DimLike) -> DimLike:
        return _from_terms([*self.terms, *_terms(other)])

    __radd__ = __add__

    def __neg__(self) -> DimLike:
        return self * -1

    def __sub__(self, other: DimLike) -> DimLike:
        return self + other * -1

    def __rsub__(self, other: DimLike) -> DimLike:
        return self * -1 + other

    def __mul__(self, other: DimLike) -> DimLike:
        return _from_terms([(tuple(sorted(m + n)), a * b) for m, a in self.terms for n, b in _terms(other)])

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self.__str__()

    def __str__(self) -> str:
        parts = []
        for mono, coefficient in self.terms:
            factors = [str(coefficient)] * (coefficient != 1 or not mono) + list(mono)
            parts.append("*".join(factors))
        return "+".join(parts)


DimLike: TypeAlias = int | Dim
Shape: TypeAlias = tuple[DimLike, ...]


def _terms(d: DimLike) -> Iterable[tuple[Monomial, int]]:
    return d.terms if isinstance(d, Dim) else (((), d),)


def _from_terms(terms: Iterable[tuple[Monomial, int]]) -> DimLike:
    total: dict[Monomial, int] = {}
    for mono, coefficient in terms:
        total[mono] = total.get(mono, 0) + coefficient
    kept = tuple((m, total[m]) for m in sorted(total, key=lambda m: (-len(m), m)) if total[m])
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Dim(kept)


def product(dims: Iterable[DimLike]) -> DimLike:
    total: DimLike = 1
    for d in dims:
        total = total * d
    return total


def exact_div(a: DimLike, b: DimLike) -> DimLike | None:
    """a / b where that is a polynomial with integer coefficients, else None. b may have one term only."""
    if isinstance(b, int):
        if b == 0 or any(c % b for _, c in _terms(a)):
            return None
        return _from_terms([(m, c // b) for m, c in _terms(a)])
    if a == b:
        return 1
    if len(b.terms) != 1:
        return None
    mono, coefficient = b.terms[0]
    out = []
    for m, c in _terms(a):
        rest = list(m)
        for name in mono:
            if name not in rest:
                return None
            rest.remove(name)
        if c % coefficient:
            return None
        out.append((tuple(rest), c // coefficient))
    return _from_terms(out)


def evaluate(d: DimLike, sizes: Mapping[str, int]) -> int:
    return d if isinstance(d, int) else d.evaluate(sizes)


def substitute(d: DimLike, sizes: Mapping[str, DimLike]) -> DimLike:
    """`d` with named sizes replaced (by ints or other polynomials); names not given stay."""
    if isinstance(d, int):
        return d
    total: DimLike = 0
    for mono, coefficient in d.terms:
        total = total + coefficient * product(sizes.get(n, Dim.symbol(n)) for n in mono)
    return total


def _size(value: object) -> int:
    """An integer of another class (NumPy's) as int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ShapeError(f"a size is an int or a Dim, not {value!r}")
    return operator.index(value)


# -------------------------------------------------------------------------------------------------- tensor types
class TensorType:
    """A dtype and a shape. Interned: equal types are the same object."""

    __slots__ = ("__weakref__", "_hash", "_text", "dtype", "is_static", "shape")
    _interned: dict[tuple[DType, Shape], TensorType] = {}
    dtype: DType
    shape: Shape
    is_static: bool  # no symbolic size
    _hash: int
    _text: str

    def __new__(cls, dtype: DType, shape: Shape = ()) -> TensorType:
        key = (dtype, shape)
        found = cls._interned.get(key)
        if found is None:
            # Only ints and Dims get in: 2.0 and True equal an int, so they would stand for it ever after.
            if not isinstance(dtype, DType):
                raise DTypeError(f"a TensorType has a DType, not {dtype!r}")
            shape = tuple([d if type(d) is int or isinstance(d, Dim) else _size(d) for d in shape])
            key = (dtype, shape)
            found = object.__new__(cls)
            found.dtype, found.shape, found._hash = dtype, shape, hash(key)
            found._text = f"{dtype.name}[{','.join(map(str, shape))}]"
            found.is_static = not any(isinstance(d, Dim) for d in shape)
            cls._interned[key] = found
        return found

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, TensorType) and self.dtype is other.dtype and self.shape == other.shape
        )

    def __reduce__(self) -> tuple:
        return TensorType, (self.dtype, self.shape)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> DimLike:
        """Number of elements."""
        return product(self.shape)

    @property
    def nbytes(self) -> DimLike:
        return self.size * self.dtype.itemsize

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the symbolic sizes, sorted."""
        return tuple(sorted({n for d in self.shape if isinstance(d, Dim) for n in d.names}))

    def static_shape(self, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape as ints; `sizes` gives the named sizes."""
        if self.is_static:
            return self.shape  # type: ignore[return-value]
        return tuple(evaluate(d, sizes or {}) for d in self.shape)

    def with_shape(self, shape: Shape) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


def broadcast_shapes(*shapes: Shape) -> Shape:
    """NumPy's broadcasting. A symbolic size meets only itself or 1."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[DimLike] = []
    for axis in range(-rank, 0):
        dim: DimLike = 1
        for s in shapes:
            d = s[axis] if -axis <= len(s) else 1
            if d == 1 or d == dim:
                continue
            if dim != 1:
                listed = " and ".join(shape_str(s) for s in shapes)
                raise ShapeError(f"shapes {listed} do not broadcast: axis {axis} has {dim} and {d}")
            dim = d
        out.append(dim)
    return tuple(out)


def shape_str(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def row_major(shape: Shape) -> Shape:
    """Strides, in elements, of a contiguous array of that shape."""
    strides: list[DimLike] = []
    step: DimLike = 1
    for d in reversed(shape):
        strides.append(step)
        step = step * d
    return tuple(reversed(strides))
