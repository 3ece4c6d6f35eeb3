"""Hoisting of replays (duo/hoisting.py): a replay in its quick form becomes one on what is kept between calls."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from duo import runtime
from duo.eager.trace import Val
from duo.hoisting import Hoister, is_on
from duo.jit.capture import tensors_in
from duo.jit.in_place import Quick
from duo.jit.recording import Source
from duo.jit.replay import MISS, Replay
from duo_ir.core import Function


def offer(replay: Replay, name: str) -> None:
    """Watches a replay in its quick form, if it is one that can be hoisted."""
    r = replay.recording
    if not is_on() or r.writes or r.grads:
        return
    if any(isinstance(x, Source) and x.kind == "outside" for x in r.inputs):
        replay.become(ReplayHoister(replay, name).watch)


class ReplayHoister(Hoister):
    """Of a replay."""

    def __init__(self, replay: Replay, name: str) -> None:
        inputs = enumerate(replay.recording.inputs)
        outside = {k: x.what for k, x in inputs if isinstance(x, Source) and x.kind == "outside"}
        super().__init__(replay.run, MISS, outside)
        self.replay, self.name = replay, name

    def become(self, form: Any) -> None:
        self.replay.become(form)

    def program(self) -> tuple[Function, Collection[int]]:
        program = self.replay.recording.program
        assert program is not None
        return program.function, program.runnable.program.scalars

    def form(self, given: tuple, fixed: dict[int, Val], buffers: list[runtime.Buffer]) -> Any:
        args, kwargs = given
        return Main(self, args, kwargs, fixed, buffers).form()

    def tell(self, text: str) -> None:
        self.replay.hoisted = text


class Main(Quick):
    """Writes the hoisted form: the main program on what the prologue gave, for these values of its inputs."""

    def __init__(
        self, hoister: ReplayHoister, args: tuple, kwargs: dict, fixed: dict[int, Val], buffers: list[runtime.Buffer]
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


__all__ = ["ReplayHoister", "offer"]
