"""Convolution for any sizes and strides: each result position in turn, vectors of output channels (of groups where each has
one), taps inside.

Symbolic extents, integer dtypes and layouts of every kind go through here. It packs nothing and keeps one vector of sums, so it is slow.
"""

from __future__ import annotations

from duo_backends.cpu.body import Emitter, Scope, Value
from duo_backends.cpu.code import SIGNATURE, Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_plan import CHUNK_BLOCKS, SEQUENTIAL_K
from duo_backends.cpu.gemm_tile import BLOCK, compute_dtype, lanes_of, multiply_add
from duo_backends.cpu.llvm import Function, Module, literal, register_type, vector
from duo_ir.kernels.kernel import Access, Affine, ConvKernel, Guard

_LEVELS = 64  # sums that wait for a neighbour, at most


def emit_plain(module: Module, target: Target, kernel: ConvKernel, name: str) -> None:
    """define void @name(SIGNATURE): units are positions of the result, of one group."""
    _Plain(module, target, kernel, name).emit()


def over_groups(kernel: ConvKernel) -> bool:
    """Whether the lanes are groups: each has one output channel."""
    return kernel.n == 1 and kernel.groups != 1


class _Plain:
    def __init__(self, module: Module, target: Target, kernel: ConvKernel, name: str) -> None:
        self.kernel, self.target = kernel, target
        self.compute = compute_dtype(kernel.acc)
        self.lanes = lanes_of(target, self.compute)
        f = self.f = Function(module, f"define void @{name}({SIGNATURE}) #0")
        pointers = [
            f.op(f"load ptr, ptr {f.gep('ptr', '%args', str(k), f.top)}, align 8", f.top)
            for k in range(len(kernel.args))
        ]
        self.emitter = Emitter(f, target, kernel.args, pointers, kernel.dims)
        self.type = vector(self.lanes, register_type(self.compute))

    def emit(self) -> None:
        f, kernel, dim = self.f, self.kernel, self.emitter.dim
        self.c = dim(kernel.c)
        outer, lanes = kernel.axes[:-1], kernel.n
        if over_groups(kernel):
            outer, lanes = (*kernel.axes[:-2], kernel.n), kernel.groups
        self.n = dim(lanes)
        self.taps = [dim(w.taps) for w in kernel.windows]
        depth = self.c
        for t in self.taps:
            depth = f.mul(depth, t, f.top)
        self.depth = depth
        long = f.pure(f"icmp sgt i64 {depth}, {SEQUENTIAL_K}", f.top)
        self.chunk = f.pure(f"select i1 {long}, i64 {BLOCK * CHUNK_BLOCKS}, i64 {depth}", f.top)
        self.waiting = f.alloca(self.type, _LEVELS)
        with f.loop("%begin", "%end") as unit:
            indices = self._unravel(unit.index, [dim(d) for d in outer])
            # The mask must not be a constant: LLVM makes a store of one narrow lane that was truncated wider than the lane.
            with f.loop("0", self.n, self.lanes, opaque=True) as loop:
                numbers = ", ".join(f"i64 {lane}" for lane in range(self.lanes))
                count = self.emitter.splat_scalar(f.sub(self.n, loop.index), "i64", self.lanes)
                mask = f.op(f"icmp slt {vector(self.lanes, 'i64')} <{numbers}>, {count}")
                self._vector(indices, loop.index, mask)
        f.finish()

    def _unravel(self, index: str, sizes: list[str]) -> list[str]:
        f = self.f
        out: list[str] = []
        for size in reversed(sizes[1:]):
            out.insert(0, f.rem(index, size))
            index = f.div(index, size)
        return [index, *out]

    def _place(self, indices: list[str], lane: str) -> tuple[list[str], int]:
        """(index along each axis of the result, which of them runs over the lanes)."""
        if over_groups(self.kernel):
            return [*indices[:-1], lane, indices[-1]], len(indices) - 1
        return [*indices, lane], len(indices)

    def _vector(self, indices: list[str], column: str, mask: str) -> None:
        """One vector of output channels at one position."""
        f, kernel = self.f, self.kernel
        zero = "zeroinitializer"
        total = f.alloca(self.type)
        f.emit(f"store {self.type} {zero}, ptr {total}, align 64")
        with f.loop("0", self.depth, self.chunk) as chunk:
            end = f.min(f.add(chunk.index, self.chunk), self.depth)
            with f.loop(chunk.index, end, BLOCK, [(self.type, zero)], runs=True) as block:
                acc = self._block(indices, column, mask, block.index, f.min(f.add(block.index, str(BLOCK)), end))
                first = f.op(f"icmp eq i64 {block.index}, {chunk.index}")
                summed = self._add(block.values[0], acc)
                block.next = [f.op(f"select i1 {first}, {self.type} {acc}, {self.type} {summed}")]
            number = f.op(f"udiv i64 {chunk.index}, {self.chunk}")
            last = f.op(f"icmp eq i64 {end}, {self.depth}")
            self._combine(number, last, block.results[0], total)
        acc = f.op(f"load {self.type}, ptr {total}, align 64")
        acc = convert(f, self.target, acc, self.compute, kernel.acc, self.lanes, None)
        acc = convert(f, self.target, acc, kernel.acc, kernel.result, self.lanes, None)
        place, axis = self._place(indices, column)
        scope = Scope.flat(place, axis, self.lanes, mask)
        values = self.emitter.emit(kernel.body, scope, acc=Value(acc, kernel.result, True, 0))
        for store in kernel.stores:
            self.emitter.store(store, values, scope)

    def _add(self, x: str, y: str) -> str:
        return self.f.op(f"{'fadd' if self.compute.is_float else 'add'} {self.type} {x}, {y}")

    def _combine(self, number: str, last: str, value: str, total: str) -> None:
        """Chunk `number` joins those that wait, as a binary counter carries; after the last all that is left joins from the right."""
        f = self.f
        level = f.op(f.intrinsic("ctpop", "i64", [("i64", number)]))
        carries = f.op(f.intrinsic("cttz", "i64", [("i64", f.op(f"xor i64 {number}, -1")), ("i1", "false")], "i64"))
        merges = f.op(f"select i1 {last}, i64 {level}, i64 {carries}")
        with f.loop("0", merges, 1, [(self.type, value)]) as loop:
            place = f.gep(self.type, self.waiting, f.sub(f.sub(level, loop.index), "1"))
            left = f.op(f"load {self.type}, ptr {place}, align 64")
            loop.next = [self._add(left, loop.values[0])]
        place = f.gep(self.type, self.waiting, f.sub(level, merges))
        f.emit(f"store {self.type} {loop.results[0]}, ptr {place}, align 64")
        with f.when(last):
            f.emit(f"store {self.type} {loop.results[0]}, ptr {total}, align 64")

    def _block(self, indices: list[str], column: str, mask: str, begin: str, end: str) -> str:
        """The sum over k in [begin, end)."""
        f, kernel, emitter = self.f, self.kernel, self.emitter
        (image, *positions, group, n), _ = self._place(indices, column)
        grouped = over_groups(kernel)
        element = register_type(self.compute)
        first, last = f.op(f"udiv i64 {begin}, {self.c}"), f.op(f"udiv i64 {f.sub(end, '1')}, {self.c}")
        with f.loop(first, f.add(last, "1"), 1, [(self.type, "zeroinitializer")], runs=True) as tap:
            base = f.mul(tap.index, self.c)
            low = f.op(f.intrinsic("smax", "i64", [("i64", f.sub(begin, base)), ("i64", "0")]))
            high = f.min(f.sub(end, base), self.c)
            taps = self._unravel(tap.index, self.taps)
            spatial, guards = [], []
            for axis, (w, q, t) in enumerate(zip(kernel.windows, positions, taps)):
                at = f.add(emitter.dim(w.offset), f.mul(q, emitter.dim(w.stride)))
                spatial.append(f.add(at, f.mul(t, emitter.dim(w.dilation))))
                strides = tuple([1 if k == 1 + axis else 0 for k in range(len(kernel.windows) + 3)])
                guards.append(Guard(Affine(0, strides), w.bound))
            with f.loop(low, high, 1, [(self.type, tap.values[0])], runs=True) as c:
                a_type, b_type = kernel.args[kernel.a.buffer].dtype, kernel.args[kernel.b.buffer].dtype
                guarded = Access(kernel.a.buffer, kernel.a.at, tuple(guards))
                zero = Value(literal(0, a_type), a_type, False, 0)
                place = (image, *spatial, group, c.index)
                scope = Scope.flat(place, len(place) - 2, self.lanes, mask) if grouped else Scope.flat(place)
                a = emitter.load(guarded, [zero], a_type, scope)
                if grouped:
                    left = convert(f, self.target, emitter.splat(scope, a), a_type, self.compute, self.lanes, None)
                else:
                    left = convert(f, self.target, a.name, a_type, self.compute, 1, None)
                    left = emitter.splat_scalar(left, element, self.lanes)
                scope = Scope.flat((*taps, group, c.index, n), len(taps) + (0 if grouped else 2), self.lanes, mask)
                b = emitter.load(kernel.b, [], b_type, scope)
                right = convert(f, self.target, emitter.splat(scope, b), b_type, self.compute, self.lanes, None)
                c.next = [multiply_add(f, self.type, left, right, c.values[0], self.compute)]
            tap.next = [c.results[0]]
        return tap.results[0]
