"""What a recorded program makes of the state of modules alone (weights laid out for products) is kept between its runs.

A program that saves nothing for gradients looks, now and then, whether the parameters and buffers among its inputs have had the very same
values since the last look. Then it is run as the main program of duo_ir/transforms/hoist.py on results of the prologue. Those belong to the
values they are made of (`Val.kept`) and go with the first of them: a write gives a tensor another value, whoever writes and however. What is
kept holds the buffers, so nobody takes their memory for something else meanwhile: all that overwrites memory asks first whether it is the
only owner.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo import runtime
from duo.eager.trace import Trace, Val

_CALLS = 2  # between looks, at first
_MOST_CALLS = 64  # between looks where values change
_RARELY = 1 << 16  # and where no state is among the inputs
_MOST_PROGRAMS = 8  # that keep something of one value

_state: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by id, as tensors compare elementwise


def is_on() -> bool:
    """Whether the user wants it (DUO_HOIST)."""
    return os.environ.get("DUO_HOIST", "1") != "0"


def note_state(tensor: Any) -> None:
    """The tensor is a parameter or buffer of modules: its values stay for many calls."""
    _state[id(tensor)] = tensor


def is_state(tensor: Any) -> bool:
    """Whether it was noted."""
    return id(tensor) in _state


class Kept:
    """What was made for one program. constants: (entry, buffer) of what `prologue` made it of; main: the program that takes the inputs and `made`.
    words: of a lane for native code, `address` where they are (0: none yet)."""

    __slots__ = ("address", "constants", "made", "main", "prologue", "words")

    def __init__(self, constants: tuple[tuple[int, Any], ...], prologue: Any, made: list[Any], main: Any) -> None:
        self.constants, self.prologue, self.made, self.main = constants, prologue, made, main
        self.words: Any = None
        self.address = 0

    def __repr__(self) -> str:
        return f"Kept({len(self.made)} values, {sum(b.nbytes for b in self.made)} bytes)"


class Mark:
    """In `Val.kept`: a Keeper has seen the value. That of the value that has what is kept has it as `kept`, until one of the `watched` marks, of the
    other values that it was made of, has gone with its value."""

    __slots__ = ("__weakref__", "kept", "watched")

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self.watched: list[weakref.ref[Mark]] = []

    def hold(self, kept: Kept, others: Sequence[Mark]) -> None:
        """Keeps it until one of the others goes."""
        here = weakref.ref(self)

        def lose(_: object) -> None:
            mark = here()
            if mark is not None:
                mark.kept = None

        self.watched = [weakref.ref(other, lose) for other in others]
        self.kept = kept


class Keeper:
    """Of one program. counts: calls until the next look, and the entry whose value has what is kept (0: none); native code counts there, too."""

    __slots__ = ("__weakref__", "_again", "_patience", "_splits", "_subset", "counts", "function", "rows", "scalars")

    def __init__(self, function: Any, inputs: Sequence[tuple[int, int | None]]) -> None:
        self.function = function
        self.rows = [(i, e) for i, (e, k) in enumerate(inputs) if k is None]
        self.scalars = [i for i, (_, k) in enumerate(inputs) if k is not None]
        self.counts = np.array([_CALLS, 0], np.int64)
        self._patience = _CALLS
        self._again = False  # whether the last look was for nothing
        self._subset: tuple[int, ...] = ()
        self._splits: dict[tuple[int, ...], Any] = {}

    def find(self, trace: Trace) -> Kept | None:
        """What is kept for the values that the trace has; None: run the program as it is."""
        mark = self._mark(trace)
        kept = None if mark is None else mark.kept
        if kept is not None:
            entries = trace.entries
            if all(entries[e].buf is b for e, b in kept.constants):
                return kept
            mark.kept = None  # type: ignore[union-attr]
        left = int(self.counts[0]) - 1
        self.counts[0] = left
        return self._look(trace) if left <= 0 else None

    def stands(self, trace: Trace) -> bool:
        """Whether the flush must go its general way, for `find`; else counts a call."""
        mark = self._mark(trace)
        if self.counts[0] <= 1 or (mark is not None and mark.kept is not None):
            return True
        self.counts[0] -= 1
        return False

    def _mark(self, trace: Trace) -> Mark | None:
        """The mark of the value that would have what is kept."""
        number = int(self.counts[1])
        if number:
            for val, entry in trace.leaves.items():
                if entry == number:
                    return getattr(val, "kept", {}).get(self)  # type: ignore[no-any-return]
        return None

    def _look(self, trace: Trace) -> Kept | None:
        """Whether values have stayed since the last look; keeps what is made of them if so."""
        outside = {number: val for val, number in trace.leaves.items()}
        there = {id(tensor._val) for tensor in list(_state.values())}
        found = {i: outside[e] for i, e in self.rows if e in outside and id(outside[e]) in there}
        stayed = tuple([i for i, val in found.items() if self in getattr(val, "kept", {})])
        marks = {i: self._put(val) for i, val in found.items()}
        kept = None
        if stayed and (len(stayed) == len(found) or stayed == self._subset):
            self._patience = _RARELY  # should it fail
            self.counts[0] = _RARELY
            kept = self._keep(trace, found, marks, stayed)
            if kept is not None:
                self._patience = _CALLS
            self._again = False
        elif not found:
            self._patience = min(4 * self._patience, _RARELY)
        else:
            if self._again:
                self._patience = min(2 * self._patience, _MOST_CALLS)
            self._again = True
        self._subset = stayed
        self.counts[0] = self._patience
        return kept

    def _keep(self, trace: Trace, found: dict[int, Val], marks: dict[int, Mark], stayed: tuple[int, ...]) -> Kept | None:
        if stayed not in self._splits:
            if len(self._splits) > 3:
                self._splits.clear()
            self._splits[stayed] = runtime.hoist(self.function, stayed, self.scalars)
        split = self._splits[stayed]
        if split is None:
            return None
        entry = dict(self.rows)
        entries = trace.entries
        constants = tuple([(entry[i], entries[entry[i]].buf) for i in split.constants])
        first, *others = split.constants
        kept = Kept(constants, split.prologue, _made(found[first], constants, split.prologue), split.main)
        self.counts[1] = constants[0][0]
        marks[first].hold(kept, [marks[i] for i in others])
        return kept

    def _put(self, val: Val) -> Mark:
        """A new mark of that value."""
        held = getattr(val, "kept", None)
        if held is None:
            held = val.kept = {}
        held.pop(self, None)
        while len(held) >= _MOST_PROGRAMS:
            held.pop(next(iter(held)), None)
        mark = held[self] = Mark()
        return mark  # type: ignore[no-any-return]


def _made(anchor: Val, constants: tuple[tuple[int, Any], ...], prologue: Any) -> list[Any]:
    """What the prologue makes of the constants, for another program already perhaps."""
    buffers = [b for _, b in constants]
    ids = [id(b) for b in buffers]
    for mark in list(anchor.kept.values()):
        other = mark.kept
        if other is not None and other.prologue is prologue and [id(b) for _, b in other.constants] == ids:
            return other.made  # type: ignore[no-any-return]
    return prologue.run(buffers)  # type: ignore[no-any-return]
