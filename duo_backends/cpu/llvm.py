"""A small builder of LLVM text: functions made of regions, SSA loops, and common-subexpression reuse.

A `Region` is a stretch of instructions with a place in the function; it can grow after later text was written, which is
how loop-invariant values are hoisted: `Loop.before` runs once, only when the loop runs at all. `pure` reuses an equal
instruction of the region or of one that encloses it. Text is built directly because it is several times faster than
building objects to print.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from duo_ir.types import DType, bf16, f16, f32, f64

_SHORT = {"float": "f32", "double": "f64", "half": "f16", "ptr": "p0"}


def vector(width: int, element: str) -> str:
    """`<width x element>`, or the element itself for width 1."""
    return element if width == 1 else f"<{width} x {element}>"


def mangle(type_: str) -> str:
    """An intrinsic's suffix for a type: `<16 x float>` -> v16f32."""
    if type_[0] == "<":
        count, element = type_[1:-1].split(" x ")
        return f"v{count}{mangle(element)}"
    return _SHORT.get(type_, type_)


def register_type(d: DType) -> str:
    """f16 and bf16 live in registers as their bits (i16), bool as i1."""
    if d.kind == "b":
        return "i1"
    if d.is_narrow_float:
        return "i16"
    if d.kind == "f":
        return "float" if d is f32 else "double"
    return f"i{d.bits}"


def memory_type(d: DType) -> str:
    return "i8" if d.kind == "b" else register_type(d)


def literal(value: float | int | bool, d: DType) -> str:
    """The LLVM literal of `value` rounded to `d`."""
    if d.kind == "b":
        return "true" if value else "false"
    if d in (f32, f64):
        with np.errstate(over="ignore"):
            rounded = float(np.float32(value)) if d is f32 else float(value)
        return "0x" + struct.pack(">d", rounded).hex().upper()
    if d in (f16, bf16):
        with np.errstate(over="ignore"):
            return str(int(np.asarray(value, d.numpy).view(np.int16)))
    return str(int(np.asarray(value, d.numpy).astype(np.int8)) if d.kind == "u" else int(value))


def is_literal(name: str) -> bool:
    return name[0] != "%"


def splat_literal(width: int, element: str, text: str) -> str:
    return text if width == 1 else f"splat ({element} {text})"


class Module:
    """Functions, the intrinsics they declare, and tables of constants."""

    def __init__(self) -> None:
        self.functions: list[str] = []
        self.declarations: set[str] = set()

    def table(self, name: str, words: Sequence[int]) -> str:
        """The address of constant i64 words, which later calls with this name share."""
        self.declarations.add(
            f"@{name} = internal constant [{len(words)} x i64] [{', '.join([f'i64 {w}' for w in words])}], align 64"
        )
        return f"@{name}"

    def text(self) -> str:
        return "\n".join([*self.functions, *sorted(self.declarations), ""])


class Region:
    """Instructions at one place. `block` is the label of the basic block that its end lies in."""

    __slots__ = ("block", "known", "lines", "parent", "sections")

    def __init__(self, block: str, parent: Region | None) -> None:
        self.lines: list[str | Region] = []
        self.block = block
        self.known: dict[str, str] = {}
        self.parent = parent
        self.sections: list[Region] = []

    def find(self, text: str) -> str | None:
        """The value of an equal instruction in scope at this place."""
        scope: Region | None = self
        while scope is not None:
            if text in scope.known:
                return scope.known[text]
            for section in scope.sections:
                if text in section.known:
                    return section.known[text]
            scope = scope.parent
        return None

    def write(self, out: list[str]) -> None:
        for line in self.lines:
            if isinstance(line, Region):
                line.write(out)
            else:
                out.append(line)


class Loop:
    """A loop being built. `index` counts; `values` are the carried values at the start of an iteration; set `next` to
    their new names before the body ends; `results` hold them after the loop. `before` is the hoisting region."""

    __slots__ = ("before", "body", "index", "next", "results", "values")

    def __init__(self, index: str, values: list[str], results: list[str], before: Region, body: Region) -> None:
        self.index, self.values, self.results, self.before, self.body = index, values, results, before, body
        self.next: Sequence[str] = values


class Function:
    """Builds one function; `here` is the region that text goes to. `entry` holds allocas, `top` values that depend on
    nothing but arguments. Close with `finish()`, which adds the text to the module."""

    def __init__(self, module: Module, header: str) -> None:
        self.module = module
        self.header = header
        self.count = 0
        self.entry = Region("entry", None)
        self.root = Region("start", None)
        self.here = self.root
        self.top = self.section()

    # ------------------------------------------------------------------------------------------------ instructions
    def name(self) -> str:
        self.count += 1
        return f"%v{self.count}"

    def label(self) -> str:
        self.count += 1
        return f"b{self.count}"

    def emit(self, text: str, region: Region | None = None) -> None:
        (region or self.here).lines.append(f"  {text}")

    def op(self, text: str, region: Region | None = None) -> str:
        """An instruction with a result; always a new one."""
        self.count += 1
        name = f"%v{self.count}"
        (region or self.here).lines.append(f"  {name} = {text}")
        return name

    def pure(self, text: str, region: Region | None = None) -> str:
        """An instruction whose result depends on its operands alone: an equal one in scope is reused."""
        region = region or self.here
        name = region.find(text)
        if name is None:
            name = region.known[text] = self.op(text, region)
        return name

    def intrinsic(self, base: str, result: str, operands: Sequence[tuple[str, str]], suffix: str | None = None) -> str:
        """The text of a call of `llvm.<base>.<suffix>` (the suffix is the result type's unless given), declared."""
        name = f"@llvm.{base}" + (f".{suffix if suffix is not None else mangle(result)}" if suffix != "" else "")
        self.module.declarations.add(f"declare {result} {name}({', '.join(t for t, _ in operands)})")
        return f"call {result} {name}({', '.join(f'{t} {x}' for t, x in operands)})"

    def call(
        self,
        base: str,
        result: str,
        operands: Sequence[tuple[str, str]],
        suffix: str | None = None,
        region: Region | None = None,
    ) -> str:
        """A pure intrinsic call."""
        return self.pure(self.intrinsic(base, result, operands, suffix), region)

    def alloca(self, type_: str, count: int = 1) -> str:
        return self.op(f"alloca {type_}, i64 {count}, align 64", self.entry)

    # --------------------------------------------------------------------------------------------- i64 arithmetic
    def add(self, a: str, b: str, region: Region | None = None) -> str:
        if a == "0":
            return b
        if b == "0":
            return a
        if is_literal(a) and is_literal(b):
            return str(int(a) + int(b))
        return self.pure(f"add i64 {a}, {b}", region)

    def sub(self, a: str, b: str, region: Region | None = None) -> str:
        if b == "0":
            return a
        if is_literal(a) and is_literal(b):
            return str(int(a) - int(b))
        return self.pure(f"sub i64 {a}, {b}", region)

    def mul(self, a: str, b: str, region: Region | None = None) -> str:
        if a == "0" or b == "0":
            return "0"
        if a == "1":
            return b
        if b == "1":
            return a
        if is_literal(a) and is_literal(b):
            return str(int(a) * int(b))
        return self.pure(f"mul i64 {a}, {b}", region)

    def _divide(self, kind: str, a: str, b: str, region: Region | None) -> str:
        if is_literal(a) and is_literal(b):
            return str(int(a) // int(b) if kind == "udiv" else int(a) % int(b))
        if is_literal(b) and int(b) > 0 and int(b) & (int(b) - 1) == 0:
            shift, mask = int(b).bit_length() - 1, int(b) - 1
            return self.pure(f"lshr i64 {a}, {shift}" if kind == "udiv" else f"and i64 {a}, {mask}", region)
        return self.pure(f"{kind} i64 {a}, {b}", region)

    def div(self, a: str, b: str, region: Region | None = None) -> str:
        """Quotient of non-negative numbers."""
        return a if b == "1" else self._divide("udiv", a, b, region)

    def rem(self, a: str, b: str, region: Region | None = None) -> str:
        """Remainder of non-negative numbers."""
        return "0" if b == "1" else self._divide("urem", a, b, region)

    def min(self, a: str, b: str, region: Region | None = None) -> str:
        if is_literal(a) and is_literal(b):
            return str(min(int(a), int(b)))
        return self.call("smin", "i64", [("i64", a), ("i64", b)], region=region)

    def gep(self, type_: str, pointer: str, offset: str, region: Region | None = None) -> str:
        if offset == "0":
            return pointer
        return self.pure(f"getelementptr {type_}, ptr {pointer}, i64 {offset}", region)

    # ------------------------------------------------------------------------------------------------ control flow
    def section(self) -> Region:
        """A region at this place that later text can still add to."""
        parent = self.here
        inside, after = self.label(), self.label()
        region = Region(inside, parent.parent)  # not `parent`: what that computes later is not in scope
        parent.lines += [f"  br label %{inside}", f"{inside}:", region, f"  br label %{after}", f"{after}:"]
        parent.block = after
        parent.sections.append(region)
        return region

    @contextmanager
    def when(self, condition: str, region: Region | None = None) -> Iterator[None]:
        """Runs the block only where the i1 `condition` holds. Nothing computed inside may be used after it."""
        if condition == "true":
            yield
            return
        outside = self.here
        parent = region or outside
        inside, after = self.label(), self.label()
        parent.lines.append(f"  br i1 {condition}, label %{inside}, label %{after}")
        parent.lines.append(f"{inside}:")
        child = Region(inside, parent)
        parent.lines.append(child)
        self.here = child
        yield
        parent.lines.append(f"  br label %{after}")
        parent.lines.append(f"{after}:")
        parent.block = after
        self.here = outside

    @contextmanager
    def loop(
        self,
        begin: str,
        end: str,
        step: int | str = 1,
        carried: Sequence[tuple[str, str]] = (),
        runs: bool = False,
        opaque: bool = False,
    ) -> Iterator[Loop]:
        """for (index = begin; index < end; index += step), tested at the bottom. `carried`: (type, initial value) of
        each loop-carried value. `runs`: known to run at least once. `opaque`: a loop even where it runs once, so that the index is no constant."""
        parent = self.here
        if not opaque and _once(begin, end, step):
            before = self.section()
            once = Loop(begin, [value for _, value in carried], [], before, parent)
            yield once
            once.results += once.next
            return
        entry, body, exit_ = self.label(), self.label(), self.label()
        if is_literal(begin) and is_literal(end) and int(begin) < int(end):
            runs = True
        if not runs:
            some = self.pure(f"icmp slt i64 {begin}, {end}")
            self.emit(f"br i1 {some}, label %{entry}, label %{exit_}")
        else:
            self.emit(f"br label %{entry}")
        skipped = parent.block
        before = Region(entry, parent)
        inner = Region(body, before)
        index = self.name()
        loop = Loop(index, [self.name() for _ in carried], [self.name() for _ in carried], before, inner)
        self.here = inner
        yield loop
        following = self.op(f"add i64 {index}, {step}")
        again = self.op(f"icmp slt i64 {following}, {end}")
        self.emit(f"br i1 {again}, label %{body}, label %{exit_}")
        latch = inner.block
        phis = [f"  {index} = phi i64 [ {begin}, %{before.block} ], [ {following}, %{latch} ]"]
        for (type_, initial), value, new in zip(carried, loop.values, loop.next, strict=True):
            phis.append(f"  {value} = phi {type_} [ {initial}, %{before.block} ], [ {new}, %{latch} ]")
        parent.lines += [f"{entry}:", before, f"  br label %{body}", f"{body}:", *phis, inner, f"{exit_}:"]
        for (type_, initial), result, new in zip(carried, loop.results, loop.next, strict=True):
            skip = "" if runs else f"[ {initial}, %{skipped} ], "
            parent.lines.append(f"  {result} = phi {type_} {skip}[ {new}, %{latch} ]")
        parent.block = exit_
        self.here = parent

    def finish(self) -> None:
        out = [f"{self.header} {{", "entry:"]
        self.entry.write(out)
        out.append("  br label %start")
        out.append("start:")
        self.root.write(out)
        self.module.functions.append("\n".join([*out, "  ret void", "}"]))


def _once(begin: str, end: str, step: int | str) -> bool:
    """Whether it is known that a loop's body runs once."""
    if not (is_literal(begin) and is_literal(end) and is_literal(str(step))):
        return False
    return int(begin) < int(end) <= int(begin) + int(step)


# ------------------------------------------------------------------------------------------------------ wide vectors
def part(f: Function, type_: str, name: str, first: int, lanes: int) -> str:
    """Lanes [first, first + lanes) of a vector."""
    order = ", ".join(f"i32 {k}" for k in range(first, first + lanes))
    return f.op(f"shufflevector {type_} {name}, {type_} poison, <{lanes} x i32> <{order}>")


def joined(f: Function, element: str, parts: Sequence[str], lanes: int) -> str:
    """The vector of these parts, a power of two of them, of `lanes` lanes each."""
    while len(parts) > 1:
        order = ", ".join(f"i32 {k}" for k in range(2 * lanes))
        both = vector(lanes, element)
        parts = [
            f.op(f"shufflevector {both} {a}, {both} {b}, <{2 * lanes} x i32> <{order}>")
            for a, b in zip(parts[::2], parts[1::2])
        ]
        lanes *= 2
    return parts[0]


def scalef(f: Function, type_: str, names: list[str], dtype: DType, width: int) -> str:
    """AVX-512's ldexp, in one instruction a register, which takes no longer where the result underflows."""
    lanes = 64 // dtype.itemsize
    if width == lanes:
        operands = [*[(type_, n) for n in names], (type_, "zeroinitializer"), (f"i{width}", "-1"), ("i32", "4")]
        return f.intrinsic(f"x86.avx512.mask.scalef.p{'s' if dtype.itemsize == 4 else 'd'}.512", type_, operands, "")
    element = register_type(dtype)
    parts = [
        f.op(scalef(f, vector(lanes, element), [part(f, type_, n, k, lanes) for n in names], dtype, lanes))
        for k in range(0, width, lanes)
    ]
    return f"bitcast {type_} {joined(f, element, parts, lanes)} to {type_}"
