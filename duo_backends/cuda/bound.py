"""Programs with all sizes known, ready to run on the GPU: `CudaBound`, over what all programs of a device share, its `Runtime` (streams.py).

A run hands its work to the thread's current stream and returns; nothing waits, except to read a bool that decides what comes next. An index that is out of
range is noticed when somebody waits (`Runtime.synchronize`, or reading a buffer), at once under DUO_SYNC=1, and before a result overwrites an
input, which then stays whole; a buffer that depends on it raises the error whenever somebody reads or uses it (`Fault`). A block of work that comes a second time with the same addresses is captured as a CUDA graph and
replayed from then on. Numbers given as Python numbers go to the device as arguments of a launch before the program, so graphs keep.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import numpy as np

from duo_backends.base import Scalar
from duo_backends.binding import Signature, byte_count
from duo_backends.calls import choose_donors, rounded
from duo_backends.cuda.memory import DeviceBuffer, Fault, Outcome
from duo_backends.cuda.streams import SCALARS, Runtime, Stream
from duo_backends.cuda.work import Launch, Multiply, Table, Work
from duo_backends.flat import round_up
from duo_ir.errors import ArgumentError

GRAPH_LEAST = 3  # launches and copies from which a block is worth a graph
PLACEMENTS = 16  # sets of addresses that a bound program remembers words and graphs for


@dataclass(frozen=True)
class Prepared:
    """A program as `CudaBound` needs it. `keep`: what its code's memory belongs to."""

    signature: Signature
    table: Table
    keep: object


class _Placement:
    """A call's words for one set of addresses, and a graph for each block (None: not seen yet; True: seen once)."""

    __slots__ = ("graphs", "memory", "words")

    def __init__(self, words: np.ndarray, blocks: int) -> None:
        self.words = words
        self.memory = words.data.cast("B") if len(words) else memoryview(b"")
        self.graphs: list[Any] = [None] * blocks


class _Frame:
    """Device memory of one run beside its buffers: numbers, status words, temporaries, scratch. `bases` are those of the call's words."""

    __slots__ = ("bases", "blocks", "scalars", "status")

    def __init__(self, bound: CudaBound, arguments: Sequence[int], stream: Stream) -> None:
        self.blocks = [stream.allocate(nbytes) for nbytes in bound.frame_blocks]
        starts = [block.ptr for block in self.blocks]
        if bound.runtime.pool.exact:
            self.scalars, self.status, arena, scratch, *own = starts
        else:
            start, own = starts[0], []
            self.scalars, self.status, arena, scratch = [start + offset for offset in bound.frame_offsets]
        given = [
            self.scalars + 8 * bound.scalar_at[k] if k in bound.scalar_at else ptr for k, ptr in enumerate(arguments)
        ]
        self.bases = (0, arena, scratch, self.status, *given, *own)


class Call:
    """One run that may overwrite inputs: `results` lists its buffers beforehand, `done` tells whether all its work has been handed over, so that
    they will hold the results for whoever reads them."""

    __slots__ = ("_bound", "_donating", "_inputs", "_outputs", "_stream", "done", "results")

    def __init__(
        self,
        bound: CudaBound,
        inputs: Sequence[DeviceBuffer | Scalar],
        outputs: list[DeviceBuffer],
        results: list[DeviceBuffer],
        donating: bool,
        stream: Stream,
    ) -> None:
        self._bound, self._inputs, self._outputs, self._donating = bound, inputs, outputs, donating
        self._stream = stream
        self.results = results
        self.done = False

    def run(self) -> list[DeviceBuffer]:
        """Hands the work over and gives `results`."""
        self._bound.issue(self._inputs, self._outputs, self._donating, self._stream)
        self.done = True
        return self.results

    def close(self) -> None:
        """It has run and nobody will ask again."""
        self._inputs = ()


class CudaBound:
    """A program ready to run. `run` may be called from several threads; what they start runs in the order in which they come."""

    def __init__(self, program: Prepared, runtime: Runtime) -> None:
        self.program, self.table, self.runtime = program.signature, program.table, runtime
        self._keep = program.keep
        self.givable = frozenset([given for _, given in self.program.donations])
        self.scalar_at = {k: n for n, k in enumerate(sorted(self.program.scalars))}
        self.scalar_bytes = 8 * SCALARS * -(-len(self.scalar_at) // SCALARS)
        self._in_bytes = [byte_count(t) for t in self.program.inputs]
        self._out_bytes = [byte_count(t) for t in self.program.outputs]
        sizes = [self.scalar_bytes, self.table.status, self.table.arena, self.table.scratch]
        ends = list(accumulate(map(round_up, sizes), initial=0))
        self.frame_blocks = [*sizes, *self.table.own] if runtime.pool.exact else [ends.pop()]
        self.frame_offsets = ends
        self._placements: OrderedDict[tuple[int, ...], _Placement] = OrderedDict()
        self._generation = runtime.pool.generation

    @property
    def may_fail(self) -> bool:
        """Whether it checks indices."""
        return self.table.status > 0

    # --------------------------------------------------------------------------------------------------------- running
    def run(self, inputs: Sequence[DeviceBuffer | Scalar], donated: Collection[int] = ()) -> list[DeviceBuffer]:
        """See `duo_backends.base.Bound.run`; IndexOutOfRange comes when somebody waits."""
        return self.begin(inputs, donated).run()

    def begin(
        self,
        inputs: Sequence[DeviceBuffer | Scalar],
        donated: Collection[int] = (),
        preferred: Sequence[tuple[int, int]] = (),
    ) -> Call:
        """See `duo_backends.base.Bound.begin`."""
        self.check_inputs(inputs)
        heirs: dict[int, int] = {}
        if donated:
            uses = Counter(map(id, inputs))
            given_away = choose_donors(
                self.program.donations, self.program.results, len(self.program.inputs), donated, preferred
            )
            for output, given in given_away.items():
                buffer = inputs[given]
                assert isinstance(buffer, DeviceBuffer)
                if buffer.donatable and uses[id(buffer)] == 1:  # nobody else sees its memory
                    heirs[output] = given
        stream = self.runtime.stream
        outputs: list[DeviceBuffer] = [
            inputs[heirs[k]] if k in heirs else stream.allocate(n)  # type: ignore[misc]
            for k, n in enumerate(self._out_bytes)
        ]
        return Call(self, inputs, outputs, self._results(inputs, outputs), bool(heirs), stream)

    def check_inputs(self, inputs: Sequence[DeviceBuffer | Scalar]) -> None:
        """Raises ArgumentError when there are too few inputs, or one is no buffer of this device or too small."""
        if len(inputs) != len(self._in_bytes):
            raise ArgumentError(f"the program takes {len(self._in_bytes)} inputs, not {len(inputs)}")
        for k, (x, nbytes) in enumerate(zip(inputs, self._in_bytes)):
            if k not in self.scalar_at and (x.__class__ is not DeviceBuffer or x.nbytes < nbytes):  # type: ignore[union-attr]
                raise ArgumentError(
                    f"input {k}, {self.program.inputs[k]}, needs a buffer of {nbytes} bytes on the GPU, not {x!r}"
                )

    def _results(self, inputs: Sequence[DeviceBuffer | Scalar], outputs: list[DeviceBuffer]) -> list[DeviceBuffer]:
        count = len(self.program.inputs)
        out: list[DeviceBuffer] = []
        for slot in self.program.results:
            if slot >= count:
                out.append(outputs[slot - count])
            elif slot in self.scalar_at:
                out.append(self.runtime.upload(rounded(inputs[slot], self.program.inputs[slot].dtype)))
            else:
                out.append(inputs[slot])  # type: ignore[arg-type]
        return out

    def _scalar_words(self, inputs: Sequence[DeviceBuffer | Scalar]) -> list[int]:
        """The bits of the inputs that are Python numbers."""
        words = []
        for k in self.scalar_at:
            dtype = self.program.inputs[k].dtype
            try:
                array = rounded(inputs[k], dtype)
            except (OverflowError, TypeError, ValueError):
                raise ArgumentError(f"input {k}, {inputs[k]!r}, does not fit {dtype.name}") from None
            words.append(int.from_bytes(array.tobytes().ljust(8, b"\0"), "little", signed=True))
        return words

    # -------------------------------------------------------------------------------------------------- handing work over
    def issue(
        self, inputs: Sequence[DeviceBuffer | Scalar], outputs: list[DeviceBuffer], donating: bool, stream: Stream
    ) -> None:
        """Gives all work to the stream. `donating`: outputs may be inputs, so checks come first. Raises IndexOutOfRange where it has
        to wait, or under DUO_SYNC=1, or an input depends on such an index."""
        faults = self._faults(inputs)
        words = self._scalar_words(inputs)
        runtime = self.runtime
        with runtime.lock, runtime.driver:
            if not runtime.tracking:
                outcome = self._give(inputs, outputs, words, donating, stream)
            else:
                overwritten = [x for x in outputs if any(x is y for y in inputs)] if donating else []
                runtime.acquire(stream, inputs, overwritten)
                try:
                    outcome = self._give(inputs, outputs, words, donating, stream)
                finally:  # where it raises, some of the work has been given all the same
                    runtime.release(stream, inputs, outputs)
            if faults or outcome is not None or donating:
                for buffer, (checks, read) in zip(outputs, self.table.reach):
                    seen = tuple([faults[k] for k in read if k in faults])
                    mine = outcome if checks else None
                    buffer.fault = Fault(mine, checks, seen) if seen or mine is not None else None
        if os.environ.get("DUO_SYNC") == "1":
            runtime.synchronize(stream)

    def _faults(self, inputs: Sequence[DeviceBuffer | Scalar]) -> dict[int, Fault]:
        """What may be wrong with inputs, by number. Raises the error of one that is known."""
        faults: dict[int, Fault] = {}
        for k, x in enumerate(inputs):
            if x.__class__ is DeviceBuffer and x.fault is not None:  # type: ignore[union-attr]
                assert isinstance(x, DeviceBuffer)
                fault = x.fault
                assert fault is not None
                error = fault.found()
                if error is not None:
                    raise error
                if fault.open():
                    faults[k] = fault
                else:
                    x.fault = None
        return faults

    def _give(
        self,
        inputs: Sequence[DeviceBuffer | Scalar],
        outputs: list[DeviceBuffer],
        words: list[int],
        donating: bool,
        stream: Stream,
    ) -> Outcome | None:
        addresses = [x.ptr if isinstance(x, DeviceBuffer) else 0 for x in (*inputs, *outputs)]
        runtime, table = self.runtime, self.table
        # its blocks go back to the stream's at the end: what comes later comes later on the stream
        frame = _Frame(self, addresses, stream)
        placement = self._placement(frame)
        if words:
            runtime.put_scalars(frame.scalars, words, stream)
        if table.status:
            runtime.driver.fill(frame.status, 0, table.status, stream.queue)
        number = 0
        while True:
            self._hand_over(number, placement, stream)
            end = table.blocks[number].end
            number += 1
            if end.kind == "end":
                break
            if end.kind == "jump":
                number = end.target
            elif table.status and (end.kind == "branch" or donating):
                runtime.check_now(frame.status, table, stream)
            if end.kind == "branch" and not runtime.read_bool(int(placement.words[end.word]), stream):
                number = end.target
        return runtime.start_check(frame.status, table, stream) if table.status else None

    def _placement(self, frame: _Frame) -> _Placement:
        if self._generation != self.runtime.pool.generation:  # what graphs say of memory is no longer sure
            self._generation = self.runtime.pool.generation
            self._placements.clear()
        found = self._placements.get(frame.bases)
        if found is not None:
            self._placements.move_to_end(frame.bases)
            return found
        words = np.array(frame.bases, np.int64)[self.table.bases] + self.table.offsets
        found = self._placements[frame.bases] = _Placement(words, len(self.table.blocks))
        if len(self._placements) > PLACEMENTS:
            self._placements.popitem(last=False)
        return found

    def _hand_over(self, number: int, placement: _Placement, stream: Stream) -> None:
        """A block's work: by itself the first time, then as a graph."""
        work, runtime = self.table.blocks[number].work, self.runtime
        if runtime.recording is not None:
            for note, parts in groupby(work, lambda item: item.note):
                runtime.recording.run(note, stream, partial(self._launch, list(parts), placement, stream))
            return
        graph = placement.graphs[number]
        if len(work) < GRAPH_LEAST or graph is False:
            self._launch(work, placement, stream)
        elif graph is None:
            self._launch(work, placement, stream)
            placement.graphs[number] = True
        else:
            if graph is True:
                graph = placement.graphs[number] = self._capture(work, placement, stream)
            if graph is False:
                self._launch(work, placement, stream)
                return
            runtime.driver.replay(graph, stream.queue)
            runtime.replays += 1

    def _capture(self, work: Sequence[Work], placement: _Placement, stream: Stream) -> Any:
        """A graph of the work; False where the driver does not make one."""
        driver = self.runtime.driver
        driver.begin_capture(stream.queue)
        graph = None
        try:
            self._launch(work, placement, stream)
        finally:
            graph = driver.end_capture(stream.queue)  # in any case: a stream that captures runs nothing
        return graph or False

    def _launch(self, work: Sequence[Work], placement: _Placement, stream: Stream) -> None:
        driver, queue, memory = self.runtime.driver, stream.queue, placement.memory
        for item in work:
            if isinstance(item, Launch):
                packed = memory[8 * item.first : 8 * item.last]
                driver.launch(item.function, item.blocks, item.threads, packed, item.shared, queue)
            elif isinstance(item, Multiply):
                words = placement.words
                pointers = {role: int(words[word]) for role, word in item.operands.items()}
                item.plan.run(pointers, int(words[item.workspace]), driver.handle(queue))
            else:
                words = placement.words
                driver.copy(int(words[item.target]), int(words[item.source]), item.nbytes, queue)
        self.runtime.launches += len(work)
