"""Groups of drafts to kernels: one loop nest for all members, values that stay inside passed from body to body.

Stages get a level: a stage that uses a reduction comes at least one level after it, and work of one level over the same axes
shares a stage. At the end equal loops are merged, unused stores dropped and the buffers numbered in order of first use, so that
equal work gives equal kernels whatever program it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from duo_ir.core import Value
from duo_ir.kernels.access import Position, expand, refine, respread
from duo_ir.kernels.body import BodyBuilder, Row, finish
from duo_ir.kernels.draft import Axes, Draft, DraftStage, Put, Ref, Windows, base, collapse, prune
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
    Reduce,
    ScanKernel,
    ScatterKernel,
    SortKernel,
    Stage,
    Store,
    Window,
)  # fmt: skip
from duo_ir.opdef import compute_dtype
from duo_ir.types import Dim, DimLike, product, row_major


@dataclass
class Member:
    """A draft in a group: its axes (one split if need be) and how many of them are the group's outer axes."""

    draft: Draft
    axes: Axes
    count: int

    def spread(self, position: Position) -> Position:
        """A position of the draft over the member's axes."""
        own = self.draft.axes
        if len(own) == len(self.axes) or len(position[1]) != len(own):
            return position
        return respread(position, expand(own, self.axes), self.axes)


@dataclass
class Built:
    """A kernel over values: argument i is the memory of operands[i]."""

    kernel: Kernel
    operands: tuple[Value, ...]
    outputs: frozenset[Value]
    where: str


@dataclass
class _Provided:
    stage: _Open
    handle: int


class _Open:
    """A stage being filled."""

    def __init__(self, level: int, axes: Axes) -> None:
        self.level, self.stage = level, DraftStage(axes, BodyBuilder())
        self.copies: dict[tuple[int, int], int] = {}  # (id of another open stage, its handle) -> handle here


class Nest:
    """The common loop nest of a group."""

    def __init__(self, members: Sequence[Member], target: Axes | None, keep: Callable[[Value], bool]) -> None:
        self.keep = keep
        self.outer: Axes = tuple(d for d in (target or members[0].axes[: members[0].count]) if d != 1)
        for m in members:
            fine = refine(self.outer, m.axes[: m.count])
            assert fine is not None
            self.outer = fine
        self.inner: dict[DimLike, list[Axes]] = {}
        for m in members:
            self._declare(m.axes[m.count :])
        self.stages: list[_Open] = []
        self.provided: dict[Value, _Provided] = {}
        for m in members:
            self._add(m)

    def _declare(self, axes: Axes) -> None:
        known = self.inner.setdefault(product(axes), [])
        for n, other in enumerate(known):
            fine = refine(other, axes)
            if fine is not None:
                known[n] = fine
                return
        known.append(axes)

    def _inner(self, axes: Axes) -> Axes:
        for fine in self.inner[product(axes)]:
            if refine(fine, axes) == fine:
                return fine
        return axes

    def _add(self, member: Member) -> None:
        draft = member.draft
        opened: list[_Open] = []
        starts: list[int] = []  # of each opened stage, the reductions it had before
        inner = self._inner(member.axes[member.count :])
        fine = self.outer + inner
        groups = expand(member.axes, fine)
        outer_groups = expand(member.axes[: member.count], self.outer)
        for number, stage in enumerate(draft.stages):
            over = number == 0  # a map's or reduction's first stage walks all its axes, what follows the outer ones
            axes = inner if over else ()
            need = opened[-1].level + 1 if number else 0
            for row in stage.builder.rows:
                if row[0] == "load" and row[3].value in self.provided:
                    need = max(need, self.provided[row[3].value].stage.level)
            target = self._open(need, axes)
            opened.append(target)
            starts.append(len(target.stage.reduces))
            handles: list[int] = []

            def place(p: Position, over: bool = over) -> Position:
                if over:
                    return respread(member.spread(p), groups, fine)
                return respread(p, outer_groups, self.outer)

            for row in stage.builder.rows:
                handles.append(self._copy(row, handles, target, place, opened, starts))
            for put in stage.stores:
                handle = handles[put.handle]
                self.provided.setdefault(put.value, _Provided(target, handle))
                if self.keep(put.value):
                    target.stage.stores.append(Put(put.value, place(put.position), handle))
            target.stage.reduces += [(kind, tuple([handles[a] for a in args]), d) for kind, args, d in stage.reduces]

    def _open(self, need: int, axes: Axes) -> _Open:
        fitting = [s for s in self.stages if s.level >= need and s.stage.axes == axes]
        if fitting:
            return min(fitting, key=lambda s: s.level)
        opened = _Open(need, axes)
        self.stages.append(opened)
        return opened

    def _copy(
        self, row: Row, handles: list[int], target: _Open, place: Callable[[Position], Position],
        opened: list[_Open], starts: list[int],
    ) -> int:  # fmt: skip
        op, args, dtype, attr = row
        args = tuple([handles[a] for a in args])
        b = target.stage.builder
        if op == "const":
            return b.const(attr, dtype)
        if op == "load":
            inside = self.provided.get(attr.value)
            if inside is not None:
                return self._import(inside.stage, inside.handle, target)
            guards = tuple([(place(p), bound, step) for p, bound, step in attr.guards])
            attr = Ref(attr.value, place(attr.position), guards, attr.index_strides)
        elif op == "index":
            attr = place(attr)
        elif op == "reduced":
            stage, n = attr
            attr = (opened[stage], starts[stage] + n)
        return b.put(op, args, dtype, attr)

    def _import(self, source: _Open, handle: int, target: _Open) -> int:
        """The value of an earlier stage's instruction, computed again where it is not in the same stage."""
        if source is target:
            return handle
        pad = (0,) * (len(target.stage.axes) - len(source.stage.axes))

        def place(p: Position) -> Position:
            return (p[0], p[1] + pad) if pad else p

        rows, b = source.stage.builder.rows, target.stage.builder
        needed = {handle}
        for n in range(handle, -1, -1):
            if n in needed:
                needed.update(rows[n][1])
        for n in sorted(needed):
            key = (id(source), n)
            if key in target.copies:
                continue
            op, args, dtype, attr = rows[n]
            args = tuple([target.copies[id(source), a] for a in args])
            if op == "const":
                target.copies[key] = b.const(attr, dtype)
                continue
            if op == "load":
                guards = tuple([(place(p), bound, step) for p, bound, step in attr.guards])
                attr = Ref(attr.value, place(attr.position), guards, attr.index_strides)
            elif op == "index":
                attr = place(attr)
            target.copies[key] = b.put(op, args, dtype, attr)
        return target.copies[id(source), handle]

    def done(self) -> list[DraftStage]:
        """The stages in order, those that leave nothing behind dropped, `reduced` by number."""
        for opened in self.stages:
            prune(opened.stage)
        kept = sorted([o for o in self.stages if o.stage.stores or o.stage.reduces], key=lambda o: o.level)
        number = {id(o): n for n, o in enumerate(kept)}
        for opened in kept:
            rows = opened.stage.builder.rows
            for n, (op, args, dtype, attr) in enumerate(rows):
                if op == "reduced":
                    rows[n] = (op, args, dtype, (number[id(attr[0])], attr[1]))
        return [o.stage for o in kept]


# ---------------------------------------------------------------------------------------------------------- kernels
def build(members: Sequence[Member], target: Axes | None, keep: Callable[[Value], bool], symbolic: bool) -> Built:
    """The kernel of a group. `target`: the axes of the epilogue when a member is a contraction; `keep(value)`: is its memory needed?
    `symbolic`: the program has named sizes."""
    head = members[0].draft
    where = next((m.draft.where for m in reversed(members) if m.draft.where), "")
    if head.kind == "scan":
        return _scan(head, where, symbolic, keep)
    if head.kind == "sort":
        return _sort(head, where, symbolic, keep)
    if head.kind == "scatter":
        return _scatter(head, where, symbolic)
    if head.kind == "attention":
        return _attention(head, where, symbolic)
    if len(members) == 1:
        outer, stages = head.outer, head.stages
    else:
        nest = Nest(members, target, keep)
        outer, stages = nest.outer, nest.done()
        if target is None:
            outer = collapse(outer, stages)
    names = _Names()
    if target is not None:
        contraction = next(m.draft.contraction for m in members if m.draft.contraction is not None)
        if len(members) > 1:
            _insert_single_turns(target, stages)
        a, b = names.access(contraction.a), names.access(contraction.b)
        (stage,) = stages
        body, stores, _ = names.stage(stage)
        args = names.args
        if isinstance(contraction, Windows):
            windows, c = contraction.windows, contraction.c
            dims = () if not symbolic else _dims(args, target, windows, (c,), a, b, body, stores)
            images, *_, groups, n = target
            return names.built(
                ConvKernel(
                    args, images, windows, groups, n, c, a, b, contraction.acc, contraction.result, body, stores, dims,
                    names.sites(),
                ),
                where,
            )  # fmt: skip
        *batch, m, n = target
        dims = () if not symbolic else _dims(args, target, (contraction.k,), a, b, body, stores)
        return names.built(
            ContractKernel(
                args,
                tuple(batch),
                m,
                n,
                contraction.k,
                a,
                b,
                contraction.acc,
                contraction.result,
                body,
                stores,
                dims,
                names.sites(),
            ),
            where,
        )
    done = []
    for stage in stages:
        body, stores, reduces = names.stage(stage)
        done.append(Stage(stage.axes, body, stores, reduces))
    dims = () if not symbolic else _dims(names.args, outer, *[(s.axes, s.body, s.stores) for s in done])
    return names.built(LoopKernel(names.args, outer, tuple(done), dims, names.sites()), where)


def _insert_single_turns(target: Axes, stages: Sequence[DraftStage]) -> None:
    """Gives every position a stride for the axes of size 1 in `target`."""
    holes = [k for k, d in enumerate(target) if d == 1]
    if not holes:
        return

    def new(p: Position) -> Position:
        strides = list(p[1])
        for k in holes:
            strides.insert(k, 0)
        return p[0], tuple(strides)

    for stage in stages:
        rows = stage.builder.rows
        for n, (op, args, dtype, attr) in enumerate(rows):
            if op == "load":
                rows[n] = (op, args, dtype, attr._replace(position=new(attr.position)))
            elif op == "index":
                rows[n] = (op, args, dtype, new(attr))
        stage.stores = [Put(v, new(p), h) for v, p, h in stage.stores]


class _Names:
    """Numbers for values and check sites, in order of first use."""

    def __init__(self) -> None:
        self.numbers: dict[Value, int] = {}
        self.written: set[Value] = set()
        self._sites: dict[str, int] = {}

    def buffer(self, v: Value) -> int:
        return self.numbers.setdefault(v, len(self.numbers))

    @property
    def args(self) -> tuple[Arg, ...]:
        return tuple([Arg(v.type.dtype, v.type.size, v in self.written) for v in self.numbers])

    def sites(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def access(self, ref: Ref) -> Access:
        guards = tuple([Guard(Affine(*p), bound, step) for p, bound, step in ref.guards])
        return Access(self.buffer(ref.value), Affine(*ref.position), guards, ref.index_strides)

    def translate(self, row: Row) -> object:
        op, _, _, attr = row
        if op == "load":
            return self.access(attr)
        if op == "index":
            return Affine(*attr)
        if op == "check":
            return attr[0], self._sites.setdefault(attr[1], len(self._sites))
        return attr

    def stage(self, stage: DraftStage) -> tuple[Body, tuple[Store, ...], tuple[Reduce, ...]]:
        body, number = finish(stage.builder.rows, stage.roots(), self.translate)
        stores = []
        for v, p, h in stage.stores:
            self.written.add(v)
            stores.append(Store(Access(self.buffer(v), Affine(*p)), number[h]))
        reduces = tuple([Reduce(kind, tuple([number[a] for a in args]), d) for kind, args, d in stage.reduces])
        return body, tuple(stores), reduces

    def built(self, kernel: Kernel, where: str) -> Built:
        return Built(kernel, tuple(self.numbers), frozenset(self.written), where)


def _scan(draft: Draft, where: str, symbolic: bool, keep: Callable[[Value], bool]) -> Built:
    names = _Names()
    (stage,) = draft.stages
    stage.stores = [put for put in stage.stores if keep(put.value)]
    prune(stage)
    body, stores, after = names.stage(stage)
    *axes, length = draft.outer
    dims = () if not symbolic else _dims(names.args, draft.outer, body, stores)
    following = tuple([r.args[0] for r in after])
    return names.built(ScanKernel(names.args, tuple(axes), length, draft.start, following, body, stores, dims), where)


def _sort(draft: Draft, where: str, symbolic: bool, keep: Callable[[Value], bool]) -> Built:
    names = _Names()
    assert draft.sorted is not None
    ref, place = draft.sorted
    source = names.access(ref)
    targets: list[Access | None] = []
    for v in draft.values:
        targets.append(Access(names.buffer(v), Affine(*place)) if keep(v) else None)
        if keep(v):
            names.written.add(v)
    *axes, length = draft.outer
    count, descending = draft.op.attrs["count"], draft.op.attrs["descending"]
    values, positions = targets
    used = [t for t in targets if t is not None]
    dims = () if not symbolic else _dims(names.args, draft.outer, (count,), source, *used)
    return names.built(
        SortKernel(names.args, tuple(axes), length, count, source, values, positions, descending, dims), where
    )


def _attention(draft: Draft, where: str, symbolic: bool) -> Built:
    names = _Names()
    a, attrs = draft.attended, draft.op.attrs
    assert a is not None
    reads, rows = (tuple([names.access(ref) for ref in refs]) for refs in (a.reads, a.rows))
    mask = None if a.mask is None else names.access(a.mask)
    results = [Access(names.buffer(r), Affine(*p)) for r, p in zip(draft.values, (*a.writes, *([a.sums] if a.sums else [])))]
    names.written.update(draft.values)
    writes, sums = tuple(results[: len(a.writes)]), results[-1] if a.sums else None
    sizes = (*draft.outer, a.queries, a.keys)
    dims = () if not symbolic else _dims(names.args, sizes, *reads, *rows, *([mask] if mask else []), *results)
    kernel = AttentionKernel(
        names.args, draft.outer, a.queries, a.keys, a.width, a.value_width, reads, rows, mask, writes, sums, attrs["causal"],
        attrs["scale"], compute_dtype(draft.op.operands[0].type.dtype), dims,
    )  # fmt: skip
    return names.built(kernel, where)


def _scatter(draft: Draft, where: str, symbolic: bool) -> Built:
    names = _Names()
    (stage,) = draft.stages
    names.buffer(base(draft.op.operands[0]))
    body, number = finish(stage.builder.rows, stage.roots(), names.translate)
    value, *places = stage.stores
    names.written.add(value.value)
    x = draft.op.operands[0].type
    steps = row_major(x.shape)
    strides = tuple([steps[a] for a in draft.op.attrs["axes"]])
    access = Access(names.buffer(value.value), Affine(*value.position), (), strides)
    store = Store(access, number[value.handle], tuple([number[p.handle] for p in places]))
    dims = () if not symbolic else _dims(names.args, draft.outer, (x.size,), body, (store,))
    return names.built(
        ScatterKernel(
            names.args, x.size, draft.outer, draft.sequential, body, store, draft.op.attrs["mode"], dims, names.sites()
        ),
        where,
    )


def _dims(args: Iterable[Arg], *parts: object) -> tuple[str, ...]:
    """Names of all symbolic sizes in use, sorted."""
    found: set[str] = set()
    todo: list[object] = [*parts, *[a.size for a in args]]
    while todo:
        x = todo.pop()
        if isinstance(x, Dim):
            found.update(x.names)
        elif isinstance(x, tuple):
            todo += x
        elif isinstance(x, Affine):
            todo += (x.offset, *x.strides)
        elif isinstance(x, Access):
            todo += (x.at, *x.index_strides)
            for g in x.guards:
                todo += (g.position, g.bound)
        elif isinstance(x, Store):
            todo.append(x.access)
        elif isinstance(x, Window):
            todo += (x.count, x.taps, x.bound, x.offset, x.stride, x.dilation)
        elif isinstance(x, Instr) and x.attr is not None and x.op != "const":
            todo.append(x.attr)
    return tuple(sorted(found))


__all__ = ["Built", "Member", "build"]
