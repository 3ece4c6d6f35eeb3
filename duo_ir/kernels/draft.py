"""Drafts: kernels while they still speak of values instead of numbered buffers.

`lower.py` makes one draft per value that needs memory, `merge.py` groups drafts, `assemble.py` makes a kernel of a group. A draft has outer
axes and stages as a LoopKernel has; its instructions are `BodyBuilder` rows whose load attribute is a `Ref`, whose index attribute
is a Position and whose check attribute is (bound, text).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from duo_ir.core import Op, Value
from duo_ir.kernels.access import Bounds, Position, merge, mergeable
from duo_ir.kernels.body import BodyBuilder, Row
from duo_ir.kernels.kernel import Window
from duo_ir.opdef import Reshape
from duo_ir.types import DimLike, DType, product

Axes: TypeAlias = tuple[DimLike, ...]


class Ref(NamedTuple):
    """What a load reads: `position` of the memory of `value`, within `guards`, plus indices times `index_strides`."""

    value: Value
    position: Position
    guards: tuple[Bounds, ...] = ()
    index_strides: tuple[DimLike, ...] = ()

    @property
    def plain(self) -> bool:
        return not self.guards and not self.index_strides


class Put(NamedTuple):
    """A store of instruction `handle` to the memory of `value`."""

    value: Value
    position: Position
    handle: int


@dataclass
class DraftStage:
    axes: Axes
    builder: BodyBuilder
    stores: list[Put] = field(default_factory=list)
    reduces: list[tuple[str, tuple[int, ...], DType]] = field(default_factory=list)

    def roots(self) -> list[int]:
        return [p.handle for p in self.stores] + [a for _, args, _ in self.reduces for a in args]


@dataclass(frozen=True)
class Product:
    """The contraction of a 'contract' draft: outer axes are (batch..., m, n)."""

    k: DimLike
    a: Ref  # over (batch..., m, k)
    b: Ref  # over (batch..., k, n)
    acc: DType
    result: DType


@dataclass(frozen=True)
class Windows:
    """The contraction of a 'contract' draft that is a convolution: outer axes are (image, q..., group, n)."""

    windows: tuple[Window, ...]
    c: DimLike
    a: Ref  # over (image, p..., group, c)
    b: Ref  # over (taps..., group, c, n)
    acc: DType
    result: DType


@dataclass(frozen=True)
class Attended:
    """What an 'attention' draft reads and writes, as in AttentionKernel, whose batch axes are the draft's outer axes."""

    queries: DimLike
    keys: DimLike
    width: int
    value_width: int
    reads: tuple[Ref, ...]
    rows: tuple[Ref, ...]
    mask: Ref | None
    writes: tuple[Position, ...]
    sums: Position | None

    def refs(self) -> tuple[Ref, ...]:
        return (*self.reads, *self.rows, *(() if self.mask is None else (self.mask,)))


@dataclass(eq=False)
class Draft:
    """kind: 'map' (one stage without axes), 'reduce' (a stage that reduces over `inner`, then one that stores), 'contract' (the stage is
    the epilogue), or 'attention', 'scan' (a stage whose reductions are what the state becomes), 'sort', 'scatter', 'control', which take no part in fusion. `order` is the op's place in the Function."""

    kind: str
    op: Op
    order: int
    values: tuple[Value, ...]
    outer: Axes = ()
    inner: Axes = ()
    stages: list[DraftStage] = field(default_factory=list)
    contraction: Product | Windows | None = None
    partial: bool = False  # stores only a part of its value (one operand of a concat, one phase of a convolution)
    inlined: set[Value] = field(default_factory=set)
    refs: list[Ref] = field(default_factory=list)  # every load
    rows: int = 0
    sequential: int = 0  # axes of a scatter's updates, the first ones, that follow one another
    start: tuple[tuple[DType, float | int], ...] = ()  # the state that a scan starts from
    sorted: tuple[Ref, Position] | None = None  # what a sort reads, and where it writes in each result
    attended: Attended | None = None

    @property
    def axes(self) -> Axes:
        return self.outer + self.inner

    @property
    def where(self) -> str:
        return str(self.op.loc) if self.op.loc is not None else ""

    def reads(self) -> Iterator[Value]:
        """Values whose memory it reads."""
        for ref in self.refs:
            yield ref.value
        if self.contraction is not None:
            yield self.contraction.a.value
            yield self.contraction.b.value
        if self.sorted is not None:
            yield self.sorted[0].value
        if self.attended is not None:
            for ref in self.attended.refs():
                yield ref.value

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return self.kind != "control" and all(v.type.size == 0 for v in self.values)


def base(value: Value) -> Value:
    """`value` without the reshapes at its end: they share its memory."""
    while value.op is not None and isinstance(value.op.definition.kind, Reshape):
        value = value.op.operands[0]
    return value


def prune(stage: DraftStage) -> None:
    """Drops the instructions that nothing needs."""
    rows = stage.builder.rows
    live = set(stage.roots())
    for n in range(len(rows) - 1, -1, -1):
        if n in live:
            live.update(rows[n][1])
    if len(live) == len(rows):
        return
    number: dict[int, int] = {}
    kept: list[Row] = []
    for n in sorted(live):
        op, args, dtype, attr = rows[n]
        number[n] = len(kept)
        kept.append((op, tuple([number[a] for a in args]), dtype, attr))
    stage.builder.rows = kept
    stage.stores = [Put(v, p, number[h]) for v, p, h in stage.stores]
    stage.reduces = [(kind, tuple([number[a] for a in args]), d) for kind, args, d in stage.reduces]


def positions(stage: DraftStage) -> list[Position]:
    """Every distinct position that the stage uses."""
    seen: dict[Position, None] = {}
    for op, _, _, attr in stage.builder.rows:
        if op == "load":
            seen[attr.position] = None
            for bounds in attr.guards:
                seen[bounds[0]] = None
        elif op == "index":
            seen[attr] = None
    for put in stage.stores:
        seen[put.position] = None
    return list(seen)


def with_groups(stage: DraftStage, groups: Sequence[Sequence[int]]) -> None:
    """Rewrites every position of the stage over merged axes."""
    known: dict[Position, Position] = {}

    def new(p: Position) -> Position:
        found = known.get(p)
        if found is None:
            found = known[p] = merge(p, groups)
        return found

    rows = stage.builder.rows
    for n, (op, args, dtype, attr) in enumerate(rows):
        if op == "load":
            guards = tuple([(new(p), bound, step) for p, bound, step in attr.guards])
            rows[n] = (op, args, dtype, Ref(attr.value, new(attr.position), guards, attr.index_strides))
        elif op == "index":
            rows[n] = (op, args, dtype, new(attr))
    stage.stores = [Put(v, new(p), h) for v, p, h in stage.stores]


def collapse(outer: Axes, stages: Sequence[DraftStage], keep: Sequence[Sequence[int]] | None = None) -> Axes:
    """Merges loops that every position walks as one, drops loops of one turn; returns the new outer axes.

    The order of iteration is unchanged, so reductions keep their order. `keep`: the groups to form of the outer axes."""
    n = len(outer)
    used = [positions(stage) for stage in stages]
    shared = [p for ps in used for p in ps]
    groups = [list(g) for g in keep] if keep is not None else mergeable(outer, shared, 0, n)
    for stage, ps in zip(stages, used):
        scope = outer + stage.axes
        inner = mergeable(scope, ps, n, len(scope))
        if len(groups) + len(inner) != len(scope):
            with_groups(stage, groups + inner)
        stage.axes = tuple([product([scope[k] for k in g]) for g in inner])
    return tuple([product([outer[k] for k in g]) for g in groups])


def collect_refs(stages: Iterable[DraftStage]) -> list[Ref]:
    return [attr for stage in stages for op, _, _, attr in stage.builder.rows if op == "load"]
