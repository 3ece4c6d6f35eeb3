"""Static kernels to templates: sizes become named dims, so that equal work on other shapes is one kernel, compiled once.

`generalize(kernel)` gives the template and the values of its names. Each extent of a loop gets a name of its own, also where two happen
to be equal; a stride that is the extent of a contiguous run (row-major memory) becomes that product, so that backends still see
which loops are one; every other integer gets its own name. 0, 1 and -1 stay what they are: they decide broadcasting and contiguity. Constants
of bodies and `Guard.step` are values or change the code, and stay too. The order of every computation depends on run-time sizes alone, so
the bits are those of the static kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from duo_ir.kernels.kernel import (
    Access,
    Affine,
    Arg,
    AttentionKernel,
    Body,
    ContractKernel,
    ConvKernel,
    Guard,
    Instr,
    Kernel,
    LoopKernel,
    ScanKernel,
    ScatterKernel,
    SortKernel,
    Stage,
    Store,
    Window,
)  # fmt: skip
from duo_ir.kernels.program import Cond, Item, Program, Step, While
from duo_ir.types import Dim, DimLike

Sizes: TypeAlias = tuple[tuple[str, int], ...]
LARGE_CONVOLUTION = 1 << 24  # multiply-adds
_LARGEST = 1 << 62  # beyond, a value might not fit the i64 that passes it


def generalize(kernel: Kernel) -> tuple[Kernel, Sizes]:
    """(template, value of each of its `dims` in order). A kernel with named sizes already is its own template."""
    if kernel.dims:
        return kernel, ()
    return _Template(kernel).make()


def generalize_program(program: Program) -> Program:
    """`program` with every static kernel, nested programs' too, as template and sizes (`Step.sizes`)."""
    return replace(program, items=tuple([_item(item) for item in program.items]))


def _item(item: Item) -> Item:
    if isinstance(item, Step):
        if item.kernel.dims:
            return item
        kernel, sizes = generalize(item.kernel)
        return Step(_shared(kernel), item.slots, item.where, sizes)
    if isinstance(item, Cond):
        return replace(item, then=generalize_program(item.then), orelse=generalize_program(item.orelse))
    if isinstance(item, While):
        return replace(item, test=generalize_program(item.test), body=generalize_program(item.body))
    return item


def _shared(kernel: Kernel) -> Kernel:
    """One object for equal templates: programs that are kept share it, and look-ups compare it by identity."""
    if kernel.sites:  # these differ between equal kernels
        return kernel
    if len(_templates) >= _KEPT:
        _templates.clear()
    return _templates.setdefault(kernel, kernel)


_KEPT = 4096  # templates remembered
_templates: dict[Kernel, Kernel] = {}
_SYMBOLS = [Dim.symbol(f"d{n}") for n in range(64)]  # made once: few kernels have more


class _Template:
    """A kernel on its way to a template. `sizes`: names given so far, in order, with their values."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sizes: list[tuple[str, int]] = []
        self.whole: dict[int, tuple[int, DimLike]] = {}  # buffer -> elements of the contiguous run an access covers

    def make(self) -> tuple[Kernel, Sizes]:
        kernel = self.kernel
        made: Kernel
        if isinstance(kernel, LoopKernel):
            made = self.loop(kernel)
        elif isinstance(kernel, ContractKernel):
            made = self.contract(kernel)
        elif isinstance(kernel, ConvKernel):
            if _is_large(kernel):
                return kernel, ()
            made = self.convolve(kernel)
        elif isinstance(kernel, ScanKernel):
            made = self.scan(kernel)
        elif isinstance(kernel, SortKernel):
            made = self.sort(kernel)
        elif isinstance(kernel, AttentionKernel):
            made = self.attention(kernel)
        else:
            made = self.scatter(kernel)
        return made, tuple(self.sizes)

    # ----------------------------------------------------------------------------------------------------- the kinds
    def loop(self, kernel: LoopKernel) -> LoopKernel:
        outer = self.extents(kernel.axes)
        # Stages over equal inner axes walk the same elements.
        inner = {axes: self.extents(axes) for axes in dict.fromkeys([s.axes for s in kernel.stages])}
        stages = []
        for stage in kernel.stages:
            scope = _Scope((*kernel.axes, *stage.axes), (*outer, *inner[stage.axes]))
            stores = tuple([self.store(s, scope) for s in stage.stores])
            stages.append(Stage(inner[stage.axes], self.body(stage.body, scope), stores, stage.reduces))
        args = self.args(kernel.args)
        return LoopKernel(args, outer, tuple(stages), self.names(), kernel.sites)

    def contract(self, kernel: ContractKernel) -> ContractKernel:
        axes = (*kernel.batch, kernel.m, kernel.n, kernel.k)
        extents = self.extents(axes)
        batch, (m, n, k) = extents[:-3], extents[-3:]
        *rows, _, depth = range(len(axes))
        left, right = (
            _Scope.pick(axes, extents, [*rows, depth]),
            _Scope.pick(axes, extents, [*rows[:-1], depth, rows[-1] + 1]),
        )
        out = _Scope.pick(axes, extents, range(len(axes) - 1))
        a, b = self.access(kernel.a, left), self.access(kernel.b, right)
        stores = tuple([self.store(s, out) for s in kernel.stores])
        body = self.body(kernel.body, out)
        args = self.args(kernel.args)
        return replace(
            kernel, args=args, batch=batch, m=m, n=n, k=k, a=a, b=b, body=body, stores=stores, dims=self.names()
        )

    def convolve(self, kernel: ConvKernel) -> ConvKernel:
        axes = self.extents(kernel.axes)
        images, *counts, groups, n = axes
        taps, bounds = self.extents([w.taps for w in kernel.windows]), self.extents([w.bound for w in kernel.windows])
        c = self.name(_static(kernel.c))
        windows = tuple([
            Window(count, tap, bound, *[self.name(_static(d)) for d in (w.offset, w.stride, w.dilation)])
            for w, count, tap, bound in zip(kernel.windows, counts, taps, bounds)
        ])  # fmt: skip
        left = (kernel.images, *[w.bound for w in kernel.windows], kernel.groups, kernel.c)
        right = (*[w.taps for w in kernel.windows], kernel.groups, kernel.c, kernel.n)
        a = self.access(kernel.a, _Scope(left, (images, *bounds, groups, c)))
        b = self.access(kernel.b, _Scope(right, (*taps, groups, c, n)))
        scope = _Scope(kernel.axes, axes)
        stores, body = tuple([self.store(s, scope) for s in kernel.stores]), self.body(kernel.body, scope)
        args = self.args(kernel.args)
        return replace(
            kernel, args=args, images=images, windows=windows, groups=groups, n=n, c=c, a=a, b=b, body=body,
            stores=stores, dims=self.names(),
        )  # fmt: skip

    def scan(self, kernel: ScanKernel) -> ScanKernel:
        axes = (*kernel.axes, kernel.length)
        extents = self.extents(axes)
        scope = _Scope(axes, extents)
        body, stores = self.body(kernel.body, scope), tuple([self.store(s, scope) for s in kernel.stores])
        args = self.args(kernel.args)
        return replace(
            kernel, args=args, axes=extents[:-1], length=extents[-1], body=body, stores=stores, dims=self.names()
        )

    def sort(self, kernel: SortKernel) -> SortKernel:
        """All elements, or the first few of a row: which, is decided by whether the two sizes have one name."""
        axes = (*kernel.axes, kernel.length)
        extents = self.extents(axes)
        count = extents[-1] if kernel.count == kernel.length else self.name(_static(kernel.count))
        source = self.access(kernel.source, _Scope(axes, extents))
        scope = _Scope((*kernel.axes, kernel.count), (*extents[:-1], count))
        values, positions = (None if a is None else self.access(a, scope) for a in (kernel.values, kernel.positions))
        args = self.args(kernel.args)
        return replace(
            kernel, args=args, axes=extents[:-1], length=extents[-1], count=count, source=source, values=values,
            positions=positions, dims=self.names(),
        )  # fmt: skip

    def attention(self, kernel: AttentionKernel) -> AttentionKernel:
        """The widths of heads stay: tiles are made for them."""
        axes = (*kernel.batch, kernel.queries, kernel.keys, kernel.width, kernel.value_width)
        extents = (*self.extents(axes[:-2]), *axes[-2:])
        batch = range(len(kernel.batch))
        t, s, d, e = range(len(kernel.batch), len(axes))

        def over(*rest: int) -> _Scope:
            return _Scope.pick(axes, extents, [*batch, *rest])

        shapes = [over(t, d), over(s, d), over(s, e), over(t, e)]
        reads = tuple([self.access(a, scope) for a, scope in zip(kernel.reads, shapes)])
        rows = tuple([self.access(a, over(t)) for a in kernel.rows])
        mask = None if kernel.mask is None else self.access(kernel.mask, over(t, s))
        targets = shapes if kernel.backward else [over(t, e)]
        writes = tuple([self.access(a, scope) for a, scope in zip(kernel.writes, targets)])
        sums = None if kernel.sums is None else self.access(kernel.sums, over(t))
        args = self.args(kernel.args)
        return replace(
            kernel, args=args, batch=extents[:-4], queries=extents[t], keys=extents[s], reads=reads, rows=rows, mask=mask, writes=writes,
            sums=sums, dims=self.names(),
        )  # fmt: skip

    def scatter(self, kernel: ScatterKernel) -> ScatterKernel:
        axes = self.extents(kernel.axes)
        scope = _Scope(kernel.axes, axes)
        body, store = self.body(kernel.body, scope), self.store(kernel.store, scope)
        size = self.name(_static(kernel.size))
        self.whole[0] = self.whole[len(kernel.args) - 1] = _static(kernel.size), size
        args = self.args(kernel.args)
        return replace(kernel, args=args, size=size, axes=axes, body=body, store=store, dims=self.names())

    # --------------------------------------------------------------------------------------------------------- parts
    def name(self, value: int) -> DimLike:
        """A new name for `value`, or the value itself where it is special; negative ones are the negated name."""
        size = abs(value)
        if size <= 1 or size > _LARGEST:
            return value
        number = len(self.sizes)
        symbol = _SYMBOLS[number] if number < len(_SYMBOLS) else Dim.symbol(f"d{number}")
        self.sizes.append((f"d{number}", size))
        return symbol if value > 0 else -symbol

    def names(self) -> tuple[str, ...]:
        return tuple([name for name, _ in self.sizes])

    def extents(self, axes: Sequence[DimLike]) -> tuple[DimLike, ...]:
        return tuple([self.name(_static(d)) for d in axes])

    def args(self, args: tuple[Arg, ...]) -> tuple[Arg, ...]:
        out = []
        for n, arg in enumerate(args):
            size = _static(arg.size)
            value, dim = self.whole.get(n, (-1, 0))
            out.append(Arg(arg.dtype, dim if value == size else self.name(size), arg.output))
        return tuple(out)

    def body(self, body: Body, scope: _Scope) -> Body:
        return tuple([self.instruction(i, scope) for i in body])

    def instruction(self, instr: Instr, scope: _Scope) -> Instr:
        attr: object = instr.attr
        if isinstance(attr, Access):
            attr = self.access(attr, scope)
        elif isinstance(attr, Affine):
            attr = self.affine(attr, scope)
        elif instr.op == "dim":
            assert isinstance(attr, int)
            attr = self.name(attr)
        elif instr.op == "check":
            assert isinstance(attr, tuple)
            attr = (self.name(attr[0]), attr[1])
        else:
            return instr
        return Instr(instr.op, instr.args, instr.dtype, attr)

    def store(self, store: Store, scope: _Scope) -> Store:
        return Store(self.access(store.access, scope), store.value, store.indices)

    def access(self, access: Access, scope: _Scope) -> Access:
        at = self.affine(access.at, scope)
        if at.offset == 0 and access.buffer not in self.whole:
            self.whole[access.buffer] = scope.covered[access.at]
        guards = tuple(
            [Guard(self.affine(g.position, scope), self.name(_static(g.bound)), g.step) for g in access.guards]
        )
        return Access(access.buffer, at, guards, tuple([self.name(_static(s)) for s in access.index_strides]))

    def affine(self, affine: Affine, scope: _Scope) -> Affine:
        """The position in names. Strides, smallest first: one that a contiguous walk of the axes before it covers is their product,
        any other has a name of its own. The offset of a walk backwards is where it starts, plus what is left."""
        found = scope.known.get(affine)
        if found is not None:
            return found
        values = [_static(s) for s in affine.strides]
        strides: list[DimLike] = [0] * len(values)
        order = sorted([k for k, v in enumerate(values) if v], key=lambda k: (abs(values[k]), -k))
        covered, run = 1, _ONE  # elements, as a number and in names
        before, same = 0, _ONE
        low, start = 0, _ZERO
        for k in order:
            step = abs(values[k])
            dim = run if step == covered else same if step == before else self.name(step)
            strides[k] = dim if values[k] > 0 else -dim
            if values[k] < 0:
                low += step * (scope.values[k] - 1)
                start = start + dim * (scope.extents[k] - 1)
            covered, run = step * scope.values[k], dim * scope.extents[k]
            before, same = step, dim
        offset = start + self.name(_static(affine.offset) - low)
        made = Affine(offset, tuple(strides))
        scope.known[affine], scope.covered[affine] = made, (covered, run)
        return made


def _is_large(kernel: ConvKernel) -> bool:
    """Whether a convolution is enough work to be compiled for its own sizes: code for any sizes is many times slower."""
    sizes = [*kernel.axes, kernel.c, *[w.taps for w in kernel.windows]]
    return math.prod([_static(d) for d in sizes]) > LARGE_CONVOLUTION


class _Scope:
    """Axes in scope: their sizes, these in names, and the positions over them that were met so far."""

    def __init__(self, values: Sequence[DimLike], extents: Sequence[DimLike]) -> None:
        self.values = [_static(v) for v in values]
        self.extents = extents
        self.known: dict[Affine, Affine] = {}
        self.covered: dict[Affine, tuple[int, DimLike]] = {}

    @staticmethod
    def pick(values: Sequence[DimLike], extents: Sequence[DimLike], axes: Sequence[int]) -> _Scope:
        return _Scope([values[k] for k in axes], [extents[k] for k in axes])


_ZERO: DimLike = 0
_ONE: DimLike = 1


def _static(d: DimLike) -> int:
    assert isinstance(d, int), "a kernel without named sizes has integers only"
    return d


__all__ = ["Sizes", "generalize", "generalize_program"]
