"""Values that a later stage of a row would compute again: kept in a buffer of the row instead.

Softmax needs exp(x - max) twice, in the sum and in the quotient; a kernel's stages do not read what earlier ones wrote, so
its body says exp twice. Here equal expressions of stages over the same axis are found and the later ones replaced by
`saved` instructions (attr: slot). The bits cannot change: it is the same value.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from duo_ir.kernels.kernel import Body, Instr, Stage, Store
from duo_ir.types import DimLike, DType

_WORTH = 10.0  # cost from which storing and loading a value beats computing it
_LONGEST = 1 << 16  # elements of a row beyond which the buffer leaves the cache
_COST = {"const": 0.0, "dim": 0.0, "index": 0.0, "reduced": 0.0, "load": 0.5, "div": 4.0, "sqrt": 4.0}


@dataclass(frozen=True)
class Reuse:
    """`stages`: the kernel's, with `saved` instructions; `saves[s]`: (instruction, slot) that stage s keeps; `slots`: their
    dtypes; `length`: elements of each, the size of the stages' only axis."""

    stages: tuple[Stage, ...]
    saves: dict[int, list[tuple[int, int]]]
    slots: tuple[DType, ...]
    length: DimLike


class _Numbering:
    """Expression numbers: equal numbers compute equal values at equal indices."""

    def __init__(self) -> None:
        self.known: dict[Hashable, int] = {}
        self.nodes: list[tuple[float, frozenset[int]]] = []
        self.varies: list[bool] = []

    def number(self, instr: Instr, args: tuple[int, ...]) -> int:
        # repr tells 0.0 from -0.0 and 1 from True, and NaN equals itself
        key = (instr.op, instr.dtype, args, repr(instr.attr) if instr.op == "const" else instr.attr)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = len(self.nodes)
            below = frozenset({found}).union(*(self.nodes[a][1] for a in args))
            self.nodes.append((_COST.get(instr.op, 1.0), below))
            self.varies.append(any(self.varies[a] for a in args) or _varies(instr))
        return found

    def cost(self, number: int) -> float:
        return sum(self.nodes[k][0] for k in self.nodes[number][1])


def _varies(instr: Instr) -> bool:
    """Whether it depends on the innermost index by itself."""
    if instr.op == "index":
        return instr.attr.strides[-1] != 0  # type: ignore[attr-defined]
    if instr.op == "load":
        access = instr.attr
        positions = [access.at, *(g.position for g in access.guards)]  # type: ignore[attr-defined]
        return any(p.strides[-1] != 0 for p in positions)
    return False


def find_reuse(stages: tuple[Stage, ...]) -> Reuse | None:
    """What later stages can take from earlier ones, or None. Only stages with one and the same axis take part."""
    lengths = [s.axes[0] for s in stages if len(s.axes) == 1]
    if len(lengths) < 2:
        return None
    length = lengths[0]
    if isinstance(length, int) and not 1 < length <= _LONGEST:
        return None
    numbering = _Numbering()
    first: dict[int, tuple[int, int]] = {}  # expression -> (stage, instruction) that computes it first
    slot_of: dict[int, int] = {}
    slots: list[DType] = []
    saves: dict[int, list[tuple[int, int]]] = {}
    out = list(stages)
    for s, stage in enumerate(stages):
        if stage.axes != (length,):
            continue
        numbers: list[int] = []
        for instr in stage.body:
            numbers.append(numbering.number(instr, tuple(numbers[a] for a in instr.args)))
        replaced: dict[int, int] = {}
        live = _live(stage, numbers, first, numbering, replaced)
        for i, number in replaced.items():
            if number not in slot_of:
                slot_of[number] = len(slots)
                slots.append(stage.body[i].dtype)
                where, instr_number = first[number]
                saves.setdefault(where, []).append((instr_number, slot_of[number]))
        if replaced:
            out[s], kept = _prune(stage, live, {i: slot_of[n] for i, n in replaced.items()})
        else:
            kept = {i: i for i in range(len(stage.body))}
        for i, number in enumerate(numbers):
            if i in kept and number not in first:
                first[number] = (s, kept[i])
    return Reuse(tuple(out), saves, tuple(slots), length) if slots else None


def _live(
    stage: Stage,
    numbers: list[int],
    first: dict[int, tuple[int, int]],
    numbering: _Numbering,
    replaced: dict[int, int],
) -> set[int]:
    """Instructions needed when those in `replaced` (filled here) are loaded instead of computed."""
    pending = [k for store in stage.stores for k in (store.value, *store.indices)]
    pending += [k for r in stage.reduces for k in r.args]
    live: set[int] = set()
    while pending:
        k = pending.pop()
        if k in live:
            continue
        live.add(k)
        number = numbers[k]
        if (
            number in first
            and stage.body[k].dtype.kind != "b"
            and numbering.varies[number]
            and numbering.cost(number) >= _WORTH
        ):
            replaced[k] = number
            continue
        pending += stage.body[k].args
    return live


def _prune(stage: Stage, live: set[int], saved: dict[int, int]) -> tuple[Stage, dict[int, int]]:
    """The stage with live instructions only, and where each of them went."""
    kept: dict[int, int] = {}
    body: list[Instr] = []
    for i, instr in enumerate(stage.body):
        if i not in live:
            continue
        kept[i] = len(body)
        if i in saved:
            body.append(Instr("saved", (), instr.dtype, saved[i]))
        else:
            body.append(Instr(instr.op, tuple(kept[a] for a in instr.args), instr.dtype, instr.attr))
    stores = tuple(Store(s.access, kept[s.value], tuple(kept[k] for k in s.indices)) for s in stage.stores)
    reduces = tuple(replace(r, args=tuple(kept[k] for k in r.args)) for r in stage.reduces)
    new_body: Body = tuple(body)
    return Stage(stage.axes, new_body, stores, reduces), kept
