"""Sorting works on keys: unsigned numbers in the wanted order, made of the elements' bits, and where positions count beside them.

A *record* is what is moved about: a 32-bit key; a 64-bit word of a 32-bit key above its position (sorting such words is stable, whatever the
algorithm); a 64-bit key; or, in two columns, a 64-bit key and its position. Floats map to keys as their bits do once a negative number's are
inverted and a positive number's sign is set; every NaN has the greatest key. With positions, both zeros have one key and the sign is
read again in the end; without, they differ, and the zeros of a row are put back in their places in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from duo_backends.cpu.code import Target
from duo_backends.cpu.llvm import Function, splat_literal, vector
from duo_ir.kernels.kernel import SortKernel
from duo_ir.types import DType, bool_


@dataclass(frozen=True)
class Records:
    """How the rows of one kernel are sorted: `columns` are the element types of a record's parts."""

    dtype: DType
    descending: bool
    indexed: bool

    @staticmethod
    def of(kernel: SortKernel, indexed: bool | None = None) -> Records:
        if indexed is None:
            indexed = kernel.positions is not None
        return Records(kernel.dtype, kernel.descending, indexed)

    @property
    def key(self) -> str:
        return "i64" if self.dtype.itemsize == 8 else "i32"

    @property
    def packed(self) -> bool:
        """A key and its position in one word."""
        return self.indexed and self.key == "i32"

    @property
    def columns(self) -> tuple[str, ...]:
        if not self.indexed:
            return (self.key,)
        return ("i64",) if self.packed else ("i64", "i64")

    @property
    def column_bytes(self) -> int:
        return 4 if self.columns[0] == "i32" else 8

    @property
    def digits(self) -> int:
        """Bytes of the key that may differ."""
        return self.dtype.itemsize

    @property
    def tells_zeros_apart(self) -> bool:
        """Whether -0.0 and +0.0 have keys of their own."""
        return self.dtype.kind == "f" and not self.indexed

    @property
    def first_bit(self) -> int:
        """Where the key begins in the first column."""
        return 32 if self.packed else 0

    def lanes(self, target: Target) -> int:
        return target.vector_bytes // self.column_bytes


class Keys:
    """Conversions between elements and records, `width` lanes at a time."""

    def __init__(self, f: Function, records: Records, width: int) -> None:
        self.f, self.r, self.width = f, records, width
        self.bits = 8 if records.dtype is bool_ else records.dtype.bits
        self.int = f"i{self.bits}"

    def type(self, element: str) -> str:
        return vector(self.width, element)

    def lit(self, value: int, element: str) -> str:
        return splat_literal(self.width, element, str(value))

    def op(self, code: str, element: str, x: str, y: str) -> str:
        return self.f.pure(f"{code} {self.type(element)} {x}, {y}")

    def cast(self, code: str, x: str, old: str, new: str) -> str:
        return x if old == new else self.f.pure(f"{code} {self.type(old)} {x} to {self.type(new)}")

    def select(self, condition: str, element: str, x: str, y: str) -> str:
        return self.f.pure(
            f"select {self.type('i1')} {condition}, {self.type(element)} {x}, {self.type(element)} {y}"
        )

    # ------------------------------------------------------------------------------------------------------- constants
    @property
    def least(self) -> int:
        """The sign bit alone, as a signed number."""
        return -(1 << (self.bits - 1))

    def zero_key(self, negative: bool) -> int:
        """The key of a float zero, as an unsigned number of the dtype's bits."""
        sign = 1 << (self.bits - 1)
        key = sign - 1 if negative and not self.r.indexed else sign
        return (1 << self.bits) - 1 - key if self.r.descending else key

    # ----------------------------------------------------------------------------------------------------- to and fro
    def key(self, x: str) -> str:
        """Elements in registers as keys, i32 or i64."""
        d, i = self.r.dtype, self.int
        if d is bool_:
            x = self.cast("zext", x, "i1", i)
            return self.cast("zext", self.op("xor", i, x, self.lit(1, i)) if self.r.descending else x, i, self.r.key)
        if d.kind == "f":
            x = self._float_key(x)
        elif d.kind == "i":
            x = self.op("xor", i, x, self.lit(self.least, i))
        if self.r.descending:
            x = self.op("xor", i, x, self.lit(-1, i))
        return self.cast("zext", x, i, self.r.key)

    def _float_key(self, x: str) -> str:
        i = self.int
        if not self.r.dtype.is_narrow_float:
            x = self.cast("bitcast", x, "float" if self.bits == 32 else "double", i)
        magnitude = self.op("and", i, x, self.lit(-self.least - 1, i))
        infinity = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "f64": 0x7FF0000000000000}[self.r.dtype.name]
        nan = self.op("icmp ugt", i, magnitude, self.lit(infinity, i))
        if self.r.indexed:
            x = self.select(self.op("icmp eq", i, magnitude, self.lit(0, i)), i, self.lit(0, i), x)
        flip = self.op("or", i, self.op("ashr", i, x, self.lit(self.bits - 1, i)), self.lit(self.least, i))
        return self.select(nan, i, self.lit(-1, i), self.op("xor", i, x, flip))

    def element(self, key: str) -> str:
        """Keys as elements: the inverse, but for the sign of zeros in records with positions and for what a NaN says."""
        d, i = self.r.dtype, self.int
        x = self.cast("trunc", key, self.r.key, i)
        if self.r.descending:
            x = self.op("xor", i, x, self.lit(1 if d is bool_ else -1, i))
        if d is bool_:
            return self.op("icmp ne", i, x, self.lit(0, i))
        if d.kind == "i":
            return self.op("xor", i, x, self.lit(self.least, i))
        if d.kind != "f":
            return x
        positive = self.op("icmp slt", i, x, self.lit(0, i))
        x = self.op("xor", i, x, self.select(positive, i, self.lit(self.least, i), self.lit(-1, i)))
        return x if d.is_narrow_float else self.cast("bitcast", x, i, "float" if self.bits == 32 else "double")

    def record(self, key: str, position: str) -> list[str]:
        """The columns of a record; `position`: i64, not read without positions."""
        if not self.r.indexed:
            return [key]
        if not self.r.packed:
            return [key, position]
        wide = self.cast("zext", key, "i32", "i64")
        return [self.op("or", "i64", self.op("shl", "i64", wide, self.lit(32, "i64")), position)]

    def split(self, columns: list[str]) -> tuple[str, str]:
        """(key, position) of a record; the position is empty without."""
        if not self.r.indexed:
            return columns[0], ""
        if not self.r.packed:
            return columns[0], columns[1]
        key = self.cast("trunc", self.op("lshr", "i64", columns[0], self.lit(32, "i64")), "i64", "i32")
        return key, self.op("and", "i64", columns[0], self.lit(0xFFFFFFFF, "i64"))

    def less(self, x: list[str], y: list[str]) -> str:
        """Whether record x comes before y, i1."""
        first = self.op("icmp ult", self.r.columns[0], x[0], y[0])
        if len(x) == 1:
            return first
        same = self.op("icmp eq", "i64", x[0], y[0])
        return self.op("or", "i1", first, self.op("and", "i1", same, self.op("icmp ult", "i64", x[1], y[1])))
