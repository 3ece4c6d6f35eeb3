"""Reductions in CUDA C: what an accumulator is, what one more element does to it, and how two combine.

Order (numerics contract, rule 3): element i goes to lane i mod 16 of chunk i div 1024; a lane accumulates in ascending i; chunks combine per
lane by the adjacent tree, then lanes by halving. Kinds that give the same bits in any order take the same path.
"""

from __future__ import annotations

from collections.abc import Sequence

from duo_backends.cuda.body import Value, arithmetic, convert, literal
from duo_backends.cuda.code import register
from duo_ir.kernels.kernel import Reduce, Stage
from duo_ir.types import DType, f32

LANES = 16
CHUNK = 1024
_NO_POSITION = "0x7fffffffffffffffLL"  # of a lane without elements: loses against every real one


class Reducer:
    """One `Reduce` of a body. `state`: the C type of its accumulator; `nbytes`: its size."""

    def __init__(self, reduce: Reduce, body_dtype: DType) -> None:
        self.kind, self.args, self.dtype = reduce.kind, reduce.args, reduce.dtype
        self._narrow = body_dtype if body_dtype.is_narrow_float else None
        self.value = f32 if self._narrow else body_dtype
        self._is_arg = self.kind in ("argmax", "argmin")
        plain = register(self.value)
        self.state = f"Best<{plain}>" if self._is_arg else plain
        self.nbytes = 16 if self._is_arg else self.value.itemsize

    @property
    def identity(self) -> str:
        """The accumulator before any element."""
        d = self.value
        if self.kind in ("sum", "dot"):
            return literal(0, d)
        if self.kind == "prod":
            return literal(1, d)
        if self.kind in ("any", "all"):
            return literal(self.kind == "all", d)
        start = literal(_lowest(d) if self.kind in ("max", "argmax") else _highest(d), d)
        return f"{self.state}{{{start}, {_NO_POSITION}}}" if self._is_arg else start

    def step(self, acc: str, values: Sequence[Value], position: str) -> str:
        """The accumulator after one more element, which is number `position`."""
        given = [Value(convert(v.name, v.dtype, self.value), self.value) for v in values]
        if self.kind == "dot":
            if self.value.is_float:
                return arithmetic("fma", [*given, Value(acc, self.value)], self.value)
            product = arithmetic("mul", given, self.value)
            return self.merge(acc, f"({product})")
        if self._is_arg:
            return self.merge(acc, f"{self.state}{{{given[0].name}, {position}}}")
        return self.merge(acc, given[0].name)

    def merge(self, x: str, y: str) -> str:
        """Two accumulators, the earlier elements first."""
        if self.kind in ("max", "min"):
            return f"duo_{self.kind}({x}, {y})"
        if self._is_arg:
            return f"duo_best<{'true' if self.kind == 'argmax' else 'false'}>({x}, {y})"
        code = {"sum": "add", "dot": "add", "prod": "mul", "any": "or_", "all": "and_"}[self.kind]
        return arithmetic(code, [Value(x, self.value), Value(y, self.value)], self.value)

    def result(self, state: str) -> str:
        """What the kernel's later stages read, of `dtype`."""
        if self._is_arg:
            return f"{state}.index"
        return convert(state, self.value, self.dtype)


def reducers(stage: Stage) -> list[Reducer]:
    """Those of a stage. The dtype of what is reduced is that of the body's value."""
    return [Reducer(r, stage.body[r.args[0]].dtype) for r in stage.reduces]


def _lowest(d: DType) -> float | int | bool:
    if d.kind == "f":
        return float("-inf")
    return False if d.kind == "b" else 0 if d.kind == "u" else -(1 << (d.bits - 1))


def _highest(d: DType) -> float | int | bool:
    if d.kind == "f":
        return float("inf")
    return True if d.kind == "b" else (1 << d.bits) - 1 if d.kind == "u" else (1 << (d.bits - 1)) - 1
