"""Lanes: the flush of a short path that has been flushed before, as one function written for it.

What a flush does in general (flush.py) is looked up, counted and looped over; for a path of a few entries that costs as much as a small
kernel. A lane has it all written out: it checks that the values which are alive are those its program gives, runs the program, publishes and
closes. Where anything is different it does nothing, and the flush goes its general way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any

import numpy as np

from duo.eager.stepwise import may_live
from duo.eager.trace import END, Trace, Val
from duo.eager.trie import NOTHING

MAX_ENTRIES = 64  # longer paths take long enough for the general way not to matter
AFTER = 4  # flushes by which a program has shown that it comes again

_count = sys.getrefcount
Lane = Callable[[Trace, list[Val]], bool]


def _entry_alone() -> int:
    """The count that a lane sees for an entry that its trace alone holds; -1 where counts do not tell."""
    entries = [Val(None, 0, None, NOTHING), Val(None, 0, None, NOTHING)]
    kept = entries[1]
    alone, held = _count(entries[0]), _count(entries[1])
    return alone if held == alone + 1 and kept is entries[1] else -1


def _leaf_alone() -> int:
    """The count that a lane sees for a value from outside that nobody but the trace holds any more."""
    leaves = {Val(None, 0, None, NOTHING): 0}
    counts = [_count(val) for val in leaves]
    for val in leaves:
        counts.append(_count(val))
    return max(counts)


_ENTRY_ALONE, _LEAF_ALONE = _entry_alone(), _leaf_alone()


def write(plan: Any, program: Any) -> Lane | None:
    """The lane of a program of a path; None where gradients, results that are inputs, or its length need the general way."""
    bound, nodes = program.runnable, plan.node.path()
    first = [node for node in nodes if may_live(node)]
    if program.outs or _ENTRY_ALONE < 0 or nodes[-1].first + len(nodes[-1].infos) > MAX_ENTRIES:
        return None
    if not hasattr(bound, "run_lines") or not bound.outputs_are_results or os.environ.get("DUO_VERIFY") == "1":
        return None
    names: dict[str, Any] = {"count": _count, "END": END, "program": program}
    lines = []
    for number in [node.first + k for node in first for k in range(len(node.infos))]:
        differs = "==" if number in program.order else "!="
        lines.append(f"if count(entries[{number}]) {differs} {_ENTRY_ALONE}: return False")
    if program.givable[0]:  # a result may take the place of what only this trace still holds: the general way finds out
        lines += ["for val in trace.leaves:", f"  if count(val) <= {_LEAF_ALONE}: return False"]
    if program.keeper is not None:  # what is kept of parameters is for the general way, or for native code
        names["stands"] = program.keeper.stands
        lines.append("if stands(trace): return False")
    inputs = [f"entries[{e}].{'buf' if k is None else f'scalars[{k}]'}" for e, k in plan.inputs]
    lines += ["trace.program = program", *bound.run_lines(inputs, names)]
    for k, number in enumerate(program.order):  # buffers first: another thread may take a value up from then on
        lines += [f"entries[{number}].buf = o{k}", f"entries[{number}].trace = None"]
    lines += [
        "trace.done = True",
        "trace.leaves = {}",
        "trace.leaf_numbers = {}",
        "trace.entries = [END]",
        "return True",
    ]
    exec(_compiled("def lane(trace, entries):\n" + "".join(f"  {line}\n" for line in lines)), names)
    return names.pop("lane")  # type: ignore[no-any-return]


class Words:
    """A lane as native code reads it (`duo_backends/cpu/lane_text.py`): where its words are, and what they refer to."""

    __slots__ = ("_kept", "address")

    def __init__(self, words: list[int], kept: list[Any]) -> None:
        array = np.array(words, np.int64)
        self._kept, self.address = [array, *kept], array.ctypes.data


def words(plan: Any, program: Any, kept: Any = None) -> Words | None:
    """The words of a program that `write` gave a lane, or of its main program on what is kept; None where its arguments need Python."""
    bound = program.runnable if kept is None else kept.main
    if not bound.outputs_are_results:
        return None
    parts = bound.lane_parts()
    if parts is None:
        return None
    entry, frames, outputs = parts
    keeper, made, constants = (program.keeper, (), ()) if kept is None else (None, kept.made, kept.constants)
    checks = [n for node in plan.node.path() if may_live(node) for n in range(node.first, node.first + len(node.infos))]
    found = [
        id(program),
        id(entry),
        id(frames),
        len(checks),
        len(plan.inputs) + len(made),
        len(outputs),
        int(bool(program.givable[0])),
        0 if keeper is None else id(keeper),
        0 if keeper is None else keeper.counts.ctypes.data,
        len(constants),
    ]
    for number in checks:
        found += [number, int(number in program.order)]
    for e, k in plan.inputs:
        found += [e, -1 if k is None else k]
    places = [buffer.ptr for buffer in made]
    for place in places:
        found += [id(place), -2]
    used: list[Any] = [entry, frames, keeper, places]
    for number, (nbytes, home) in zip(program.order, outputs):
        found += [number, id(nbytes), id(home), id(home.free)]
        used += [nbytes, home]
    for e, buffer in constants:
        found += [e, id(buffer)]
    return Words(found, used)


@lru_cache(maxsize=512)
def _compiled(source: str) -> CodeType:
    return compile(source, "<duo lane>", "exec")
