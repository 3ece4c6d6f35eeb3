"""Records scalar SSA: the ScalarBuilder behind kernel bodies.

Recipes run against a `BodyBuilder` and leave instructions; equal instructions are recorded once and constants are folded by
the NumPy evaluator, so folding cannot change a bit. Handles are ints. Instructions are kept as plain tuples
(op, args, dtype, attr) and become `Instr`s when a kernel is finished, which also drops the unused ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import numpy as np

from duo_ir.kernels.kernel import Body, Instr
from duo_ir.scalar.numpy_eval import NumpyScalar
from duo_ir.scalar.protocol import BINARY, COMPARE, UNARY
from duo_ir.types import DimLike, DType, bool_, i64

Row: TypeAlias = tuple[str, tuple[int, ...], DType, Any]  # an instruction before it is an Instr

_NUMPY = NumpyScalar()
_FOLDABLE = frozenset((*UNARY, *BINARY, *COMPARE, "select", "fma", "bitcast", "convert"))
_BITWISE = frozenset(("and_", "or_", "xor", "shl", "lshr", "ashr"))
_literals: dict[tuple[float | int | bool, DType], float | int | bool] = {}  # a cache: what `_literal` gave
MOST_LITERALS = 10000


class BodyBuilder:
    """Scalar SSA under construction; see `duo_ir/scalar/protocol.py` for the instructions."""

    __slots__ = ("_constants", "_seen", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._seen: dict[Row, int] = {}
        self._constants: dict[int, float | int | bool] = {}  # handle -> value

    def put(self, op: str, args: tuple[int, ...], dtype: DType, attr: Any = None) -> int:
        """The handle of this instruction; an equal one recorded before is used again."""
        row = (op, args, dtype, attr)
        found = self._seen.get(row)
        if found is not None:
            return found
        constants = self._constants
        if constants and args and op in _FOLDABLE:
            for a in args:
                if a not in constants:
                    break
            else:
                value = _fold(op, [_NUMPY.const(constants[a], self.rows[a][2]) for a in args], dtype)
                if value is not None:
                    handle = self.const(value.item(), dtype)
                    self._seen[row] = handle
                    return handle
            if op in _BITWISE:
                x, y = args
                if constants.get(y) == 0:
                    return y if op == "and_" else x
                if constants.get(x) == 0:
                    return y if op in ("or_", "xor") else x
        handle = len(self.rows)
        self.rows.append(row)
        self._seen[row] = handle
        return handle

    def dtype_of(self, x: int) -> DType:
        return self.rows[x][2]

    # ------------------------------------------------------------------------------------- beside the scalar protocol
    def index(self, position: Any) -> int:
        return self.put("index", (), i64, position)

    def dim(self, d: DimLike) -> int:
        """A size as i64: a constant, or its run-time value."""
        return self.const(d, i64) if isinstance(d, int) else self.put("dim", (), i64, d)

    def load(self, access: Any, dtype: DType, args: tuple[int, ...] = ()) -> int:
        return self.put("load", args, dtype, access)

    def reduced(self, stage: int, n: int, dtype: DType) -> int:
        return self.put("reduced", (), dtype, (stage, n))

    def acc(self, dtype: DType) -> int:
        return self.put("acc", (), dtype)

    def check(self, index: int, bound: DimLike, site: Any) -> int:
        return self.put("check", (index,), i64, (bound, site))

    # ------------------------------------------------------------------------------------------------ scalar protocol
    def const(self, value: float | int | bool, dtype: DType) -> int:
        """A literal. NaN is one object and -0.0 is written neg(0.0), so that equal instructions are equal values and
        different ones are not (0.0 == -0.0 in Python)."""
        known = _literals.get((value, dtype)) if value else None
        if known is None:
            known = _literal(value, dtype)
            if value:
                if len(_literals) > MOST_LITERALS:
                    _literals.clear()
                _literals[value, dtype] = known
        if known == 0 and dtype.kind == "f" and math.copysign(1.0, known) < 0:
            handle = self._record("neg", (self.const(0.0, dtype),), dtype, None)
            self._constants[handle] = -0.0
            return handle
        handle = self._record("const", (), dtype, known)
        self._constants[handle] = known
        return handle

    def _record(self, op: str, args: tuple[int, ...], dtype: DType, attr: Any) -> int:
        row = (op, args, dtype, attr)
        handle = self._seen.get(row)
        if handle is None:
            handle = self._seen[row] = len(self.rows)
            self.rows.append(row)
        return handle

    def select(self, c: int, x: int, y: int) -> int:
        if x == y:
            return x
        known = self._constants.get(c)
        if known is not None:
            return x if known else y
        return self.put("select", (c, x, y), self.rows[x][2])

    def fma(self, x: int, y: int, z: int) -> int:
        return self.put("fma", (x, y, z), self.rows[x][2])

    def bitcast(self, x: int, dtype: DType) -> int:
        return x if self.rows[x][2] is dtype else self.put("bitcast", (x,), dtype)

    def convert(self, x: int, dtype: DType) -> int:
        return x if self.rows[x][2] is dtype else self.put("convert", (x,), dtype)

    neg: ClassVar[Callable[[BodyBuilder, int], int]]
    fabs: ClassVar[Callable[[BodyBuilder, int], int]]
    sqrt: ClassVar[Callable[[BodyBuilder, int], int]]
    floor: ClassVar[Callable[[BodyBuilder, int], int]]
    ceil: ClassVar[Callable[[BodyBuilder, int], int]]
    trunc: ClassVar[Callable[[BodyBuilder, int], int]]
    rint: ClassVar[Callable[[BodyBuilder, int], int]]
    not_: ClassVar[Callable[[BodyBuilder, int], int]]
    add: ClassVar[Callable[[BodyBuilder, int, int], int]]
    sub: ClassVar[Callable[[BodyBuilder, int, int], int]]
    mul: ClassVar[Callable[[BodyBuilder, int, int], int]]
    div: ClassVar[Callable[[BodyBuilder, int, int], int]]
    copysign: ClassVar[Callable[[BodyBuilder, int, int], int]]
    ldexp: ClassVar[Callable[[BodyBuilder, int, int], int]]
    idiv: ClassVar[Callable[[BodyBuilder, int, int], int]]
    irem: ClassVar[Callable[[BodyBuilder, int, int], int]]
    and_: ClassVar[Callable[[BodyBuilder, int, int], int]]
    or_: ClassVar[Callable[[BodyBuilder, int, int], int]]
    xor: ClassVar[Callable[[BodyBuilder, int, int], int]]
    shl: ClassVar[Callable[[BodyBuilder, int, int], int]]
    lshr: ClassVar[Callable[[BodyBuilder, int, int], int]]
    ashr: ClassVar[Callable[[BodyBuilder, int, int], int]]
    eq: ClassVar[Callable[[BodyBuilder, int, int], int]]
    ne: ClassVar[Callable[[BodyBuilder, int, int], int]]
    lt: ClassVar[Callable[[BodyBuilder, int, int], int]]
    le: ClassVar[Callable[[BodyBuilder, int, int], int]]
    gt: ClassVar[Callable[[BodyBuilder, int, int], int]]
    ge: ClassVar[Callable[[BodyBuilder, int, int], int]]


def _install_instructions() -> None:
    """The uniform part of the protocol, from its tables."""

    def unary(name: str) -> Callable[[BodyBuilder, int], int]:
        return lambda self, x: self.put(name, (x,), self.rows[x][2])

    def binary(name: str) -> Callable[[BodyBuilder, int, int], int]:
        return lambda self, x, y: self.put(name, (x, y), self.rows[x][2])

    def compare(name: str) -> Callable[[BodyBuilder, int, int], int]:
        return lambda self, x, y: self.put(name, (x, y), bool_)

    for name in UNARY:
        setattr(BodyBuilder, name, unary(name))
    for name in BINARY:
        setattr(BodyBuilder, name, binary(name))
    for name in COMPARE:
        setattr(BodyBuilder, name, compare(name))


def _literal(value: float | int | bool, dtype: DType) -> float | int | bool:
    """`value` as a constant of `dtype` is written: rounded, NaN always the same object."""
    if dtype.kind != "f":
        return bool(value) if dtype is bool_ else int(value)
    rounded = float(_NUMPY.const(float(value), dtype))
    return math.nan if rounded != rounded else rounded


def _fold(op: str, args: list[Any], dtype: DType) -> Any:
    """The value of an instruction on constants, or None where the protocol leaves it undefined."""
    if op in ("idiv", "irem"):
        x, y = args
        if y == 0 or (y == -1 and x == np.iinfo(x.dtype).min):
            return None
    if op in ("shl", "lshr", "ashr") and not 0 <= args[1] < dtype.bits:
        return None
    if op in ("bitcast", "convert"):
        (x,) = args
        if op == "convert" and dtype.is_integer and x.dtype.kind not in "iub":
            info = np.iinfo(dtype.numpy)
            if not (math.isfinite(float(x)) and info.min <= math.trunc(float(x)) <= info.max):
                return None
        return getattr(_NUMPY, op)(x, dtype)
    with np.errstate(all="ignore"):
        return np.asarray(getattr(_NUMPY, op)(*args))


_instr = lru_cache(16384)(Instr)  # recipes give the same instructions again and again


def finish(rows: list[Row], roots: Iterable[int], translate: Callable[[Row], Any]) -> tuple[Body, dict[int, int]]:
    """The live part of `rows` as a Body, and the new number of each live row. `translate` gives an instruction's final attr."""
    live = set(roots)
    for n in range(len(rows) - 1, -1, -1):
        if n in live:
            live.update(rows[n][1])
    number: dict[int, int] = {}
    body: list[Instr] = []
    for n in sorted(live):
        op, args, dtype, attr = row = rows[n]
        if attr is not None and op != "const":
            attr = translate(row)
        number[n] = len(body)
        body.append(_instr(op, tuple([number[a] for a in args]), dtype, attr))
    return tuple(body), number


_install_instructions()
