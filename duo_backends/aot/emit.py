"""Expressions of sizes as LLVM text: straight code in one function, equal expressions once."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from duo_backends.aot.sizes import Size

HELPERS = """
declare i64 @llvm.smax.i64(i64, i64)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.ctpop.i64(i64)
declare i64 @llvm.ctlz.i64(i64, i1)
declare double @llvm.ceil.f64(double)
declare double @llvm.floor.f64(double)
declare double @llvm.maxnum.f64(double, double)
; The largest integer that is not above a / b, where b > 0; anything for b = 0, which ways that are not taken divide by.
define internal i64 @duo.floordiv(i64 %a, i64 %given) alwaysinline nounwind {
  %none = icmp eq i64 %given, 0
  %b = select i1 %none, i64 1, i64 %given
  %q = sdiv i64 %a, %b
  %r = srem i64 %a, %b
  %below = icmp slt i64 %r, 0
  %less = sext i1 %below to i64
  %out = add i64 %q, %less
  ret i64 %out
}
; `threads_for` of `cpu/table.py`: how many threads, if work of less than `least` is for one and each gets `share` at least.
define internal i64 @duo.patient(double %cost, i64 %units, double %least, double %share, i64 %most) nounwind {
  %small = fcmp olt double %cost, %least
  %parts.real = fdiv double %cost, %share
  %parts.given = fptosi double %parts.real to i64
  %parts = select i1 %small, i64 1, i64 %parts.given
  %fitting = call i64 @llvm.smin.i64(i64 %parts, i64 %units)
  %out = call i64 @llvm.smin.i64(i64 %fitting, i64 %most)
  ret i64 %out
}
"""


class SizeText:
    """Lines of a function in which `dims` gives the names of values (i64) for dims. With `real`, everything is computed in double, so that sizes
    that do not fit an i64 are seen to be large."""

    def __init__(self, dims: Mapping[str, str], thread_limits: tuple[float, ...] = (), real: bool = False) -> None:
        self.dims, self.limits, self.real = dims, thread_limits, real
        self.lines: list[str] = []
        self._made: dict[tuple[Any, bool], str] = {}

    def new(self, text: str) -> str:
        """A value."""
        self.lines.append(f"  %e{len(self.lines)} = {text}")
        return f"%e{len(self.lines) - 1}"

    def value(self, x: Any, real: bool = False) -> str:
        """An expression or number, as an i64, or with `real` as a double."""
        real = real or self.real
        if not isinstance(x, Size):
            return _double(x) if real else str(int(x))
        key = (x, real)
        if key not in self._made:
            natural = x.real or self.real
            if natural == real:
                self._made[key] = self._emit(x)
            else:
                self._made[key] = self.new(f"sitofp i64 {self.value(x)} to double")
        return self._made[key]

    def _emit(self, x: Size) -> str:
        real, op, args = x.real or self.real, x.op, x.args
        kind = "double" if real else "i64"
        if op == "dim":
            given = self.dims[args[0]]
            return self.new(f"sitofp i64 {given} to double") if self.real else given
        if op == "select":
            test, a, b, yes, no = args
            floats = any(isinstance(v, float) or (isinstance(v, Size) and v.real) for v in (a, b)) or self.real
            left, right = self.value(a, floats), self.value(b, floats)
            word = f"fcmp o{test} double" if floats else f"icmp {'ne' if test == 'ne' else 's' + test} i64"
            if floats and test == "ne":
                word = "fcmp one double"
            flag = self.new(f"{word} {left}, {right}")
            return self.new(f"select i1 {flag}, {kind} {self.value(yes, real)}, {kind} {self.value(no, real)}")
        if op in ("trunc", "ceil"):
            inner = self.value(args[0], True)
            if op == "ceil":
                inner = self.new(f"call double @llvm.ceil.f64(double {inner})")
            return inner if self.real else self.new(f"fptosi double {inner} to i64")
        if op == "bit_count":
            return self.new(f"call i64 @llvm.ctpop.i64(i64 {self.value(args[0])})")
        if op == "bit_length":
            zeros = self.new(f"call i64 @llvm.ctlz.i64(i64 {self.value(args[0])}, i1 false)")
            return self.new(f"sub i64 64, {zeros}")
        if op in ("patient", "eager"):
            return self._threads(op, args)
        a, b = (self.value(v, real) for v in args)
        if op == "max":
            name = "@llvm.maxnum.f64" if real else "@llvm.smax.i64"
            return self.new(f"call {kind} {name}({kind} {a}, {kind} {b})")
        if op == "floordiv" and not real:
            return self.new(f"call i64 @duo.floordiv(i64 {a}, i64 {b})")
        word = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "floordiv": "div"}[op]
        out = self.new(f"{'f' if real else ''}{word} {kind} {a}, {b}")
        return self.new(f"call double @llvm.floor.f64(double {out})") if op == "floordiv" else out

    def _threads(self, op: str, args: tuple[Any, ...]) -> str:
        serial, share, eager, eager_share, most = self.limits
        cost, units = self.value(args[0], True), self.value(args[1])

        def of(least: float, each: float) -> str:
            return self.new(
                f"call i64 @duo.patient(double {cost}, i64 {units}, double {_double(least)}, double {_double(each)}, i64 {int(most)})"
            )

        patient = of(serial, share)
        if op == "patient":
            return patient
        return self.new(f"call i64 @llvm.smax.i64(i64 {patient}, i64 {of(eager, eager_share)})")


def _double(x: float) -> str:
    """A double as LLVM reads it exactly."""
    return "0x" + struct.pack(">d", float(x)).hex().upper()
