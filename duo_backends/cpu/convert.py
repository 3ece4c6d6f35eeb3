"""Conversions between dtypes as LLVM text, each rounding once to nearest even (numerics contract, rule 4).

f16 and bf16 are i16 bits in registers. bf16 is converted by integer arithmetic on every target: the hardware's
conversion differs on denormals. f16 takes the target's instruction where there is one, else integer arithmetic. What
cannot round once through f32 (f64 and i64 to a narrow float) goes through f32 *rounded to odd*: a last bit that is set
when anything was lost, which makes the second rounding equal to a single one (Boldo & Melquiond, "When double rounding is odd", 2005).
"""

from __future__ import annotations

from duo_backends.cpu.code import Target
from duo_backends.cpu.llvm import Function, Region, literal, register_type, splat_literal, vector
from duo_ir.types import DType, bf16, bool_, f32, f64, i32, i64


class _Lanes:
    """`f` at one width and place, with short names for what conversions use."""

    def __init__(self, f: Function, width: int, region: Region | None) -> None:
        self.f, self.width, self.region = f, width, region

    def type(self, element: str) -> str:
        return vector(self.width, element)

    def int(self, value: int, bits: int = 32) -> str:
        return splat_literal(self.width, f"i{bits}", str(value))

    def float(self, value: float, d: DType = f32) -> str:
        return splat_literal(self.width, register_type(d), literal(value, d))

    def op(self, code: str, element: str, *names: str) -> str:
        return self.f.pure(f"{code} {self.type(element)} {', '.join(names)}", self.region)

    def cast(self, code: str, name: str, source: str, target: str) -> str:
        return self.f.pure(f"{code} {self.type(source)} {name} to {self.type(target)}", self.region)

    def select(self, condition: str, element: str, x: str, y: str) -> str:
        type_ = self.type(element)
        return self.f.pure(f"select {self.type('i1')} {condition}, {type_} {x}, {type_} {y}", self.region)

    def call(self, name: str, element: str, *operands: str) -> str:
        type_ = self.type(element)
        return self.f.call(name, type_, [(type_, x) for x in operands], region=self.region)


def convert(
    f: Function, target: Target, name: str, source: DType, result: DType, width: int, region: Region | None
) -> str:
    """`name`, a scalar or vector of `source` in registers, as `result`."""
    if source is result:
        return name
    b = _Lanes(f, width, region)
    old, new = register_type(source), register_type(result)
    if source.is_narrow_float:
        wide = bf16_to_f32(b, name) if source is bf16 else _f16_to_f32(b, target, name)
        return convert(f, target, wide, f32, result, width, region)
    if result is bool_:
        if source.kind == "f":
            return b.op("fcmp une", old, name, b.float(0.0, source))
        return b.op("icmp ne", old, name, b.int(0, source.bits))
    if result.is_narrow_float:
        return _to_narrow(b, target, name, source, result)
    if source.kind == "f" and result.kind == "f":
        return b.cast("fpext" if result is f64 else "fptrunc", name, old, new)
    if source.kind == "f":
        # out of range is poison; frozen, so that a recipe may compute with it before it selects another value
        number = b.cast("fptoui" if result.kind == "u" else "fptosi", name, old, new)
        return b.f.pure(f"freeze {b.type(new)} {number}", region)
    unsigned = source.kind in "ub"
    if result.kind == "f":
        return b.cast("uitofp" if unsigned else "sitofp", name, old, new)
    if old == new:
        return name
    if source.bits > result.bits and source is not bool_:
        return b.cast("trunc", name, old, new)
    return b.cast("zext" if unsigned else "sext", name, old, new)


def bf16_to_f32(b: _Lanes, name: str) -> str:
    bits = b.op("shl", "i32", b.cast("zext", name, "i16", "i32"), b.int(16))
    return b.cast("bitcast", bits, "i32", "float")


def _to_narrow(b: _Lanes, target: Target, name: str, source: DType, result: DType) -> str:
    old = register_type(source)
    if source is f64:
        name = _f64_to_f32_odd(b, name)
    elif source is i64 or (source is i32 and result is bf16):
        # f16 overflows beyond 2^16, below which f32 is exact; bf16 does not
        name = _integer_to_f32_odd(b, name, source) if result is bf16 else b.cast("sitofp", name, old, "float")
    elif source.kind != "f":
        name = b.cast("uitofp" if source.kind in "ub" else "sitofp", name, old, "float")
    return f32_to_bf16(b, name) if result is bf16 else _f32_to_f16(b, target, name)


def f32_to_bf16(b: _Lanes, name: str) -> str:
    """Adds 0x7fff plus the last kept bit, keeps the upper half; NaN stays a (quiet) NaN."""
    bits = b.cast("bitcast", name, "float", "i32")
    upper = b.op("lshr", "i32", bits, b.int(16))
    last = b.op("and", "i32", upper, b.int(1))
    rounded = b.op("add", "i32", bits, b.op("add", "i32", last, b.int(0x7FFF)))
    rounded = b.op("lshr", "i32", rounded, b.int(16))
    quiet = b.op("or", "i32", upper, b.int(0x40))
    nan = b.op("fcmp uno", "float", name, name)
    return b.cast("trunc", b.select(nan, "i32", quiet, rounded), "i32", "i16")


def _f16_to_f32(b: _Lanes, target: Target, name: str) -> str:
    if target.has_half:
        return b.cast("fpext", b.cast("bitcast", name, "i16", "half"), "half", "float")
    # exponent and fraction moved to f32's place are the value times 2^-112, denormals too; then infinity and NaN
    wide = b.cast("zext", name, "i16", "i32")
    magnitude = b.op("and", "i32", wide, b.int(0x7FFF))
    moved = b.cast("bitcast", b.op("shl", "i32", magnitude, b.int(13)), "i32", "float")
    scaled = b.cast("bitcast", b.op("fmul", "float", moved, b.float(2.0**112)), "float", "i32")
    special = b.op("icmp uge", "i32", magnitude, b.int(0x7C00))
    scaled = b.select(special, "i32", b.op("or", "i32", scaled, b.int(0x7F800000)), scaled)
    sign = b.op("shl", "i32", b.op("and", "i32", wide, b.int(0x8000)), b.int(16))
    return b.cast("bitcast", b.op("or", "i32", scaled, sign), "i32", "float")


def _f32_to_f16(b: _Lanes, target: Target, name: str) -> str:
    if target.has_half:
        return b.cast("bitcast", b.cast("fptrunc", name, "float", "half"), "half", "i16")
    bits = b.cast("bitcast", name, "float", "i32")
    magnitude = b.op("and", "i32", bits, b.int(0x7FFFFFFF))
    # normal results: rebias the exponent (by 127 - 15), round at bit 13
    last = b.op("and", "i32", b.op("lshr", "i32", magnitude, b.int(13)), b.int(1))
    normal = b.op("add", "i32", magnitude, b.int(0xFFF - (112 << 23)))
    normal = b.op("lshr", "i32", b.op("add", "i32", normal, last), b.int(13))
    # denormal results: adding 0.5, whose last place is f16's smallest step 2^-24, rounds them
    half = b.op("fadd", "float", b.cast("bitcast", magnitude, "i32", "float"), b.float(0.5))
    denormal = b.op("sub", "i32", b.cast("bitcast", half, "float", "i32"), b.int(0x3F000000))
    small = b.op("icmp ult", "i32", magnitude, b.int(0x38800000))
    rounded = b.select(small, "i32", denormal, normal)
    rounded = b.select(b.op("icmp uge", "i32", magnitude, b.int(0x47800000)), "i32", b.int(0x7C00), rounded)
    rounded = b.select(b.op("icmp ugt", "i32", magnitude, b.int(0x7F800000)), "i32", b.int(0x7E00), rounded)
    sign = b.op("and", "i32", b.op("lshr", "i32", bits, b.int(16)), b.int(0x8000))
    return b.cast("trunc", b.op("or", "i32", rounded, sign), "i32", "i16")


def _f64_to_f32_odd(b: _Lanes, name: str) -> str:
    """Toward zero, the last bit set when inexact."""
    nearest = b.cast("fptrunc", name, "double", "float")
    back = b.cast("fpext", nearest, "float", "double")
    beyond = b.op("fcmp ogt", "double", b.call("fabs", "double", back), b.call("fabs", "double", name))
    bits = b.cast("bitcast", nearest, "float", "i32")
    bits = b.select(beyond, "i32", b.op("sub", "i32", bits, b.int(1)), bits)
    inexact = b.op("fcmp one", "double", back, name)
    bits = b.select(inexact, "i32", b.op("or", "i32", bits, b.int(1)), bits)
    return b.cast("bitcast", bits, "i32", "float")


def _integer_to_f32_odd(b: _Lanes, name: str, source: DType) -> str:
    """The magnitude cut to 24 significant bits or to its upper bits, with a sticky bit, is exact in f64."""
    if source is i32:
        return _f64_to_f32_odd(b, b.cast("sitofp", name, "i32", "double"))
    negative = b.op("icmp slt", "i64", name, b.int(0, 64))
    magnitude = b.select(negative, "i64", b.op("sub", "i64", b.int(0, 64), name), name)
    lost = b.op("icmp ne", "i64", b.op("and", "i64", magnitude, b.int(0x7FF, 64)), b.int(0, 64))
    sticky = b.select(lost, "i64", b.int(0x800, 64), b.int(0, 64))
    cut = b.op("or", "i64", b.op("and", "i64", magnitude, b.int(-0x800, 64)), sticky)
    large = b.op("icmp uge", "i64", magnitude, b.int(1 << 53, 64))
    wide = b.cast("uitofp", b.select(large, "i64", cut, magnitude), "i64", "double")
    wide = b.select(negative, "double", b.f.pure(f"fneg {b.type('double')} {wide}", b.region), wide)
    return _f64_to_f32_odd(b, wide)
