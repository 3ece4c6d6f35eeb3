"""How much work a kernel is: arithmetic operations and bytes that must move, for profiles and rooflines.

`flops` counts an fma as two and any other arithmetic instruction of a body as one, an exp as the dozen that its polynomial
has; conversions, comparisons, selections and index arithmetic count nothing. `traffic` counts each argument once, however often a
cache serves it again.
"""

from __future__ import annotations

from collections.abc import Mapping

from duo_ir.kernels.kernel import (
    AttentionKernel,
    Body,
    ContractKernel,
    ConvKernel,
    Kernel,
    LoopKernel,
    ScanKernel,
    ScatterKernel,
    SortKernel,
)  # fmt: skip
from duo_ir.ops.attention import HALF
from duo_ir.types import evaluate, product

_ARITHMETIC = {"add": 1, "sub": 1, "mul": 1, "div": 1, "fma": 2, "sqrt": 1, "neg": 1, "ldexp": 1}
_REDUCING = {"sum": 1, "prod": 1, "dot": 2, "max": 1, "min": 1}


def _body(body: Body) -> int:
    return sum(_ARITHMETIC.get(i.op, 0) for i in body if i.dtype.kind == "f")


def flops(kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """Floating-point operations of one run with these values of `kernel.dims`."""
    if isinstance(kernel, ContractKernel):
        results = evaluate(product(kernel.batch) * kernel.m * kernel.n, sizes)
        return results * (2 * evaluate(kernel.k, sizes) + _body(kernel.body))
    if isinstance(kernel, ConvKernel):
        depth = kernel.c * product([w.taps for w in kernel.windows])
        return evaluate(product(kernel.axes), sizes) * (2 * evaluate(depth, sizes) + _body(kernel.body))
    if isinstance(kernel, AttentionKernel):
        products = 3 * kernel.width + 2 * kernel.value_width if kernel.backward else kernel.width + kernel.value_width
        return evaluate(product(kernel.batch), sizes) * _pairs(kernel, sizes) * 2 * products
    if isinstance(kernel, LoopKernel):
        each = 0
        for stage in kernel.stages:
            inner = sum(_REDUCING.get(r.kind, 0) for r in stage.reduces if r.dtype.kind == "f") + _body(stage.body)
            each += evaluate(product(stage.axes), sizes) * inner
        return evaluate(product(kernel.axes), sizes) * each
    if isinstance(kernel, ScatterKernel):
        return evaluate(product(kernel.axes), sizes) * (_body(kernel.body) + (kernel.mode == "add"))
    if isinstance(kernel, ScanKernel):
        return evaluate(product(kernel.axes) * kernel.length, sizes) * _body(kernel.body)
    return 0


def _pairs(kernel: AttentionKernel, sizes: Mapping[str, int]) -> int:
    """Pairs of a query and a key that take part, of one head."""
    queries, keys = evaluate(kernel.queries, sizes), evaluate(kernel.keys, sizes)
    if not kernel.causal:
        return queries * keys
    starts = range(0, queries, HALF)
    return sum(min(HALF, queries - i) * min(keys, i + HALF) for i in starts)


def traffic(kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """Bytes of the arguments."""
    return sum(evaluate(arg.size, sizes) * arg.dtype.itemsize for arg in kernel.args)


def describe(kernel: Kernel, sizes: Mapping[str, int]) -> str:
    """A few words for a person: the kind, the sizes, what is reduced."""

    def numbers(dims: tuple) -> str:
        return "x".join(str(evaluate(d, sizes)) for d in dims) or "1"

    if isinstance(kernel, ContractKernel):
        batch = f"{numbers(kernel.batch)} of " if kernel.batch else ""
        return f"matmul {batch}{numbers((kernel.m, kernel.k, kernel.n))} {kernel.result.name}"
    if isinstance(kernel, ConvKernel):
        counts, taps = [w.count for w in kernel.windows], [w.taps for w in kernel.windows]
        groups = f" in {numbers((kernel.groups,))} groups" if kernel.groups != 1 else ""
        return f"conv {numbers((kernel.images, *counts, kernel.n))}{groups} of {numbers((*taps, kernel.c))} {kernel.result.name}"
    if isinstance(kernel, AttentionKernel):
        what = f"{'causal ' if kernel.causal else ''}attention{' gradient' if kernel.backward else ''}"
        widths = numbers(tuple(dict.fromkeys((kernel.width, kernel.value_width))))
        return f"{what} {numbers(kernel.batch)} of {numbers((kernel.queries, kernel.keys))}, width {widths} {kernel.acc.name}"
    if isinstance(kernel, LoopKernel):
        parts = []
        for stage in kernel.stages:
            kinds = "+".join(dict.fromkeys(r.kind for r in stage.reduces))
            if kinds:
                parts.append(f"{kinds} over {numbers(stage.axes)}")
        return f"loop {numbers(kernel.axes)}" + (f", {', '.join(dict.fromkeys(parts))}" if parts else "")
    if isinstance(kernel, ScanKernel):
        return f"cumulative {numbers((*kernel.axes, kernel.length))}"
    if isinstance(kernel, SortKernel):
        count, length = numbers((kernel.count,)), numbers((kernel.length,))
        return f"sort {numbers(kernel.axes)} of {length}" + (f", first {count}" if count != length else "")
    if isinstance(kernel, ScatterKernel):
        return f"scatter {numbers(kernel.axes)} into {evaluate(kernel.size, sizes)}"
    return type(kernel).__name__
