"""Function -> kernels over values: which values get memory, and the walk that lowers, groups and assembles them.

A value with memory is an *anchor*; all others are expressions inlined where they are read. Anchors are the results, what reductions,
contractions, scans, scatters and control flow make or need in memory, and expressions that would otherwise be computed too often. With
`fusion` off every op that computes has memory and its own kernel. Fusion decides where things are computed, never what.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from duo_ir.core import Function, Op, Value
from duo_ir.kernels.access import seems_nonnegative
from duo_ir.kernels.assemble import Built, build
from duo_ir.kernels.draft import Draft, base
from duo_ir.kernels.express import NeedMemory
from duo_ir.kernels.lower import Lowering
from duo_ir.kernels.merge import Group, group
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
    Reduction,
    Reshape,
    Scatter,
    Sort,
)  # fmt: skip
from duo_ir.types import Dim

CHEAP, DEAR = 1, 8  # cost of an elementwise op whose definition says cheap, and of another
LOAD = 4  # cost of one more load, where a value is computed again from several that are stored
WORTH_MEMORY = 8  # cost, times the kernels that would compute it again, from which a value gets memory
DEEPEST = 48  # ops in one expression, along a path
MOST = 200  # cost of one expression


@dataclass
class Fused:
    """`items` in order: kernels over values, and control-flow ops. `storage(v)` is the value whose memory holds v."""

    function: Function
    items: list[Built | Op]
    storage: Callable[[Value], Value]


def fuse(function: Function, fusion: bool = True) -> Fused:
    """The kernels that compute `function`'s results."""
    lowering = Lowering(function)
    live = _live_ops(function)
    choice = _Choice(lowering, live, fusion)
    choice.run()
    drafts = _Drafts(lowering)
    drafts.add(lowering.anchors)
    groups = group(drafts.in_order(), fusion)
    if fusion:
        shared = choice.computed_too_often(groups)
        if shared:
            drafts.forget(shared)
            lowering.anchors.update(shared)
            drafts.add(lowering.anchors)
            groups = group(drafts.in_order(), fusion)
    return Fused(function, _assemble(function, groups), base)


def _live_ops(function: Function) -> list[Op]:
    live = set(function.results)
    ops = []
    for op in reversed(function.ops):
        if not live.isdisjoint(op.results):
            ops.append(op)
            live.update(op.operands)
    ops.reverse()
    return ops


# ---------------------------------------------------------------------------------------------------------- anchors
class _Choice:
    """Chooses anchors: first what must have memory (consumers before producers), then what should (producers first)."""

    def __init__(self, lowering: Lowering, ops: list[Op], fusion: bool) -> None:
        self.lowering, self.ops, self.fusion = lowering, ops, fusion
        self.anchors = lowering.anchors
        self.users: dict[Value, list[Op]] = {}
        for op in ops:
            for v in dict.fromkeys(op.operands):
                self.users.setdefault(v, []).append(op)
        self.cost: dict[Value, int] = {}

    def run(self) -> None:
        for r in self.lowering.function.results:
            self.need(r)
        partly: set[Value] = set()  # of these not every element may be read, or only under a guard
        for op in reversed(self.ops):
            if self.fusion:
                self._require(op, partly)
            else:
                self._require_unfused(op)
        self._bound_expressions()

    def need(self, v: Value) -> None:
        self.anchors.add(base(v))

    def _require(self, op: Op, partly: set[Value]) -> None:
        kind = op.definition.kind
        if isinstance(kind, Elementwise):
            self._pass_on(op, partly)
        elif isinstance(kind, Movement):
            view = self.lowering.view(op)
            if any(g is not None and g[1] != 1 for g in view.guards):
                self.need(op.operands[0])
            if not _covers(op, view.guards) or self._passes_partly(op, partly):
                partly.update(op.operands)
        elif isinstance(kind, Gather):
            self.need(op.operands[0])
            if op.result in partly or len(self.users.get(op.result, ())) > 1:
                self.need(op.result)
            # an index is read wherever an element of its window is
        elif isinstance(kind, Concat):
            users = self.users.get(op.result, ())
            if (
                op.result in self.anchors
                or len(users) != 1
                or not isinstance(users[0].definition.kind, (Elementwise, Concat))
            ):
                self.need(op.result)
            else:
                partly.update(op.operands)
        elif isinstance(kind, (Reshape, Generate)):
            self._pass_on(op, partly)
        else:
            self._require_heavy(op)

    def _pass_on(self, op: Op, partly: set[Value]) -> None:
        if self._passes_partly(op, partly):
            partly.update(op.operands)

    def _passes_partly(self, op: Op, partly: set[Value]) -> bool:
        return any(r in partly and r not in self.anchors for r in op.results)

    def _require_heavy(self, op: Op) -> None:
        """Reductions, contractions and what takes no part in fusion."""
        kind = op.definition.kind
        self.anchors.update(op.results)
        if isinstance(kind, Contraction):
            x, y = op.operands
            if op.result.type.shape[-1] != 1:
                self._need_address(x)
                self._need_address(y)
            elif any(d != 1 for d in op.result.type.shape):
                self._need_address(y)  # read once for every row
        elif isinstance(kind, (Convolution, Cumulative, Sort, Attention)):
            for v in op.operands:
                self._need_address(v)
        elif isinstance(kind, Scatter):
            self.need(op.operands[0])
        elif isinstance(kind, Control):
            for v in op.operands:
                self.need(v)

    def _require_unfused(self, op: Op) -> None:
        kind = op.definition.kind
        if isinstance(kind, Reshape):
            return
        if isinstance(kind, Movement):
            view = self.lowering.view(op)
            if any(g is not None for g in view.guards):
                self.anchors.add(op.result)
                self.need(op.operands[0])
            return
        if isinstance(kind, Generate) and not op.operands:
            return
        if isinstance(kind, Gather):
            self.need(op.operands[0])
        self.anchors.update([r for r in op.results if len(op.results) == 1 or r in self.users or r in self.anchors])
        if not isinstance(kind, (Elementwise, Generate)):
            self._require_heavy(op) if not isinstance(kind, (Gather, Concat)) else None

    def _need_address(self, v: Value) -> None:
        """Memory for what `v` is a view of."""
        while v not in self.anchors and v.op is not None and isinstance(v.op.definition.kind, (Movement, Reshape)):
            if isinstance(v.op.definition.kind, Movement) and any(self.lowering.view(v.op).guards):
                break
            v = v.op.operands[0]
        self.need(v)

    def _bound_expressions(self) -> None:
        """Gives memory to expressions that are too deep or too dear to be inlined where they are read."""
        cost, depth = self.cost, dict[Value, int]()
        for op in self.ops:
            kind = op.definition.kind
            if isinstance(kind, (Reduction, Contraction, Convolution, Cumulative, Sort, Attention, Scatter, Control)):
                continue
            total = deep = 0
            for v in op.operands:
                if v not in self.anchors:
                    total += cost.get(v, 0)
                    deep = max(deep, depth.get(v, 0))
            total += _own_cost(op)
            if self.fusion and isinstance(kind, Movement) and total >= DEAR and _stretches(op):
                self.need(op.operands[0])
                total, deep = 0, 0
            for r in op.results:
                cost[r], depth[r] = min(total, MOST), deep + 1
                if r in self.anchors or isinstance(kind, Reshape):
                    continue
                if total >= MOST or deep + 1 >= DEEPEST or (total > 0 and self._read_in_several_places(r)):
                    viewed = op.operands[0] if isinstance(kind, Movement) else r
                    if viewed is not r and seems_nonnegative(r.type.size - viewed.type.size):
                        cost[r], depth[r] = 0, 1  # what it views is not larger: the view itself costs nothing
                        self.need(viewed)
                    else:
                        self.need(r)

    def _read_in_several_places(self, v: Value) -> bool:
        users = self.users.get(v, ())
        if len(users) < 2:
            return False
        moved = sum(isinstance(u.definition.kind, (Movement, Reshape, Concat)) for u in users)
        return moved >= 2 or (moved == 1 and self.cost[v] > CHEAP and not all(u in self._plain_users(v) for u in users))

    def _plain_users(self, v: Value) -> list[Op]:
        return [u for u in self.users.get(v, ()) if isinstance(u.definition.kind, (Elementwise, Reduction))]

    def computed_too_often(self, groups: list[Group]) -> set[Value]:
        """Values that several kernels would compute and that are dear enough to be stored instead."""
        where: dict[Value, int] = {v: 1 << n for n, g in enumerate(groups) for m in g.members for v in m.draft.values}
        reach: dict[Value, int] = {}
        found: dict[Value, int] = {}
        for op in reversed(self.ops):
            inlined = [v for v in op.results if v not in self.anchors]
            for v in inlined:
                reach[v] = 0
                for user in self.users.get(v, ()):
                    for r in user.results:
                        reach[v] |= where[r] if r in where else reach.get(r, 0)
            homes = 0  # kernels that would run the op, for one of its results or another
            for v in op.results:
                homes |= where.get(v, 0) if v in self.anchors else reach[v]
            count, first = homes.bit_count(), homes & -homes
            # What repeats a smaller value is never stored itself: the smaller one is.
            stretched = isinstance(op.definition.kind, Movement) and _stretches(op)
            for v in inlined:
                elsewhere = count > 1 and reach[v] & ~first and not stretched and base(v) is v
                if elsewhere and self.cost.get(v, 0) * (count - 1) >= WORTH_MEMORY:
                    found[v] = count - 1
                    where[v] = first
        return self._still_dear(found)

    def _still_dear(self, found: dict[Value, int]) -> set[Value]:
        """Those of the values (with how often each would be computed again) that are dear even where what they are made of is stored."""
        work: dict[Value, int] = {}
        loads: dict[Value, frozenset[Value]] = {}  # what is loaded to compute a value, of its own size
        stored: set[Value] = set()
        for op in self.ops:
            for r in op.results:
                if r in self.anchors:
                    continue
                total, read = _own_cost(op), set[Value]()
                for v in dict.fromkeys(op.operands):
                    if v not in self.anchors and v not in stored:
                        total += work.get(v, 0)
                        read |= loads.get(v, frozenset())
                    elif v.type.size == r.type.size:
                        read.add(v)
                work[r], loads[r] = min(MOST, total), frozenset(read)
                # a stored value is loaded once itself
                if (total + LOAD * max(0, len(read) - 1)) * found.get(r, 0) >= WORTH_MEMORY:
                    stored.add(r)
        return stored


def _own_cost(op: Op) -> int:
    kind = op.definition.kind
    if isinstance(kind, Elementwise):
        return CHEAP if kind.cheap else DEAR
    if isinstance(kind, Generate):
        return DEAR if op.operands else 0
    if isinstance(kind, Gather):
        return DEAR // 2
    return CHEAP if isinstance(kind, Concat) else 0


def _stretches(op: Op) -> bool:
    return (
        op.operands[0].type.shape != op.result.type.shape
        and len(op.operands) == 1
        and op.operands[0].type.size != op.result.type.size
    )


def _covers(op: Op, guards: tuple[object, ...]) -> bool:
    """Whether the movement op reads every element of its operand unguarded: a permutation, a flip, a broadcast."""
    if any(g is not None for g in guards):
        return False
    source, result = op.operands[0].type, op.result.type
    return source.size == result.size or _is_broadcast(source.shape, result.shape)


def _is_broadcast(source: tuple, result: tuple) -> bool:
    lead = len(result) - len(source)
    return lead >= 0 and all(s in (1, r) for s, r in zip(source, result[lead:])) and 0 not in result


# ----------------------------------------------------------------------------------------------------------- drafts
class _Drafts:
    """The drafts of all anchors; an anchor found missing on the way is added."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        self.made: dict[Value, list[Draft]] = {}

    def add(self, anchors: Iterable[Value]) -> None:
        order = self.lowering.order
        # Later ops first: what an emission asks for in addition is always earlier.
        heap = [
            (-order[v.op], v.index, v) for v in anchors if v.op is not None and v.op in order and v not in self.made
        ]
        heapq.heapify(heap)
        while heap:
            _, _, v = heap[0]
            if v in self.made:
                heapq.heappop(heap)
                continue
            try:
                drafts = self.lowering.drafts(v)
            except NeedMemory as missing:
                new = base(missing.value)
                assert new.op is not None and new not in self.lowering.anchors
                self.lowering.anchors.add(new)
                heapq.heappush(heap, (-order[new.op], new.index, new))
                continue
            heapq.heappop(heap)
            for value in drafts[0].values if drafts else (v,):
                self.made[value] = drafts

    def forget(self, inlined: set[Value]) -> None:
        """Drops the drafts that inline one of these values."""
        self.made = {v: ds for v, ds in self.made.items() if not any(d.inlined & inlined for d in ds)}

    def in_order(self) -> list[Draft]:
        drafts = dict.fromkeys(d for ds in self.made.values() for d in ds)
        return sorted(drafts, key=lambda d: (d.order, d.values[0].index))


# --------------------------------------------------------------------------------------------------------- assembly
def _assemble(function: Function, groups: list[Group]) -> list[Built | Op]:
    """Kernels in order; what no later kernel and no result reads is not stored."""
    outside = {base(r) for r in function.results}
    read_by: dict[Value, set[int]] = {}
    for n, g in enumerate(groups):
        for m in g.members:
            reads = m.draft.op.operands if m.draft.kind == "control" else m.draft.reads()
            for v in reads:
                read_by.setdefault(base(v), set()).add(n)

    def read_elsewhere(n: int) -> Callable[[Value], bool]:
        return lambda v: v in outside or bool(read_by.get(v, set()) - {n})

    symbolic = bool(function.dims) or any(_names_sizes(op) for op in function.ops)
    items: list[Built | Op] = []
    for n, g in enumerate(groups):
        head = g.members[0].draft
        if head.kind == "control":
            items.append(head.op)
        elif not head.empty:
            items.append(build(g.members, g.target, read_elsewhere(n), symbolic))
    return items


def _names_sizes(op: Op) -> bool:
    return any(not r.type.is_static for r in op.results) or any(isinstance(a, Dim) for a in op.attrs.values())
