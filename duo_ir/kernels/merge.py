"""Which drafts become one kernel.

Drafts are taken in program order; each joins the groups of the values it reads where the loops fit, then groups that read the same
memory in the same way. A value may pass between members only where both walk it alike: element by element, or once per outer point
(the result of a reduction). Nothing here decides what is computed, only where, so no choice changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from duo_ir.core import Value
from duo_ir.kernels.access import expand, is_row_major, refine, respread, split_at
from duo_ir.kernels.assemble import Member
from duo_ir.kernels.body import BodyBuilder
from duo_ir.kernels.draft import Axes, Draft, DraftStage, Ref, collect_refs, with_groups
from duo_ir.types import DimLike, product

MOST_ROWS = 1500  # instructions in one kernel
FEW_POINTS, LONG_ROW = 8, 8192  # rows this long, this few of them, run better as kernels that are parallel within a row
NEAREST = 8  # how many groups that read the same memory are tried


class Group:
    """Drafts that become one kernel. `bit` sets: members' bits, and the bits of all that they depend on."""

    def __init__(self, draft: Draft, number: int) -> None:
        self.members = [Member(draft, draft.axes, len(draft.outer))]
        self.first = self.number = number
        self.bits = 1 << number
        self.before = 0
        self.direct: set[int] = set()  # numbers of drafts in the groups it reads from
        self.rows = draft.rows
        self.reduces = draft.kind == "reduce"
        self.target: Axes | None = draft.outer if draft.kind == "contract" else None
        self.fixed = draft.kind in ("attention", "scan", "sort", "scatter", "control") or product(draft.axes) == 0
        self.outer_size = product(draft.outer)


def group(drafts: Sequence[Draft], fuse: bool) -> list[Group]:
    """The drafts (in program order) as groups in an order in which they can run."""
    return _Merger(fuse).run(drafts)


class _Merger:
    def __init__(self, fuse: bool) -> None:
        self.fuse = fuse
        self.groups: list[Group] = []
        self.makers: dict[Value, list[Group]] = {}
        self.readers: dict[Value, list[Group]] = {}
        self.home: dict[int, Group] = {}  # bit number -> group

    def run(self, drafts: Sequence[Draft]) -> list[Group]:
        for number, draft in enumerate(drafts):
            new = Group(draft, number)
            self.home[number] = new
            producers = self._producers(draft)
            for p in producers:
                new.before |= p.before | p.bits
                new.direct.add(p.number)
            self.groups.append(new)
            current = new
            if self.fuse and not new.fixed:
                for p in producers:
                    if p is current:
                        continue
                    if self._joins(p, current) or (p.target is not None and self._joins_permuted(p, current)):
                        current = self._join(p, current)
                if draft.kind != "contract":
                    current = self._join_siblings(draft, current)
            for v in draft.values:
                self.makers.setdefault(v, []).append(current)
            for v in dict.fromkeys(draft.reads()):
                self.readers.setdefault(v, []).append(current)
        return self._ordered()

    def _live(self, g: Group) -> Group:
        return self.home[g.number]

    def _producers(self, draft: Draft) -> list[Group]:
        """Groups whose values it reads: contractions first (an epilogue saves most), then the latest."""
        found: dict[int, Group] = {}
        reads = list(dict.fromkeys(draft.reads()))
        if draft.kind == "control":
            reads += draft.op.operands
        for v in reads:
            for maker in self.makers.get(v, ()):
                g = self._live(maker)
                found[id(g)] = g
        return sorted(found.values(), key=lambda g: (g.target is None, -g.number))

    # ------------------------------------------------------------------------------------------------------- joining
    def _joins(self, p: Group, c: Group) -> bool:
        """Whether consumer group c may join producer group p; on success the members' layouts are set."""
        if p.fixed or c.fixed or c.target is not None or p.rows + c.rows > MOST_ROWS:
            return False
        if p.reduces == c.reduces and p.outer_size != c.outer_size:
            return False
        layout = self._layout(p, c)
        if layout is None:
            return False
        members = layout[: len(p.members)]
        made = {v: m for m in members for v in m.draft.values}
        for m in layout[len(p.members) :]:
            if not all(_passes(made[ref.value], m, ref) for ref in m.draft.refs if ref.value in made):
                return False
        for n in c.direct:
            between = self.home[n]
            if between is not p and between is not c and between.before & p.bits:
                return False  # it would come to depend on itself
        self._found = layout
        return True

    def _joins_permuted(self, p: Group, c: Group) -> bool:
        """Tries a map that reads the contraction's result transposed: its loops may run in the contraction's order, its store is strided."""
        if len(c.members) != 1 or c.members[0].draft.kind != "map":
            return False
        made = {v for m in p.members for v in m.draft.values}
        own = c.members[0]
        for ref in own.draft.refs:
            if ref.value in made:
                draft = _permuted(own.draft, ref)
                if draft is None:
                    return False
                c.members = [Member(draft, draft.axes, len(draft.outer))]
                if self._joins(p, c):
                    return True
                c.members = [own]
                return False
        return False

    def _layout(self, p: Group, c: Group) -> list[Member] | None:
        """All members over common outer loops, or None."""
        if p.target is not None and (c.reduces or any(not r.plain for m in c.members for r in m.draft.refs)):
            return None
        size = p.outer_size if p.reduces or not c.reduces else c.outer_size
        outer: Axes = p.target if p.target is not None else ()
        outer = tuple(d for d in outer if d != 1)
        inner: dict[DimLike, Axes] = {}
        out: list[Member] = []
        rows = False
        for m in p.members + c.members:
            placed = _placed(m.draft, size, p.reduces or c.reduces)
            if placed is None:
                return None
            own = placed.axes[: placed.count]
            fine = refine(outer, own) if outer or out else tuple(d for d in own if d != 1)
            if fine is None:
                return None
            if p.target is not None and len(fine) != len(outer):
                return None
            outer = fine
            rest = placed.axes[placed.count :]
            n = product(rest)
            shared = refine(inner.get(n, rest), rest)
            if shared is None:
                return None
            inner[n] = shared
            rows |= bool(rest) and m.draft.kind == "map"
            out.append(placed)
        if rows or (p.reduces and c.reduces and c.before & p.bits):
            longest = max((n for n in inner if isinstance(n, int)), default=0)
            if isinstance(size, int) and size < FEW_POINTS and longest > LONG_ROW:
                return None
        return out

    def _join(self, p: Group, c: Group) -> Group:
        """c's members move into p."""
        p.members = self._found
        p.bits |= c.bits
        p.before = (p.before | c.before) & ~p.bits
        p.direct |= c.direct
        p.rows += c.rows
        if c.reduces and not p.reduces:
            p.outer_size = c.outer_size
        p.reduces |= c.reduces
        self.groups.remove(c)
        for number in _bits(c.bits):
            self.home[number] = p
        all_before = p.before | p.bits
        for g in self.groups:
            if g.before & p.bits:
                g.before |= all_before & ~g.bits
        return p

    def _join_siblings(self, draft: Draft, c: Group) -> Group:
        for ref in draft.refs:
            if not ref.plain or ref.value.type.size == 1:
                continue
            seen: set[int] = set()
            for reader in reversed(self.readers.get(ref.value, [])[-NEAREST:]):
                g = self._live(reader)
                if g is c or id(g) in seen:
                    continue
                seen.add(id(g))
                if g.target is not None or c.target is not None or (g.before & c.bits) or (c.before & g.bits):
                    continue
                if _reads_alike(g, draft, ref) and self._joins(g, c):
                    c = self._join(g, c)
                    break
        return c

    def _ordered(self) -> list[Group]:
        """Groups so that each comes after those it depends on, otherwise in program order."""
        done, out, waiting = 0, [], sorted(self.groups, key=lambda g: g.first)
        while waiting:
            rest = []
            for g in waiting:
                if g.before & ~done:
                    rest.append(g)
                else:
                    out.append(g)
                    done |= g.bits
            assert len(rest) < len(waiting), "kernels depend on each other in a cycle"
            waiting = rest
        return out


def _placed(draft: Draft, size: DimLike, reduces: bool) -> Member | None:
    """The draft with outer loops of `size` points in all, or None."""
    own = product(draft.outer)
    if own == size:
        return Member(draft, draft.axes, len(draft.outer))
    if not reduces or draft.kind != "map":
        return None
    found = split_at(draft.outer, size)
    return None if found is None else Member(draft, *found)


def _permuted(draft: Draft, ref: Ref) -> Draft | None:
    """The map with its loops in the order in which `ref` is read row-major; None where there is none, or where its innermost loop would
    not stay innermost."""
    offset, strides = ref.position
    order: list[int] = []
    step: DimLike = 1
    while len(order) < len(strides):
        found = [k for k, s in enumerate(strides) if s == step and k not in order]
        if not found:
            return None
        order.insert(0, found[0])
        step = step * draft.outer[found[0]]
    if offset != 0 or not order or order[-1] != len(order) - 1 or not ref.plain:
        return None
    (stage,) = draft.stages
    builder = BodyBuilder()
    builder.rows = list(stage.builder.rows)
    turned = DraftStage((), builder, list(stage.stores))
    with_groups(turned, [[k] for k in order])
    return replace(
        draft, outer=tuple([draft.outer[k] for k in order]), stages=[turned], refs=collect_refs([turned]), partial=True
    )


def _passes(maker: Member, reader: Member, ref: Ref) -> bool:
    """Whether what `ref` loads is the very element that the maker's body makes at the same point."""
    if maker.draft.partial or not ref.plain:
        return False
    position, axes = ref.position, reader.axes
    if len(axes) != len(reader.draft.axes):
        position = respread(position, expand(reader.draft.axes, axes), axes)
    rows = maker.axes[maker.count :] if maker.draft.kind == "map" else ()
    if not rows:
        return is_row_major(position, axes, reader.count)
    mine = reader.axes[reader.count :]
    return product(rows) == product(mine) and is_row_major(position, axes, len(axes))


def _reads_alike(g: Group, draft: Draft, ref: Ref) -> bool:
    """Whether some member reads the same memory over the same loops."""
    whole = is_row_major(ref.position, draft.axes, len(draft.axes))
    for m in g.members:
        axes = m.draft.axes
        if axes == draft.axes and ref in m.draft.refs:
            return True
        if not whole or product(axes) != product(draft.axes):
            continue
        if any(r.value is ref.value and r.plain and is_row_major(r.position, axes, len(axes)) for r in m.draft.refs):
            return True
    return False


def _bits(mask: int) -> list[int]:
    out = []
    while mask:
        low = mask & -mask
        out.append(low.bit_length() - 1)
        mask ^= low
    return out
