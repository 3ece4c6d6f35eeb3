"""Running a path that is seen for the first time: entry by entry, through programs that all paths share (steps.py).

What repeats is worth compiling as a whole; what may never come again must not cost more than its ops. `run` does what a flush does with a compiled
path (flush.py), and leaves a StepSegment behind where gradients may be asked for later, whose backward pass goes entry by entry too, at once.
Both give the bits, and refuse what, the whole path's program gives and refuses. Two rare cases run as a whole: a path with a backward pass that can
itself be differentiated (create_graph), and a path that fails (its values are tried apart by flush.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from duo.eager.autograd import BACKWARD, Cotangents, Engine, Inner
from duo.eager.build import Construction, freed_error
from duo.eager.path import Checks, Path, Visit, forget_path
from duo.eager.segments import Origin, Segment, unmarked, version_of
from duo.eager.steps import Unable, ones, step_of, total
from duo.eager.trace import Trace, Val, places, settle, state
from duo.eager.trie import LEAF, NOTHING, Applied, Info, Node, Note
from duo_ir.core import Loc
from duo_ir.errors import DuoError


def run(trace: Trace, node: Node, live: Sequence[int]) -> None:
    """Runs what the values `live` of a closed trace need, and publishes them. Raises Unable, or the error of an entry, before anything is published."""
    try:
        this = _Run(trace, Path.to(node), live)
        try:
            this.go()
        finally:
            this.plan.clear()  # it refers to the run, and would keep every buffer until the garbage collector came
    finally:
        forget_path()


def may_live(node: Node) -> bool:
    """Whether a step makes values that a flush could be asked for."""
    body = node.key[0]
    if body is LEAF or isinstance(body, Note):
        return False
    return not (
        (body is BACKWARD and not node.extra)
        or (body.__class__.__name__ == "SegmentBackward" and not node.key[1].types)
    )


class _Run:
    """One run. values[rep]: the buffer of a value that is needed later; inner[first]: inner values that pullbacks read."""

    def __init__(self, trace: Trace, path: Path, live: Sequence[int]) -> None:
        self.trace, self.path, self.live = trace, path, live
        self.entries = trace.entries
        self.values: list[Any] = [None] * len(path.nodes)
        self.inner: dict[int, list[Any]] = {}
        self.needed = bytearray(len(path.nodes))
        self.saves: set[int] = set()  # entries whose inner values are needed
        self.plan: list[
            tuple[Callable[..., None], tuple, list[int]]
        ] = []  # latest first: what to do, and which values nobody needs after it

    def go(self) -> None:
        path, entries = self.path, self.entries
        outs = [n for n in self.live if n not in path.leaf_like and path.requires_grad(n)]
        errors: dict[int, Callable[[], Exception]] = {}
        if path.freed and outs:
            lines = places(self.trace)
            errors = {n: partial(_freed_error, *found, lines) for n, found in path.freed_outputs(outs).items()}
        kept: dict[int, Any] = {}
        saving: dict[int, int] = {}
        alive = [n for n in outs if n not in errors]
        if alive:
            walk = path.reverse(0, alive, ())
            saving = walk.touched
            kept = dict.fromkeys(self._reads(walk.visits))
        segment_inner = list(self.saves)
        for n in [*map(path.rep, self.live), *kept]:
            self.needed[n] = 1
        self._make_plan()
        values = self.values
        for action, arguments, drops in reversed(self.plan):
            action(*arguments)
            for n in drops:
                values[n] = None
        origins = {n: Origin(None, n, error) for n, error in errors.items()}
        if alive:
            segment = self._segment(kept, segment_inner, saving)
            for n in alive:
                origins[n] = segment.origins[n]
        for n in self.live:
            val = entries[n]
            if n in origins:
                val.extra = origins[n]
            val.buf = values[path.rep(n)]  # last: another thread may take the value up from here on
            val.trace = None

    def _reads(self, visits: Iterable[Visit]) -> list[int]:
        """The forward values that pullbacks read; notes the entries whose inner values they read."""
        out: list[int] = []
        for visit in visits:
            values, inner = self._read_by(visit)
            out += values
            if inner:
                self.saves.add(visit[0])
        return out

    def _read_by(self, visit: Visit) -> tuple[list[int], bool]:
        """The forward values that one pullback reads, and whether it reads inner values."""
        first, pull, reps, _, outs = visit
        read = pull.run(outs, ())
        path = self.path
        return [*[reps[k] for k in read.operands], *[path.rep(first + j) for j in read.results]], bool(read.inner)

    # ------------------------------------------------------------------------------------------------------ planning
    def _make_plan(self) -> None:
        """Which entries run, from the last to the first, each with the values that it is the last to need."""
        path, needed, plan = self.path, self.needed, self.plan
        rep = path.rep
        for node in reversed(path.order):
            first, applied = node.first, node.extra
            if applied.__class__ is Applied:
                if not needed[first] and first not in self.saves and not any(needed[first : first + len(node.infos)]):
                    continue
                reps = path.operands[first]
                drops = []
                for r in reps:  # type: ignore[union-attr]
                    if r >= 0 and not needed[r]:
                        needed[r] = 1
                        drops.append(r)
                plan.append((self._apply, (node, reps), drops))
                continue
            body = node.key[0]
            if not any(needed[first : first + len(node.infos)]):
                continue
            if body is LEAF:
                self.values[first] = self.entries[first].buf
                continue
            if body is BACKWARD:
                seeds = node.key[2]
                reached = {rep(n) for i, n in enumerate(node.extra) if needed[first + i]}
                visits = list(path.walks[first].towards(reached))
                kept = set(self.saves)  # a later pass, or the segment, reads these too
                reads = [*self._reads(visits), *[rep(c) for _, c in seeds if c >= 0]]
                drops = self._need(reads)
                plan.append((self._back, (node, visits, reached, self._last_reads(visits, drops, kept)), drops))
            else:
                numbers, program = body.alone(node, path.type)
                numbers = [rep(n) for n in numbers]
                plan.append((self._alone, (node, numbers, program), self._need(numbers)))

    def _last_reads(self, visits: list[Visit], drops: list[int], kept: set[int]) -> list[tuple[list[int], bool]]:
        """For each visit, which of `drops` no later visit reads, and whether its entry's inner values are read by it alone."""
        left = set(drops)
        out: list[tuple[list[int], bool]] = []
        for visit in reversed(visits):
            values, inner = self._read_by(visit)
            last = [n for n in dict.fromkeys(values) if n in left]
            left.difference_update(last)
            out.append((last, inner and visit[0] not in kept))
        out.reverse()
        return out

    def _need(self, numbers: Iterable[int]) -> list[int]:
        drops = []
        for n in numbers:
            if not self.needed[n]:
                self.needed[n] = 1
                drops.append(n)
        return drops

    # ------------------------------------------------------------------------------------------------------- running
    def _apply(self, node: Node, reps: tuple[int, ...]) -> None:
        """The entry of a body."""
        values, first = self.values, node.first
        step = node.extra.step or step_of(node.extra)
        if step.numbers:
            numbers = iter(self.entries[first].scalars or ())
            inputs = [values[r] if r >= 0 else next(numbers) for r in reps]
        else:
            inputs = [values[r] for r in reps]
        count = len(node.infos)
        if count > 1 and first not in self.saves:
            wanted = tuple([j for j in range(count) if self.needed[first + j]])
            part = step.part(wanted) if len(wanted) < count else None
            if part is not None:
                for j, buffer in zip(wanted, part(inputs)):
                    values[first + j] = buffer
                return
        if first in self.saves and step.inner:
            made = step.save(inputs)
            self.inner[first] = made[count:]
        else:
            made = step.run(inputs)
        if count == 1:
            values[first] = made[0]
        else:
            values[first : first + count] = made[:count]

    def _alone(self, node: Node, numbers: list[int], program: Callable[..., list[Any]]) -> None:
        """The entry of a macro."""
        inputs = [self.values[n] for n in numbers]
        inputs += self.entries[node.first].scalars or ()
        self.values[node.first : node.first + len(node.infos)] = program(inputs)

    def _back(
        self, node: Node, visits: list[Visit], reached: set[int], last_reads: list[tuple[list[int], bool]]
    ) -> None:
        """The entry of a backward pass. Values go as soon as no visit will read them any more."""
        path, values = self.path, self.values
        totals: dict[int, Any] = {}
        for number, cotangent in node.key[2]:
            r = path.rep(number)
            seed = values[path.rep(cotangent)] if cotangent >= 0 else ones(path.type(number))
            totals[r] = total(path.type(r), totals[r], seed) if r in totals else seed
        seeds = {path.rep(c) for _, c in node.key[2] if c >= 0}

        def visited(k: int) -> None:
            last, inner = last_reads[k]
            for n in last:
                if n not in seeds:
                    values[n] = None
            if inner:
                self.inner.pop(visits[k][0], None)

        go_back(path, visits, totals, reached, values.__getitem__, self.inner, self._numbers, visited)
        for i, n in enumerate(node.extra):
            r = path.rep(n)
            if r in reached:
                values[node.first + i] = totals[r]

    def _numbers(self, first: int) -> Sequence[Any]:
        return self.entries[first].scalars or ()

    # ----------------------------------------------------------------------------------------------------- afterwards
    def _segment(self, kept: dict[int, Any], inner: list[int], saving: dict[int, int]) -> StepSegment:
        path, entries, values = self.path, self.entries, self.values
        outside = {number: val for val, number in self.trace.leaves.items()}
        for r in kept:
            if path.nodes[r].key[0] is LEAF:
                val = outside.get(r, entries[r])
                # Its mark from now on tells of in-place ops after this flush; the path knows of those before.
                kept[r] = unmarked(val) if val.overwritten else val
                continue
            kept[r] = values[r]
            holders = [entries[n] for n in path.names.get(r, (r,))]
            # One without a version is held by this trace alone, or live (below): no in-place op will be told of it.
            stamp = version_of(holders) if any(val.stamp is not None for val in holders) else None
            if stamp is not None:
                kept[r] = _holding(values[r], Info(path.type(r)))
                kept[r].stamp = stamp
        for n in self.live:
            r = path.rep(n)
            if r in kept and path.nodes[r].key[0] is not LEAF and not entries[n].overwritten:
                kept[r] = entries[n]
        within = {n: self._stamped(n, outside) for n in inner if n in self.inner}
        segment = StepSegment(path, entries[:-1], kept, within, saving, places(self.trace))
        for n in self.live:
            if n in path.leaf_like or not path.requires_grad(n):
                continue
            origin = segment.origins[n] = Origin(segment, n, None)
            if isinstance(entries[n].extra, Inner):
                origin.hooks = entries[n].extra.hooks
        return segment

    def _stamped(self, first: int, outside: dict[int, Val]) -> list[Any]:
        """The inner values of an entry; those that are a transpose or the like of a value that an in-place op may overwrite say so."""
        path, node = self.path, self.path.nodes[first]
        out = list(self.inner[first])
        for i, base in enumerate(step_of(node.extra).bases):
            if base is None:
                continue
            r = path.operands[first][base] if base >= 0 else path.rep(first - 1 - base)  # type: ignore[index]
            stamp = version_of([outside.get(n, self.entries[n]) for n in path.names.get(r, (r,))]) if r >= 0 else None
            if stamp is not None:
                out[i] = _holding(out[i], NOTHING)
                out[i].stamp = stamp
        return out


def go_back(
    path: Path,
    visits: Iterable[Visit],
    totals: dict[int, Any],
    keep: Collection[int],
    value: Callable[[int], Any],
    inner: dict[int, list[Any]],
    numbers: Callable[[int], Sequence[Any]],
    visited: Callable[[int], None] = lambda k: None,
) -> None:
    """Takes the cotangents `totals`, rep -> buffer, through the entries of `visits`. Those of `keep` stay, others go once they were used.
    `visited` is called after visit k."""
    for n, (first, pull, reps, cts, outs) in enumerate(visits):
        accs = tuple([k for k in outs if reps[k] in totals])
        back = pull.run(outs, accs)
        inputs = [value(reps[k]) for k in back.operands]
        if back.results:
            inputs += [value(path.rep(first + j)) for j in back.results]
        if back.inner:
            held = inner.get(first)
            if held is None:
                raise Unable
            for i in back.inner:
                kept = held[i]
                if kept.__class__ is Val:
                    if kept.overwritten:
                        raise Unable
                    kept = kept.buf
                inputs.append(kept)
        if back.numbers:
            given = numbers(first)
            inputs += [given[i] for i in back.numbers]
        inputs += [totals[c] if c in keep else totals.pop(c) for c in cts]
        if accs:
            inputs += [totals[reps[k]] for k in accs]
        made = back.run(inputs)
        inputs = []
        for k, buffer in zip(outs, made):
            totals[reps[k]] = buffer
        visited(n)


class StepSegment(Segment):
    """What a stepwise run left for a backward pass: kept[rep] is a value that pullbacks read (a Val where something outside may overwrite it, else
    its buffer), inner[first] the inner values of an entry. saves, gone: first number of an entry -> its ops whose rules read what is kept, and those
    that are freed. Where the whole path's Function must be asked after all, `_whole` turns it into an ordinary segment."""

    def __init__(
        self,
        path: Path,
        entries: Sequence[Val],
        kept: dict[int, Any],
        inner: dict[int, list[Any]],
        saves: dict[int, int],
        lines: Mapping[int, Loc],
    ) -> None:
        super().__init__(path.nodes[-1], entries, [], lines)
        self.path: Path | None = path
        self.kept, self.kept_inner, self.saves = kept, inner, saves
        self.gone: dict[int, int] = {}
        self.numbers = {e.index: e.scalars for e in entries if e.scalars is not None}
        self._saving: set[int] = set()

    def note_overwritten(self, val: Val, by: Any) -> None:
        if self.path is None:
            super().note_overwritten(val, by)
            return
        for r, held in self.kept.items():
            if held is val:
                self.late[r if self.path.nodes[r].key[0] is LEAF else val.index] = by
                self.kept[r] = unmarked(val)

    def stage(
        self, engine: Engine, low: int, given: Cotangents, wanted: Sequence[int], touched: set[Any]
    ) -> Cotangents:
        if self.path is not None:
            if engine.create or state.capture is not None or any(p.__class__ is tuple for p in given):
                self._whole(touched)
            else:
                try:
                    return self._stepwise(self.path, engine, low, given, wanted, touched)
                except (Unable, DuoError):
                    self._whole(touched)  # if it is an error, it comes from there
        return super().stage(engine, low, given, wanted, touched)

    def _stepwise(
        self, path: Path, engine: Engine, low: int, given: Cotangents, wanted: Sequence[int], touched: set[Any]
    ) -> Cotangents:
        checks = Checks(self.gone, path.stale(self.late))
        walk = path.reverse(low, given, wanted, checks)
        totals: dict[int, Any] = {}
        failed: dict[int, Exception] = {}
        for n, tensor in given.items():
            try:
                seed = settle(tensor._value())
            except Exception as error:
                failed.update(dict.fromkeys(path.reverse(low, (n,), wanted).numbers, error))
                continue
            r = path.rep(n)
            totals[r] = total(path.type(r), totals[r], seed) if r in totals else seed
        good = walk if not failed else path.reverse(low, totals, wanted)
        keep = {path.rep(n) for n in good.numbers if n not in failed}
        go_back(path, good.towards(keep), totals, keep, self._value, self.kept_inner, self.numbers.__getitem__)
        touched.update(walk.touched.items())
        out = {}
        for n in walk.numbers:
            val = Val(None, -1, None, Info(path.type(n)))
            if n in failed:
                val.extra = failed[n]
            else:
                val.buf = totals[path.rep(n)]
            out[n] = engine.wrap(val)
        return out

    def _value(self, rep: int) -> Any:
        held = self.kept.get(rep)
        if held is None:
            raise Unable
        if held.__class__ is not Val:
            return held
        if held.overwritten:
            raise Unable
        return held.buf

    def free(self, touched: set[Any]) -> None:
        if self.path is None:
            super().free(touched)
            return
        for first, ops in touched:
            self.gone[first] = self.gone.get(first, 0) | ops
        if all(self.gone.get(first, 0) & ops == ops for first, ops in self.saves.items()):
            self.kept.clear()
            self.kept_inner.clear()

    def saving(self) -> set[int]:
        return self._saving

    def _whole(self, touched: set[Any]) -> None:
        """Becomes a segment of the whole path: what is kept by position in its Construction."""
        path = self.path
        assert path is not None
        construction = Construction(self.node, self.places)
        place = {p: (-1, i) for i, p in enumerate(construction.builder.params)}
        place.update((r, (i, r.index)) for i, op in enumerate(construction.builder.ops) for r in op.results)

        def ops(masks: Iterable[tuple[int, int]]) -> set[int]:
            return {construction.ends[e - 1] + i for e, m in masks for i in range(m.bit_length()) if m >> i & 1}

        self.sources = [
            self.kept.get(e) if k is None else self.numbers[e][k]
            for e, k in construction.inputs  # type: ignore[index]
        ]
        for rep, held in self.kept.items():
            p = place[construction.value(rep)]
            if p[0] >= 0:
                self.residuals[p] = held if held.__class__ is Val else _holding(held, Info(path.type(rep)))
        for e, buffers in self.kept_inner.items():
            base = construction.ends[e - 1]
            for (i, r), buffer in zip(step_of(path.nodes[e].extra).inner, buffers):
                type = construction.builder.ops[base + i].results[r].type
                held = _holding(buffer.buf if buffer.__class__ is Val else buffer, Info(type))
                held.stamp = buffer.stamp if buffer.__class__ is Val else None
                self.residuals[base + i, r] = held
        self._saving = ops(self.saves.items())
        self.freed = ops(self.gone.items())
        done = ops(touched)
        touched.clear()
        touched.update(done)
        self.path = None
        self.kept, self.kept_inner, self.numbers = {}, {}, {}


def _freed_error(node: Node, op: int, lines: Mapping[int, Loc]) -> Exception:
    return freed_error(step_of(node.extra).op(op), lines.get(node.first, node.loc))


def _holding(buffer: Any, info: Info) -> Val:
    val = Val(None, -1, None, info)
    val.buf = buffer
    return val


__all__ = ["StepSegment", "may_live", "run"]
