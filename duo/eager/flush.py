"""Flushing: a closed trace is compiled (or found), run, and its live values get their buffers.

What is live is read off reference counts: an entry that only its trace holds is dead. The first time a path is seen it runs entry by
entry (stepwise.py) through programs that all paths share; from the second time on it runs as one fused program. Equal bits make
the difference invisible, and traces that never repeat cost no more than their ops.

`DUO_SYNC=1` flushes after every op and raises errors at once; `DUO_FLUSH=random:SEED` flushes at random points.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from duo import runtime
from duo.devices import CPU
from duo.eager import lane
from duo.eager.autograd import Inner
from duo.eager.build import Construction, Watch, freed_error
from duo.eager.keeping import Keeper, Kept, is_on
from duo.eager.locate import explainer, index_inputs, relocated
from duo.eager.segments import Origin, Pullback, Segment, unmarked, version_of
from duo.eager.steps import Position
from duo.eager.stepwise import may_live, run
from duo.eager.trace import END, Trace, Val, forget, forks, hooks, places, settle, state
from duo.eager.trie import NOTHING, Info, Macro, Node
from duo_ir.core import Value
from duo_ir.errors import DeviceError, GradientError, TraceError

_getrefcount = sys.getrefcount


def _baseline() -> int:
    """The reference count that `map(getrefcount, entries)` sees for a value held by its trace alone."""
    entries = [Val(None, 0, None, NOTHING)]
    held = [Val(None, 0, None, NOTHING)]
    keep = held[0]
    (alone,), (kept,) = list(map(_getrefcount, entries)), list(map(_getrefcount, held))
    # Where counts do not tell (no reference counting, deferred counts) everything is taken to be live.
    return alone if kept == alone + 1 and keep is held[0] else -1


ALONE = _baseline()
OVERWRITE_FROM = 1 << 14  # bytes from which reusing an input's memory is worth the asking


def _counts(leaves: dict[Val, int], entries: list[int], buffers: list[Any]) -> list[tuple[int, int]]:
    """Reference counts of the outside values of these entries, and of their buffers, as `_unreadable` sees them."""
    outside = {number: val for val, number in leaves.items()}
    out = []
    for entry, buffer in zip(entries, buffers):
        val = outside[entry]
        out.append((_getrefcount(val), _getrefcount(buffer)))
    return out


def _owned_once() -> tuple[int, int]:
    """What `_counts` gives for a value and buffer that only a trace's leaf still holds; nothing where counts do not tell."""
    leaves: dict[Val, int] = {}
    proxies = []
    for number in range(2):
        val, proxy = Val(None, 0, None, NOTHING), Val(None, 0, None, NOTHING)
        val.buf = proxy.buf = object()  # type: ignore[assignment]
        leaves[val] = number
        proxies.append(proxy)
    del val, proxy
    inputs = [p.buf for p in proxies]
    first, second = _counts(leaves, [0, 1], [inputs[j] for j in (0, 1)])
    keep = list(leaves)
    held, _ = _counts(leaves, [0, 1], [inputs[j] for j in (0, 1)])
    return first if first == second and held == (first[0] + 1, first[1]) and keep and ALONE != -1 else (-1, -1)


_OWNED_ONCE = _owned_once()


class Program:
    """The executable of one path for one set of live values. order: the value numbers of its results."""

    def __init__(self, plan: FlushPlan, live: tuple[int, ...], fused: bool) -> None:
        construction = Construction(plan.node)
        plan.know(construction)
        self.order = live
        self.fused = fused
        outs = [n for n in live if construction.infos[n].requires_grad and not construction.leaf_like[n]]
        self.errors = _freed_outputs(construction, outs)
        self.outs = tuple(outs)
        self.residuals: tuple[Position, ...] = ()
        kept: list[Value] = []
        self.alive = [n for n in outs if n not in self.errors]
        if self.alive:
            pullback = Pullback(plan.node, 0, self.alive, ())
            plan.saving |= pullback.touched
            self.residuals = tuple(p for p in pullback.residuals if p[0] >= 0)
            kept = [construction.builder.ops[i].results[r] for i, r in self.residuals]
        values = [construction.value(n) for n in live]
        self.same = {p: n for p, v in zip(self.residuals, kept) for n, w in zip(live, values) if v is w}
        self.holders = {p: construction.numbers().get(construction.moved(v), ()) for p, v in zip(self.residuals, kept)}
        function = construction.builder.build([*values, *kept])
        scalars = [i for i, (_, k) in enumerate(plan.inputs) if k is not None]
        self.runnable = runtime.runnable(function, fused, scalars, plan.node.device, plan.node.numerics)
        self.run = self.runnable.run
        self.function = function
        # What a GPU's error, which comes after the run, is explained by: the inputs that indices are computed from.
        late = plan.node.device is not CPU and getattr(self.runnable, "may_fail", False)
        self.reads = index_inputs(function) if late else None
        # What a segment keeps may be read again by a backward pass; otherwise results may overwrite inputs that nobody else can read.
        params = function.params
        least = OVERWRITE_FROM if plan.node.device is CPU else 0  # graphs of a GPU know addresses
        rows = [j for j in sorted(self.runnable.givable) if params[j].type.nbytes >= least]
        self.givable = ([], []) if self.alive else (rows, [plan.inputs[j][0] for j in rows])
        self.updates = _updates(plan, live) if rows else []
        self.given: tuple[int, ...] = ()  # inputs that nobody could read any more the last time
        keeps = fused and plan.node.device is CPU and not outs and is_on()
        self.keeper = Keeper(function, plan.inputs) if keeps else None
        self.uses = 0  # as one of `FlushPlan.known`
        self.lane: lane.Lane | None = None
        self.words: lane.Words | None = None


def _updates(plan: FlushPlan, live: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs (result, input) of which one is the new state of the other: they stay where they are."""
    place = {e: i for i, (e, k) in enumerate(plan.inputs) if k is None}
    steps = [step for step in plan.node.path() if isinstance(step.key[0], Macro)]
    new = {n: old for step in steps for n, old in step.key[0].updates(step).items() if old in place}
    return [(k, place[new[n]]) for k, n in enumerate(live) if n in new]


def _freed_outputs(construction: Construction, outs: list[int]) -> dict[int, Exception]:
    """The outputs whose history a backward pass of this very path has freed already, with the error that says so."""
    errors: dict[int, Exception] = {}
    if not construction.freed:
        return errors
    builder = construction.builder
    start = len(builder.ops)
    watch = Watch(construction.freed, free=construction.free())
    for n in outs:
        with builder:
            try:
                construction.backward(0, {construction.value(n): construction.value(n)}, (), watch)
            except GradientError as error:
                errors[n] = error.with_traceback(None)  # its frames would keep this flush's values alive
                error.op = builder.ops.index(error.op)  # type: ignore[attr-defined]
        del builder.ops[start:]
    return errors


class FlushPlan:
    """What every flush at one node needs (`Node.memo`); small, as most paths may be seen once.

    inputs, scalar_dtypes: of the path's Construction, which is made when they are asked for. saving: the ops whose rules read what segments keep.
    quick: a program with a lane, the one that ran last; address: of the words of its lane for native code, or 0. at_once: whether the path is compiled
    as a whole the first time: on a GPU starting the compiler for every op would take longest, and kernels that are known are not compiled again."""

    __slots__ = (
        "address", "at_once", "inputs", "known", "node", "programs", "pullbacks", "quick", "saving", "scalar_dtypes", "visits",
    )  # fmt: skip

    def __init__(self, node: Node) -> None:
        self.node = node
        self.at_once = FUSE_AT_ONCE or node.device is not CPU
        self.visits = 0
        self.programs: dict[tuple[int, ...], Program] = {}
        self.known: dict[tuple[int, ...], Program] = {}  # what reference counts led to before
        self.quick: Program | None = None
        self.address = 0
        self.pullbacks: dict[tuple, Pullback] = {}
        self.saving: frozenset[int] = frozenset()

    def __getattr__(self, name: str) -> Any:
        if name not in ("inputs", "scalar_dtypes"):
            raise AttributeError(name)
        self.know(Construction(self.node))
        return getattr(self, name)

    def know(self, construction: Construction) -> None:
        """Takes `inputs` and `scalar_dtypes` from the path's Construction."""
        dtypes = iter(construction.scalar_dtypes)
        # parameter number -> dtype of a Python number
        self.scalar_dtypes = {i: next(dtypes) for i, (_, k) in enumerate(construction.inputs) if k is not None}
        self.inputs = construction.inputs

    def program(self, live: tuple[int, ...]) -> Program:
        self.visits += 1
        program = self.programs.get(live)
        if program is not None and (program.fused or self.visits < 2):
            return program
        wanted = set(live)
        for order, known in self.programs.items():
            if known.fused and known.order == order and wanted <= set(order) and len(order) <= len(live) + 4:
                return known
        program = self.programs[live] = Program(self, live, fused=self.visits > 1 or self.at_once)
        return program


FUSE_AT_ONCE = os.environ.get("DUO_TIERS", "1") == "0"


def flush(trace: Trace | None = None) -> None:
    """Closes and runs a trace (this thread's by default). An error of the program is raised where one of its values is touched."""
    trace = trace if trace is not None else state.trace
    if state.capture is not None and trace is state.trace:
        raise TraceError(state.capture.refusal())
    if trace.__class__ is Trace and trace.born != forks[0]:  # or a Flight, which fork waits for
        _adopt(trace)
    with trace.lock:
        if trace.done:
            return
        entries = trace.entries
        while entries[-1] is not END:
            last = entries[-1]
            if entries[-1] is last:
                entries.append(END)
        if trace.node is None:
            trace.node = entries[-2].node
        _run(trace)


def _adopt(trace: Trace) -> None:
    """In a forked child: a trace that came from the parent, where another thread may have been running it. It runs anew here, unless that thread
    was overwriting its inputs."""
    trace.lock, trace.born = threading.RLock(), forks[0]
    if trace.call is None or trace.call.done:
        return
    lost = DeviceError(
        "this value was being computed by another thread, in the memory of what it is computed from, when the process was forked; "
        "wait for threads (duo.synchronize) before os.fork, or use multiprocessing's 'spawn'"
    )
    for val in trace.entries:
        if val.trace is trace and val.buf is None:
            val.extra, val.trace = lost, None
    finish(trace)


def _run(trace: Trace) -> None:
    entries, node = trace.entries, trace.node
    assert node is not None
    if node.parent is None:
        trace.done = True
        return
    if trace.call is not None:
        if trace.call.done:  # an interrupt came after the program had run
            trace.call.land(trace)
            finish(trace)
            return
        trace.call.undo()
    plan: FlushPlan = node.memo
    if plan is None:
        plan = node.memo = FlushPlan(node)
    elif plan.quick is not None and not trace.hooked:
        quick = plan.quick
        try:
            if quick.lane(trace, entries):  # type: ignore[misc]
                return
        except Exception as error:
            _salvage(trace, plan, quick.order, error)
            finish(trace)
            return
    counts = tuple(map(_getrefcount, entries))[:-1]
    program = plan.known.get(counts) if not trace.hooked else None
    if program is not None:
        live = program.order
        program.uses += 1
        if program.uses == lane.AFTER:
            program.lane = lane.write(plan, program)
            program.words = lane.words(plan, program) if program.lane is not None else None
            hooks.repeated()
        if program.lane is not None:
            plan.quick = program
            plan.address = 0 if program.words is None else program.words.address
    else:
        held = [n for n, count in enumerate(counts) if count > ALONE]
        live = tuple([n for n in held if n > 0 and may_live(entries[n].node)])  # type: ignore[arg-type]
        if trace.hooked:  # a hook must be called even if its tensor has gone
            live = tuple(sorted({*live, *trace.hooked}))
    if not live:
        finish(trace)
        return
    try:
        if program is not None:
            _execute(trace, plan, live, program)
        elif plan.visits or plan.at_once or not _run_stepwise(trace, plan, live):
            program = plan.program(live)
            if program.fused and not trace.hooked and len(plan.known) < 64:
                plan.known[counts] = program
            _execute(trace, plan, live, program)
    except Exception as error:
        _salvage(trace, plan, live, error)
    finish(trace)


def _run_stepwise(trace: Trace, plan: FlushPlan, live: tuple[int, ...]) -> bool:
    """Runs a path that is new entry by entry. False if that cannot be or something fails, and nothing has happened."""
    try:
        run(trace, plan.node, live)
    except Exception:
        return False
    plan.visits = 1
    return True


def _salvage(trace: Trace, plan: FlushPlan, live: tuple[int, ...], error: Exception) -> None:
    """After a program failed: halves of its values are tried apart, until the values that the failure reaches are alone; those are
    poisoned with it, and nothing else is lost (the generator's state, say)."""
    if len(live) == 1:
        val = trace.entries[live[0]]
        val.extra = relocated(trace, plan.inputs, live[0], error)
        val.trace = None
        return
    middle = len(live) // 2
    for part in (live[:middle], live[middle:]):
        try:
            _execute(trace, plan, part, Program(plan, part, fused=False), overwrite=False)
        except Exception as again:
            _salvage(trace, plan, part, again)


def _execute(trace: Trace, plan: FlushPlan, live: tuple[int, ...], program: Program, overwrite: bool = True) -> None:
    """Runs what the values `live` need, and publishes them. `overwrite`: results may take the memory of inputs that nobody else can read."""
    entries = trace.entries
    trace.program = program
    inputs: list[Any] = []
    for e, k in plan.inputs:
        entry = entries[e]
        inputs.append(entry.buf if k is None else entry.scalars[k])  # type: ignore[index]
    if program.reads is None:
        kept = None if program.keeper is None else program.keeper.find(trace)
        if kept is not None and kept.words is None and program.words is not None:
            kept.words = lane.words(plan, program, kept)
            kept.address = 0 if kept.words is None else kept.words.address
        _call(trace, plan, program, inputs, overwrite, kept)
        return
    with runtime.explained(trace.device, explainer(trace, live, program.reads, inputs)):
        _call(trace, plan, program, inputs, overwrite, None)


def _call(
    trace: Trace, plan: FlushPlan, program: Program, inputs: list[Any], overwrite: bool, kept: Kept | None
) -> None:
    given = program.given = _unreadable(trace, program, inputs) if overwrite and program.givable[0] else ()
    bound = program.runnable
    if kept is not None:
        bound = kept.main
        inputs += kept.made
    if not given:
        publish(trace, plan, program, bound.run(inputs))
        return
    # An interrupt may come between the run and the publishing, when old values are gone and new ones not there yet. The trace holds the
    # call, which knows whether it has run: whoever touches a value next publishes, or runs, what is missing (`_run`).
    call = bound.begin(inputs, given, program.updates)
    trace.call = _Begun(plan, program, call)
    call.run()
    runtime.statistics.overwritten += sum(b.nbytes for b in set(inputs).intersection(call.results))
    publish(trace, plan, program, call.results)
    trace.call = None
    call.close()


class _Begun:
    """A flush whose program may have overwritten its inputs."""

    __slots__ = ("call", "plan", "program")

    def __init__(self, plan: FlushPlan, program: Program, call: Any) -> None:
        self.plan, self.program, self.call = plan, program, call

    @property
    def done(self) -> bool:
        return self.call.done  # type: ignore[no-any-return]

    def land(self, trace: Trace) -> None:
        """It has run: its values get their buffers."""
        publish(trace, self.plan, self.program, self.call.results)

    def undo(self) -> None:
        """It has not run, and will not."""


def publish(trace: Trace, plan: FlushPlan, program: Any, buffers: list[Any]) -> None:
    """Gives the results of a program to the values they are of."""
    entries = trace.entries
    origins: dict[int, Origin] = {}
    if program.alive:
        origins = _segment(trace, plan, program, buffers).origins
    else:
        for n in program.outs:
            origins[n] = Origin(None, n, _freed(trace, plan, program.errors[n]))
    for n, buffer in zip(program.order, buffers):
        val = entries[n]
        if n in origins:
            val.extra = origins[n]
        val.buf = buffer  # last: another thread may take the value up from here on
        val.trace = None


def _unreadable(trace: Trace, program: Program, inputs: list[Any]) -> tuple[int, ...]:
    """Inputs that nobody will read again: their values are held by this trace alone, their buffers by those values and as inputs."""
    numbers, entries = program.givable
    counts = _counts(trace.leaves, entries, [inputs[j] for j in numbers])
    return tuple([j for j, count in zip(numbers, counts) if count == _OWNED_ONCE])


def _segment(trace: Trace, plan: FlushPlan, program: Program, buffers: list[Any]) -> Segment:
    entries = trace.entries
    outside = {number: val for val, number in trace.leaves.items()}
    sources = [_saved(outside.get(e, entries[e])) if k is None else entries[e].scalars[k] for e, k in plan.inputs]  # type: ignore[index]
    segment = Segment(plan.node, entries[:-1], sources, places(trace))
    for position, buffer in zip(program.residuals, buffers[len(program.order) :]):
        number = program.same.get(position)
        if number is not None and not entries[number].overwritten:
            segment.residuals[position] = entries[number]
            continue
        val = Val(None, -1, None, Info(_type_at(program, position), False, plan.node.device))
        val.buf = buffer
        val.stamp = version_of([outside.get(n, entries[n]) for n in program.holders[position]])
        segment.residuals[position] = val
    for n in program.outs:
        error = program.errors.get(n)
        origin = segment.origins[n] = Origin(segment, n, error and _freed(trace, plan, error))
        if isinstance(entries[n].extra, Inner):
            origin.hooks = entries[n].extra.hooks
    return segment


def _freed(trace: Trace, plan: FlushPlan, error: Exception) -> Exception | Callable[[], Exception]:
    """The error of a gradient that was freed, or what says it with the lines of this very recording when it is asked for."""
    if not trace.placed:
        return error
    lines = places(trace)
    return lambda: freed_error(Construction(plan.node, lines).builder.ops[error.op])  # type: ignore[attr-defined]


def _saved(val: Val) -> Val:
    """`val`, whose mark from now on tells of in-place ops after this flush; the path knows of those before."""
    return unmarked(val) if val.overwritten else val


def _type_at(program: Program, position: Position) -> Any:
    return program.function.results[len(program.order) + program.residuals.index(position)].type


def finish(trace: Trace) -> None:
    trace.done = True
    trace.call = None
    trace.leaves = {}
    trace.leaf_numbers = {}
    trace.entries = [END]  # entries refer to their trace: without this only the garbage collector would free them


def synchronize() -> None:
    """Runs what this thread has recorded and waits for it, and for all that GPUs have been given to do. Raises IndexOutOfRange where an index was
    found out of range there."""
    flush()
    runtime.synchronize()


# ------------------------------------------------------------------------------------------------ when to flush
_random: Any = None  # of `random`'s class


def configure(sync: bool | None = None, flush_seed: int | None = None) -> None:
    """`DUO_SYNC` and `DUO_FLUSH` at run time: `sync` flushes after every op, `flush_seed` at random points."""
    global _random
    if sync is not None:
        hooks.policy = _always if sync else None
    if flush_seed is not None:
        _random = importlib.import_module("random").Random(flush_seed)
        hooks.policy = _at_random


def _always() -> tuple[bool, bool]:
    return True, True


def _at_random() -> tuple[bool, bool]:
    return _random.random() < 0.15, False


def _forget_programs() -> None:
    """Programs were dropped (another backend, say): what is recorded runs with the old ones, what comes is compiled anew."""
    if state.capture is None:
        flush()
    forget()


hooks.flush = flush
runtime.cache_listeners.append(_forget_programs)
_flush_setting = os.environ.get("DUO_FLUSH", "")
configure(
    sync=os.environ.get("DUO_SYNC", "0") not in ("", "0"),
    flush_seed=int(_flush_setting.split(":")[1]) if _flush_setting.startswith("random:") else None,
)
__all__ = ["Macro", "configure", "flush", "settle", "synchronize"]
