"""Programs with all sizes known, ready to run: `CpuBound`, made of a `Prepared`.

A `Prepared` comes from `executable.py`, which compiles, or from `saved.py`, which reads what an earlier process compiled; nothing
here needs the compiler. A call needs a *frame*: argument pointers, scalar cells, temporaries, status words and scratch in one block. Small frames are
kept by the bound program, one per overlapping call; large ones go back to the allocator after each call, so that programs share
memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from duo_backends.calls import choose_donors, index_error, rounded
from duo_backends.cells import ARRAY, NUMBER, POINTER, Argument
from duo_backends.cpu import profile
from duo_backends.cpu import runner_text as layout
from duo_backends.cpu.memory import BIG, Buffer, allocate, allocator
from duo_backends.cpu.pool_text import CHUNKS_PER_THREAD, STATUS_BYTES
from duo_backends.cpu.runner import native
from duo_backends.cpu.threads import get_num_threads, on_change
from duo_ir.errors import ArgumentError, DeviceError, IndexOutOfRange
from duo_ir.types import TensorType, evaluate

if TYPE_CHECKING:
    from duo_backends.base import Scalar

KEPT_FRAME = 1 << 20  # bytes up to which a bound program keeps its frames
SMALL_FRAME = 1 << 14  # programs of templates are many: a larger frame is kept by the last LARGE_FRAMES of them only
LARGE_FRAMES = 16
RELEASE_NANOSECONDS = 30_000  # estimated work from which on other Python threads may run meanwhile
DONATION_LIMIT = 64  # choices of inputs given away that a bound program remembers
_LINE = 64
_KINDS = {
    "f64": layout.F64, "f32": layout.F32, "i64": layout.I64, "i32": layout.I32, "i16": layout.I16, "i8": layout.I8,
    "u8": layout.U8, "bool": layout.BOOL, "f16": layout.BITS16, "bf16": layout.BITS16,
}  # fmt: skip


class Note(Protocol):
    """What is known of a step for error messages and profiles: the user's line, what each check says, the kernel in words and its work."""

    @property
    def where(self) -> str: ...
    @property
    def sites(self) -> Sequence[str]: ...
    @property
    def description(self) -> str: ...
    @property
    def flops(self) -> int: ...
    @property
    def traffic(self) -> int: ...


class Table(NamedTuple):
    """What the native runner walks: `code` words (dims as addresses into `dims`), the pointer words of a frame as places, and the
    arena's size. `notes[i]` is of what instruction i runs (None: a copy, a branch), `scratch(threads)` gives bytes."""

    code: np.ndarray
    dims: np.ndarray
    places: list[int]
    arena: int
    cost: float
    parallel: bool
    loops: bool
    notes: list[Note | None]
    scratch: Callable[[int], int]


class Prepared(NamedTuple):
    """A program as `CpuBound` needs it. `results[k]` is an input's number, or the number of inputs plus an output's; `donations`: pairs (output,
    input) that may share memory; `safe`: outputs that are not written before everything that may fail has run; `scalars`: inputs given as Python numbers; `templates`: its kernels serve many sizes, and it may well
    run once only; `keep`: what the code's memory belongs to."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    results: tuple[int, ...]
    donations: tuple[tuple[int, int], ...]
    safe: frozenset[int]
    scalars: frozenset[int]
    table: Table
    templates: bool
    keep: object


class Call:
    """One run that may overwrite inputs: `results` lists its buffers beforehand, `done` tells whether they hold the results. Whoever keeps
    it can tell after an interrupt, at whatever moment, whether the inputs are old and whole or gone: native code sets the mark."""

    __slots__ = ("_arguments", "_bound", "_frame", "_inputs", "_mark", "results")

    def __init__(
        self, bound: CpuBound, inputs: Sequence[object], arguments: list[object], results: list[Buffer]
    ) -> None:
        self._bound, self._inputs, self.results = bound, inputs, results
        frame = self._frame = bound.take_frame()
        self._mark = bound.mark(frame)
        self._arguments = [*arguments, frame.ptr]

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""
        return self._mark.value == 1

    def run(self) -> list[Buffer]:
        """Runs once and gives `results`. Raises IndexOutOfRange, with every input as it was."""
        failed = self._bound.entry(*self._arguments)
        if failed:
            self._bound.fail(failed, self._frame)
        return self.results

    def close(self) -> None:
        """It has run and nobody will ask again."""
        self._bound.keep_frame(self._frame)


class CpuBound:
    """A program ready to run. `run` may be called from several threads at once."""

    def __init__(self, program: Prepared) -> None:
        self.program, self.table = program, program.table
        self._out_bytes = [evaluate(t.nbytes, {}) for t in program.outputs]
        self._in_bytes = [evaluate(t.nbytes, {}) for t in program.inputs]
        self._scalars = program.scalars
        count = len(program.inputs)
        self._plain = list(program.results) == list(range(count, count + len(program.outputs)))
        self._donations = list(program.donations)
        self._donors: dict[tuple, dict[int, int]] = {}  # inputs given away, pairs preferred -> donors
        self._narrow = frozenset([k for k in self._scalars if program.inputs[k].dtype.is_narrow_float])
        self.givable = frozenset([given for _, given in self._donations])
        self._plan = self._make_plan()
        self.entry = native().make_entry(self._plan.ctypes.data)
        self._frames: list[Buffer] = _FromSecondCall() if program.templates else []
        self._measure()
        if not program.templates and self._geometry[-1] >= BIG:
            allocator.wanted = (
                0  # a program as a whole, whose frame takes the place of what ran before it, op by op perhaps
            )
        self.run = self._make_run()
        on_change(self)
        profile.register(self)

    # --------------------------------------------------------------------------------------------------------- running
    # `run(inputs, donated=())`, see `duo_backends.base.Bound.run`, is made by _make_run: a function with the program's
    # number of inputs and outputs written out costs half of one with loops.
    run: Callable[..., list[Buffer]]

    def _make_run(self) -> Callable[..., list[Buffer]]:
        names: dict[str, Any] = {"begin": self.begin, "results": self._results, "check": self.check_inputs}
        inputs = [f"a{k}" for k in range(len(self._in_bytes))]
        lines = ["def run(inputs, donated=()):", "  if donated: return begin(inputs, donated).run()"]
        if os.environ.get("DUO_VERIFY") == "1":
            lines.append("  check(inputs)")
        if inputs:
            lines.append(f"  {', '.join(inputs)}, = inputs")
        lines += ["  " + line for line in self.run_lines(inputs, names)]
        outputs = f"[{', '.join(f'o{k}' for k in range(len(self._out_bytes)))}]"
        lines.append(f"  return {outputs}" if self._plain else f"  return results(inputs, {outputs})")
        exec(_compiled("\n".join(lines)), names)
        return names["run"]  # type: ignore[no-any-return]

    def run_lines(self, inputs: Sequence[str], names: dict[str, Any]) -> list[str]:
        """Code that runs it once: `inputs` are expressions for the inputs, `o0`, `o1`, ... the variables that get the outputs' buffers."""
        names.update({"entry": self.entry, "bits": self._bits})
        arguments = [self._address(k, text) for k, text in enumerate(inputs)]
        lines = []
        for k in range(len(self._out_bytes)):
            lines += self.output_lines(k, names)
            arguments.append(f"o{k}.ptr")
        return lines + self.call_lines("entry", arguments, names)

    @property
    def outputs_are_results(self) -> bool:
        """Whether result k is output k: no result is an input, or the same as another."""
        return self._plain

    def lane_parts(self) -> tuple[Callable[..., int], list[Buffer], list[tuple[int, Any]]] | None:
        """The entry, the frames, and of each output its bytes and size class, for native code that calls the entry itself; None where inputs need
        conversion or frames are not simply kept."""
        if type(self._frames) is not list or self._narrow or self._geometry[-1] > KEPT_FRAME:
            return None
        return self.entry, self._frames, [(n, allocator.class_of(n)) for n in self._out_bytes]

    def output_lines(self, k: int, names: dict[str, Any]) -> list[str]:
        """Code that makes `o{k}`, a buffer for output k."""
        nbytes = self._out_bytes[k]
        home = allocator.class_of(nbytes)
        names.update({f"home{k}": home, f"pop{k}": home.pop, f"n{k}": nbytes, "Buffer": Buffer, "allocate": allocate})
        return [
            f"try: o{k} = Buffer(pop{k}(), n{k}, home{k})",
            f"except IndexError: o{k} = allocate(n{k})",
        ]

    def call_lines(
        self, entry: str, arguments: Sequence[str], names: dict[str, Any], refused: str = "", lock: str = ""
    ) -> list[str]:
        """Code that calls an entry with a frame and raises what it reports. `refused`: what to do if it refuses; `lock`: held meanwhile."""
        names["fail"] = self.fail
        call = f"failed = {entry}({', '.join([*arguments, 'frame.ptr'])})"
        lines = self.frame_lines(names)
        lines += [call] if not lock else [f"with {lock}:", f"  {call}"]
        lines.append("if failed:")
        if refused:
            lines += [f"  if failed == {-layout.REFUSED}:", f"    {refused}"]
        lines.append("  fail(failed, frame)")
        return [*lines, self.keep_line]

    def frame_lines(self, names: dict[str, Any]) -> list[str]:
        """Code that makes `frame`, as `take_frame` does."""
        names.update({"frames": self._frames, "new_frame": self.new_frame})
        return ["try: frame = frames.pop()", "except IndexError: frame = new_frame()"]

    keep_line = f"if frame.nbytes <= {KEPT_FRAME}: frames.append(frame)"  # as `keep_frame` does

    def _address(self, k: int, name: str) -> str:
        """The expression for what the entry takes for input k."""
        if k not in self._scalars:
            return f"{name}.ptr"
        return f"bits({name}, {k})" if self.program.inputs[k].dtype.is_narrow_float else name

    def _bits(self, value: object, k: int) -> int:
        """The bits of an f16 or bf16 scalar input."""
        return int(rounded(value, self.program.inputs[k].dtype).view(np.uint16))

    def begin(
        self,
        inputs: Sequence[Buffer | Scalar],
        donated: Collection[int] = (),
        preferred: Sequence[tuple[int, int]] = (),
    ) -> Call:
        """A call that may write results into the buffers of the inputs `donated`, where the program allows it and nobody else sees their
        memory: the result is that very buffer. Pairs (result, input) that are `preferred` come first."""
        key = (tuple(donated), tuple(preferred))
        donors = self._donors.get(key)
        if donors is None:
            if len(self._donors) >= DONATION_LIMIT:
                self._donors.clear()
            donors = self._donors[key] = choose_donors(
                self._donations, self.program.results, len(self.program.inputs), donated, preferred
            )
        heirs = dict(donors)
        if heirs:
            uses = Counter(map(id, inputs))
            for output, given in donors.items():
                if not inputs[given].donatable or uses[id(inputs[given])] != 1:  # type: ignore[union-attr]
                    del heirs[output]  # others see its memory
        outputs: list[Buffer] = [
            inputs[heirs[k]] if k in heirs else allocate(n)  # type: ignore[misc]
            for k, n in enumerate(self._out_bytes)
        ]
        arguments: list[object] = [
            x.ptr if x.__class__ is Buffer else self._bits(x, k) if k in self._narrow else x  # type: ignore[union-attr]
            for k, x in enumerate(inputs)
        ]
        arguments += [x.ptr for x in outputs]
        return Call(self, inputs, arguments, outputs if self._plain else self._results(inputs, outputs))

    def check_inputs(self, inputs: Sequence[Buffer | Scalar]) -> None:
        """Raises ArgumentError when there are too few inputs or a buffer is too small (each call does under DUO_VERIFY=1)."""
        if len(inputs) != len(self._in_bytes):
            raise ArgumentError(f"the program takes {len(self._in_bytes)} inputs, not {len(inputs)}")
        for k, (x, nbytes) in enumerate(zip(inputs, self._in_bytes)):
            if k not in self._scalars and (not isinstance(x, Buffer) or x.nbytes < nbytes):
                raise ArgumentError(f"input {k}, {self.program.inputs[k]}, needs a buffer of {nbytes} bytes, not {x!r}")

    def _results(self, inputs: Sequence[Buffer | Scalar], outputs: list[Buffer]) -> list[Buffer]:
        count = len(self.program.inputs)
        out = []
        for slot in self.program.results:
            if slot >= count:
                out.append(outputs[slot - count])
            elif slot in self._scalars:
                array = rounded(inputs[slot], self.program.inputs[slot].dtype)
                buffer = allocate(array.nbytes)
                ctypes.memmove(buffer.ptr, array.ctypes.data, array.nbytes)
                out.append(buffer)
            else:
                out.append(inputs[slot])  # type: ignore[arg-type]
        return out

    def fail(self, code: int, frame: Buffer) -> None:
        if code > 0:
            raise self._index_error(self.table.notes[code - 1], frame)
        if code == -layout.WRONG_COUNT:
            raise ArgumentError(f"the program takes {len(self.program.inputs)} inputs")
        if code < -layout.OUT_OF_RANGE:
            k = -code - layout.OUT_OF_RANGE - 1
            raise ArgumentError(f"input {k} does not fit {self.program.inputs[k].dtype.name}")
        raise DeviceError(f"input {-code - 1} of the program has no memory")

    def _index_error(self, note: Note | None, frame: Buffer) -> IndexOutOfRange:
        assert note is not None
        status = ctypes.c_int64.from_address(frame.ptr + 16).value
        site, index, bound = (ctypes.c_int64 * 3).from_address(status)
        return index_error(note, site, index, bound)

    # ---------------------------------------------------------------------------------------------- plan and frames
    def _make_plan(self) -> np.ndarray:
        """The words that `duo_entry` reads; arrays they point to are kept in this object."""
        program, count = self.program, len(self.program.inputs) + len(self.program.outputs)
        base = layout.FRAME_HEADER + 8 * len(program.inputs)
        users: list[list[int]] = [[] for _ in range(count)]
        for word, place in enumerate(self.table.places):
            if place < 0:
                users[-1 - place].append(base + 8 * word)
        self._users = users
        self._patches = np.array([offset for user in users for offset in user] + [0], np.int64)
        self._specs = np.zeros((count + 1, layout.SPEC_WORDS), np.int64)
        position = 0
        for k, user in enumerate(users):
            kind = _KINDS[program.inputs[k].dtype.name] if k in self._scalars else POINTER
            self._specs[k, :4] = (kind, layout.FRAME_HEADER + 8 * k, position, position + len(user))
            position += len(user)
        flags = layout.HAS_PARALLEL if self.table.parallel else 0
        if self.table.cost > RELEASE_NANOSECONDS or self.table.loops:
            flags |= layout.RELEASE_GIL
        addresses = [a.ctypes.data for a in (self.table.code, self._specs, self._patches)]
        self._temps_at = _round(base + 8 * len(self.table.places))
        self._places_at = base
        # Frame offsets of what lies in the arena; arguments are patched by each call.
        self._places = np.array([max(place, 0) + self._temps_at for place in self.table.places], np.int64)
        self._placed = (-1, self._places, 0)  # the latest frame's start, these places there, and the address of that array
        self._flags = flags
        return np.array([count + 1, *addresses, flags, 0, 0], np.int64)

    def cell_entry(
        self, arguments: Sequence[Argument], layout_words: np.ndarray, flight: object
    ) -> tuple[Callable[..., int], object]:
        """An entry for arguments given another way than `run`'s: of each, how, and which slots of inputs and outputs get its address. Its last
        argument is the frame. It gives 0; `-REFUSED`, with nothing changed; or another code for `fail`. Keep the second object as long."""
        patches: list[int] = []
        specs = np.zeros((len(arguments) + 1, layout.SPEC_WORDS), np.int64)
        for row, argument in zip(specs, arguments):
            start = len(patches)
            patches += [offset for slot in argument.slots for offset in self._users[slot]]
            kind, cell = argument.kind, 0
            if argument.kind == NUMBER:
                (slot,) = argument.slots
                kind, cell = _KINDS[self.program.inputs[slot].dtype.name], layout.FRAME_HEADER + 8 * slot
            elif argument.kind == ARRAY:
                cell = array_data() or 0
            row[:7] = (
                kind,
                cell,
                start,
                len(patches),
                *[0 if x is None else id(x) for x in (argument.info, argument.extra)],
                argument.others,
            )
        places = np.array([*patches, 0], np.int64)
        words = [len(arguments) + 1, self.table.code.ctypes.data, specs.ctypes.data, places.ctypes.data, self._flags]
        plan = np.array([*words, layout_words.ctypes.data, id(flight)], np.int64)
        return native().make_entry(plan.ctypes.data), (self, arguments, specs, places, plan, layout_words, flight)

    @property
    def takes_arrays(self) -> bool:
        """Whether arguments of `cell_entry` may be NumPy arrays."""
        return array_data() is not None

    @property
    def releases(self) -> bool:
        """Whether other Python threads run meanwhile."""
        return bool(self._flags & layout.RELEASE_GIL)

    @property
    def may_fail(self) -> bool:
        """Whether it checks indices."""
        return any(note is not None and note.sites for note in self.table.notes)

    def may_overwrite(self, output: int, given: int) -> bool:
        """Whether the output may be written into the memory of that input."""
        return (output, given) in self._donations

    @property
    def safe_outputs(self) -> frozenset[int]:
        """Outputs that are not written before everything that may fail has run."""
        return self.program.safe

    def _measure(self) -> None:
        threads = get_num_threads() if self.table.parallel else 1
        status_at = _round(self._temps_at + self.table.arena)
        scratch_at = _round(status_at + STATUS_BYTES * CHUNKS_PER_THREAD * threads)
        self._geometry = (threads, status_at, scratch_at, scratch_at + self.table.scratch(threads))
        self._frames.clear()

    def threads_changed(self) -> None:
        self._measure()

    def take_frame(self) -> Buffer:
        """A frame that another call has left, or a new one."""
        try:
            return self._frames.pop()
        except IndexError:
            return self.new_frame()

    @staticmethod
    def mark(frame: Buffer) -> ctypes.c_int64:
        """A number in the frame, 0 now, that a run sets to 1 when it has ended well."""
        mark = _mark_at(frame.ptr + layout.DONE_AT)
        mark.value = 0
        return mark

    def keep_frame(self, frame: Buffer) -> None:
        """Keeps a frame for another call if it is small."""
        if frame.nbytes <= KEPT_FRAME:
            self._frames.append(frame)

    def new_frame(self) -> Buffer:
        """A frame for one call at a time; its `ptr` is the entry's last argument."""
        threads, status_at, scratch_at, nbytes = self._geometry
        frame = allocate(nbytes)
        start = frame.ptr
        header = (ctypes.c_int64 * 3).from_address(start)
        header[0], header[1], header[2] = threads, start + scratch_at, start + status_at
        at, words, address = self._placed
        if at != start:  # most calls find the block that the one before has freed
            words = self._places + start
            address = words.ctypes.data
            self._placed = (start, words, address)
        ctypes.memmove(start + self._places_at, address, words.nbytes)
        ctypes.memset(start + status_at, 0, STATUS_BYTES * CHUNKS_PER_THREAD * threads)
        return frame


class _FromSecondCall(list[Buffer]):
    """The frames of a program of templates, most of which run once: what the first call leaves is not kept, large ones are not kept for long."""

    called = False
    large = False  # whether it may keep a large one
    _keepers: ClassVar[deque[_FromSecondCall]] = deque()

    def append(self, frame: Buffer) -> None:
        if self.called and (frame.nbytes <= SMALL_FRAME or self._may_keep()):
            super().append(frame)
        self.called = True

    def _may_keep(self) -> bool:
        if not self.large:
            self.large = True
            self._keepers.append(self)
            if len(self._keepers) > LARGE_FRAMES:
                oldest = self._keepers.popleft()
                oldest.large = False
                oldest.clear()
        return not self


_mark_at = ctypes.c_int64.from_address


@lru_cache(maxsize=1)
def array_data() -> int | None:
    """How far into a NumPy array, as an object in memory, its address stands (`PyArrayObject_fields`); None where it is not there."""
    at = object.__basicsize__
    arrays = (np.zeros(3), np.zeros((4, 5), np.int8)[1:, 2:])
    if sys.implementation.name != "cpython":
        return None
    found = [ctypes.c_size_t.from_address(id(a) + at).value for a in arrays]
    return at if found == [a.ctypes.data for a in arrays] else None


@lru_cache(maxsize=1024)
def _compiled(source: str) -> CodeType:
    return compile(source, "<duo bound program>", "exec")


def _round(nbytes: int) -> int:
    return math.ceil(nbytes / _LINE) * _LINE
