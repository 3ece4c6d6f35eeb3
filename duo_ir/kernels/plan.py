"""Kernels over values -> Program: slots for inputs, outputs and temporaries, lifetimes, donations, control flow.

A result that is a parameter is returned as it is; one that is the same memory in another shape, or a second name for a result of
another shape, is a copy. Items run as `fuse.py` put them, except where another order needs less memory (`order.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from duo_ir.core import Function, Op, Value
from duo_ir.kernels.assemble import Built
from duo_ir.kernels.fuse import Fused, fuse
from duo_ir.kernels.kernel import Access, Body, ContractKernel, ConvKernel, LoopKernel, ScatterKernel, Store
from duo_ir.kernels.order import reorder
from duo_ir.kernels.program import Cond, Copy, Item, Program, Step, Temp, While, reads_writes, touched
from duo_ir.opdef import Control
from duo_ir.types import DimLike, TensorType


def plan(fused: Fused, *, fusion: bool = True, own_results: bool = False) -> Program:
    """The Program of a fused Function. `own_results`: result k is output k, written by the program (sub-programs of control flow).
    `fusion` is how nested Functions are fused."""
    planner = _Planner(fused, fusion)
    planner.place_results(own_results)
    planner.scatter_in_place()
    for item in fused.items:
        planner.items.append(planner.control(item) if isinstance(item, Op) else planner.step(item))
    planner.items += planner.copies
    if fusion and not own_results:
        planner.reorder()
    return planner.finish()


class _Planner:
    def __init__(self, fused: Fused, fusion: bool) -> None:
        self.fused, self.fusion = fused, fusion
        function = fused.function
        self.inputs = function.param_types
        self.slots: dict[Value, int] = {p: n for n, p in enumerate(function.params)}
        self.outputs: list[TensorType] = []
        self.items: list[Item] = []
        self.copies: list[Item] = []
        self.results: list[int] = []
        self.sizes: list[DimLike] = []  # bytes of each temporary

    def place_results(self, own: bool) -> None:
        known = {(p, p.type): n for n, p in enumerate(self.fused.function.params)}
        for r in self.fused.function.results:
            root = self.fused.storage(r)
            slot = known.get((root, r.type))
            if slot is not None and not own:
                self.results.append(slot)
                continue
            new = len(self.inputs) + len(self.outputs)
            self.outputs.append(r.type)
            self.results.append(new)
            known[root, r.type] = new
            if root in self.slots:
                self.copies.append(Copy(self.slots[root], new))
            else:
                self.slots[root] = new

    def scatter_in_place(self) -> None:
        """A temporary that only a scatter reads, as its base, shares the memory of the result: nothing needs copying."""
        readers: dict[Value, int] = {}
        for item in self.fused.items:
            reads = item.operands if isinstance(item, Op) else [v for v in item.operands if v not in item.outputs]
            for v in reads:
                readers[self.fused.storage(v)] = readers.get(self.fused.storage(v), 0) + 1
        for item in self.fused.items:
            if isinstance(item, Op) or not isinstance(item.kernel, ScatterKernel):
                continue
            first, out = item.operands[0], item.operands[-1]
            alone = readers[first] == 1 and all(a.buffer != 0 for a in _loads(item.kernel.body))
            if alone and first not in self.slots and first.op is not None:
                self.slots[first] = self.slot(out)

    def slot(self, v: Value) -> int:
        """The slot of v's memory; a temporary when it is first named."""
        v = self.fused.storage(v)
        found = self.slots.get(v)
        if found is None:
            found = self.slots[v] = len(self.inputs) + len(self.outputs) + len(self.sizes)
            self.sizes.append(v.type.nbytes)
        return found

    def step(self, built: Built) -> Step:
        return Step(built.kernel, tuple([self.slot(v) for v in built.operands]), built.where)

    def control(self, op: Op) -> Item:
        kind = op.definition.kind
        assert isinstance(kind, Control)
        operands = [self.slot(v) for v in op.operands]
        outputs = tuple([self.slot(v) for v in op.results])
        if kind.name == "cond":
            then, orelse = self.nested(op.attrs["then"]), self.nested(op.attrs["orelse"])
            return Cond(operands[0], then, orelse, tuple(operands[1:]), outputs)
        count = op.attrs["carried"]
        test, body = self.nested(op.attrs["test"]), self.nested(op.attrs["body"])
        return While(test, body, tuple(operands[:count]), tuple(operands[count:]), outputs)

    def nested(self, function: Function) -> Program:
        return plan(fuse(function, self.fusion), fusion=self.fusion, own_results=True)

    def reorder(self) -> None:
        """Another order of the items, where that needs less memory."""
        base = len(self.inputs) + len(self.outputs)
        nbytes = {base + n: size for n, size in enumerate(self.sizes) if isinstance(size, int)}
        if len(nbytes) < len(self.sizes):
            return
        count = len(self.inputs)
        found = _donations(self.inputs, tuple(self.outputs), tuple(self.items), self.results, together=True)
        in_place = [(count + out, given) for out, given in found]
        self.items = reorder(self.items, nbytes, range(count, base), in_place)

    def finish(self) -> Program:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for n, item in enumerate(self.items):
            for slot in touched(item):
                first.setdefault(slot, n)
                last[slot] = n
        base = len(self.inputs) + len(self.outputs)
        temps = tuple([Temp(size, first.get(base + n, 0), last.get(base + n, 0)) for n, size in enumerate(self.sizes)])
        items = tuple(self.items)
        donations = _donations(self.inputs, tuple(self.outputs), items, self.results)
        return Program(self.inputs, tuple(self.outputs), temps, items, tuple(self.results), donations, self.dims())

    def dims(self) -> tuple[str, ...]:
        names: dict[str, None] = dict.fromkeys(self.fused.function.dims)
        for item in self.items:
            for found in _item_dims(item):
                names.setdefault(found)
        for t in self.outputs:
            for name in t.names:
                names.setdefault(name)
        return tuple(names)


def _item_dims(item: Item) -> tuple[str, ...]:
    if isinstance(item, Step):
        return item.dims()
    if isinstance(item, Cond):
        return item.then.dims + item.orelse.dims
    return item.test.dims + item.body.dims if isinstance(item, While) else ()


# -------------------------------------------------------------------------------------------------------- donations
_EARLIER = 32  # inputs read before that are noted for one output


def _donations(
    inputs: tuple[TensorType, ...],
    outputs: tuple[TensorType, ...],
    items: tuple[Item, ...],
    results: list[int],
    together: bool = False,
) -> tuple[tuple[int, int], ...]:
    """Pairs (output, input) that may share memory: the input is read for the last time before the output is first written, or in the
    same kernel at the very position that is written. For each output, pairs of one kernel come first (an optimiser's new and old parameter);
    `together`: only those, whoever reads the input later."""
    last_read: dict[int, int] = {}
    first_write: dict[int, int] = {}
    for n, item in enumerate(items):
        reads, writes = reads_writes(item)
        for slot in reads:
            last_read[slot] = n
        for slot in writes:
            first_write.setdefault(slot, n)
    free: dict[tuple[object, object], list[int]] = {}
    for n, t in enumerate(inputs):
        if n not in results and t.size != 0:
            free.setdefault((t.dtype, t.size), []).append(n)
    found: list[tuple[int, int]] = []
    for out, t in enumerate(outputs):
        written = first_write.get(len(inputs) + out)
        if written is None:
            continue
        candidates = free.get((t.dtype, t.size), ())
        last = reads_writes(items[written])[0] if together else [n for n in candidates if last_read.get(n) == written]
        found += [(out, n) for n in candidates if n in last and _same_position(items[written], n, len(inputs) + out)]
        if not together:
            found += [(out, n) for n in candidates if last_read.get(n, -1) < written][:_EARLIER]
    return tuple(found)


def _same_position(item: Item, source: int, target: int) -> bool:
    """Whether the kernel reads `source` only where, and no later than, it writes `target`."""
    if not isinstance(item, Step) or item.slots.count(source) != 1 or item.slots.count(target) != 1:
        return False
    read, written = item.slots.index(source), item.slots.index(target)
    kernel = item.kernel
    if isinstance(kernel, ScatterKernel):
        return read == 0 and all(a.buffer != 0 for a in _loads(kernel.body))
    if isinstance(kernel, ContractKernel | ConvKernel):
        if read in (kernel.a.buffer, kernel.b.buffer):
            return False
        return _in_place([((), kernel.body, kernel.stores)], read, written)
    if isinstance(kernel, LoopKernel):
        return _in_place([(s.axes, s.body, s.stores) for s in kernel.stages], read, written)
    return False


def _in_place(stages: list[tuple[tuple[DimLike, ...], Body, tuple[Store, ...]]], read: int, written: int) -> bool:
    stores = [(n, s.access) for n, (_, _, ss) in enumerate(stages) for s in ss if s.access.buffer == written]
    if len(stores) != 1:
        return False
    last, store = stores[0]
    for n, (axes, body, _) in enumerate(stages):
        for access in _loads(body):
            if access.buffer != read:
                continue
            # A load over other inner axes may touch other elements of the row; one in a later stage comes after the store.
            if n > last or axes != stages[last][0] or access.guards or access.index_strides or access.at != store.at:
                return False
    return True


def _loads(body: Body) -> Iterator[Access]:
    for instr in body:
        if instr.op == "load":
            access = instr.attr
            assert isinstance(access, Access)
            yield access
