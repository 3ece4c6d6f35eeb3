"""Values to drafts: the one place where each `Kind` of op becomes loops.

A value in `anchors` has memory of its own; every other value is an expression, emitted where it is used (express.py). Where an index map
cannot be expressed the emission stops with NeedMemory and starts again with one more anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from duo_ir.core import Function, Op, Value
from duo_ir.errors import DuoError
from duo_ir.kernels.access import (
    Index,
    NeedSplit,
    Position,
    combine,
    divide,
    identity,
    linear,
    merge,
    mergeable,
    strides_of,
    through,
    unravel,
)
from duo_ir.kernels.body import BodyBuilder
from duo_ir.kernels.draft import (
    Attended,
    Axes,
    Draft,
    DraftStage,
    Product,
    Put,
    Ref,
    Windows,
    collapse,
    collect_refs,
    prune,
)
from duo_ir.kernels.express import Emitter, Memory, NeedMemory
from duo_ir.kernels.kernel import Window
from duo_ir.opdef import (
    Attention,
    Concat,
    Contraction,
    Control,
    Convolution,
    Cumulative,
    Generate,
    Movement,
    Phase,
    Reduction,
    Reshape,
    Scatter,
    Sort,
    compute_dtype,
)  # fmt: skip
from duo_ir.types import DimLike, DType, product

ARG_REDUCTIONS = ("argmax", "argmin")


class Lowering(Memory):
    """The drafts of one Function's values."""

    def __init__(self, function: Function) -> None:
        super().__init__(function)
        self.function = function
        self.order: dict[Op, int] = {op: n for n, op in enumerate(function.ops)}

    def drafts(self, value: Value) -> list[Draft]:
        """What computes the anchor `value`. Raises NeedMemory when another value must become an anchor first."""
        op = value.op
        assert op is not None
        kind = op.definition.kind
        try:
            if isinstance(kind, Reduction):
                made = [self._reduction(op, kind.name)]
            elif isinstance(kind, Contraction):
                made = [self._contraction(op)]
            elif isinstance(kind, Convolution):
                made = self._convolution(op, kind)
            elif isinstance(kind, Cumulative):
                made = [self._scan(op, kind)]
            elif isinstance(kind, Sort):
                made = [self._sort(op)]
            elif isinstance(kind, Attention):
                made = [self._attention(op, kind)]
            elif isinstance(kind, Scatter):
                made = [self._scatter(op)]
            elif isinstance(kind, Control):
                made = [Draft("control", op, self.order[op], op.results)]
            elif isinstance(kind, Concat):
                made = self._concat(op)
            else:
                made = [self._map(value, op, value, lambda index, n: linear(index, value.type.shape, n))]
        except RecursionError:
            raise DuoError(f"the expression that ends in {op!r} is nested too deeply") from None
        for draft in made:
            for stage in draft.stages:
                prune(stage)
            draft.refs += collect_refs(draft.stages)
            draft.rows = sum(len(s.builder.rows) for s in draft.stages)
        for draft in made:
            if draft.kind in ("map", "reduce"):
                outer = draft.outer
                draft.outer = collapse(outer, draft.stages)
                draft.inner = draft.stages[0].axes
                draft.refs = collect_refs(draft.stages)
        return made

    # --------------------------------------------------------------------------------------------------- loops
    def _loops(self, axes: Axes, count: int, emit: Callable[[Emitter, Index], None]) -> tuple[Emitter, Axes, int]:
        """Runs `emit` with an Emitter over `axes` and the index that walks them, splitting axes until every index exists.
        Returns the emitter, its axes, and how many of them the first `count` have become."""
        index = identity(axes)
        while True:
            emitter = Emitter(self, axes)
            try:
                emit(emitter, index)
                return emitter, axes, count
            except NeedSplit as split:
                k, inner = split.axis, split.inner
                outer = divide(axes[k], inner)
                assert outer is not None
                axes = (*axes[:k], outer, inner, *axes[k + 1 :])
                index = tuple([(o, (*s[:k], s[k] * inner, *s[k:])) for o, s in index])
                count += k < count

    def _map(self, root: Value, op: Op, target: Value, place: Callable[[Index, int], Position]) -> Draft:
        """root's elements, one loop per axis, stored in target's memory at place(index)."""
        put: list[Put] = []

        def emit(e: Emitter, index: Index) -> None:
            handle = e.expand(root, index) if root is target else e.value(root, index)
            put[:] = [Put(target, place(index, e.n), handle)]

        e, axes, _ = self._loops(root.type.shape, 0, emit)
        stage = DraftStage((), e.builder, put)
        return Draft("map", op, self.order[op], (target,), axes, (), [stage], inlined=e.inlined)

    def _concat(self, op: Op) -> list[Draft]:
        axis, out = op.attrs["axis"], op.result
        drafts = []
        offset: DimLike = 0
        for x in op.operands:
            start = offset * strides_of(out.type.shape)[axis]
            offset = offset + x.type.shape[axis]
            if x.type.size == 0:
                continue

            def place(index: Index, n: int, start: DimLike = start) -> Position:
                position, strides = linear(index, out.type.shape, n)
                return position + start, strides

            draft = self._map(x, op, out, place)
            draft.partial = True
            drafts.append(draft)
        return drafts

    def _reduction(self, op: Op, name: str) -> Draft:
        (x,) = op.operands
        reduced = op.attrs["axes"]
        shape = x.type.shape
        kept = [a for a in range(len(shape)) if a not in reduced]
        order = [*kept, *reduced]

        def values(e: Emitter, index: Index) -> tuple[int, ...]:
            place = {a: index[n] for n, a in enumerate(order)}
            handle = e.value(x, e.intern(tuple([place[a] for a in range(len(shape))])))
            return (e.widened(handle),)

        dtype = op.result.type.dtype if name in ARG_REDUCTIONS else compute_dtype(x.type.dtype)
        return self._reduce(op, name, tuple([shape[a] for a in order]), len(kept), dtype, values)

    def _reduce(
        self,
        op: Op,
        name: str,
        axes: Axes,
        count: int,
        dtype: DType,
        values: Callable[[Emitter, Index], tuple[int, ...]],
    ) -> Draft:
        args: list[int] = []

        def emit(e: Emitter, index: Index) -> None:
            args[:] = values(e, index)

        e, axes, count = self._loops(axes, count, emit)
        outer, inner = axes[:count], axes[count:]
        first = DraftStage(inner, e.builder, [], [(name, tuple(args), dtype)])
        out, last = op.result, BodyBuilder()
        handle = last.reduced(0, 0, dtype)
        if dtype is not out.type.dtype:
            handle = last.convert(handle, out.type.dtype)
        put = Put(out, (0, strides_of(outer)), handle)
        stages = [first, DraftStage((), last, [put])]
        return Draft("reduce", op, self.order[op], (out,), outer, inner, stages, inlined=e.inlined)

    # -------------------------------------------------------------------------------------------- contraction and others
    def address(self, value: Value, index: Index, extents: Axes) -> Ref:
        """Where `value` at `index` lies in memory, followed through movement and reshape. Raises NeedMemory where it does not."""
        start, n = value, len(extents)
        while True:
            storage = self.storage(value)
            if storage is not None:
                return Ref(storage, linear(index, value.type.shape, n))
            op = value.op
            assert op is not None
            kind = op.definition.kind
            if isinstance(kind, Movement):
                index, bounds = through(self.view(op), index, n)
                if bounds:
                    raise NeedMemory(start)
            elif isinstance(kind, Reshape):
                try:
                    found = unravel(linear(index, value.type.shape, n), op.operands[0].type.shape, extents)
                except NeedSplit:
                    found = None
                if found is None:
                    raise NeedMemory(op.operands[0])
                index = found
            else:
                raise NeedMemory(value)
            value = op.operands[0]

    def _contraction(self, op: Op) -> Draft:
        x, y = op.operands
        *batch, m, k = x.type.shape
        n = y.type.shape[-1]
        out = op.result
        acc = compute_dtype(x.type.dtype)
        if n == 1:
            return self._dot(op, acc)
        left = (*batch, m, k)
        right = (*batch, k, n)
        a = self.address(x, identity(left), left)
        b = self.address(y, identity(right), right)
        axes, a, b = _fold_batch((*batch, m), n, k, a, b)
        body = BodyBuilder()
        put = Put(out, (0, strides_of(axes)), body.acc(out.type.dtype))
        product_ = Product(k, a, b, acc, out.type.dtype)
        return Draft("contract", op, self.order[op], (out,), axes, (), [DraftStage((), body, [put])], product_)

    def _convolution(self, op: Op, kind: Convolution) -> list[Draft]:
        """A draft for each phase, one unless x is dilated."""
        x, w = op.operands
        phases = list(itertools.product(*kind.phases(x.type.shape, w.type.shape, op.result.type.shape, **op.attrs)))
        drafts = [self._phase(op, chosen) for chosen in phases]
        for draft in drafts:
            draft.partial = len(drafts) > 1
        return drafts

    def _phase(self, op: Op, phases: tuple[Phase, ...]) -> Draft:
        x, w = op.operands
        out, groups = op.result, op.attrs["groups"]
        images, *sizes, _ = x.type.shape
        *_, c, o = w.type.shape
        n = divide(o, groups)
        assert n is not None
        last = len(phases) + 1

        def within(count: int, before: int, inner: DimLike) -> Position:
            """group * inner + the axis after it, of `count` axes of which `before` come first."""
            return 0, tuple([inner if k == before else 1 if k == before + 1 else 0 for k in range(count)])

        box = (images, *sizes, groups, c)
        a = self.address(x, (*identity(box)[:last], within(len(box), last, c)), box)
        taps = tuple([p.taps for p in phases])
        box = (*taps, groups, c, n)
        index: list[Position] = [
            (p.tap_start, tuple([s * p.tap_step for s in walk])) for p, (_, walk) in zip(phases, identity(box))
        ]
        # A column of w is (group, n), but its channel is c alone.
        column: Position = (0, tuple([n if k == last - 1 else 1 if k == last + 1 else 0 for k in range(len(box))]))
        b = self.address(w, (*index, identity(box)[last], column), box)
        axes = (images, *[p.count for p in phases], groups, n)
        place = [(p.start, tuple([s * p.step for s in walk])) for p, (_, walk) in zip(phases, identity(axes)[1:])]
        at = linear((identity(axes)[0], *place, within(len(axes), last, n)), out.type.shape, len(axes))
        windows = tuple(
            [Window(p.count, p.taps, size, p.offset, p.stride, p.dilation) for p, size in zip(phases, sizes)]
        )
        acc, body = compute_dtype(x.type.dtype), BodyBuilder()
        put = Put(out, at, body.acc(out.type.dtype))
        return Draft(
            "contract", op, self.order[op], (out,), axes, (), [DraftStage((), body, [put])],
            Windows(windows, c, a, b, acc, out.type.dtype),
        )  # fmt: skip

    def _dot(self, op: Op, acc: DType) -> Draft:
        x, y = op.operands
        axes = x.type.shape  # (batch..., m, k)

        def values(e: Emitter, index: Index) -> tuple[int, ...]:
            a = e.value(x, index)
            b = e.value(y, e.intern((*index[:-2], index[-1], (0, (0,) * e.n))))
            return e.widened(a), e.widened(b)

        return self._reduce(op, "dot", axes, len(axes) - 1, acc, values)

    def _scan(self, op: Op, kind: Cumulative) -> Draft:
        axes, index = _last(op.operands[0].type.shape, op.attrs["axis"])
        body, n = BodyBuilder(), len(axes)
        elements = []
        for x in op.operands:
            handle = body.load(self.address(x, index, axes), x.type.dtype)
            elements.append(body.convert(handle, compute_dtype(x.type.dtype)))
        start = kind.start(compute_dtype(op.operands[0].type.dtype))
        state = tuple([body.put("saved", (), dtype, k) for k, (dtype, _) in enumerate(start)])
        after = kind.step(body, state, tuple(elements), body.index((0, (*(0,) * (n - 1), 1))))
        puts = [
            Put(r, linear(index, r.type.shape, n), body.convert(handle, r.type.dtype))
            for r, handle in zip(op.results, after, strict=True)
        ]
        stage = DraftStage((), body, puts, [("next", (handle,), dtype) for handle, (dtype, _) in zip(after, start)])
        return Draft("scan", op, self.order[op], op.results, axes, (), [stage], start=start)

    def _sort(self, op: Op) -> Draft:
        (x,) = op.operands
        axis = op.attrs["axis"]
        axes, index = _last(x.type.shape, axis)
        source = self.address(x, index, axes)
        out = op.results[0].type.shape
        out_axes, out_index = _last(out, axis)
        place = linear(out_index, out, len(out_axes))
        last = len(axes) - 1
        groups = [*mergeable(axes, [source.position, place], 0, last), [last]]
        rows = tuple([product([axes[k] for k in g]) for g in groups[:-1]])
        ends = [merge(p, groups) for p in (source.position, place)]
        if not rows:  # there is always one axis of rows
            rows, ends = (1,), [(offset, (0, *strides)) for offset, strides in ends]
        return Draft(
            "sort", op, self.order[op], op.results, (*rows, axes[last]), sorted=(Ref(source.value, ends[0]), ends[1])
        )

    def _attention(self, op: Op, kind: Attention) -> Draft:
        q, k, v, *rest = op.operands
        rows, rest = (rest[:2], rest[2:]) if kind.backward else ([], rest)
        tensors, masks = ([q, k, v, rest[0]], rest[1:]) if kind.backward else ([q, k, v], rest)
        *lead, queries, heads, width = q.type.shape
        keys, value_width = v.type.shape[-3], v.type.shape[-1]
        assert isinstance(width, int) and isinstance(value_width, int)
        batch = (*lead, heads)

        def over(*sizes: DimLike) -> tuple[Axes, Index]:
            """Loops over (batch..., sizes...), and the index that reads [lead..., sizes[0], heads, sizes[1:]...] in them."""
            axes = (*batch, *sizes)
            own, n = identity(axes), len(lead)
            return axes, (*own[:n], own[n + 1], own[n], *own[n + 2 :])

        def matrix(x: Value) -> Ref:
            axes, index = over(x.type.shape[-3], x.type.shape[-1])
            return self.address(x, index, axes)

        def place(x: Value) -> Position:
            sizes = (x.type.shape[len(lead)], *x.type.shape[len(lead) + 2 :])
            axes, index = over(*sizes)
            return linear(index, x.type.shape, len(axes))

        row_axes, row_index = over(queries)
        grid = (*batch, queries, keys)
        attended = Attended(
            queries, keys, width, value_width, tuple([matrix(x) for x in tensors]),
            tuple([self.address(x, row_index, row_axes) for x in rows]),
            self.address(masks[0], identity(grid), grid) if masks else None,
            tuple([place(r) for r in (op.results if kind.backward else op.results[:1])]),
            None if kind.backward else place(op.results[1]),
        )  # fmt: skip
        return Draft("attention", op, self.order[op], op.results, batch, attended=attended)

    def _scatter(self, op: Op) -> Draft:
        x, updates, *indices = op.operands
        target, count = op.attrs["axes"], indices[0].type.rank
        memory = self.storage(x)
        if memory is None:
            raise NeedMemory(x)
        shape = updates.type.shape
        apart = _walks_apart(shape, indices, count)
        # updates that cannot meet are as independent as the points of a window
        order = [*[a for a in range(count) if a not in apart], *apart, *range(count, len(shape))]
        axes = tuple([shape[a] for a in order])
        walk = identity(axes)
        index = tuple([walk[order.index(a)] for a in range(len(shape))])
        e = Emitter(self, axes)
        try:
            value = e.value(updates, index)
            places = e.places(op, indices, index[:count], target, x.type.shape)
        except NeedSplit:
            for v in (updates, *indices):
                if self.storage(v) is None:
                    raise NeedMemory(v) from None
            raise
        steps = strides_of(x.type.shape)
        rest = [a for a in range(x.type.rank) if a not in target]
        at = combine(0, [(steps[a], p) for a, p in zip(rest, index[count:])], e.n)
        stage = DraftStage((), e.builder, [Put(op.result, at, value), *[Put(op.result, at, p) for p in places]])
        draft = Draft(
            "scatter", op, self.order[op], (op.result,), axes, (), [stage], inlined=e.inlined, sequential=count - len(apart)
        )
        draft.refs.append(Ref(memory, at))
        return draft


def _walks_apart(shape: Axes, indices: Sequence[Value], count: int) -> list[int]:
    """Of the `count` axes of scatter's places, those along which some index is the position itself: no two updates there meet. None where an
    axis may be empty, as indices are checked all the same."""
    if not all(isinstance(d, int) and d > 0 for d in shape):
        return []
    found = set()
    for v in indices:
        kind = v.op.definition.kind if v.op is not None else None
        if isinstance(kind, Generate) and kind.position and v.op is not None:
            found.add(v.op.attrs["axis"])
    return sorted(a for a in found if a < count)


def _last(shape: Axes, axis: int) -> tuple[Axes, Index]:
    """Loops over a shape with `axis` innermost, and the index that walks the shape in them."""
    order = [*[a for a in range(len(shape)) if a != axis], axis]
    axes = tuple([shape[a] for a in order])
    walk = identity(axes)
    return axes, tuple([walk[order.index(a)] for a in range(len(shape))])


def _fold_batch(rows: Axes, n: DimLike, k: DimLike, a: Ref, b: Ref) -> tuple[Axes, Ref, Ref]:
    """Makes batch axes rows of the product while b does not depend on them and a walks them as one loop."""
    *batch, m = rows
    (a0, at), (b0, bt) = a.position, b.position
    while batch:
        last = len(batch) - 1
        size, step = batch[last], at[last]
        if size == 1:
            at, bt = (*at[:last], *at[last + 1 :]), (*bt[:last], *bt[last + 1 :])
        elif bt[last] == 0 and m == 1:
            at, bt = (*at[:last], step, at[-1]), (*bt[:last], *bt[last + 1 :])
            m = size
        elif bt[last] == 0 and step == at[last + 1] * m:
            at, bt = (*at[:last], *at[last + 1 :]), (*bt[:last], *bt[last + 1 :])
            m = m * size
        else:
            break
        batch.pop()
    axes = (*batch, m, n)
    return axes, Ref(a.value, (a0, at)), Ref(b.value, (b0, bt))
