"""From a Source to what is shipped: programs planned, weights laid out, and a library for each target.

`Artefact.library(target)` is a shared library that C can call; `container.py` puts libraries, weights and the programs' text into one file that
Python loads. Both run the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from duo_backends.aot import runtime
from duo_backends.aot.entries import Entry, State, Trainer
from duo_backends.aot.library import build_library, emit_kernels
from duo_backends.aot.limits import signed_dims
from duo_backends.aot.plan import make_plan
from duo_backends.aot.source import ProgramSource, Source, hoisted
from duo_backends.aot.special import free_columns, with_special
from duo_backends.aot.targets import AotTarget
from duo_backends.aot.weights import Block, block_of, checkpoint_header, code_of
from duo_backends.cpu.backend import CpuBackend
from duo_backends.cpu.emit import panel_columns
from duo_ir import pipeline
from duo_ir.core import Function
from duo_ir.kernels.checks import written_after_checks
from duo_ir.kernels.program import Program


@dataclass
class Artefact:
    """A Source, hoisted for one target. Raises ArgumentError for programs that cannot go into an artefact."""

    source: Source
    lowered: Mapping[str, Program]
    target: AotTarget

    @classmethod
    def of(cls, source: Source, target: AotTarget) -> Artefact:
        return cls(*with_special(hoisted(source, lambda op: panel_columns(op, target.code), run_here)), target)

    @cached_property
    def block(self) -> Block:
        """Weights, then the first values of states."""
        return block_of({**self.source.weights, **self.source.states})

    @cached_property
    def programs(self) -> list[Program]:
        return [self.lowered[p.name] for p in self.source.programs]

    @cached_property
    def states(self) -> list[State]:
        """All states, in order; a number in `Entry.sources` is one's place here."""
        double = {
            port.name
            for p, program in zip(self.source.programs, self.programs)
            for k, port in enumerate(p.results)
            if port.kind == "state" and not _stays(p, program, k)
        }
        return [
            State(name, self.block.places[name], array.nbytes, name in double)
            for name, array in self.source.states.items()
        ]

    @cached_property
    def entries(self) -> list[Entry]:
        codes = self.codes
        return [self._entry(p, program, codes) for p, program in zip(self.source.programs, self.programs)]

    @cached_property
    def codes(self) -> Mapping:
        return emit_kernels(self.programs, self.target)

    @cached_property
    def trainer(self) -> Trainer | None:
        """What a training step needs beside its programs."""
        t = self.source.training
        if t is None:
            return None
        programs = {p.name: k for k, p in enumerate(self.source.programs)}
        states = {state.name: k for k, state in enumerate(self.states)}
        arrays = self.source.states
        rows = tuple(
            [(name, code_of(arrays[s]), arrays[s].shape, states[s], optimizer) for name, s, optimizer in t.checkpoint]
        )
        headers = [
            checkpoint_header(
                [(name, arrays[s]) for name, s, optimizer in t.checkpoint if whole or not optimizer], text
            )
            for whole, text in zip((True, False), t.metadata)
        ]
        return Trainer(
            programs[t.step],
            programs[t.first] if t.first is not None else -1,
            programs[t.init] if t.init is not None else -1,
            states[t.generator] if t.generator is not None else -1,
            rows,
            (headers[0], headers[1]),
        )

    def library(self, embed: bool = True) -> bytes:
        """The shared library; with `embed`, weights lie in it."""
        weights = self.block.content if embed else b""
        return build_library(
            self.source.name,
            self.entries,
            self.codes,
            self.target,
            weights=weights,
            states=self.states,
            trainer=self.trainer,
        )

    def _entry(self, p: ProgramSource, program: Program, codes: Mapping) -> Entry:
        number = {state.name: k for k, state in enumerate(self.states)}
        count = len(program.inputs)
        outputs = [port.name for port in p.results if port.kind == "output"]
        given = [port.name for port in p.params if port.kind == "input"]
        sources: list[tuple[int, int] | None] = []
        for port in p.params:
            if port.kind == "input":
                sources.append((runtime.GIVEN, given.index(port.name)))
            elif port.kind == "weight":
                sources.append((runtime.WEIGHT, self.block.places[port.name]))
            else:
                sources.append((runtime.STATE, number[port.name]))
        sources += [None] * len(program.outputs)
        copies: list[tuple[int, int, int]] = []
        swaps: list[int] = []
        seen = 0
        for k, (port, slot) in enumerate(zip(p.results, program.results)):
            if port.kind == "output":
                target = (runtime.GIVEN, len(given) + seen)
                seen += 1
            elif slot < count and p.params[slot] == port:
                continue  # it stays what it is
            elif slot >= count and sources[slot] is None and not _stays(p, program, k):
                target = (runtime.NEXT, number[port.name])
                swaps.append(number[port.name])
            elif slot >= count and sources[slot] is None:
                target = (runtime.STATE, number[port.name])
            else:  # what another result is, or an input
                target = (runtime.NEXT, number[port.name])
                swaps.append(number[port.name])
            if slot >= count and sources[slot] is None:
                sources[slot] = target
            else:
                copies.append((slot, *target))
        # Outputs that no result names do not happen: a plan gives each result an output and makes no others.
        known = [s for s in sources if s is not None]
        assert len(known) == len(sources)
        return Entry(
            p.name,
            make_plan(program, codes),
            p.dims,
            {**dict.fromkeys(p.dims, 0), **p.least},
            tuple(signed_dims(p.function)),
            free_columns(p.function),
            (*given, *outputs),
            tuple(known),
            tuple(copies),
            tuple(swaps),
            self._special(p),
        )

    def _special(self, p: ProgramSource) -> tuple[tuple[int, Mapping[str, int]], ...]:
        """Numbers of the programs that stand in for `p`, and when; the one that asks for most comes first."""
        found = [
            (k, dict(other.special.sizes))
            for k, other in enumerate(self.source.programs)
            if other.special is not None and other.special.of == p.name
        ]
        return tuple(sorted(found, key=lambda row: -len(row[1])))


def _stays(p: ProgramSource, program: Program, k: int) -> bool:
    """Whether result k, the next value of a state, may be written where the state lies."""
    slot, count = program.results[k], len(program.inputs)
    if slot < count or program.results.index(slot) != k:
        return slot < count and p.params[slot] == p.results[k]
    output = slot - count
    if output not in written_after_checks(program):  # a program that fails leaves states as they were
        return False
    if p.results[k] not in p.params:
        return True
    param = p.params.index(p.results[k])
    return (output, param) in program.donations and param not in program.results


def run_here(function: Function, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What a Function computes of these arrays."""
    backend = CpuBackend()
    bound = pipeline.compile(function, backend).bind({})
    out = bound.run([backend.from_numpy(a) for a in arrays])
    return [backend.to_numpy(b, t.dtype, t.static_shape()) for b, t in zip(out, function.result_types)]
