"""A Program with known sizes as straight code: what the backends share of making it.

Control flow is flattened into branches and jumps, so that every buffer of every nested program has a fixed place: an
argument of the call, or an offset in the call's arena. Arena offsets come from lifetimes. A loop's carried values
alternate between two sets of places, for which its body is written out twice; a carried value that the body may update in
place (`Program.donations`) has one place only. A backend's `Flattener` says what a step, a copy, a branch and a jump are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duo_ir.errors import VerifyError
from duo_ir.kernels.program import Cond, Copy, Program, Step, While
from duo_ir.kernels.work import describe, flops, traffic
from duo_ir.types import evaluate

LINE = 64  # bytes that every place in an arena is aligned to
_SMALL_ARENA = 1 << 20  # bytes up to which an arena is good enough


class StepNote:
    """What bound programs tell of a step , computed when somebody asks. `sizes`: the values of its kernel's sizes."""

    __slots__ = ("_sizes", "_step")

    def __init__(self, step: Step, sizes: Mapping[str, int]) -> None:
        self._step, self._sizes = step, sizes

    @property
    def where(self) -> str:
        return self._step.where

    @property
    def sites(self) -> Sequence[str]:
        return self._step.kernel.sites

    @property
    def description(self) -> str:
        return describe(self._step.kernel, self._sizes)

    @property
    def flops(self) -> int:
        return flops(self._step.kernel, self._sizes)

    @property
    def traffic(self) -> int:
        return traffic(self._step.kernel, self._sizes)


def argument(k: int) -> int:
    """The place of argument k of the call; places in the arena are their offsets, 0 and up."""
    return -1 - k


def pack(spans: Sequence[tuple[int, int, int]], share: bool = True) -> tuple[list[int], int]:
    """Offsets in one arena for (nbytes, first, last): two that live at the same item do not overlap. Returns them and the arena's
    size. Each at the lowest offset that is free for all its life: in that of several orders that makes the arena smallest. Without `share`
    no two overlap."""
    n = len(spans)
    size = np.array([round_up(s[0]) for s in spans], np.int64)
    first, last = np.array([s[1] for s in spans], np.int64), np.array([s[2] for s in spans], np.int64)
    if not share:
        first, last = np.zeros(n, np.int64), np.zeros(n, np.int64)
    least = largest_live_set(size, first, last)
    best, total = np.zeros(n, np.int64), -1
    for key in (
        lambda i: (-size[i], first[i]),  # largest first
        lambda i: (-size[i] * (last[i] - first[i] + 1), first[i]),  # so that what is large for long is at the bottom
        lambda i: (first[i] - last[i], -size[i]),  # longest life first
        lambda i: (first[i], -size[i]),  # as they come
    ):
        offset = _placed(sorted(range(n), key=key), size, first, last)
        end = int((offset + size).max(initial=0))
        if total < 0 or end < total:
            best, total = offset, end
        if total <= max(least, _SMALL_ARENA):
            break
    return best.tolist(), total


def largest_live_set(size: np.ndarray, first: np.ndarray, last: np.ndarray) -> int:
    """The most bytes that live at one item: no arena is smaller."""
    if not len(size):
        return 0
    change = np.zeros(int(last.max()) + 2, np.int64)
    np.add.at(change, first, size)
    np.add.at(change, last + 1, -size)
    return int(np.cumsum(change).max())


def _placed(order: Sequence[int], size: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Offsets, each the lowest that is free, taken in this order."""
    offset = np.zeros(len(size), np.int64)
    done: list[int] = []
    for i in order:
        if not size[i]:
            continue
        if done:
            others = np.array(done)
            others = others[(first[others] <= last[i]) & (last[others] >= first[i])]
            others = others[np.argsort(offset[others], kind="stable")]
            # Free from the highest end of those below, up to the next one's start.
            ends = np.maximum.accumulate(np.concatenate([[0], offset[others] + size[others]]))
            starts = np.concatenate([offset[others], [np.iinfo(np.int64).max]])
            offset[i] = ends[np.argmax(starts - ends >= size[i])]
        done.append(i)
    return offset


@dataclass
class Layout:
    """Arena of one program, relative to its own start: temporaries and then extras, blocks of nested items, total."""

    temps: list[int]
    nested: dict[int, int]
    nbytes: int


class Flattener(ABC):
    """Writes a program out for these sizes. Without `share` no two values of the arena overlap. `regions`: bytes by place of all that
    lies in the arena."""

    def __init__(self, sizes: Mapping[str, int], share: bool = True) -> None:
        self.sizes, self.share = sizes, share
        self.layouts: dict[int, Layout] = {}
        self.regions: dict[int, int] = {}
        self.loops = False

    @abstractmethod
    def step(self, step: Step, places: list[int]) -> None:
        """Runs a kernel; `places` are those of all slots."""

    def step_at(self, program: Program, number: int, step: Step, places: list[int]) -> None:
        """Item `number` of the program. `places` go on with those of its extras."""
        self.step(step, places)

    def extras(self, program: Program) -> Sequence[tuple[int, int, int]]:
        """Buffers that a backend wants beside the program's temporaries: bytes, first and last item."""
        return ()

    @abstractmethod
    def copy_bytes(self, source: int, target: int, nbytes: int) -> None: ...

    @abstractmethod
    def branch(self, place: int) -> int:
        """Goes on where `land` is called with what this returns, if the bool at `place` is false."""

    @abstractmethod
    def jump(self, target: int | None = None) -> int:
        """Goes on at `target`, or where `land` is called with what this returns."""

    @abstractmethod
    def here(self) -> int:
        """The target of a jump to what comes next."""

    @abstractmethod
    def land(self, label: int) -> None:
        """What comes next is where that branch or jump goes."""

    def item_done(self, program: Program, number: int) -> None:  # noqa: B027 (most have nothing to do)
        """All of this item of that program has been written out."""

    def claim(self, place: int, nbytes: int) -> None:
        """Notes that something of this size lies there."""
        self.regions[place] = max(self.regions.get(place, 0), nbytes)

    # ------------------------------------------------------------------------------------------------- arena sizes
    def layout(self, program: Program) -> Layout:
        found = self.layouts.get(id(program))
        if found is not None:
            return found
        spans = [(evaluate(t.nbytes, self.sizes), t.first, t.last) for t in program.temps] + [*self.extras(program)]
        count = len(spans)
        nested = [i for i, item in enumerate(program.items) if isinstance(item, Cond | While)]
        for i in nested:
            spans.append((self.nested_bytes(program.items[i]), i, i))
        offsets, total = pack(spans, self.share)
        made = Layout(offsets[:count], dict(zip(nested, offsets[count:])), total)
        self.layouts[id(program)] = made
        return made

    def nested_bytes(self, item: object) -> int:
        if isinstance(item, Cond):
            return max(self.block_bytes(item.then), self.block_bytes(item.orelse))
        assert isinstance(item, While)
        single = single_place(item.body, len(item.initial))
        shadowed = [item.body.inputs[k] for k in range(len(item.initial)) if k not in single]
        shadows = sum(round_up(evaluate(t.nbytes, self.sizes)) for t in shadowed)
        return LINE + shadows + max(self.block_bytes(item.test), self.block_bytes(item.body))

    def output_bytes(self, program: Program) -> list[int]:
        return [evaluate(t.nbytes, self.sizes) for t in program.outputs]

    def block_bytes(self, program: Program) -> int:
        """A nested program's arena: its outputs that no result names, then its own layout."""
        dead = sum(
            round_up(n) for k, n in enumerate(self.output_bytes(program)) if _slot(program, k) not in program.results
        )
        return dead + self.layout(program).nbytes

    # -------------------------------------------------------------------------------------------------------- code
    def emit(self, program: Program, arguments: list[int], start: int) -> None:
        """Code of `program` with its inputs and outputs at `arguments` and its arena from `start` on."""
        layout = self.layout(program)
        places = [*arguments, *(start + offset for offset in layout.temps)]
        types = [*program.inputs, *program.outputs]
        nbytes = [evaluate(t.nbytes, self.sizes) for t in types] + [
            evaluate(t.nbytes, self.sizes) for t in program.temps
        ]
        nbytes += [extra[0] for extra in self.extras(program)]
        for place, n in zip(places[len(arguments) :], nbytes[len(arguments) :]):
            self.claim(place, n)
        for number, item in enumerate(program.items):
            if isinstance(item, Step):
                self.step_at(program, number, item, places)
            elif isinstance(item, Copy):
                self.copy_bytes(places[item.source], places[item.target], nbytes[item.source])
            elif isinstance(item, Cond):
                self.cond(item, places, start + layout.nested[number])
            else:
                self.loop(item, places, start + layout.nested[number])
            self.item_done(program, number)

    def cond(self, item: Cond, places: list[int], start: int) -> None:
        inputs, outputs = [places[s] for s in item.inputs], [places[s] for s in item.outputs]
        branch = self.branch(places[item.predicate])
        self.nested(item.then, inputs, outputs, start)
        jump = self.jump()
        self.land(branch)
        self.nested(item.orelse, inputs, outputs, start)
        self.land(jump)

    def loop(self, item: While, places: list[int], start: int) -> None:
        self.loops = True
        constants = [places[s] for s in item.constants]
        here, there, flag, rest = [places[s] for s in item.outputs], [], start, start + LINE
        nbytes = [evaluate(item.body.inputs[k].nbytes, self.sizes) for k in range(len(here))]
        single = single_place(item.body, len(here))
        for k, place in enumerate(here):
            if k in single:
                there.append(place)
                continue
            self.claim(rest, nbytes[k])
            there.append(rest)
            rest += round_up(nbytes[k])
        for k, slot in enumerate(item.initial):
            self.copy_bytes(places[slot], here[k], nbytes[k])
        self.claim(flag, 1)
        top = self.here()
        out_of = []
        turns = [(here, there), (there, here)] if here != there else [(here, there)]
        for before, after in turns:
            predicate = self.result_place(item.test, [*before, *constants], flag)
            self.nested(item.test, [*before, *constants], [predicate], rest)
            out_of.append(self.branch(predicate))
            self.nested(item.body, [*before, *constants], after, rest)
        self.jump(top)
        if len(turns) == 2:
            self.land(out_of[1])
            for k in range(len(here)):
                self.copy_bytes(there[k], here[k], nbytes[k])
        self.land(out_of[0])

    def result_place(self, program: Program, inputs: list[int], otherwise: int) -> int:
        """Where result 0 of a test lies: at an input if it is one."""
        slot = program.results[0]
        return inputs[slot] if slot < len(program.inputs) else otherwise

    def nested(self, program: Program, inputs: list[int], targets: list[int], start: int) -> None:
        """`program` with result k at `targets[k]`: its outputs are written there, other results copied."""
        outputs: list[int] = []
        for k, n in enumerate(self.output_bytes(program)):
            slot = _slot(program, k)
            if slot in program.results:
                outputs.append(targets[program.results.index(slot)])
            else:
                self.claim(start, n)
                outputs.append(start)
                start += round_up(n)
        self.emit(program, [*inputs, *outputs], start)
        places = [*inputs, *outputs]
        types = [*program.inputs, *program.outputs]
        for k, slot in enumerate(program.results):
            if slot >= len(places):
                raise VerifyError(
                    f"result {k} of a nested program is temporary slot {slot}; results are inputs or outputs"
                )
            self.copy_bytes(places[slot], targets[k], evaluate(types[slot].nbytes, self.sizes))


def single_place(body: Program, carried: int) -> set[int]:
    """Carried values that need one place only: passed on as they are, or updated in place, which the body allows by a
    donation and which must not be seen by another result that is the old value."""
    found = {k for k in range(carried) if body.results[k] == k}
    for output, given in body.donations:
        slot = _slot(body, output)
        if (
            given < carried
            and body.results[given] == slot
            and given not in body.results
            and body.results.count(slot) == 1
        ):
            found.add(given)
    return found


def _slot(program: Program, output: int) -> int:
    return len(program.inputs) + output


def round_up(nbytes: int) -> int:
    """To whole lines."""
    return -(-nbytes // LINE) * LINE
