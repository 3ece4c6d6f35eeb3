"""Hoisting for replays: what a replay makes of parameters alone (weights laid out for products) is made once, not at every call.

A replay that writes nothing and records no gradients is watched. When the tensors that it reads have had the very same values for a few
calls, it becomes the main program of duo_ir/transforms/hoist.py, called with kept results of the prologue. Values never change while somebody
holds them: all that overwrites memory asks first whether it is the only owner. So the values are held, and native code looks, in the same
breath in which it reads the rest, whether each tensor still has its own. Where one has not, all that was kept is dropped and the plain
replay does the call. The extra memory is the prologue's results, and, between a change and the next call, the old values.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from duo import runtime
from duo.eager.trace import Val, settle
from duo.jit.capture import tensors_in
from duo.jit.in_place import Quick
from duo.jit.recording import Source
from duo.jit.replay import MISS, Replay

_CALLS = 2  # with equal values, before the values are held for one more
_MOST_CALLS = 64


def offer(replay: Replay, name: str) -> None:
    """Watches a replay in its quick form, if it is one that can be hoisted."""
    r = replay.recording
    if os.environ.get("DUO_HOIST", "1") == "0" or r.writes or r.grads:
        return
    if any(isinstance(x, Source) and x.kind == "outside" for x in r.inputs):
        replay.become(Hoister(replay, name).watch)


class Hoister:
    """Decides which form of a replay is run."""

    def __init__(self, replay: Replay, name: str) -> None:
        self.replay, self.name = replay, name
        self.quick = replay.run
        self.inputs = {
            k: x.what for k, x in enumerate(replay.recording.inputs) if isinstance(x, Source) and x.kind == "outside"
        }
        self.split: Any = None
        self.patience = _CALLS
        self._forget()

    def _forget(self) -> None:
        self.ids: list[int] = []
        self.calls = 0
        self.held: dict[int, Val] | None = None  # number of an input -> its value

    # ---------------------------------------------------------------------------------------------------- before and after
    def watch(self, args: tuple, kwargs: dict) -> Any:
        """The call, plainly, after which it may be time to hoist."""
        out = self.quick(args, kwargs)
        if out is not MISS:
            self._look(args, kwargs)
        return out

    def _look(self, args: tuple, kwargs: dict) -> None:
        held = self.held
        if held is None:
            # Training overwrites values that nobody holds: equal ids are a guess, and holding would make it take other memory.
            ids = [id(t._val) for t in self.inputs.values() if t._storage is None]
            self.calls = self.calls + 1 if ids == self.ids and len(ids) == len(self.inputs) else 1
            self.ids = ids
            if self.calls >= self.patience:
                self.held = {k: t._val for k, t in self.inputs.items()}
        elif self._unchanged(held):
            self._hoist(args, kwargs, held)
        else:
            self._forget()
            self.patience = min(2 * self.patience, _MOST_CALLS)

    def _unchanged(self, held: dict[int, Val]) -> bool:
        return all(self.inputs[k]._val is v and self.inputs[k]._storage is None for k, v in held.items())

    def lost(self, args: tuple, kwargs: dict) -> Any:
        """What the hoisted form refused: other arguments, a guard that failed, or other values."""
        held = self.held
        if held is not None and self._unchanged(held):
            return self.quick(args, kwargs)
        self._forget()
        self.replay.hoisted = ""
        self.replay.become(self.watch)
        return self.watch(args, kwargs)

    # ------------------------------------------------------------------------------------------------------------ hoisting
    def _hoist(self, args: tuple, kwargs: dict, held: dict[int, Val]) -> None:
        program = self.replay.recording.program
        assert program is not None
        if self.split is None:
            self.split = runtime.hoist(program.function, self.inputs, program.runnable.program.scalars)
        form = None
        if self.split is not None:
            fixed = {k: held[k] for k in self.split.constants}
            buffers = self.split.prologue.run([settle(v) for v in fixed.values()])
            form = Main(self, args, kwargs, fixed, buffers).form()
        if form is None:
            self._forget()
            self.replay.become(self.quick)  # for good
            return
        self.held, self.patience = fixed, _CALLS
        nbytes = sum(b.nbytes for b in buffers)
        self.replay.hoisted = f"{len(buffers)} values made of parameters alone are kept between calls ({nbytes} bytes)"
        self.replay.become(form)


class Main(Quick):
    """Writes the hoisted form: the main program on what the prologue gave, for these values of its inputs."""

    def __init__(
        self, hoister: Hoister, args: tuple, kwargs: dict, fixed: dict[int, Val], buffers: list[runtime.Buffer]
    ) -> None:
        super().__init__(hoister.replay, hoister.name, args, kwargs, tensors_in((args, kwargs)))
        self.hoister, self.fixed = hoister, fixed
        self.buffers = buffers

    def form(self) -> Any:
        """The function, or None where the main program has no quick form."""
        if not self.possible():
            return None
        self.bound = self.hoister.split.main
        self.ir = self.bound.program
        if any(self._output(n) is None for n in self._wanted()):
            return None
        made = [("constant", SimpleNamespace(buf=b)) for b in self.buffers]
        self.r = replace(self.r, inputs=[*self.r.inputs, *made])
        return self.function()

    def slow(self) -> Any:
        return self.hoister.lost


__all__ = ["Hoister", "offer"]
