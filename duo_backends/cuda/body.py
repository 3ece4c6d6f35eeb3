"""Scalar SSA bodies as CUDA C: one statement per instruction, for one point of the loop nest.

A `Scope` says which C expression each loop index has and what the surrounding kernel provides. Wrapping integer arithmetic goes through
unsigned types, narrow integers are cut back after every operation; -fmad=false and the rounding flags (see `device.cuh`) do the rest of
rule 1 of the numerics contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from duo_backends.cuda.code import integer, memory, polynomial, register
from duo_ir.kernels.kernel import Access, Affine, Arg, Body, Instr, Store
from duo_ir.types import DimLike, DType, bf16, bool_, f32, f64, i32, i64

_UNSIGNED = {1: "unsigned char", 2: "unsigned short", 4: "unsigned", 8: "unsigned long long"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_FLOAT_UNARY = {"fabs": "fabs", "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "rint"}
_WRAPPING = {"add": "+", "sub": "-", "mul": "*", "and_": "&", "or_": "|", "xor": "^", "shl": "<<", "lshr": ">>"}
_BITS = {
    ("f32", "i32"): "__float_as_int", ("i32", "f32"): "__int_as_float", ("f64", "i64"): "__double_as_longlong",
    ("i64", "f64"): "__longlong_as_double",
}  # fmt: skip


class Writer:
    """Lines of C with indentation, and fresh names."""

    def __init__(self, depth: int = 0) -> None:
        self.lines: list[str] = []
        self._depth, self._names = depth, 0

    def put(self, line: str) -> None:
        self.lines.append("  " * self._depth + line)

    def name(self, prefix: str = "v") -> str:
        """A name that no other has."""
        self._names += 1
        return f"{prefix}{self._names}"

    @contextmanager
    def block(self, head: str, close: str = "}") -> Any:
        """`head {` ... `}` around what is put inside."""
        self.put(f"{head} {{" if head else "{")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self.put(close)

    def nothing(self) -> Any:
        """A block without braces."""
        return nullcontext()

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Value:
    """A C expression without side effects, cheap to repeat (a name or a literal), and its dtype."""

    name: str
    dtype: DType


@dataclass(frozen=True)
class Scope:
    """Loop indices in scope (outer axes, then the stage's) as C expressions, atomic in precedence (a name or a literal). `point`: a number of
    the point, for the order of reports. `loaded`: values that the kernel has loaded already, by number of instruction. `reduced(stage, n)`,
    `acc` and `saved`: those operands."""

    indices: tuple[str, ...]
    point: str = "0"
    loaded: Mapping[int, Value] = field(default_factory=dict)
    reduced: Callable[[int, int], Value] | None = None
    acc: Value | None = None
    saved: Sequence[Value] = ()


class Emitter:
    """Emits bodies. `wide`: positions are 64-bit numbers."""

    def __init__(self, writer: Writer, args: Sequence[Arg], wide: bool) -> None:
        self.w, self.args, self.wide = writer, args, wide

    @property
    def index_type(self) -> str:
        return "long long" if self.wide else "int"

    # --------------------------------------------------------------------------------------------------- positions
    def affine(self, a: Affine, indices: Sequence[str]) -> str:
        """A position as an expression (not atomic)."""
        terms = [] if a.offset == 0 else [polynomial(a.offset)]
        for index, stride in zip(indices, a.strides, strict=True):
            if stride == 0 or index == "0":
                continue
            terms.append(index if stride == 1 else f"{index}*{_atom(polynomial(stride))}")
        return " + ".join(terms) or "0"

    def guards(self, access: Access, indices: Sequence[str]) -> str:
        """The condition under which the access touches memory; empty where it always does."""
        parts = []
        for guard in access.guards:
            position = self.affine(guard.position, indices)
            unsigned = "unsigned long long" if self.wide else "unsigned"
            parts.append(f"({unsigned})({position}) < ({unsigned})({polynomial(guard.bound)})")
            if guard.step > 1:
                parts.append(f"({position}) % {guard.step} == 0")
        return " && ".join(parts)

    def address(self, access: Access, indices: Sequence[str], extra: Sequence[Value] = ()) -> str:
        """The element's number: `access.at` plus the index values."""
        terms = [self.affine(access.at, indices)]
        for value, stride in zip(extra, access.index_strides, strict=True):
            step = polynomial(stride)
            index = value.name if self.wide else f"({self.index_type}){_atom(value.name)}"
            terms.append(index if stride == 1 else f"{index}*{_atom(step)}")
        return " + ".join([t for t in terms if t != "0"]) or "0"

    def unravel(self, flat: str, sizes: Sequence[DimLike]) -> list[str]:
        """The row-major indices of a flat number, as names."""
        out: list[str] = []
        for k in range(len(sizes) - 1, 0, -1):
            name, quotient, size = self.w.name("i"), self.w.name("q"), polynomial(sizes[k])
            self.w.put(
                f"const {self.index_type} {quotient} = {flat} / ({size}), {name} = {flat} - {quotient}*({size});"
            )
            out.append(name)
            flat = quotient
        return [flat, *reversed(out)] if sizes else []

    # ------------------------------------------------------------------------------------------------------ bodies
    def emit(self, body: Body, scope: Scope) -> list[Value]:
        """Emits every instruction; the values, numbered as in the body."""
        values: list[Value] = []
        for number, instr in enumerate(body):
            known = scope.loaded.get(number)
            values.append(known or self._instr(instr, [values[k] for k in instr.args], scope))
        return values

    def define(self, dtype: DType, expression: str, prefix: str = "v") -> Value:
        """A new constant with that value."""
        name = self.w.name(prefix)
        self.w.put(f"const {register(dtype)} {name} = {expression};")
        return Value(name, dtype)

    def _instr(self, instr: Instr, args: list[Value], scope: Scope) -> Value:
        op, dtype = instr.op, instr.dtype
        attr: Any = instr.attr
        if op == "const":
            return Value(literal(attr, dtype), dtype)
        if op == "load":
            return self.define(dtype, self.load(attr, args, scope))
        if op == "index":
            return self.define(i64, self.affine(attr, scope.indices))
        if op == "dim":
            return self.define(i64, polynomial(attr))
        if op == "reduced":
            assert scope.reduced is not None
            return scope.reduced(*attr)
        if op == "acc":
            assert scope.acc is not None
            return scope.acc
        if op == "saved":
            return scope.saved[attr]
        if op == "check":
            bound, site = attr
            return self.define(
                i64, f"duo_check(status, {scope.point}, {site + 1}, {args[0].name}, {polynomial(bound)})"
            )
        return self.define(dtype, arithmetic(op, args, dtype))

    def load(self, access: Access, args: Sequence[Value], scope: Scope) -> str:
        """The expression that reads; guarded ones read only where they may."""
        count = len(access.index_strides)
        dtype = self.args[access.buffer].dtype
        text = f"a{access.buffer}[{self.address(access, scope.indices, args[:count])}]"
        if dtype is bool_:
            text = f"({text} != 0)"
        condition = self.guards(access, scope.indices)
        return f"({condition}) ? {text} : {args[count].name}" if condition else text

    def store(self, store: Store, values: Sequence[Value], scope: Scope) -> None:
        """Writes a value of the body where its guards hold."""
        value = values[store.value]
        extra = [values[k] for k in store.indices]
        target = f"a{store.access.buffer}[{self.address(store.access, scope.indices, extra)}]"
        condition = self.guards(store.access, scope.indices)
        stored = f"{target} = {in_memory(value)};"
        self.w.put(f"if ({condition}) {stored}" if condition else stored)


def in_memory(value: Value) -> str:
    """The value as it is stored."""
    return f"({memory(value.dtype)}){_atom(value.name)}" if value.dtype is bool_ else value.name


def _atom(text: str) -> str:
    plain = text.replace("_", "").replace(".", "").isalnum() or (text.startswith("(") and text.endswith(")"))
    return text if plain else f"({text})"


def literal(value: Any, dtype: DType) -> str:
    """A constant, rounded to `dtype` already, as C."""
    if dtype is bool_:
        return "true" if value else "false"
    if dtype.is_integer:
        number = integer(int(value))
        if dtype is not i64 or "LL" in number:
            return number
        return f"{number[:-1]}LL)" if number.endswith(")") else f"{number}LL"
    array = np.asarray(value).astype(dtype.numpy)
    if dtype.is_narrow_float:
        return f"(unsigned short)0x{int(array.view(np.uint16)):04x}"
    if not np.isfinite(array):
        if dtype is f32:
            return f"__int_as_float(0x{int(array.view(np.uint32)):08x})"
        return f"__longlong_as_double(0x{int(array.view(np.uint64)):016x}LL)"
    text = repr(float(array)) if dtype is f64 else np.format_float_scientific(np.float32(array), unique=True, trim="0")
    text = f"{text}f" if dtype is f32 else text
    return f"({text})" if text.startswith("-") else text


def arithmetic(op: str, args: Sequence[Value], dtype: DType) -> str:
    """One instruction of the scalar protocol as an expression of `dtype`."""
    names = [a.name for a in args]
    source = args[0].dtype
    float_ = source.kind == "f"
    suffix = "f" if source is f32 else ""
    if op == "convert":
        return convert(names[0], source, dtype)
    if op == "bitcast":
        return _bitcast(names[0], source, dtype)
    if op == "select":
        return f"{names[0]} ? {names[1]} : {names[2]}"
    if op == "fma":
        return f"__fma{'f' if dtype is f32 else ''}_rn({', '.join(names)})"
    if op == "ldexp":
        return f"duo_ldexp({', '.join(names)})"
    if op == "copysign":
        return f"copysign{suffix}({names[0]}, {names[1]})"
    if op in _FLOAT_UNARY:
        return f"{_FLOAT_UNARY[op]}{suffix}({names[0]})"
    if op in _COMPARE:
        return f"{names[0]} {_COMPARE[op]} {names[1]}"
    if op == "neg":
        return f"-{names[0]}" if float_ else _wrap("-", "0", names[0], dtype)
    if op == "not_":
        return f"!{names[0]}" if dtype is bool_ else f"({register(dtype)})~{names[0]}"
    if op in ("idiv", "irem"):
        return f"({register(dtype)})({names[0]} {'/' if op == 'idiv' else '%'} {names[1]})"
    if op == "ashr":
        return f"({register(dtype)})({names[0]} >> {names[1]})"
    if float_:
        return f"{names[0]} {'/' if op == 'div' else _WRAPPING[op]} {names[1]}"
    if dtype is bool_:
        return f"(bool)({names[0]} {_WRAPPING[op]} {names[1]})"
    return _wrap(_WRAPPING[op], names[0], names[1], dtype)


def _wrap(code: str, x: str, y: str, dtype: DType) -> str:
    """Two's complement arithmetic: in unsigned of at least 32 bits, cut back to the dtype."""
    cast = f"({_UNSIGNED[dtype.itemsize]})"
    if dtype.itemsize < 4:
        cast = f"(unsigned){cast}"
    return f"({register(dtype)})({cast}{_atom(x)} {code} {cast}{_atom(y)})"


def _bitcast(name: str, source: DType, dtype: DType) -> str:
    if dtype is bool_:
        return f"{name} != 0"
    call = _BITS.get((source.name, dtype.name))
    return f"{call}({name})" if call else f"({register(dtype)}){_atom(name)}"


def convert(name: str, source: DType, dtype: DType) -> str:
    """A conversion of the scalar protocol (rule 4), rounded once."""
    if source is dtype:
        return name
    if source.is_narrow_float:
        return convert(f"duo_from_{source.name}({name})", f32, dtype)
    if dtype is bool_:
        return f"{_atom(name)} != 0"
    if dtype.is_narrow_float:
        # f16 overflows beyond 2^16, below which f32 is exact; bf16 does not
        odd = source is f64 or (dtype is bf16 and source in (i32, i64))
        return f"duo_to_{dtype.name}({'duo_odd' if odd else '(float)'}({name}))"
    return f"({register(dtype)}){_atom(name)}"
