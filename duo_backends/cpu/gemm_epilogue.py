"""What a contraction does with a finished tile: the kernel's body on its sums, and what that meets in memory, asked for beforehand.

The lines that an epilogue reads and writes come in rows too short for the hardware to foresee, and all at once they would keep the next
micro-kernel waiting. So their addresses are put down before a tile's last block, and its micro-kernel asks for them one by one on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from duo_backends.cpu.body import Emitter, Scope, Value
from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_ahead import ahead_offsets
from duo_backends.cpu.gemm_plan import Plan
from duo_backends.cpu.gemm_tile import BLOCK, LINE, ask
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector
from duo_backends.cpu.stream import last_stores
from duo_ir.kernels.kernel import Access, ContractKernel
from duo_ir.types import product

_APART = 4  # k steps from one line to the next that is asked for, at most
_WORK = 24  # multiply-adds to each line, at least
_FAR = 1 << 19  # bytes of a result that is written without being looked at, from which it is not near


def pointers(f: Function, kernel: ContractKernel) -> list[str]:
    """The addresses of the kernel's arguments."""
    out = []
    for number in range(len(kernel.args)):
        out.append(f.op(f"load ptr, ptr {f.gep('ptr', '%args', str(number), f.top)}, align 8", f.top))
    return out


def _on_tile(module: Module, kernel: ContractKernel, name: str, more: str) -> tuple[Function, list[str]]:
    """void name(args, dims, status, batch indices..., row, rows, column, columns, more), and the batch indices."""
    batch = [f"%batch{i}" for i in range(len(kernel.batch))]
    header = "".join(f"i64 {b}, " for b in batch) + "i64 %row, i64 %rows, i64 %column, i64 %columns"
    return Function(
        module, f"define internal void @{name}(ptr %args, ptr %dims, ptr %status, {header}, {more}) noinline #0"
    ), batch


def emit_epilogue(module: Module, target: Target, plan: Plan, name: str, streams: frozenset[int]) -> None:
    """The body on one tile: `more` is (ptr tile, i64 bytes between its rows)."""
    kernel = plan.kernel
    f, batch = _on_tile(module, kernel, name, "ptr %tile, i64 %tile_row")
    emitter = Emitter(f, target, kernel.args, pointers(f, kernel), kernel.dims, streams=streams)
    past = {buffer: _lies_apart(f, kernel, emitter.pointers, buffer) for buffer in last_results(kernel)}
    lanes, size = plan.lanes, plan.compute.itemsize
    type_ = vector(lanes, register_type(plan.compute))

    def strip(number: str, mask: str | None) -> None:
        """One vector of columns, all rows."""
        offset = f.mul(number, str(lanes))
        column, at = f.add("%column", offset), f.gep("i8", "%tile", f.mul(offset, str(size)))
        with f.loop("0", "%rows", 1, [("ptr", at)], runs=True) as loop:
            row = f.op(f"add i64 %row, {loop.index}")
            levels = (*(0 for _ in batch), 2, 1)
            regions = (f.top, loop.before, None)
            scope = Scope((*batch, row, column), levels, regions, len(batch) + 1, lanes, mask)
            acc = f.op(f"load {type_}, ptr {loop.values[0]}, align {size}")
            acc = convert(f, target, acc, plan.compute, kernel.acc, lanes, None)
            acc = convert(f, target, acc, kernel.acc, kernel.result, lanes, None)
            values = emitter.emit(kernel.body, scope, acc=Value(acc, kernel.result, True, 2))
            for store in kernel.stores:
                far = past.get(store.access.buffer)
                if far is not None:
                    with f.when(far):
                        emitter.streams = streams | {store.access.buffer}
                        emitter.store(store, values, scope)
                        emitter.streams = streams
                    with f.when(f.pure(f"xor i1 {far}, true", f.top)):
                        emitter.store(store, values, scope)
                    continue
                emitter.store(store, values, scope)
            loop.next = [f.op(f"getelementptr i8, ptr {loop.values[0]}, i64 %tile_row")]

    full = f.div("%columns", str(lanes))
    with f.loop("0", full, 1) as loop:
        strip(loop.index, None)
    if not (isinstance(kernel.n, int) and kernel.n % lanes == 0):
        rest = f.rem("%columns", str(lanes))
        with f.when(f.op(f"icmp ne i64 {rest}, 0")):
            numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
            count = emitter.splat_scalar(rest, "i64", lanes)
            strip(full, f.op(f"icmp slt {vector(lanes, 'i64')} <{numbers}>, {count}"))
    f.finish()


def last_results(kernel: ContractKernel) -> frozenset[int]:
    """Arguments that go past the caches, one by one where they lie apart from what is read here alone; see `results.py`."""
    return last_stores(kernel.args, [(store, len(kernel.batch) + 1) for store in kernel.stores])


def _lies_apart(f: Function, kernel: ContractKernel, pointers: Sequence[str], buffer: int) -> str:
    """The i1 that says whether the argument is aligned and in the memory of no other that this kernel alone reads."""
    address = f.pure(f"ptrtoint ptr {pointers[buffer]} to i64", f.top)
    apart = f.pure(f"icmp eq i64 {f.pure(f'and i64 {address}, {LINE - 1}', f.top)}, 0", f.top)
    for other, arg in enumerate(kernel.args):
        if not arg.output and not arg.shared:
            differs = f.pure(f"icmp ne ptr {pointers[buffer]}, {pointers[other]}", f.top)
            apart = f.pure(f"and i1 {apart}, {differs}", f.top)
    return apart


def _met(kernel: ContractKernel, write: int, streams: frozenset[int]) -> list[Access]:
    """What the epilogue reads or writes, not past the caches, in rows along its columns; nothing where all that it does is to write a small
    result."""
    if len(kernel.stores) + len(kernel.body) <= 2:
        size = product((*kernel.batch, kernel.m, kernel.n))
        if not isinstance(size, int) or size * kernel.result.itemsize < _FAR:
            return []
    past = streams | last_results(kernel)
    accesses = [s.access for s in kernel.stores] if write else [i.attr for i in kernel.body if isinstance(i.attr, Access)]
    return [
        a
        for a in accesses
        if a.at.strides[-1] == 1 and a.at.strides[-2] != 0 and not a.index_strides and not a.guards and a.buffer not in past
    ]


def _row_lines(plan: Plan, access: Access) -> range:
    """Offsets in bytes of the lines of a row of a panel."""
    return range(0, plan.panel * plan.kernel.args[access.buffer].dtype.itemsize, LINE)


class Lines(NamedTuple):
    """How many lines of each row of a tile are asked for: to be read, and for each access to be written. `twins[i]`: arguments read at the very
    places that access i writes; where the result lies in the memory of one of them, its lines are there already."""

    read: int
    written: tuple[int, ...]
    twins: tuple[frozenset[int], ...]

    @property
    def most(self) -> int:
        return self.read + sum(self.written)

    @property
    def least(self) -> int:
        """Where every result that can lies in the memory of an operand."""
        return self.read + sum(n for n, twins in zip(self.written, self.twins) if not twins)


def lines(plan: Plan, streams: frozenset[int]) -> Lines:
    """What is asked for. Nothing where B is turned in registers (`gemm_rows.py`)."""
    if not plan.pack_b and plan.kernel.b.at.strides[-1] != 1:
        return Lines(0, (), ())
    reads, writes = (_met(plan.kernel, write, streams) for write in (0, 1))
    dtypes = [arg.dtype for arg in plan.kernel.args]
    twins = [frozenset(r.buffer for r in reads if r.at == w.at and dtypes[r.buffer] is dtypes[w.buffer]) for w in writes]
    return Lines(sum(len(_row_lines(plan, r)) for r in reads), tuple([len(_row_lines(plan, w)) for w in writes]), tuple(twins))


def in_place(f: Function, kernel: ContractKernel, pointers: Sequence[str], plan: Plan, streams: frozenset[int]) -> list[str]:
    """For each access to be written the i1 that says whether its lines are read too."""
    found = []
    for access, twins in zip(_met(kernel, 1, streams), lines(plan, streams).twins):
        same = "false"
        for twin in sorted(twins):
            one = f.pure(f"icmp eq ptr {pointers[access.buffer]}, {pointers[twin]}", f.top)
            same = one if same == "false" else f.pure(f"or i1 {same}, {one}", f.top)
        found.append(same)
    return found


def ask_every(plan: Plan, streams: frozenset[int]) -> int:
    """K steps of a micro-kernel from one line that it asks for to the next; 0: it asks for none, as there are none, or too many. Where it has too few
    steps for all of them, the last ones are left out."""
    rows, k = plan.segments[0].rows, plan.kernel.k
    count = lines(plan, streams).least * rows + len(ahead_offsets(plan)) * plan.ahead_steps
    if count == 0:
        return 0
    last = (k - 1) % BLOCK + 1 if isinstance(k, int) and k > 0 else BLOCK  # steps of the last block
    every = min(_APART, last // count)
    return every if every * rows * plan.vectors >= _WORK else 0


def emit_asks(module: Module, target: Target, plan: Plan, name: str, streams: frozenset[int]) -> None:
    """The addresses of a tile's lines, those to be read first: `more` is (ptr where to put them). Where a micro-kernel has too few steps, all
    are asked for here instead."""
    kernel = plan.kernel
    f, batch = _on_tile(module, kernel, name, "ptr %asks")
    emitter = Emitter(f, target, kernel.args, pointers(f, kernel), kernel.dims)
    at_once = ask_every(plan, streams) == 0
    reads, writes = _met(kernel, 0, streams), _met(kernel, 1, streams)
    same = ["false"] * len(reads) + in_place(f, kernel, emitter.pointers, plan, streams)
    at = "%asks"
    helpers: dict[tuple[int, int], str] = {}

    def rows(start: str, apart: str, count: str, lines: range, at: str, write: int) -> None:
        """The lines of `count` rows, `apart` bytes from each other, of which the first begins at `start`."""
        key = (len(lines), write if at_once else 0)
        if key not in helpers:
            helpers[key] = f"{name}_rows{len(helpers)}"
            _emit_row_asks(module, helpers[key], lines, at_once, key[1])
        f.emit(f"call void @{helpers[key]}(ptr {start}, i64 {apart}, i64 {count}, ptr {at})")

    for write, accesses in enumerate((reads, writes)):
        for access, there in zip(accesses, same[len(reads) * write :]):
            position, _, _ = emitter.affine(Scope.flat((*batch, "%row", "%column")), access.at)
            dtype, lines = kernel.args[access.buffer].dtype, _row_lines(plan, access)
            apart = f.mul(emitter.dim(access.at.strides[-2]), str(dtype.itemsize), f.top)
            count = "%rows" if there == "false" else f.pure(f"select i1 {there}, i64 0, i64 %rows")
            rows(f.gep(memory_type(dtype), emitter.pointers[access.buffer], position), apart, count, lines, at, write)
            at = f.gep("i8", at, f.mul(count, str(8 * len(lines))))
    f.finish()


def _emit_row_asks(module: Module, name: str, lines: range, at_once: bool, write: int) -> None:
    """void name(ptr first, i64 apart, i64 rows, ptr at): the addresses of the lines of some rows are put down at `at`, or asked for `at_once`."""
    f = Function(module, f"define internal void @{name}(ptr %first, i64 %apart, i64 %rows, ptr %at) noinline #0")
    with f.loop("0", "%rows", 1, [("ptr", "%first"), ("ptr", "%at")]) as loop:
        start, at = loop.values
        for number, offset in enumerate(lines):
            line = f.gep("i8", start, str(offset))
            if at_once:
                ask(f, line, write)
            else:
                f.emit(f"store ptr {line}, ptr {f.gep('i8', at, str(8 * number))}, align 8")
        loop.next = [f.gep("i8", start, "%apart"), f.gep("i8", at, str(8 * len(lines)))]
    f.finish()
