"""Whole programs on disk: what a Function was compiled to, so that a later process runs it without passes, emitters or LLVM.

An entry says in JSON what `bound.py` needs (sizes, the runner's table, notes for errors and profiles) and names the object files of
the kernels, which lie in the same cache. Its key holds the Function's hash and a fingerprint of everything else that the code depends on: duo's
own sources, LLVM's package, the CPU. Source lines are not in a Function's hash, so notes name ops by number and take the lines of
the Function at hand.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from duo_backends.cache import disk_cache
from duo_backends.cpu.bound import CpuBound, Note, Prepared, Table
from duo_backends.cpu.fingerprint import fingerprint
from duo_backends.cpu.library import load_many
from duo_backends.cpu.pool_text import MAX_THREADS
from duo_backends.cpu.runner import native
from duo_backends.cpu.runner_text import CODE_WORDS, PHASE
from duo_ir.core import Function, Op
from duo_ir.types import TensorType, dtype

_THREADS = sorted(
    {*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128, MAX_THREADS}
)  # numbers of threads that scratch is kept for
_COPY = -1  # in place of a kernel's phase: the runner's own copy


def load(function: Function, fused: bool, scalars: Collection[int]) -> CpuBound | None:
    """The program that an earlier process compiled `function` to, ready to run; None where there is none."""
    key = _key(function, fused, scalars)
    if key is None:
        return None
    disk = disk_cache()
    text = disk.get(key)
    if text is None:
        return None
    entry = json.loads(text)
    codes = [disk.get(name) for name, _ in entry["objects"]]
    if any(code is None for code in codes):  # swept away
        return None
    symbols = [names for _, names in entry["objects"]]
    libraries = load_many([(code, names) for code, names in zip(codes, symbols) if code is not None])
    phases = [libraries[number].addresses[symbol] for number, symbol in entry["phases"]]
    dims = np.array(entry["dims"], np.int64)
    code = np.array(entry["code"], np.int64).reshape(-1, CODE_WORDS)
    for row in code:
        if row[0] == PHASE:
            row[1] = native().copy if row[1] == _COPY else phases[row[1]]
            row[3] = dims.ctypes.data + 8 * row[3]
    lines = _Lines(function)
    notes = [SavedNote(lines, *fields) for fields in entry["notes"]]
    scratch: list[int] = entry["scratch"]
    table = Table(
        code, dims, entry["places"], entry["arena"], entry["cost"], entry["parallel"], entry["loops"],
        [notes[k] if k >= 0 else None for k in entry["rows"]],
        lambda threads: scratch[bisect.bisect_left(_THREADS, threads)],
    )  # fmt: skip
    prepared = Prepared(
        tuple([p.type for p in function.params]),
        tuple([_type(t) for t in entry["outputs"]]),
        tuple(entry["results"]),
        tuple([(output, given) for output, given in entry["donations"]]),
        frozenset(entry["safe"]),
        frozenset(scalars),
        table,
        entry["templates"],
        libraries,
    )
    return CpuBound(prepared)


def store(function: Function, fused: bool, scalars: Collection[int], bound: CpuBound) -> None:
    """Keeps what `function` was compiled to, where that can be done."""
    key = _key(function, fused, scalars)
    if key is None:
        return
    program, table = bound.program, bound.table
    places: dict[int, tuple[str, str]] = {}  # address of a phase -> name of its object file, symbol
    for loaded in program.keep.values():  # type: ignore[attr-defined]
        if not loaded.library.key:
            return
        for phase, address in zip(loaded.code.phases, loaded.addresses):
            places[address] = (loaded.library.key, phase.symbol)
    objects: dict[str, list[str]] = {}
    phases: dict[tuple[str, str], int] = {}
    code = table.code.copy()
    for row in code:
        if row[0] != PHASE:
            continue
        row[3] = (row[3] - table.dims.ctypes.data) // 8
        if row[1] == native().copy:
            row[1] = _COPY
            continue
        place = places[int(row[1])]
        if place not in phases:
            phases[place] = len(phases)
            objects.setdefault(place[0], []).append(place[1])
        row[1] = phases[place]
    order = {name: k for k, name in enumerate(objects)}
    distinct: dict[int, int] = {}
    notes: list[list[Any]] = []
    rows = []
    lines = _Lines(function)
    for note in table.notes:
        if note is not None and id(note) not in distinct:
            distinct[id(note)] = len(notes)
            notes.append(_fields(note, lines))
        rows.append(-1 if note is None else distinct[id(note)])
    scratch = [table.scratch(n) for n in _THREADS]
    if scratch != sorted(scratch):
        return  # what suffices for more threads would not for fewer
    entry = {
        "objects": [[name, symbols] for name, symbols in objects.items()],
        "phases": [[order[name], symbol] for name, symbol in phases],
        "code": code.ravel().tolist(), "dims": table.dims.tolist(), "places": table.places, "arena": table.arena,
        "cost": table.cost, "parallel": table.parallel, "loops": table.loops, "rows": rows, "notes": notes,
        "scratch": scratch,
        "outputs": [str(t) for t in program.outputs], "results": program.results, "donations": program.donations,
        "safe": sorted(program.safe), "templates": program.templates,
    }  # fmt: skip
    disk_cache().put(key, json.dumps(entry, separators=(",", ":")).encode())


def _type(text: str) -> TensorType:
    name, _, shape = text[:-1].partition("[")
    return TensorType(dtype(name), tuple([int(d) for d in shape.split(",")]) if shape else ())


# ------------------------------------------------------------------------------------------------------------ notes
class _Lines:
    """The source lines of a Function's ops by number, looked at when somebody asks."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._ops: list[Op] | None = None

    def _all(self) -> list[Op]:
        if self._ops is None:
            self._ops = list(self._function.walk())
        return self._ops

    def at(self, number: int, full: bool) -> str:
        ops = self._all()
        loc = ops[number].loc if number < len(ops) else None
        return "" if loc is None else loc.full() if full else str(loc)

    @functools.cached_property
    def numbers(self) -> dict[str, tuple[int, bool]]:
        """Text of a line -> (number of the first op there, whether the text is the full one)."""
        out: dict[str, tuple[int, bool]] = {}
        for number, op in enumerate(self._all()):
            if op.loc is not None:
                out.setdefault(op.loc.full(), (number, True))
                out.setdefault(str(op.loc), (number, False))
        return out

    def split(self, text: str) -> list[Any]:
        """`text` as pieces: strings, and [op number, full] for the line of an op."""
        found = self.numbers.get(text)
        if found is not None:
            return [list(found)]
        for line, place in sorted(self.numbers.items(), key=lambda item: -len(item[0])):
            before, mark, after = text.partition(line)
            if mark:
                return [before, list(place), after]
        return [text]

    def join(self, pieces: Sequence[Any]) -> str:
        return "".join([p if isinstance(p, str) else self.at(p[0], p[1]) for p in pieces])


def _fields(note: Note, lines: _Lines) -> list[Any]:
    where = lines.split(note.where) if note.where else []
    return [where, [lines.split(s) for s in note.sites], note.description, note.flops, note.traffic]


class SavedNote:
    """A note (`bound.Note`) whose lines are those of the Function that runs now."""

    __slots__ = ("_lines", "_sites", "_where", "description", "flops", "traffic")

    def __init__(
        self, lines: _Lines, where: list[Any], sites: list[list[Any]], description: str, flops: int, traffic: int
    ) -> None:
        self._lines, self._where, self._sites = lines, where, sites
        self.description, self.flops, self.traffic = description, flops, traffic

    @property
    def where(self) -> str:
        return self._lines.join(self._where)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple([self._lines.join(s) for s in self._sites])


# ------------------------------------------------------------------------------------------------------------- keys
def _key(function: Function, fused: bool, scalars: Collection[int]) -> str | None:
    if os.environ.get("DUO_DUMP") or os.environ.get("DUO_VERIFY") == "1":
        return None  # the stages are asked for
    host = fingerprint()
    if host is None or disk_cache().directory is None:
        return None
    parts = ("program", host, os.environ.get("DUO_CPU", ""), function.hash, str(fused), ",".join(map(str, scalars)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
