"""A path of the trie entry by entry: what depends on what, and how a cotangent goes back, without the path's Function.

`Path` says what `build.Construction` says for the questions that recording and stepwise running ask of a path that may never come again, in a
microsecond or so per entry. Whatever it cannot answer raises Unable, and the Construction answers.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from duo.eager.steps import Pull, Unable, step_of
from duo.eager.trie import Applied, Node

_LEAF_LIKE = ("leaf", "mark", "optimize")  # as in build.py


class Visit(NamedTuple):
    """One entry of a walk back: the number of its first value, its pullback, the operands' values by number, the results' with cotangents by number, and the
    operands whose new cotangents are asked for."""

    first: int
    pull: Pull
    reps: tuple[int, ...]
    cts: tuple[int, ...]
    outs: tuple[int, ...]


class Walk:
    """A reverse pass over a path. visits: latest entry first. numbers: the values that a gradient reaches, of those asked for."""

    def __init__(self, visits: list[Visit], numbers: tuple[int, ...]) -> None:
        self.visits, self.numbers = visits, numbers

    @property
    def touched(self) -> dict[int, int]:
        """First number of an entry -> which of its ops' rules read forward values (`Pull.touched`)."""
        return {v.first: v.pull.touched for v in self.visits if v.pull.touched}

    def towards(self, reps: Iterable[int]) -> list[Visit]:
        """The visits that the gradients of the values `reps` need."""
        useful = set(reps)
        out: list[Visit] = []
        for visit in reversed(self.visits):
            outs = visit.outs
            for k in outs:
                if visit.reps[k] not in useful:
                    outs = tuple([k for k in outs if visit.reps[k] in useful])
                    break
            if outs:
                useful.update(visit.cts)
                out.append(visit if outs is visit.outs else visit._replace(outs=outs))
        out.reverse()
        return out


class Path:
    """The path to a node. nodes[n] is the node that value n belongs to; `order` has each node once.

    A value may have several numbers (an entry that gives its operand back); `alias` maps the later ones to the first, its *rep*. overwritten: as in
    Construction. freed: first number of an entry -> its ops whose saved values a backward pass of this path has freed. walks: first number of a backward
    pass's entry -> its Walk. ahead: a walk that recording a backward pass asked for, which is likely to be the next entry."""

    def __init__(self, root: Node) -> None:
        self.nodes: list[Node] = [root]
        self.operands: list[tuple[int, ...] | None] = [
            None
        ]  # per value: the reps of its body's operands, -1 for Python numbers
        self.order: list[Node] = []
        self.alias: dict[int, int] = {}
        self.names: dict[int, list[int]] = {}  # rep -> all numbers, where there are several
        self.overwritten: dict[int, int] = {}
        self.freed: dict[int, int] = {}
        self.walks: dict[int, Walk] = {}
        self.leaf_like: set[int] = set()
        self.ahead: tuple[tuple, Walk] | None = None

    @staticmethod
    def to(node: Node) -> Path:
        """The path to `node`; the one asked for last grows where that is a part of this. Raises Unable."""
        last = _last.path
        found: list[Node] = []
        end = last.nodes[-1] if last is not None else None
        at: Node | None = node
        while at is not None and at is not end and at.parent is not None:
            found.append(at)
            at = at.parent
        if last is None or at is not end:
            assert at is not None
            last = Path(at)
        _last.path = None
        found.reverse()
        for step in found:
            last.append(step)
        _last.path = last
        return last

    def append(self, node: Node) -> None:
        """One more entry."""
        body = node.key[0]
        first = len(self.nodes)
        applied = node.extra
        if applied.__class__ is Applied:
            known = self.alias
            if known:
                reps = tuple([known.get(r, r) if r.__class__ is int else -1 for r in node.refs])
            else:
                reps = tuple([r if r.__class__ is int else -1 for r in node.refs])
            if not applied.fresh:
                alias = (applied.step or step_of(applied)).alias
                if alias:
                    self._alias(reps, first, alias)
            self.nodes.append(node)
            self.operands.append(reps)
            for _ in node.infos[1:]:
                self.nodes.append(node)
                self.operands.append(reps)
            self.order.append(node)
            return
        count = len(node.infos)
        body.enter(self, node)
        if body.name in _LEAF_LIKE:
            self.leaf_like.update(range(first, first + count))
        self.nodes.extend([node] * count)
        self.operands.extend([None] * count)
        self.order.append(node)

    def _alias(self, reps: tuple[int, ...], first: int, alias: Mapping[int, int]) -> None:
        for j, k in alias.items():
            rep = reps[k] if k >= 0 else self.rep(first - 1 - k)
            self.alias[first + j] = rep
            self.names.setdefault(rep, [rep]).append(first + j)

    def rep(self, number: int) -> int:
        return self.alias.get(number, number)

    def requires_grad(self, number: int) -> bool:
        node = self.nodes[number]
        return node.infos[number - node.first].requires_grad

    def type(self, number: int) -> Any:
        node = self.nodes[number]
        return node.infos[number - node.first].type

    # ------------------------------------------------------------------------------------------------------ gradients
    def reverse(self, low: int, seeds: Iterable[int], wanted: Collection[int], check: Checks | None = None) -> Walk:
        """The reverse pass over the entries after `low` from the values `seeds`; see `Construction.backward`."""
        nodes, operands = self.nodes, self.operands
        reached = {r for r in map(self.rep, seeds) if self.requires_grad(r)}
        heap = [-r for r in reached]
        heap.sort()
        visits: list[Visit] = []
        while heap:
            number = -heappop(heap)
            node = nodes[number]
            first = node.first
            cts: tuple[int, ...] = (number,)
            if len(node.infos) > 1:
                while heap and -heap[0] >= first:
                    cts = (-heappop(heap), *cts)
            reps = operands[number]
            if first <= low or reps is None:
                continue
            applied = node.extra
            step = applied.step or step_of(applied)
            pull = step.pull(
                _places(reps), (0,) if number == first and len(cts) == 1 else tuple([n - first for n in cts])
            )
            if check is not None:
                check.visit(self, first, pull, reps)
            visits.append(Visit(first, pull, reps, cts, pull.outs))
            for k in pull.outs:
                r = reps[k]
                if r not in reached:
                    reached.add(r)
                    heappush(heap, -r)
        found = []
        for r in reached:
            for n in self.names.get(r, (r,)):
                if (n in self.leaf_like or n <= low or n in wanted) and self.requires_grad(n):
                    found.append(n)
        found.sort()
        return Walk(visits, tuple(found))

    def stale(self, late: Mapping[int, int]) -> dict[int, frozenset[int]]:
        """Reps of the values that in-place ops have replaced wherever they were, each with the entries that may go on reading it
        (`Construction.stale`)."""
        overwritten = {**self.overwritten, **late} if late else self.overwritten
        out: dict[int, frozenset[int]] = {}
        for n in overwritten:
            rep = self.rep(n)
            names = self.names.get(rep, (rep,))
            if all(other in overwritten for other in names):
                by = [overwritten[other] for other in names]
                out[rep] = frozenset([b for b in by if b > 0 and self.nodes[b].first == b])
        return out

    def freed_outputs(self, outs: Iterable[int]) -> dict[int, tuple[Node, int]]:
        """The values of `outs` whose history a backward pass of this very path has freed already, each with the entry, and the number of the op in it, that a
        walk back from it meets first."""
        worst: dict[int, tuple[int, int]] = {}  # rep -> (entry, op of it) that comes last among those freed behind it
        for node in self.order:
            if node.extra.__class__ is not Applied:
                continue
            reps = self.operands[node.first]
            assert reps is not None
            for j, info in enumerate(node.infos):
                n = node.first + j
                if not info.requires_grad or n in self.alias:
                    continue
                pull = step_of(node.extra).pull(_places(reps), (j,))
                again = pull.touched & self.freed.get(node.first, 0)
                bad = [worst[reps[k]] for k in pull.outs if reps[k] in worst]
                if again:
                    bad.append((node.first, again.bit_length() - 1))
                if bad:
                    worst[n] = max(bad)
        out = {}
        for n in outs:
            if self.rep(n) in worst:
                entry, op = worst[self.rep(n)]
                out[n] = self.nodes[entry], op
        return out


def _places(reps: tuple[int, ...]) -> tuple[int, ...]:
    if len(reps) == 1:
        return (0,)
    if len(reps) == 2:
        return (0, 0) if reps[0] == reps[1] >= 0 else (0, 1)
    return tuple([k if r < 0 else reps.index(r) for k, r in enumerate(reps)])


class Checks:
    """Refuses walks that the whole path's Function would refuse, or may: freed entries, and values that were overwritten since."""

    def __init__(self, freed: Mapping[int, int], stale: Mapping[int, frozenset[int]]) -> None:
        self.freed, self.stale = freed, stale

    def visit(self, path: Path, first: int, pull: Pull, reps: Sequence[int]) -> None:
        if self.freed and self.freed.get(first, 0) & pull.touched:
            raise Unable
        if not self.stale:
            return
        read = [reps[k] for k in pull.watched_operands] + [path.rep(first + j) for j in pull.watched_results]
        if any(r in self.stale and first not in self.stale[r] for r in read):
            raise Unable


class _Last(threading.local):
    """The path that this thread asked for last: a backward pass's entry asks when it is recorded, and the flush soon after."""

    path: Path | None = None


_last = _Last()


def forget_path() -> None:
    _last.path = None


__all__ = ["Checks", "Path", "Visit", "Walk", "forget_path"]
