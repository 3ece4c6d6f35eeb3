"""Launch plans of a file on a device: `CudaCode` reads and checks them, and runs programs on buffers. Nothing is compiled.

A plan (`launch_plan.py`) is checked whole before a module of the file goes to the driver: every number of a word, a node, a step, a module is one that
is there. For the sizes of a call it becomes a `Table`, as a program that was compiled here has one, which `CudaBound` runs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duo_backends.aot.formulas import Formulas, Values
from duo_backends.binding import Signature, byte_count
from duo_backends.cuda.bound import CudaBound, Prepared
from duo_backends.cuda.code import STATUS_WORDS
from duo_backends.cuda.memory import DeviceBuffer
from duo_backends.cuda.streams import Runtime
from duo_backends.cuda.work import (
    ARENA,
    ARGUMENTS,
    CONSTANT,
    SCRATCH,
    STATUS,
    STATUS_STRIDE,
    Block,
    Copy,
    End,
    Launch,
    Table,
    Work,
    blocks_of,
)
from duo_ir.errors import DeviceError, DuoError, FormatError, ShapeError
from duo_ir.types import DTYPES, TensorType, dtype

MOST_BYTES = 1 << 46  # of what a call touches; far above any device's memory
MOST_BLOCKS, MOST_THREADS, MOST_WORDS = (1 << 31) - 1, 1024, 512  # of a grid, of a block, 4 KB of parameters (CUDA's limits)
MOST_BOUND = 64  # sets of sizes that a program is remembered for
_LENGTHS = {"launch": 9, "copy": 4, "branch": 3, "jump": 2, "check": 1, "end": 1}


@dataclass(frozen=True)
class Note:
    """A step, for index errors and profiles (see `flat.StepNote`)."""

    where: str
    sites: Sequence[str] = ()
    description: str = ""
    flops: int = 0
    traffic: int = 0


class Launches:
    """One program's plan, checked. Raises FormatError."""

    def __init__(self, row: Mapping[str, Any], modules: int, programs: int) -> None:
        self.name: str = _of(str, row["name"])
        self.dims = tuple([_of(str, d) for d in _of(list, row["dims"])])
        self.formulas = Formulas(row["nodes"], self.dims)
        size = self.formulas.operand
        self.least = {d: _number(row["least"][d]) for d in self.dims}
        self.signed, self.single = ([size(x) for x in _of(list, row[k])] for k in ("signed", "single"))
        self.special = [(_below(k, programs), dict(_of(dict, s))) for k, s in _of(list, row["special"])]
        self.params = [(_one(kind, ("input", "weight", "state")), x) for kind, x in _of(list, row["params"])]
        self.inputs, self.outputs = (
            [(_one(t, DTYPES), [size(d) for d in _of(list, shape)]) for t, shape in _of(list, row[k])]
            for k in ("inputs", "outputs")
        )
        self.count = len(self.inputs) + len(self.outputs)
        if len(self.params) != len(self.inputs):
            raise FormatError("a program of it has other arguments than inputs")
        self.results = [
            (_below(slot, self.count), _one(kind, ("output", "state")), _of(str, name))
            for slot, kind, name in _of(list, row["results"])
        ]
        self.arena, self.scratch = size(row["arena"]), size(row["scratch"])
        self.notes = [
            Note(_of(str, where), [_of(str, s) for s in _of(list, sites)]) for where, sites in _of(list, row["notes"])
        ]
        self.reach = [
            (frozenset([_below(n, len(self.notes)) for n in notes]), tuple([_below(k, len(self.inputs)) for k in inputs]))
            for notes, inputs in _of(list, row["reach"])
        ]
        if len(self.reach) != len(self.outputs):
            raise FormatError("a program of it does not say what its outputs depend on")
        self.steps = [
            (_of(str, where), _of(str, kind), size(work), size(traffic))
            for where, kind, work, traffic in _of(list, row["steps"])
        ]
        self.words = [(_below(base, ARGUMENTS + self.count), size(x)) for base, x in _of(list, row["words"])]
        self.code = _of(list, row["code"])
        for entry in self.code:
            self._check(_of(list, entry), modules)
        if not self.code or self.code[-1] != ["end"]:
            raise FormatError("a program of it does not end")

    def _check(self, entry: list[Any], modules: int) -> None:
        kind, *rest = entry
        if len(entry) != _LENGTHS[_one(kind, _LENGTHS)]:
            raise FormatError(f"a {kind} of it is not complete")
        if kind == "launch":
            module, symbol, blocks, threads, shared, first, end, step = rest
            _below(module, modules), _of(str, symbol), _below(step, len(self.steps))
            self.formulas.operand(blocks), self.formulas.operand(shared)
            if not 1 <= _number(threads) <= MOST_THREADS:
                raise FormatError(f"{symbol} is launched with {threads} threads in a block")
            if not 0 <= _number(first) < _number(end) <= len(self.words) or end - first > MOST_WORDS:
                raise FormatError(f"{symbol} is launched with arguments that are not there")
        elif kind == "copy":
            _below(rest[0], len(self.words)), _below(rest[1], len(self.words)), self.formulas.operand(rest[2])
        elif kind == "branch":
            _below(rest[0], len(self.words)), _below(rest[1], len(self.code))
        elif kind == "jump":
            _below(rest[0], len(self.code))

    @property
    def symbols(self) -> dict[tuple[int, str], None]:
        """Module and name of each kernel."""
        return dict.fromkeys([(entry[1], entry[2]) for entry in self.code if entry[0] == "launch"])

    # ------------------------------------------------------------------------------------------------------ for sizes
    def launched(self, sizes: Mapping[str, int]) -> list[str]:
        """What is launched for these sizes, a line each, for a person."""
        values, out = self.checked(sizes), []
        for kind, *rest in self.code:
            if kind == "launch" and values.of(rest[2]):
                _, symbol, blocks, threads, shared, _, _, step = rest
                where, what, *_ = self.steps[step]
                memory = f", {values.of(shared):,} bytes shared" if values.of(shared) else ""
                line = f"   # {where}" if where else ""
                out.append(f"{what} {symbol}: {values.of(blocks)} blocks of {threads} threads{memory}{line}")
        return out

    def temporaries(self, sizes: Mapping[str, int]) -> int:
        """Bytes of temporaries of a call."""
        values = self.checked(sizes)
        return values.of(self.arena) + values.of(self.scratch)

    def checked(self, sizes: Mapping[str, int]) -> Values:
        """The values of all expressions. Raises ShapeError for sizes that the program is not for."""
        for name in self.dims:
            if sizes[name] < self.least[name]:
                more = f"this program needs {self.least[name]} at least" if self.least[name] else "a size must not be negative"
                raise ShapeError(f"{name} is {sizes[name]}; {more}")
        values = self.formulas.values(sizes)
        if any(values.of(x) < 0 for x in self.signed):
            raise ShapeError("with these sizes an array of the program would have a negative size")
        if any(values.of(x) == 1 for x in self.single):
            raise ShapeError(
                "with these sizes a matrix product has one column, which is added up in another order; export the program for that size"
            )
        return values

    def bind(self, sizes: Mapping[str, int], functions: Mapping[tuple[int, str], Any], shared: int) -> Prepared:
        """The program for these sizes; `shared`: the most bytes of shared memory of a block. Raises ShapeError, FormatError."""
        values = self.checked(sizes)
        types = [TensorType(dtype(t), tuple([values.of(d) for d in shape])) for t, shape in (*self.inputs, *self.outputs)]
        if any(d < 0 for t in types for d in t.static_shape()):
            raise ShapeError("with these sizes an array of the program would have a negative size")
        nbytes = [byte_count(t) for t in types]
        arena, scratch, status = values.of(self.arena), values.of(self.scratch), STATUS_STRIDE * len(self.notes)
        if arena < 0 or scratch < 0 or arena + scratch + sum(nbytes) > MOST_BYTES:
            raise ShapeError("these sizes need more memory than there can be")
        room = [0, arena, scratch, status, *nbytes]
        offsets = [values.of(x) for _, x in self.words]
        for (base, _), offset in zip(self.words, offsets):
            if base != CONSTANT and not 0 <= offset <= room[base]:
                raise FormatError("an address lies beyond its memory")
            if base == STATUS and (offset % 8 or (status and offset + 8 * STATUS_WORDS > status)):
                raise FormatError("an address lies beyond its memory")
        bases = [base for base, _ in self.words]
        blocks = blocks_of([self._action(e, values, functions, shared, bases, offsets, room) for e in self.code])
        blocks = tuple([Block(tuple([w for w in b.work if _does(w)]), b.end) for b in blocks])
        count = len(self.inputs)
        words = np.array(bases, np.int64), np.array(offsets, np.int64)
        table = Table(blocks, *words, arena, scratch, status, tuple(self.notes), (), tuple(self.reach))
        slots = tuple([slot for slot, _, _ in self.results])
        signature = Signature(tuple(types[:count]), tuple(types[count:]), slots, (), frozenset(), frozenset())
        return Prepared(signature, table, functions)

    def _action(
        self,
        entry: list[Any],
        values: Values,
        functions: Mapping[tuple[int, str], Any],
        shared: int,
        bases: list[int],
        offsets: list[int],
        room: list[int],
    ) -> Work | End:
        kind, *rest = entry
        if kind == "launch":
            module, symbol, blocks, threads, bytes_shared, first, end, step = rest
            number, dynamic = values.of(blocks), values.of(bytes_shared)
            if not 0 <= number <= MOST_BLOCKS:
                raise ShapeError(f"with these sizes {symbol} would be launched in {number} blocks, and CUDA has {MOST_BLOCKS}")
            if not 0 <= dynamic <= shared:
                raise DeviceError(f"{symbol} takes {dynamic} bytes of shared memory, and a block of this GPU has {shared}")
            where, what, work, traffic = self.steps[step]
            note = Note(where, (), what, values.of(work), values.of(traffic))
            return Launch(functions[module, symbol], number, threads, dynamic, first, end, note)  # type: ignore[arg-type]
        if kind == "copy":
            target, source, nbytes = rest
            count = values.of(nbytes)
            for word in (target, source):
                if bases[word] < ARENA or bases[word] in (SCRATCH, STATUS) or not 0 <= count <= room[bases[word]] - offsets[word]:
                    raise FormatError("a copy goes beyond its memory")
            return Copy(target, source, count)
        if kind == "branch":
            return End("branch", rest[0], rest[1])
        return End(kind, target=rest[0] if rest else 0)


def _does(work: Work) -> bool:
    return work.blocks > 0 if isinstance(work, Launch) else not isinstance(work, Copy) or work.nbytes > 0


def read_launches(content: bytes, modules: int) -> list[Launches]:
    """The plans of a file's programs. Raises FormatError, which says what of the file is wrong."""
    try:
        rows = _of(list, json.loads(content.decode())["programs"])
        return [Launches(row, modules, len(rows)) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(f"its launch plan cannot be read: {error}") from None


# ------------------------------------------------------------------------------------------------------------- running
class CudaCode:
    """A file's programs on a device. `arrays`: weights and the first values of states; `states`: names of those that programs may change. Raises FormatError,
    DeviceError."""

    def __init__(
        self,
        runtime: Runtime,
        plans: Sequence[Launches],
        modules: Sequence[bytes],
        arrays: Mapping[str, np.ndarray],
        states: Sequence[str],
    ) -> None:
        self.runtime, self.plans = runtime, {p.name: p for p in plans}
        self._order = list(plans)
        self._check(arrays, states)
        self._functions = self._load(modules)
        self._lock = threading.RLock()
        self._bound: dict[tuple[Any, ...], CudaBound] = {}
        self.names = list(states)
        self._buffers = {name: runtime.upload(np.ascontiguousarray(a)) for name, a in arrays.items()}
        self._types = {name: (a.dtype, a.shape) for name, a in arrays.items()}

    def _check(self, arrays: Mapping[str, np.ndarray], states: Sequence[str]) -> None:
        for plan in self._order:
            for (kind, x), (kind_of, shape) in zip(plan.params, plan.inputs):
                if kind == "input":
                    _number(x)
                    continue
                found = arrays.get(_of(str, x))
                if found is None or (kind == "state") != (x in states):
                    raise FormatError(f"its programs read {x!r}, which it does not have")
                if dtype(found.dtype).name != kind_of or list(found.shape) != shape:
                    raise FormatError(f"its programs read {x!r} as {kind_of}{shape}")
            for _, kind, name in plan.results:
                if kind == "state" and name not in states:
                    raise FormatError(f"its programs write {name!r}, which it does not have")

    def _load(self, modules: Sequence[bytes]) -> dict[tuple[int, str], Any]:
        driver = self.runtime.driver
        self._modules = []
        for content in modules:
            with driver:
                self._modules.append(driver.load(content))
        functions = {}
        for plan in self._order:
            for module, symbol in plan.symbols:
                try:
                    with driver:
                        functions[module, symbol] = driver.function(self._modules[module], symbol, driver.properties.shared)
                except DuoError as error:
                    raise FormatError(f"its code has no kernel {symbol[:40]!r}: {error}") from None
        return functions

    def run(self, name: str, inputs: Sequence[DeviceBuffer], sizes: Mapping[str, int]) -> list[DeviceBuffer]:
        """The outputs of a program, each a buffer of its own."""
        plan = self.plans[name]
        for number, wanted in plan.special:
            if wanted.items() <= sizes.items():
                plan = self._order[number]
                break
        with self._lock:
            bound = self._bind(plan, sizes)
            given = [inputs[x] if kind == "input" else self._buffers[x] for kind, x in plan.params]
            found = bound.run(given)
            seen = {id(b) for b in given}
            own = []
            for (_, kind, state), buffer in zip(plan.results, found):
                stays = kind == "state" and buffer is self._buffers[state]
                own.append(self.runtime.duplicate(buffer) if id(buffer) in seen and not stays else buffer)
                seen.add(id(buffer))
            writes = [(state, b) for (_, kind, state), b in zip(plan.results, own) if kind == "state"]
            if writes and bound.may_fail:  # a program that fails leaves states as they were
                self.runtime.synchronize(self.runtime.stream)
            self._buffers.update(writes)
        return [b for (_, kind, _), b in zip(plan.results, own) if kind == "output"]

    def _bind(self, plan: Launches, sizes: Mapping[str, int]) -> CudaBound:
        key = (plan.name, *[sizes[d] for d in plan.dims])
        found = self._bound.get(key)
        if found is None:
            if len(self._bound) >= MOST_BOUND:
                self._bound.clear()
            made = plan.bind(sizes, self._functions, self.runtime.driver.properties.shared)
            found = self._bound[key] = CudaBound(made, self.runtime)
        return found

    def scratch_bytes(self, name: str, sizes: Mapping[str, int]) -> int:
        """Bytes of temporaries of a call."""
        return self.plans[name].temporaries(sizes)

    def state(self, name: str) -> np.ndarray:
        """A copy of a state's value."""
        kind, shape = self._types[name]
        out = np.empty(shape, kind)
        with self._lock:
            self.runtime.download(out, self._buffers[name])
        return out

    def set_state(self, name: str, value: np.ndarray) -> None:
        """Replaces a state's value with another of its type."""
        with self._lock:
            self._buffers[name] = self.runtime.upload(np.ascontiguousarray(value))


def _of(kind: type, x: Any) -> Any:
    if not isinstance(x, kind):
        raise TypeError(f"{str(x)[:40]!r} is no {kind.__name__}")
    return x


def _number(x: Any) -> int:
    if x.__class__ is not int or not 0 <= x < 1 << 31:
        raise ValueError(f"{str(x)[:40]!r} is no number of it")
    return x  # type: ignore[no-any-return]


def _below(x: Any, count: int) -> int:
    if _number(x) >= count:
        raise ValueError(f"there is no number {x} of {count}")
    return x  # type: ignore[no-any-return]


def _one(x: Any, known: Any) -> str:
    if not isinstance(x, str) or x not in known:
        raise ValueError(f"{str(x)[:40]!r} is none of {', '.join(known)}")
    return x
