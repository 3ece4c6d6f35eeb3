"""The order in which the instructions of a long body are written where several chains of them meet late: tanh(x) * sigmoid(y), say.

Written one chain after the other, a processor waits for the first with queues full of it and does not see that the second could go on. So each
instruction stands as late as the longest chain behind it allows, which starts the longest first and lets all end together (as-late-as-possible
scheduling, De Micheli, Synthesis and Optimization of Digital Circuits, 5.2). No value changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from duo_ir.kernels.kernel import Instr, Stage

# Cycles until a result can be used, about, on processors with vectors of floats; 1 for what is not here.
_LATENCY = {"load": 0, "const": 0, "add": 3, "sub": 3, "mul": 4, "fma": 4, "ldexp": 6, "div": 13, "sqrt": 13}


def side_by_side(stage: Stage) -> Stage:
    """The stage of a map (no reductions) in that order."""
    starts = _latest_starts(stage.body)
    order = sorted(range(len(stage.body)), key=lambda k: (starts[k], k))
    place = {old: new for new, old in enumerate(order)}
    body = [stage.body[old] for old in order]
    moved = tuple([replace(instr, args=tuple([place[a] for a in instr.args])) for instr in body])
    stores = [replace(s, value=place[s.value], indices=tuple([place[k] for k in s.indices])) for s in stage.stores]
    return replace(stage, body=moved, stores=tuple(stores))


def _latest_starts(body: Sequence[Instr]) -> list[int]:
    """When each instruction has to start, at the latest, counted back from the end: never after one that uses it, which stands behind it."""
    starts = [-_LATENCY.get(instr.op, 1) for instr in body]
    for k in range(len(body) - 1, -1, -1):
        for a in body[k].args:
            starts[a] = min(starts[a], starts[k] - _LATENCY.get(body[a].op, 1))
    return starts
