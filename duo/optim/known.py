"""`Optimizer.step()` of a program that ran before, as one native call.

What the step would record is known when the path up to here has been stepped from before: the program then takes parameters, slots and
hyperparameters from where they are, and overwrites parameters and slots in place. Nothing is recorded for the step itself, and no value
or buffer is made for what stays where it is.

Native code looks whether each tensor has the value it should have and is owned by nobody else, and runs the program; no Python code is
executed in between. Whenever it refuses, or anything differs from what was noted, nothing has happened and the step is recorded as usual.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

from duo import runtime
from duo.eager import cells
from duo.eager.flush import ALONE, OVERWRITE_FROM, finish, publish
from duo.eager.segments import Origin
from duo.eager.stepwise import may_live
from duo.eager.trace import END, OVERWRITTEN, Trace, Val, hooks
from duo.eager.trie import LEAF, Node
from duo.eager.watch import Epoch
from duo_backends.cells import GRADIENT_READ, NUMBER, OWNED, POINTER, READ, Argument

SIGHTINGS = 3  # of a path, before a function is written for it
MAX_KNOWN = 16  # paths that an optimiser remembers
_getrefcount = sys.getrefcount


class Noted(NamedTuple):
    """One group's part of a recorded step: what `Optimizer._update` took and made."""

    trace: Trace
    group: Any
    macro: Any
    params: list[Any]
    tensors: list[Any]  # rows of parameter, gradient, slots
    step: Any
    node: Any


class Memory:
    """What an optimiser remembers: `steps[node]` is how often it has stepped from that node of the trie, or the KnownStep, or None
    where there can be none."""

    __slots__ = ("notes", "steps")

    def __init__(self) -> None:
        self.steps: dict[Any, Any] = {}
        self.notes: list[Noted] | None = None  # while a step is watched

    def watch(self, node: Any) -> bool:
        """Counts a step that is about to be recorded from `node`; tells whether to note what it does."""
        seen = self.steps.get(node, 0)
        if seen is None or seen.__class__ is KnownStep:
            return False
        if len(self.steps) >= MAX_KNOWN and not seen:
            self.steps.clear()
        self.steps[node] = seen + 1
        self.notes = [] if seen + 1 >= SIGHTINGS else None
        return self.notes is not None

    def forget(self, node: Any) -> bool:
        """What is known of steps from `node` is not true any more. Gives False."""
        self.steps.pop(node, None)
        return False

    def learn(self, optimizer: Any, node: Any, trace: Trace) -> None:
        """The step that was watched has run."""
        notes, self.notes = self.notes, None
        program = trace.program
        if not notes or program is None or not program.fused:
            return
        if trace.node is not notes[-1].node or any(n.trace is not trace for n in notes):
            return  # a tensor was read or written by recording more
        self.steps[node] = _written(optimizer, node, program, notes)


def structure_of(optimizer: Any) -> list[Any]:
    """What an optimiser's programs depend on, apart from hyperparameters."""
    out: list[Any] = [optimizer.rule, optimizer.state, optimizer.param_groups, *optimizer.param_groups]
    for group in optimizer.param_groups:
        out += [group["params"], *group["params"]]
    for p, slots in optimizer.state.items():
        if slots:
            out += [p, *[x for pair in slots.items() for x in pair]]
    return out


class Call:
    """A native call, which the trace holds meanwhile. results: buffers of the trace's values; moved: (value that a tensor got for the call,
    its buffer, the value that it had)."""

    __slots__ = ("_frame", "_mark", "known", "moved", "results")

    def __init__(self, known: KnownStep, frame: Any, mark: Any, results: list[Any], moved: list[tuple]) -> None:
        self.known, self._frame, self._mark, self.results, self.moved = known, frame, mark, results, moved

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""
        return self._mark.value == 1  # type: ignore[no-any-return]

    def land(self, trace: Trace) -> None:
        """It has run: values get their buffers."""
        for made, buffer, old in self.moved:
            old.stamp = OVERWRITTEN
            made.buf = buffer
            made.trace = None
        publish(trace, self.known.plan, self.known, self.results)
        runtime.statistics.overwritten += self.known.overwritten

    def undo(self) -> None:
        """It has not run, and will not: what tensors got for it is what they had."""
        for made, _, old in self.moved:
            made.buf = old.buf
            made.trace = None


class KnownStep:
    """A step from `node`. order, outs, errors, alive: the part of its program that is not the step's, as `publish` reads them of a Program.

    others: parameters that had no gradient."""

    alive = ()

    def __init__(self, optimizer: Any, node: Node, program: Any, notes: list[Noted]) -> None:
        self.node = node
        self.length = node.first + len(node.infos)
        self.program, self.plan = program, notes[-1].node.memo
        self.order = tuple([n for n in program.order if n < self.length])
        self.outs = [n for n in program.outs if n < self.length]
        self.errors = program.errors
        self.groups = [(n.group, n.macro) for n in notes]
        updated = {id(p) for n in notes for p in n.params}
        self.others = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in updated]
        self.structure = structure_of(optimizer)
        self.attributes = dict(optimizer.__dict__)
        self.epoch = Epoch.count
        self.covered: dict[
            tuple[int, ...], bool
        ] = {}  # reference counts -> whether the program computes what they say is live
        self.flight = cells.Flight()
        self.overwritten = 0  # bytes
        self.call: Any = None

    def run(self, optimizer: Any, trace: Trace) -> bool:
        """Runs the trace and the step; False if it has to be recorded, and nothing has happened."""
        if Epoch.count != self.epoch and not self._same(optimizer):
            return optimizer._memory.forget(self.node)
        hyper = []
        for group, macro in self.groups:
            settings = group.settings
            if settings is None or settings.version != group.version or settings.owner is not optimizer.__class__:
                settings = optimizer._settings(group)
            if settings.macro is not macro:
                return optimizer._memory.forget(self.node)
            hyper.append(settings.hyper if settings.hyper is not None else optimizer.hyper(group))
        for p in self.others:
            if p._leaf is not None and p._leaf.grad is not None:
                return False
        with trace.lock:
            entries = trace.entries
            if len(entries) != self.length or trace.hooked or trace.done:
                return False
            counts = tuple(map(_getrefcount, entries))
            covered = self.covered.get(counts)
            if covered is None:
                covered = self._covers(counts, entries)
            return covered and self.call(trace, entries, hyper) is True

    def _covers(self, counts: tuple[int, ...], entries: list[Any]) -> bool:
        live = {n for n, count in enumerate(counts) if count > ALONE and n > 0 and may_live(entries[n].node)}
        if len(self.covered) >= 64:
            self.covered.clear()
        covered = self.covered[counts] = live <= set(self.order)
        return covered

    def _same(self, optimizer: Any) -> bool:
        """The epoch has moved: whether the optimiser is still as it was."""
        epoch = Epoch.count
        now, attributes = structure_of(optimizer), optimizer.__dict__
        if len(now) != len(self.structure) or any(a is not b for a, b in zip(now, self.structure)):
            return False
        if len(attributes) != len(self.attributes) or any(
            attributes.get(k) is not v for k, v in self.attributes.items()
        ):
            return False
        self.epoch = epoch
        return True


def _written(optimizer: Any, node: Node, program: Any, notes: list[Noted]) -> KnownStep | None:
    """The step as a function, or None where it has no such form."""
    bound = program.runnable
    verify = os.environ.get("DUO_VERIFY", "0") not in ("", "0")
    if program.alive or cells.layout() is None or not hasattr(bound, "cell_entry") or verify:
        return None
    if any(bound.program.inputs[k].dtype.is_narrow_float for k in bound.program.scalars):
        return None
    return _Writer(KnownStep(optimizer, node, program, notes), bound, notes).written()


class _Writer:
    """Writes `KnownStep.call`, a function of the trace, its entries and the hyperparameters of each group."""

    def __init__(self, known: KnownStep, bound: Any, notes: list[Noted]) -> None:
        self.known, self.bound, self.notes = known, bound, notes
        self.names: dict[str, Any] = {
            "__name__": __name__, "known": known, "bound": bound, "END": END, "Call": Call, "node": known.node, "Val": Val, "finish": finish,
        }  # fmt: skip
        self.checks: list[str] = []
        self.given: list[str] = []
        self.arguments: list[Argument] = []
        self.moved: list[tuple[str, str, str, str]] = []  # variables: tensor, its value, the new buffer, the Info

    def const(self, value: Any, stem: str) -> str:
        name = f"{stem}{len(self.names)}"
        self.names[name] = value
        return name

    def written(self) -> KnownStep | None:
        known, bound, program = self.known, self.bound, self.known.program
        steps = {step.first: step for step in known.plan.node.path() if step.first >= known.length}
        mine = {n.node.first: i for i, n in enumerate(self.notes)}
        if any(step.key[0] is not LEAF and first not in mine for first, step in steps.items()):
            return None  # reading a tensor recorded something
        place = {e: k for k, (e, j) in enumerate(known.plan.inputs) if j is None}
        owned: dict[int, int] = {}  # input -> output that overwrites it
        moved: dict[int, int] = {}  # input -> output that is its new value, in memory of its own
        for n in program.order:
            output = bound.program.results[program.order.index(n)] - len(bound.program.inputs)
            if output < 0:
                return None
            if n < known.length:
                continue
            old = next(
                (s.key[0].updates(s)[n] for s in steps.values() if s.key[0] is not LEAF and n in s.key[0].updates(s)),
                None,
            )
            given = place.get(old, -1)  # type: ignore[arg-type]
            alone = list(bound.program.results).count(output + len(bound.program.inputs)) == 1
            if given < 0 or not alone or given in owned or given in moved:
                return None
            (owned if bound.may_overwrite(output, given) else moved)[given] = output
        if any(k not in owned and known.plan.inputs[k][0] < known.length for k in program.given):
            return None  # something else is overwritten too, which would take memory of its own: an average of the parameters, say
        if not self._sources(steps, mine, owned, moved):
            return None
        self._write(owned)
        hooks.repeated()
        return known

    def _sources(
        self, steps: dict[int, Node], mine: dict[int, int], owned: dict[int, int], moved: dict[int, int]
    ) -> bool:
        """How each input of the program is given, and what must be as it was."""
        known, length, count = self.known, self.known.length, len(self.bound.program.inputs)
        tensors: dict[int, tuple[Any, Any]] = {}  # number -> tensor, leaf whose gradient it is
        for noted in self.notes:
            _, step, numbers = noted.node.key
            width = 2 + len(noted.macro.slots)
            if step is not None:
                tensors[step] = (noted.step, None)
            for k, (number, tensor) in enumerate(zip(numbers, noted.tensors)):
                leaf = noted.tensors[k - 1]._leaf if k % width == 1 else None
                if tensors.setdefault(number, (tensor, leaf))[0] is not tensor:
                    return False
        for number, (tensor, leaf) in tensors.items():
            if number >= length:
                continue
            if leaf is not None:
                g = f"g{number}"
                self.checks += [
                    f"{g} = {self.const(leaf, 'L')}.grad",
                    f"if {g} is None or {g}._storage is not None: return",
                ]
                self.checks.append(f"if {self._elsewhere(f'{g}._val', number)}: return")
            else:
                self.checks.append(f"if {self._elsewhere(self.const(tensor, 'T') + '._val', number)}: return")
        for k, (e, j) in enumerate(known.plan.inputs):
            slots = (k, count + owned[k]) if k in owned else (k,)
            if j is not None:
                if e < length:
                    self._give(f"entries[{e}].scalars[{j}]", Argument(NUMBER, (k,)))
                else:
                    self._give(f"h{mine[e]}[{j}]", Argument(NUMBER, (k,)))
            elif k in owned:
                tensor, leaf = tensors[e]
                if leaf is not None:
                    return False
                info = steps[e].info if e >= length else known.node.info_of(e)
                others = 0 if e >= length else 1  # the trace holds the value, its entry the buffer
                self._give(self.const(tensor, "T"), Argument(OWNED, slots, info, tensor._leaf, others))
                known.overwritten += info.nbytes if info.nbytes >= OVERWRITE_FROM else 0
            elif k in moved:
                tensor, leaf = tensors[e]
                if leaf is not None or tensor._leaf is not None:
                    return False
                t, v, info = self.const(tensor, "T"), f"v{e}", steps[e].info if e >= length else known.node.info_of(e)
                self.checks.append(f"{v} = {t}._val")
                self.checks.append(
                    f"if {t}._storage is not None or {t}._leaf is not None or {v}.buf is None or {v}.stamp is not None "
                    f"or {v}.info is not {self.const(info, 'i')}: return"
                )
                self.moved.append((t, v, f"o{moved[k]}", self.const(info, "i")))
                self._give(f"{v}.buf.ptr", Argument(POINTER, (k,)))
            elif e < length:
                self._give(f"entries[{e}].buf.ptr", Argument(POINTER, (k,)))
            else:
                tensor, leaf = tensors[e]
                if leaf is not None:
                    self._give(self.const(leaf, "L"), Argument(GRADIENT_READ, slots, steps[e].info))
                else:
                    self._give(self.const(tensor, "T"), Argument(READ, slots, steps[e].info, tensor._leaf))
        return True

    def _elsewhere(self, val: str, number: int) -> str:
        """Whether a value is not number `number` of the trace."""
        entry = next(s for s in self.known.node.path() if s.first <= number < s.first + len(s.infos))
        if entry.key[0] is LEAF:
            self.checks.insert(0, "leaves = trace.leaves") if "leaves = trace.leaves" not in self.checks else None
            return f"leaves.get({val}) != {number}"
        return f"{val} is not entries[{number}]"

    def _give(self, text: str, argument: Argument) -> None:
        self.given.append(text)
        self.arguments.append(argument)

    def _write(self, owned: dict[int, int]) -> None:
        known, bound, program = self.known, self.bound, self.known.program
        count = len(bound.program.inputs)
        lines = list(self.checks)
        used = sorted({int(text[1 : text.index("[")]) for text in self.given if text[0] == "h"})
        lines += [f"h{i} = hyper[{i}]" for i in used]
        for output in range(len(bound.program.outputs)):
            if output not in owned.values():
                lines += bound.output_lines(output, self.names)
                self._give(f"o{output}.ptr", Argument(POINTER, (count + output,)))
        results = [f"o{bound.program.results[program.order.index(n)] - count}" for n in known.order]
        flight = known.flight if bound.releases else None
        entry, self.names["kept"] = bound.cell_entry(self.arguments, cells.layout(), flight)
        self.names["entry"], self.names["lock"] = entry, known.flight.lock
        run = f"failed = entry({', '.join([*self.given, 'frame.ptr'])})"
        # The trace is closed first: what a signal handler records from here on is of another. It holds the call, so that whoever touches a
        # value after an interrupt finds it, whether the call has run by then or not.
        made = [f"m{k} = Val(trace, -1, None, {info})" for k, (*_, info) in enumerate(self.moved)]
        moved = ", ".join(f"(m{k}, {buffer}, {val})" for k, (_, val, buffer, _) in enumerate(self.moved))
        lines += [
            *made,
            *bound.frame_lines(self.names),
            f"call = Call(known, frame, bound.mark(frame), [{', '.join(results)}], [{moved}])",
            f"if len(entries) != {known.length}: return",
            "entries.append(END)",
            "trace.node = node",
            "trace.call = call",
            *[f"{t}._val = m{k}" for k, (t, *_) in enumerate(self.moved)],
            *(["with lock:", f"  {run}"] if flight is not None else [run]),
            "if failed:",
            *[f"  {t}._val = {v}" for t, v, *_ in self.moved],
            "  trace.call = None",
            "  trace.node = None",
            "  if entries[-1] is END: entries.pop()",
            "  return",
            "if trace.placed: call.land(trace)",
            "else:",
            *[f"  {line}" for line in self._landing(results)],
            "finish(trace)",
            bound.keep_line,  # last: another call starts by saying that it has not run
            "return True",
        ]
        text = "def step(trace, entries, hyper):\n" + "".join(f"  {line}\n" for line in lines)
        exec(compile(text, "<known step>", "exec"), self.names)
        known.call = self.names.pop("step")  # what it holds goes with it

    def _landing(self, results: list[str]) -> list[str]:
        """`Call.land`, written out."""
        known = self.known
        self.names.update({"OVERWRITTEN": OVERWRITTEN, "Origin": Origin, "statistics": runtime.statistics})
        lines = []
        for k, (_, old, buffer, _) in enumerate(self.moved):
            lines += [f"{old}.stamp = OVERWRITTEN", f"m{k}.buf = {buffer}", f"m{k}.trace = None"]
        for n, buffer in zip(known.order, results):
            lines.append(f"e = entries[{n}]")
            if n in known.outs:
                lines.append(f"e.extra = Origin(None, {n}, {self.const(known.errors[n], 'x')})")
            lines += [f"e.buf = {buffer}", "e.trace = None"]
        return [*lines, f"statistics.overwritten += {known.overwritten}"]


__all__ = ["KnownStep", "Memory", "Noted", "structure_of"]
