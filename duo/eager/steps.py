"""One entry of a trace on its own: how to run it, and how to take cotangents back through it.

A path that is seen for the first time runs entry by entry (stepwise.py) through the small programs made here. They depend on what the entry is (body,
kinds of operands, attributes), not on where it stands, so they are few and shared by all paths. They are built by the ordinary pipeline without fusion.

Bits: an entry's pullback is the IR's reverse mode over the entry's own ops, whose operands start with the cotangents that they have so far. So
contributions add one by one in the order in which reverse mode over the whole path adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from duo import runtime
from duo.dispatch import distinct
from duo.eager.build import Watch
from duo.eager.infer import scalar_types
from duo.eager.trie import Applied, Info, Macro
from duo_ir.core import Builder, Function, Op, Value
from duo_ir.opdef import Movement, Reshape
from duo_ir.ops import add, stop_gradient
from duo_ir.ops.broadcasting import ones_like
from duo_ir.transforms.autodiff import reverse
from duo_ir.transforms.rewrite import dce
from duo_ir.types import DType, TensorType

# A forward value by position: (-1, parameter number) or (op number, result number).
Position = tuple[int, int]
Run = Callable[[Sequence[Any]], list[Any]]
MAX_STEPS = 1024  # entries whose programs are kept
TINY = 32  # ops, and elements of a value, up to which interpreting once costs less than compiling


class Unable(Exception):
    """This path, or this walk over it, is for the whole path's Function (build.py): there the error is found, or the rare case is covered."""


class _Emission:
    """An entry's ops, emitted once more. places: per operand the number of the first operand that is the same value."""

    def __init__(self, applied: Applied, places: Sequence[int]) -> None:
        self.builder = Builder("entry")
        operands = applied.operands
        types = tuple([o.type if o.__class__ is Info else o for o in operands])
        scalars = iter(scalar_types(types))
        params = [
            self.builder.parameter(t if t.__class__ is TensorType else TensorType(next(scalars), ())) for t in types
        ]
        self.values = [params[k] for k in places]
        self.scalars = [params[k] for k, o in enumerate(operands) if o.__class__ is type]
        with self.builder:
            out = applied.body(*self.values, *applied.attrs)
            results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
            if applied.grad:
                results = distinct(results, self.values)
            elif any(o.__class__ is Info and o.requires_grad for o in operands):
                results = tuple([stop_gradient(v) if v.type.dtype.is_float else v for v in results])
        self.results = results
        self.ops = list(self.builder.ops)

    def moved(self, value: Value) -> Value:
        """The operand or result that `value` is a transpose, slice or the like of; else `value` (see `Construction.moved`)."""
        held, found = {*self.values, *self.results}, value
        while found not in held and found.op is not None and isinstance(found.op.definition.kind, Movement | Reshape):
            found = found.op.operands[0]
        return found if found in held else value

    def free(self) -> set[Value]:
        """Inner values made of Python numbers and constants alone (see `Construction.free`)."""
        held = set(self.results)
        out = set(self.scalars) - held
        for op in self.ops:
            if out.issuperset(op.operands) and held.isdisjoint(op.results):
                out.update(op.results)
        return out


def outline(
    params: Sequence[Value],
    forward: Sequence[Op],
    ops: Sequence[Op],
    seeds: Sequence[Value],
    results: Sequence[Value],
    rank: Callable[[Position], Any] = lambda position: position,
) -> tuple[dict[Value, Position], tuple[Position, ...], Function]:
    """The part of `ops` that `results` need, as a Function of the forward values it reads and the seeds. Gives (position of each forward value,
    positions of those read in the order of `rank`, the Function)."""
    position: dict[Value, Position] = {}
    for i, param in enumerate(params):
        position[param] = (-1, i)
    for i, op in enumerate(forward):
        for r in op.results:
            position[r] = (i, r.index)
    needed = set(results)
    kept: list[Op] = []
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            kept.append(op)
            needed.update(op.operands)
    made = {r for op in kept for r in op.results}
    made.update(seeds)
    reads = sorted((v for v in needed if v in position and v not in made), key=lambda v: rank(position[v]))
    builder = Builder("backward")
    env = {v: builder.parameter(v.type) for v in [*reads, *seeds]}
    with builder:
        for op in reversed(kept):
            builder.loc = op.loc
            env.update(zip(op.results, builder.emit(op.definition, tuple([env[v] for v in op.operands]), op.attrs)))
    return position, tuple(position[v] for v in reads), builder.build([env[r] for r in results])


class PullRun(NamedTuple):
    """A compiled pullback: run([operands..., results..., inner values..., numbers..., cotangents..., cotangents so far...]) gives the operands'
    new cotangents. The first four name what is read, by number."""

    operands: tuple[int, ...]
    results: tuple[int, ...]
    inner: tuple[int, ...]
    numbers: tuple[int, ...]
    run: Run


class Pull:
    """Going back through an entry whose results `cts` have cotangents.

    outs: the operands that get contributions, in operand order. touched: bit i is set if the rule of op i reads a forward value.
    watched_operands, watched_results: the operands and results that are read so, or a transpose or the like of which is."""

    def __init__(self, step: Step, places: tuple[int, ...], cts: tuple[int, ...]) -> None:
        self.step, self.places, self.cts = step, places, cts
        operands = step.applied.operands
        self.wrt = [k for k, o in enumerate(operands) if places[k] == k and o.__class__ is Info and o.requires_grad]
        emission = _Emission(step.applied, places)
        watch = Watch(free=emission.free())
        found, _ = self._reverse(emission, (), watch)
        self.outs = tuple([k for k, g in zip(self.wrt, found) if g is not None])
        number_of = {op: i for i, op in enumerate(emission.ops)}
        self.touched = sum(1 << number_of[op] for op in set(watch.touched))
        read = set(map(emission.moved, watch.readers))
        self.watched_operands = tuple([k for k, v in enumerate(emission.values) if v in read])
        self.watched_results = tuple([j for j, v in enumerate(emission.results) if v in read])
        self._runs: dict[tuple[tuple[int, ...], tuple[int, ...]], PullRun] = {}

    def _reverse(
        self, emission: _Emission, accs: Iterable[int], watch: Watch | None = None
    ) -> tuple[list[Value | None], list[Value]]:
        with emission.builder as builder:
            seeds = {emission.results[j]: builder.parameter(emission.results[j].type) for j in self.cts}
            seeds.update((emission.values[k], builder.parameter(emission.values[k].type)) for k in accs)
            wrt = [emission.values[k] for k in self.wrt]
            found = reverse(emission.ops, seeds, wrt, watch.visit if watch is not None else None)
        return found, list(seeds.values())

    def run(self, outs: tuple[int, ...], accs: tuple[int, ...]) -> PullRun:
        """The program that gives the cotangents of the operands `outs`, of which `accs` have one already."""
        found = self._runs.get((outs, accs))
        if found is None:
            found = self._runs[outs, accs] = self._compile(outs, accs)
        return found

    def _compile(self, outs: tuple[int, ...], accs: tuple[int, ...]) -> PullRun:
        step = self.step
        emission = _Emission(step.applied, self.places)
        free = emission.free()
        count = len(emission.builder.params)
        gradients, seeds = self._reverse(emission, accs)
        wanted = [g for k, g in zip(self.wrt, gradients) if k in outs]
        again = [op for op in emission.ops if free.issuperset(op.results)]
        new_ops = [*again, *emission.builder.ops[len(emission.ops) :]]
        params = emission.builder.params[:count]
        results = {(v.op, v.index): j for j, v in reversed(list(enumerate(emission.results)))}

        def rank(p: Position) -> tuple[int, int]:
            """(0 operand, 1 result, 2 inner value, 3 Python number; which)."""
            if p[0] < 0:
                return (3, step.numbers.index(p[1])) if p[1] in step.numbers else (0, p[1])
            if (emission.ops[p[0]], p[1]) in results:
                return 1, results[emission.ops[p[0]], p[1]]
            if p not in step.inner:
                raise Unable
            return 2, step.inner.index(p)

        _, reads, function = outline(params, emission.ops, new_ops, seeds, wanted, rank)  # type: ignore[arg-type]
        kinds: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for kind, number in map(rank, reads):
            kinds[kind].append(number)
        operands, made, inner, numbers = map(tuple, kinds)
        return PullRun(operands, made, inner, numbers, _runner(function, range(len(reads) - len(numbers), len(reads))))


class Step:
    """How one entry runs alone.

    numbers: the operands that are Python numbers. alias: result number -> operand that it is (or -1 - an earlier result). inner: positions of the
    values inside that pullbacks read, bases: of each the operand (or -1 - the result) that it is a transpose or the like of, None if of none.
    `run` gives the results; `save` the results and then the inner values."""

    def __init__(self, applied: Applied) -> None:
        self.applied = applied
        self.numbers = tuple([k for k, o in enumerate(applied.operands) if o.__class__ is type])
        self.every = tuple(range(len(applied.operands)))
        self._pulls: dict[tuple[tuple[int, ...], tuple[int, ...]], Pull] = {}
        self.run: Run = self._first_run
        self._save: Run | None = None
        self._parts: dict[tuple[int, ...], Run | None] = {}

    @functools.cached_property
    def alias(self) -> dict[int, int]:
        if self.applied.fresh:
            return {}
        emission = _Emission(self.applied, self.every)
        alias: dict[int, int] = {}
        for j, v in enumerate(emission.results):
            if v in emission.scalars:
                continue  # a value like any other, from here on
            if v in emission.values:
                alias[j] = emission.values.index(v)
            elif v in emission.results[:j]:
                alias[j] = -1 - emission.results.index(v)
        return alias

    @functools.cached_property
    def inner(self) -> tuple[Position, ...]:
        return self._inner[0]

    @functools.cached_property
    def bases(self) -> tuple[int | None, ...]:
        return self._inner[1]

    @functools.cached_property
    def _inner(self) -> tuple[tuple[Position, ...], tuple[int | None, ...]]:
        """What pullbacks read beside operands and results, most of all when every result has a cotangent; and the bases. A compiled function's
        recording does without."""
        if not any(i.requires_grad for i in self.applied.infos):
            return (), ()
        cts = tuple([j for j, i in enumerate(self.applied.infos) if i.requires_grad and j not in self.alias])
        emission = _Emission(self.applied, self.every)
        free = emission.free()
        count = len(emission.builder.params)
        pull = self.pull(self.every, cts)
        gradients, seeds = pull._reverse(emission, ())
        wanted = [g for g in gradients if g is not None]
        again = [op for op in emission.ops if free.issuperset(op.results)]
        new_ops = [*again, *emission.builder.ops[len(emission.ops) :]]
        position, reads, _ = outline(emission.builder.params[:count], emission.ops, new_ops, seeds, wanted)
        held = {position[v] for v in emission.results}
        inner = tuple([p for p in reads if p[0] >= 0 and p not in held])
        return inner, tuple([self._base(emission, emission.ops[i].results[r]) for i, r in inner])

    @staticmethod
    def _base(emission: _Emission, value: Value) -> int | None:
        base = emission.moved(value)
        if base in emission.values:
            return emission.values.index(base)
        return -1 - emission.results.index(base) if base in emission.results else None

    def _first_run(self, inputs: Sequence[Any]) -> list[Any]:
        self.run = self._compile(())
        return self.run(inputs)

    def save(self, inputs: Sequence[Any]) -> list[Any]:
        if self._save is None:
            self._save = self._compile(self.inner)
        return self._save(inputs)

    def _compile(self, inner: Sequence[Position]) -> Run:
        emission = _Emission(self.applied, self.every)
        kept = [emission.ops[i].results[r] for i, r in inner]
        function = Function(emission.builder.params, emission.ops, [*emission.results, *kept], "entry")
        return _runner(function, self.numbers)

    def part(self, wanted: tuple[int, ...]) -> Run | None:
        """What gives the results `wanted` alone, where all that they need is tiny (the state that a random op leaves, not its sample): the reference
        interpreter, which gives the same bits before a program would be found."""
        if wanted not in self._parts:
            emission = _Emission(self.applied, self.every)
            function = dce(
                Function(emission.builder.params, emission.ops, [emission.results[j] for j in wanted], "part")
            )
            types = [v.type for v in (*function.params, *[r for op in function.ops for r in op.results])]
            tiny = len(function.ops) <= TINY and all(isinstance(t.size, int) and t.size <= TINY for t in types)
            plain = not any(op.regions for op in function.ops)
            self._parts[wanted] = runtime.interpreted(function).run if tiny and plain else None
        return self._parts[wanted]

    def op(self, number: int) -> Op:
        """Op `number` of the entry."""
        return _Emission(self.applied, self.every).ops[number]

    def pull(self, places: tuple[int, ...], cts: tuple[int, ...]) -> Pull:
        """The way back. places: per operand the number of the first operand that is the same value."""
        found = self._pulls.get((places, cts))
        if found is None:
            found = self._pulls[places, cts] = Pull(self, places, cts)
        return found


def _runner(function: Function, scalars: Sequence[int]) -> Run:
    """The compiled function, or a choice among its arguments when that is all it is."""
    chosen = None if scalars else _choice(function)
    if chosen is not None:
        return lambda inputs: [inputs[k] for k in chosen]
    if any(op.regions for op in function.ops):
        # Nested Functions are attributes by identity, so the same entry may come back as another: those are found by what they say.
        return runtime.runnable(function, False, scalars).run  # type: ignore[no-any-return]
    return runtime.compile_alone(function, scalars).run  # type: ignore[no-any-return]


def _choice(function: Function) -> list[int] | None:
    """Which parameter each result is, where every op gives an operand back (what detaches, a cast to the same dtype)."""
    given = {p: k for k, p in enumerate(function.params)}
    with Builder("aside"):
        for op in function.ops:
            found = op.definition.canonicalize(op) if op.definition.canonicalize is not None else None
            if found is None or not all(v in given for v in found):
                return None
            given.update({r: given[v] for r, v in zip(op.results, found)})
    return [given[r] for r in function.results]


_made: list[Applied] = []


def step_of(applied: Applied) -> Step:
    """The Step of a body's entry. Raises Unable where there is none."""
    step = applied.step
    if step is None:
        if len(_made) >= MAX_STEPS:
            forget_steps()
        step = applied.step = Step(applied)
        _made.append(applied)
    return step  # type: ignore[no-any-return]


def forget_steps() -> None:
    """Drops the programs of all entries; those that are needed again are made again."""
    for applied in _made:
        applied.step = None
    _made.clear()
    _macros.clear()
    _small.clear()


# ----------------------------------------------------------------------------------------------------------- macros
class _Alone:
    """Stands for the Construction while a macro builds itself: its operands are parameters."""

    def __init__(self, types: Sequence[TensorType]) -> None:
        self.builder = Builder("entry")
        self.values = [self.builder.parameter(t) for t in types]
        self.scalars: list[Value] = []
        self.overwritten: dict[int, int] = {}

    def value(self, number: int) -> Value:
        return self.values[number]

    def scalar(self, k: int, dtype: DType) -> Value:
        value = self.builder.parameter(TensorType(dtype, ()))
        self.scalars.append(value)
        return value

    def stop(self, value: Value) -> Value:
        return stop_gradient(value) if value.type.dtype.is_float else value


class _Named(NamedTuple):
    key: tuple


_macros: dict[tuple, Run] = {}


def macro_run(macro: Macro, key: tuple, types: tuple[TensorType, ...]) -> Run:
    """The program of a macro whose `key` names its operands 0, 1, ... (`Macro.alone`), which have these types; it takes them, then numbers."""
    found = _macros.get((key, types))
    if found is None:
        alone = _Alone(types)
        with alone.builder:
            results = macro.build(alone, _Named(key))  # type: ignore[arg-type]
        scalars = range(len(types), len(types) + len(alone.scalars))
        if len(_macros) >= MAX_STEPS:
            _macros.clear()
        found = _macros[key, types] = _runner(alone.builder.build(results), scalars)
    return found


# ------------------------------------------------------------------------------------------------- small programs
_small: dict[tuple[str, TensorType], Run] = {}


def ones(type: TensorType) -> Any:
    """A buffer of ones, the cotangent that is implied."""
    run = _small.get(("ones", type))
    if run is None:
        builder = Builder("ones")
        with builder:
            like = Value(type, None, 0)
            run = _small["ones", type] = _runner(builder.build([ones_like(like)]), ())
    return run([])[0]


def total(type: TensorType, a: Any, b: Any) -> Any:
    """The sum of two cotangents."""
    run = _small.get(("add", type))
    if run is None:
        builder = Builder("add")
        with builder:
            run = _small["add", type] = _runner(
                builder.build([add(builder.parameter(type), builder.parameter(type))]), ()
            )
    return run([a, b])[0]


runtime.cache_listeners.append(forget_steps)
__all__ = ["Position", "Pull", "PullRun", "Step", "Unable", "macro_run", "ones", "outline", "step_of", "total"]
