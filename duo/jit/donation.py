"""Replays on a GPU whose results take the memory of the state that they replace: parameters, slots of optimisers, generators.

On the CPU native code sees to that (in_place.py). Here the replay counts, before it runs, who holds each value that it is going to replace, and
gives away those that nobody else can read. An interrupt that comes while work is handed to the device is raised when all tensors have their
new values, or before anything has happened.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from duo.devices import CPU
from duo.eager.trace import Val
from duo.eager.trie import NOTHING
from duo.jit.recording import Recording, Source

count = sys.getrefcount


def _alone() -> tuple[int, int]:
    """What `count` gives in a replay for a value that only its tensor holds, and for its buffer."""
    names: dict[str, Any] = {"count": count}
    exec("def probe(t):\n  v = t._val\n  b = v.buf\n  if b is None: b = 0\n  return count(v), count(b)", names)
    tensor = SimpleNamespace(_val=Val(None, -1, None, NOTHING))
    tensor._val.buf = object()
    first = names["probe"](tensor)
    held = tensor._val, tensor._val.buf
    return first if names["probe"](tensor) == (first[0] + 1, first[1] + 1) and held else (-1, -1)


ALONE = _alone()


def given_away(recording: Recording) -> dict[int, Source]:
    """Number of an input -> the tensor whose state it is, of those that a result may overwrite."""
    program = recording.program
    if program is None or program.alive or recording.node.device is CPU or ALONE == (-1, -1):
        return {}
    inputs, givable = recording.inputs, program.runnable.givable
    return {
        k: x for k, x in enumerate(inputs) if k in givable and isinstance(x, Source) and x in recording.writes
        and inputs.count(x) == 1
    }  # fmt: skip


def run_lines(
    recording: Recording, given: dict[int, Source], names: dict[str, Any], variables: dict, buffers: str
) -> list[str]:
    """Code that begins the program and names its buffers `outs`; `finish_lines` runs it, when the values for them are made."""
    program = recording.program
    assert program is not None
    new = {source: program.order.index(n) for source, (n, _) in recording.writes.items() if n in program.order}
    preferred = tuple([(new[source], k) for k, source in given.items() if source in new])
    names.update({"count": count, "begin": program.runnable.begin, "preferred": preferred})
    lines = ["given = []"]
    for k, source in given.items():
        t = variables[source]
        v, b = f"v_{t}", f"b_{t}"
        alone = f"count({v}) == {ALONE[0]} if {t}._storage is None else "
        alone += f"count({v}) == {ALONE[0] + 1} and {t}._storage.val is {v}"
        lines.append(f"if count({b}) == {ALONE[1]} and ({alone}): given.append({k})")
    return [*lines, f"call = begin({buffers}, given, preferred)", "outs = call.results"]


START = [
    "failed = None",
    "try: call.run()",
    "except BaseException as error:",
    "  if not call.done: raise",
    "  failed = error",
]
END = ["call.close()", "if failed is not None: raise failed"]
