"""The meaning of kernels and Programs, by NumPy: what every backend must agree with to the bit.

A kernel's whole grid is evaluated at once: a position is an index array, a scalar instruction an array operation, a reduction the
reference of `duo_ir/ops/reference.py`. Memory is poisoned before it is written, so that reading what nothing wrote shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from duo_ir.core import bind_dims
from duo_ir.errors import DuoError, IndexOutOfRange
from duo_ir.kernels.kernel import (
    Access,
    Affine,
    AttentionKernel,
    Body,
    ContractKernel,
    ConvKernel,
    Instr,
    Kernel,
    LoopKernel,
    Reduce,
    ScanKernel,
    ScatterKernel,
    SortKernel,
    Stage,
    Store,
)  # fmt: skip
from duo_ir.kernels.program import Cond, Copy, Program, Step, While
from duo_ir.ops import reference
from duo_ir.ops.attention import backward_rows, forward_rows
from duo_ir.ops.order import ranks
from duo_ir.scalar.numpy_eval import NumpyScalar, convert
from duo_ir.types import DimLike, TensorType
from duo_ir.types import evaluate as size_of

_SCALAR = NumpyScalar()
_REDUCE = {
    "sum": reference.sum_, "prod": reference.prod, "max": reference.max_, "min": reference.min_, "any": reference.any_,
    "all": reference.all_, "argmax": reference.argmax, "argmin": reference.argmin,
}  # fmt: skip
Sizes = Mapping[str, int]


def evaluate(program: Program, *arrays: np.ndarray) -> list[np.ndarray]:
    """The results of `program` on these inputs (of the inputs' dtypes and shapes)."""
    given = [np.asarray(a) for a in arrays]
    for n, (a, t) in enumerate(zip(given, program.inputs, strict=True)):
        if a.dtype != t.dtype.numpy:
            raise DuoError(f"argument {n} is {a.dtype}, but the program takes {t}")
    sizes = bind_dims(program.inputs, [a.shape for a in given])
    memory = [np.ascontiguousarray(a).reshape(-1) for a in given]
    slots = run(program, memory, sizes)
    types = program.inputs + program.outputs
    return [slots[s].reshape(types[s].static_shape(sizes)).copy() for s in program.results]


def run(
    program: Program, inputs: Sequence[np.ndarray], sizes: Sizes, given: Mapping[int, np.ndarray] | None = None
) -> list[np.ndarray]:
    """Runs the items on flat inputs; returns the flat contents of all slots. `given`: memory for some of the outputs."""
    slots = list(inputs)
    slots += [_poison(t, sizes) if given is None or n not in given else given[n] for n, t in enumerate(program.outputs)]
    temps: list[Any] = [None] * len(program.temps)  # their dtype is known when a kernel first writes them
    slots += temps
    for item in program.items:
        if isinstance(item, Step):
            buffers, own = [], item.bind(sizes)
            for slot, arg in zip(item.slots, item.kernel.args):
                if slots[slot] is None:
                    slots[slot] = _poison(TensorType(arg.dtype, (arg.size,)), own)
                buffers.append(slots[slot])
            execute(item.kernel, buffers, own)
        elif isinstance(item, Copy):
            slots[item.target][...] = slots[item.source]
        elif isinstance(item, Cond):
            chosen = item.then if slots[item.predicate][0] else item.orelse
            _hand_over(slots, item.outputs, _outputs(chosen, [slots[s] for s in item.inputs], sizes))
        else:
            _hand_over(slots, item.outputs, _loop(item, slots, sizes))
    return slots


def _loop(item: While, slots: Sequence[np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    carried, constants = [slots[s] for s in item.initial], [slots[s] for s in item.constants]
    while _outputs(item.test, carried + constants, sizes)[0][0]:
        carried = _outputs(item.body, carried + constants, sizes)
    return [c.copy() for c in carried]


def _outputs(program: Program, inputs: Sequence[np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    slots = run(program, inputs, sizes)
    return [slots[s] for s in program.results]


def _hand_over(slots: list[np.ndarray], targets: Sequence[int], values: Sequence[np.ndarray]) -> None:
    for target, value in zip(targets, values):
        slots[target] = value


def _poison(t: TensorType, sizes: Sizes) -> np.ndarray:
    out = np.empty(size_of(t.size, sizes), t.dtype.numpy)
    out.view(np.uint8)[...] = 0 if t.dtype.kind == "b" else 0xFD
    return out


# ---------------------------------------------------------------------------------------------------------- kernels
def execute(kernel: Kernel, buffers: Sequence[np.ndarray], sizes: Sizes) -> None:
    """Runs one kernel on flat buffers, one per argument. Raises IndexOutOfRange where a check fails."""
    for n, (arg, buffer) in enumerate(zip(kernel.args, buffers, strict=True)):
        if buffer.dtype != arg.dtype.numpy or buffer.size != size_of(arg.size, sizes):
            raise DuoError(
                f"argument {n} of the kernel is {buffer.dtype}[{buffer.size}], not {arg.dtype.name}[{arg.size}]"
            )
    machine = _Machine(buffers, sizes, kernel.sites)
    if isinstance(kernel, LoopKernel):
        machine.loop(kernel)
    elif isinstance(kernel, ContractKernel):
        machine.contract(kernel)
    elif isinstance(kernel, ConvKernel):
        machine.convolve(kernel)
    elif isinstance(kernel, ScanKernel):
        machine.scan(kernel)
    elif isinstance(kernel, SortKernel):
        machine.sort(kernel)
    elif isinstance(kernel, AttentionKernel):
        machine.attention(kernel)
    else:
        machine.scatter(kernel)


class _Machine:
    def __init__(self, buffers: Sequence[np.ndarray], sizes: Sizes, sites: Sequence[str]) -> None:
        self.buffers, self.sizes, self.sites = buffers, sizes, sites
        self.reduced: list[list[np.ndarray]] = []
        self.acc: np.ndarray | None = None

    def shape(self, axes: Sequence[DimLike]) -> tuple[int, ...]:
        return tuple([size_of(d, self.sizes) for d in axes])

    def position(self, affine: Affine, shape: tuple[int, ...]) -> np.ndarray:
        if len(affine.strides) != len(shape):
            raise DuoError(f"position {affine} has {len(affine.strides)} strides for {len(shape)} axes")
        out = np.asarray(size_of(affine.offset, self.sizes), np.int64)
        for k, (stride, n) in enumerate(zip(affine.strides, shape)):
            step = size_of(stride, self.sizes)
            if step:
                out = out + step * np.arange(n).reshape((n,) + (1,) * (len(shape) - 1 - k))
        return out

    def address(self, access: Access, shape: tuple[int, ...], indices: Sequence[np.ndarray]) -> np.ndarray:
        at = self.position(access.at, shape)
        for index, stride in zip(indices, access.index_strides, strict=True):
            at = at + index * size_of(stride, self.sizes)
        return np.asarray(at)

    def load(self, access: Access, shape: tuple[int, ...], args: Sequence[np.ndarray]) -> np.ndarray:
        buffer = self.buffers[access.buffer]
        count = len(access.index_strides)
        at = self.address(access, shape, args[:count])
        inside: Any = np.asarray(True)
        for guard in access.guards:
            p = self.position(guard.position, shape)
            inside = inside & (p >= 0) & (p < size_of(guard.bound, self.sizes)) & (p % guard.step == 0)
        if not access.guards:
            return self.fetch(buffer, at, shape)
        if not inside.any():
            return args[count]
        return np.where(inside, self.fetch(buffer, np.where(inside, at, 0), shape), args[count])

    def fetch(self, buffer: np.ndarray, at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, buffer.dtype)
        if at.min() < 0 or at.max() >= buffer.size:
            raise DuoError(f"a kernel reads element {at.min()}..{at.max()} of a buffer of {buffer.size}")
        return np.asarray(buffer[at])

    def store(self, store: Store, shape: tuple[int, ...], values: Sequence[np.ndarray]) -> None:
        access = store.access
        at = np.broadcast_to(self.address(access, shape, [values[i] for i in store.indices]), shape)
        if at.size and (at.min() < 0 or at.max() >= self.buffers[access.buffer].size):
            raise DuoError(
                f"a kernel writes element {at.min()}..{at.max()} of a buffer of {self.buffers[access.buffer].size}"
            )
        self.buffers[access.buffer][at] = np.broadcast_to(values[store.value], shape)

    def body(self, body: Body, shape: tuple[int, ...], outer: int) -> list[np.ndarray]:
        values: list[np.ndarray] = []
        for instr in body:
            out = self.instruction(instr, [values[a] for a in instr.args], shape, outer)
            if out.dtype != instr.dtype.numpy:
                raise DuoError(f"{instr.op} gives {out.dtype}, but says {instr.dtype.name}")
            values.append(out)
        return values

    def instruction(self, instr: Instr, args: list[np.ndarray], shape: tuple[int, ...], outer: int) -> np.ndarray:
        op = instr.op
        attr: Any = instr.attr
        if op == "const":
            return np.asarray(_SCALAR.const(attr, instr.dtype))
        if op == "load":
            return self.load(attr, shape, args)
        if op == "index":
            return self.position(attr, shape)
        if op == "dim":
            return np.asarray(size_of(attr, self.sizes), np.int64)
        if op == "reduced":
            stage, n = attr
            value = self.reduced[stage][n]
            return value.reshape(value.shape + (1,) * (len(shape) - outer))
        if op == "acc":
            assert self.acc is not None
            return self.acc
        if op == "check":
            return self.check(args[0], attr)
        if op in ("convert", "bitcast"):
            return np.asarray(getattr(_SCALAR, op)(args[0], instr.dtype))
        return np.asarray(getattr(_SCALAR, op)(*args))

    def check(self, index: np.ndarray, attr: tuple[DimLike, int]) -> np.ndarray:
        bad = (index < 0) | (index >= size_of(attr[0], self.sizes))
        if bad.any():
            raise IndexOutOfRange(self.sites[attr[1]].format(index=index[bad].flat[0] if index.ndim else index))
        return index

    # ----------------------------------------------------------------------------------------------------- the kinds
    def loop(self, kernel: LoopKernel) -> None:
        outer = self.shape(kernel.axes)
        if 0 in outer:
            return
        for stage in kernel.stages:
            shape = outer + self.shape(stage.axes)
            values = self.body(stage.body, shape, len(outer))
            for store in stage.stores:
                self.store(store, shape, values)
            self.reduced.append([self.reduce(r, stage, values, outer, shape) for r in stage.reduces])

    def reduce(
        self, reduce: Reduce, stage: Stage, values: Sequence[np.ndarray], outer: tuple[int, ...], shape: tuple[int, ...]
    ) -> np.ndarray:
        inner = int(np.prod(shape[len(outer) :], dtype=np.int64))
        rows = [np.broadcast_to(values[a], shape).reshape((*outer, inner)) for a in reduce.args]
        if reduce.kind != "dot":
            out = _REDUCE[reduce.kind](rows[0], axes=(len(outer),))
        elif reduce.dtype.is_float:
            out = reference.dot(*rows)
        else:
            out = np.sum(rows[0] * rows[1], axis=-1, dtype=reduce.dtype.numpy)
        out = np.asarray(out)
        if out.dtype != reduce.dtype.numpy:
            raise DuoError(f"reduction {reduce.kind} gives {out.dtype}, but says {reduce.dtype.name}")
        return out

    def contract(self, kernel: ContractKernel) -> None:
        batch = self.shape(kernel.batch)
        m, n, k = self.shape((kernel.m, kernel.n, kernel.k))
        out = (*batch, m, n)
        if 0 in out:
            return
        a = np.broadcast_to(self.load(kernel.a, (*batch, m, k), ()), (*batch, m, k))
        b = np.broadcast_to(self.load(kernel.b, (*batch, k, n), ()), (*batch, k, n))
        self.acc = convert(reference.matmul(a, b), kernel.result)
        values = self.body(kernel.body, out, len(out))
        for store in kernel.stores:
            self.store(store, out, values)

    def convolve(self, kernel: ConvKernel) -> None:
        images, *counts, groups, n = out = self.shape(kernel.axes)
        if 0 in out:
            return
        (c,) = self.shape((kernel.c,))
        windows = [
            [size_of(d, self.sizes) for d in (w.offset, w.stride, w.dilation, w.bound, w.taps)] for w in kernel.windows
        ]
        bounds, taps = [w[3] for w in windows], [w[4] for w in windows]
        # One more element along each spatial axis, of zeros, stands for all that is outside.
        a = self.load(kernel.a, (images, *bounds, groups, c), ())
        a = np.pad(np.broadcast_to(a, (images, *bounds, groups, c)), [(0, 0), *[(0, 1)] * len(windows), (0, 0), (0, 0)])
        for axis, (count, (offset, stride, dilation, bound, most)) in enumerate(zip(counts, windows)):
            at = offset + stride * np.arange(count)[:, None] + dilation * np.arange(most)
            read = np.take(a, np.where((at >= 0) & (at < bound), at, bound), 1 + axis)
            a = np.moveaxis(read, 2 + axis, 1 + len(windows) + axis)
        b = np.broadcast_to(self.load(kernel.b, (*taps, groups, c, n), ()), (*taps, groups, c, n))
        rows, depth = images * int(np.prod(counts)), c * int(np.prod(taps))
        left = np.moveaxis(a, -2, 0).reshape(groups, rows, depth)
        right = np.moveaxis(b, -3, 0).reshape(groups, depth, n)
        sums = np.moveaxis(reference.contract(left, right), 0, 1).reshape(out)
        self.acc = convert(sums, kernel.result)
        values = self.body(kernel.body, out, len(out))
        for store in kernel.stores:
            self.store(store, out, values)

    def scan(self, kernel: ScanKernel) -> None:
        *points, length = shape = self.shape((*kernel.axes, kernel.length))
        if 0 in shape:
            return
        late: set[int] = set()  # what depends on the state
        values: list[np.ndarray] = []
        for n, instr in enumerate(kernel.body):
            if instr.op == "saved" or late.intersection(instr.args):
                late.add(n)
                values.append(np.empty(shape, instr.dtype.numpy))
            else:
                made = self.instruction(instr, [values[a] for a in instr.args], shape, len(shape))
                values.append(np.broadcast_to(made, shape))
        state = [np.full(points, number, dtype.numpy) for dtype, number in kernel.start]
        for i in range(length):
            for n in sorted(late):
                instr = kernel.body[n]
                if instr.op == "saved":
                    values[n][..., i] = state[instr.attr]  # type: ignore[call-overload]
                else:
                    args = [values[a][..., i] for a in instr.args]
                    values[n][..., i] = self.instruction(instr, args, tuple(points), len(points))
            state = [values[n][..., i] for n in kernel.following]
        for store in kernel.stores:
            self.store(store, shape, values)

    def sort(self, kernel: SortKernel) -> None:
        shape = self.shape((*kernel.axes, kernel.length))
        out = (*shape[:-1], size_of(kernel.count, self.sizes))
        if 0 in out:
            return
        x = np.broadcast_to(self.load(kernel.source, shape, ()), shape)
        order = np.argsort(ranks(x, kernel.descending), axis=-1, kind="stable")[..., : out[-1]]
        for access, found in (
            (kernel.values, np.take_along_axis(x, order, -1)),
            (kernel.positions, order.astype(np.int64)),
        ):
            if access is not None:
                self.buffers[access.buffer][np.broadcast_to(self.position(access.at, out), out)] = found

    def attention(self, kernel: AttentionKernel) -> None:
        batch = self.shape(kernel.batch)
        t, s = self.shape((kernel.queries, kernel.keys))
        d, e = kernel.width, kernel.value_width
        if 0 in batch:
            return

        def read(access: Access, *sizes: int) -> np.ndarray:
            return np.broadcast_to(self.load(access, (*batch, *sizes), ()), (*batch, *sizes))

        shapes = [(t, d), (s, d), (s, e), (t, e)]
        tensors = [read(a, *shape) for a, shape in zip(kernel.reads, shapes)]
        rows = [read(a, t) for a in kernel.rows]
        mask = None if kernel.mask is None else read(kernel.mask, t, s)
        results: tuple[np.ndarray, ...]
        if kernel.backward:
            q, k, v, g = tensors
            lse, delta = rows
            results = backward_rows(q, k, v, lse, delta, g, mask, kernel.causal, kernel.scale)
        else:
            q, k, v = tensors
            results = forward_rows(q, k, v, mask, kernel.causal, kernel.scale)
        for access, result in zip((*kernel.writes, *([kernel.sums] if kernel.sums else [])), results, strict=True):
            if result.size:
                at = np.broadcast_to(self.position(access.at, result.shape), result.shape)
                self.buffers[access.buffer][at] = result

    def scatter(self, kernel: ScatterKernel) -> None:
        out, base = self.buffers[kernel.store.access.buffer], self.buffers[0]
        shape = self.shape(kernel.axes)
        updates = int(np.prod(shape[: kernel.sequential], dtype=np.int64))
        # An empty window still has its indices checked.
        values = self.body(kernel.body, shape, len(shape))
        out[...] = base
        if 0 in shape:
            return
        store = kernel.store
        at = np.broadcast_to(self.address(store.access, shape, [values[i] for i in store.indices]), shape).reshape(
            updates, -1
        )
        new = np.broadcast_to(values[store.value], shape).reshape(updates, -1)
        for place, value in zip(at, new):
            if kernel.mode == "add":
                with np.errstate(all="ignore"):
                    value = reference.narrow(reference.widen(out[place]) + reference.widen(value), out.dtype)
            out[place] = value
