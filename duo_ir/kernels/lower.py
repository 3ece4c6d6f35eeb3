"""Values to drafts: the one place where each `Kind` of op becomes loops.

A value in `anchors` has memory of its own; every other value is an expression, emitted where it is used: elementwise ops run
their recipe, movement ops transform the index, gathers become indexed loads. Rounding to f16 and bf16 happens after each op here, so
inlining changes no bit. Where an index map cannot be expressed the emission stops with NeedMemory and starts again with one more anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from duo_ir.core import Function, Op, Value
from duo_ir.errors import DuoError
from duo_ir.kernels.access import (
    Bounds,
    Index,
    NeedSplit,
    Position,
    combine,
    divide,
    identity,
    linear,
    nonnegative,
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
    base,
    collapse,
    collect_refs,
    prune,
)
from duo_ir.kernels.kernel import Window
from duo_ir.opdef import (
    Attention,
    Concat,
    Contraction,
    Control,
    Convolution,
    Cumulative,
    Elementwise,
    Gather,
    Generate,
    Movement,
    Phase,
    Reduction,
    Reshape,
    Scatter,
    View,
    compute_dtype,
)  # fmt: skip
from duo_ir.types import DimLike, DType, bool_, i64

LONG_PART = 32  # elements from which a part of a concatenation has a loop of its own
ARG_REDUCTIONS = ("argmax", "argmin")


class NeedMemory(DuoError):
    """`value` is read in a way that no index map of an expression can express."""

    def __init__(self, value: Value) -> None:
        super().__init__(f"{value!r} needs memory of its own")
        self.value = value


class Lowering:
    """What the drafts of one Function share: which values have memory, and the views of its movement ops."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.anchors: set[Value] = set(function.params)
        self.order: dict[Op, int] = {op: n for n, op in enumerate(function.ops)}
        self._views: dict[Op, View] = {}

    def view(self, op: Op) -> View:
        found = self._views.get(op)
        if found is None:
            kind = op.definition.kind
            assert isinstance(kind, Movement)
            found = kind.view(op.operands[0].type.shape, op.result.type.shape, **op.attrs)
            self._views[op] = found
        return found

    def storage(self, value: Value) -> Value | None:
        """The anchor whose memory holds `value` in row-major order (through reshapes), or None."""
        value = base(value)
        return value if value in self.anchors else None

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
                made = [self._scan(op)]
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

    def _scan(self, op: Op) -> Draft:
        (x,) = op.operands
        axis, shape = op.attrs["axis"], x.type.shape
        order = [*[a for a in range(len(shape)) if a != axis], axis]
        axes = tuple([shape[a] for a in order])
        walk = identity(axes)
        index = tuple([walk[order.index(a)] for a in range(len(shape))])
        ends = self.address(x, index, axes), linear(index, shape, len(axes))
        return Draft("scan", op, self.order[op], (op.result,), axes, scan=ends)

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
        axes = updates.type.shape
        index = identity(axes)
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
        draft = Draft("scatter", op, self.order[op], (op.result,), axes, (), [stage], inlined=e.inlined)
        draft.refs.append(Ref(memory, at))
        return draft


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


class Emitter:
    """Emits expressions into one body over the loops `axes`."""

    def __init__(self, lowering: Lowering, axes: Axes) -> None:
        self.lowering, self.axes, self.n = lowering, axes, len(axes)
        self.builder = BodyBuilder()
        self.inlined: set[Value] = set()
        self._known: dict[tuple[Value, int, tuple[Bounds, ...]], int] = {}
        self._interned: dict[Index, Index] = {}  # also keeps indices alive, so that their ids stay theirs

    def intern(self, index: Index) -> Index:
        return self._interned.setdefault(index, index)

    def value(self, v: Value, index: Index, guards: tuple[Bounds, ...] = ()) -> int:
        """`v` at `index`: a load where it has memory, else its expression. Under guards the result is free where one fails."""
        if v in self.lowering.anchors:
            return self.load(v, linear(index, v.type.shape, self.n), guards)
        return self.expand(v, index, guards)

    def expand(self, v: Value, index: Index, guards: tuple[Bounds, ...] = ()) -> int:
        index = self.intern(index)
        key = (v, id(index), guards)
        found = self._known.get(key)
        if found is not None:
            return found
        op = v.op
        assert op is not None
        self.inlined.add(v)
        kind = op.definition.kind
        if isinstance(kind, Elementwise):
            handles = self._elementwise(op, kind, index, guards)
            for result, handle in zip(op.results, handles):
                self._known[(result, id(index), guards)] = handle
            return self._known[key]
        handle = self._other(v, op, kind, index, guards)
        self._known[key] = handle
        return handle

    def _other(self, v: Value, op: Op, kind: Any, index: Index, guards: tuple[Bounds, ...]) -> int:
        if isinstance(kind, Movement):
            return self._movement(op, index, guards)
        if isinstance(kind, Generate):
            return self._generate(op, kind, index, guards)
        if isinstance(kind, Reshape):
            return self._reshape(v, op, index, guards)
        if isinstance(kind, Gather):
            return self._gather(v, op, index, guards)
        if isinstance(kind, Concat):
            return self._concat(op, index, guards)
        raise NeedMemory(v)

    def load(
        self, v: Value, position: Position, guards: tuple[Bounds, ...], indices: tuple[int, ...] = (),
        strides: tuple[DimLike, ...] = (), fill: int | None = None,
    ) -> int:  # fmt: skip
        dtype = v.type.dtype
        if guards:
            indices = (*indices, self.zero(dtype) if fill is None else fill)
        return self.builder.load(Ref(v, position, guards, strides), dtype, indices)

    def zero(self, dtype: DType) -> int:
        return self.builder.const(False if dtype is bool_ else 0, dtype)

    def widened(self, handle: int) -> int:
        """f16 and bf16 as f32."""
        b = self.builder
        return b.convert(handle, compute_dtype(b.dtype_of(handle)))

    def position(self, p: Position) -> int:
        offset, strides = p
        return self.builder.dim(offset) if not any(s != 0 for s in strides) else self.builder.index(p)

    # ---------------------------------------------------------------------------------------------------- the kinds
    def _elementwise(self, op: Op, kind: Elementwise, index: Index, guards: tuple[Bounds, ...]) -> list[int]:
        b = self.builder
        handles = [self.value(x, index, guards) for x in op.operands]
        if kind.widen:
            handles = [self.widened(h) for h in handles]
        out = kind.recipe(b, *handles, **op.attrs)
        results = list(out) if isinstance(out, tuple) else [out]
        for n, r in enumerate(op.results):
            if r.type.dtype.is_narrow_float:
                results[n] = b.convert(results[n], r.type.dtype)
        return results

    def _movement(self, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        x = op.operands[0]
        inner, bounds = through(self.lowering.view(op), index, self.n)
        bounds = tuple([self._by_parts(bound) for bound in bounds if not self._always(bound)])
        if not bounds:
            return self.value(x, self.intern(inner), guards)
        fill = self.value(op.operands[1], (), guards)
        storage = self.lowering.storage(x)
        if storage is not None:
            return self._guarded_load(storage, x, inner, guards, bounds, fill)
        if any(step != 1 for _, _, step in bounds):
            raise NeedMemory(x)
        handle = self.value(x, self.intern(inner), (*guards, *bounds))
        b, inside = self.builder, self.builder.const(True, bool_)
        for p, bound, _ in bounds:
            at = self.position(p)
            inside = b.and_(inside, b.and_(b.ge(at, b.const(0, i64)), b.lt(at, b.dim(bound))))
        return b.select(inside, handle, fill)

    def _by_parts(self, bounds: Bounds) -> Bounds:
        """Bounds that whole stretches of the innermost steps are inside of or outside (parts of a concatenation), as bounds on the loops around
        them, so that no element asks by itself."""
        (offset, strides), bound, step = bounds
        unit = [k for k, s in enumerate(strides) if s == 1]
        if step != 1 or len(unit) != 1 or not isinstance(bound, int) or bound < LONG_PART:
            return bounds
        size, rest = self.axes[unit[0]], [s for s in strides if s != 1]
        if not isinstance(size, int) or any(not isinstance(d, int) or d % bound for d in (size, offset, *rest)):
            return bounds
        if size > bound:
            raise NeedSplit(unit[0], bound)
        outer = tuple([0 if k == unit[0] else divide(s, bound) or 0 for k, s in enumerate(strides)])
        return (divide(offset, bound) or 0, outer), 1, 1

    def _always(self, bounds: Bounds) -> bool:
        """Whether the bounds hold for every turn of the loops."""
        (offset, strides), bound, step = bounds
        if step != 1:
            return False
        low = high = offset
        for stride, size in zip(strides, self.axes):
            if stride == 0:
                continue
            if nonnegative(stride):
                high = high + stride * (size - 1)
            else:
                low = low + stride * (size - 1)
        return nonnegative(low) and nonnegative(bound - 1 - high)

    def _guarded_load(
        self, storage: Value, x: Value, index: Index, guards: tuple[Bounds, ...], bounds: tuple[Bounds, ...], fill: int
    ) -> int:
        # Interior padding reads element p / step, which is no affine position: it goes through an index operand.
        steps = {p: step for p, _, step in bounds if step != 1}
        b, strides = self.builder, strides_of(x.type.shape)
        terms, indices, index_strides = [], [], []
        for stride, p in zip(strides, index):
            if p in steps:
                indices.append(b.idiv(self.position(p), b.const(steps[p], i64)))
                index_strides.append(stride)
            else:
                terms.append((stride, p))
        at = combine(0, terms, self.n)
        return self.load(storage, at, (*guards, *bounds), tuple(indices), tuple(index_strides), fill)

    def _reshape(self, v: Value, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        position = linear(index, v.type.shape, self.n)
        storage = self.lowering.storage(v)
        if storage is not None:
            return self.load(storage, position, guards)
        x = op.operands[0]
        if guards:
            raise NeedMemory(x)
        inner = unravel(position, x.type.shape, self.axes)
        if inner is None:
            raise NeedMemory(x)
        return self.value(x, self.intern(inner), guards)

    def _generate(self, op: Op, kind: Generate, index: Index, guards: tuple[Bounds, ...]) -> int:
        scalars = [self.value(x, (), guards) for x in op.operands]
        indices = [self.position(p) for p in index]
        return int(
            kind.recipe(
                self.builder, indices, self.position(linear(index, op.result.type.shape, self.n)), *scalars, **op.attrs
            )
        )

    def places(
        self, op: Op, indices: list[Value], index: Index, axes: tuple[int, ...], shape: tuple[DimLike, ...]
    ) -> list[int]:
        """Checked i64 positions along `axes` of a tensor of that shape, one per index operand."""
        b, out = self.builder, []
        where = f" at {op.loc}" if op.loc is not None else ""
        index = self.intern(index)
        for i, axis in zip(indices, axes):
            text = f"{op.definition.name}{where}: index {{index}} is out of range for axis {axis}, which has {shape[axis]} elements"
            out.append(b.check(b.convert(self.value(i, index), i64), shape[axis], text))
        return out

    def _gather(self, v: Value, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        x, *indices = op.operands
        axes, count = op.attrs["axes"], indices[0].type.rank
        storage = self.lowering.storage(x)
        if storage is None:
            raise NeedMemory(x)
        if guards:  # a check must not run where the element is not wanted
            raise NeedMemory(v)
        places = self.places(op, indices, index[:count], axes, x.type.shape)
        steps = strides_of(x.type.shape)
        rest = [a for a in range(x.type.rank) if a not in axes]
        terms = [(steps[a], p) for a, p in zip(rest, index[count:])]
        handles, strides = [], []
        for a, place in zip(axes, places):
            known = self._affine(place, x.type.shape[a])
            if known is None:
                handles.append(place)
                strides.append(steps[a])
            else:  # an index that is a loop's own, and in range whatever the sizes: no check, no index operand
                terms.append((steps[a], known))
        return self.load(storage, combine(0, terms, self.n), (), tuple(handles), tuple(strides))

    def _affine(self, place: int, bound: DimLike) -> Position | None:
        """The affine position that a checked index is known to be, when it is always in range."""
        (index,) = self.builder.rows[place][1]
        op, _, _, attr = self.builder.rows[index]
        if op not in ("index", "const"):
            return None
        position: Position = attr if op == "index" else (attr, (0,) * self.n)
        return position if self._always((position, bound, 1)) else None

    def _concat(self, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        axis = op.attrs["axis"]
        offset: DimLike = 0
        parts: list[tuple[DimLike, int]] = []
        for x in op.operands:
            size = x.type.shape[axis]
            if x.type.size != 0:
                start, strides = index[axis]
                at: Position = (start - offset, strides)
                inner = self.intern((*index[:axis], at, *index[axis + 1 :]))
                bounds: Bounds = (at, size, 1)
                inside = () if self._always(bounds) else (bounds,)
                parts.append((offset + size, self.value(x, inner, (*guards, *inside))))
            offset = offset + size
        if not parts:
            return self.zero(op.result.type.dtype)
        b = self.builder
        here = self.position(index[axis])
        handle = parts[-1][1]
        for end, part in reversed(parts[:-1]):
            handle = b.select(b.lt(here, b.dim(end)), part, handle)
        return handle
