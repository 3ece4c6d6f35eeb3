"""The end of a convolution's tile: sums rounded to the result's dtype, the kernel's body, its stores. And what has tiles: functions made when
they are first called."""

from __future__ import annotations

from collections.abc import Callable

from duo_backends.cpu.body import Emitter, Scope, Value
from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.llvm import Function, Module, register_type, vector
from duo_ir.kernels.kernel import ConvKernel
from duo_ir.types import DType

PARAMETERS = (
    "ptr %args, ptr %dims, ptr %status, i64 %image, i64 %d, i64 %h, i64 %w, i64 %group, i64 %column, i64 %columns, "
    "i64 %high, i64 %wide, ptr %tile, i64 %row"
)


def pointers_of(f: Function, kernel: ConvKernel) -> list[str]:
    """The addresses of the kernel's arguments."""
    return [
        f.op(f"load ptr, ptr {f.gep('ptr', '%args', str(k), f.top)}, align 8", f.top) for k in range(len(kernel.args))
    ]


def emit_epilogue(module: Module, target: Target, name: str, kernel: ConvKernel, compute: DType, lanes: int) -> None:
    """define void @name(PARAMETERS): the body on a tile of high x wide positions from (d, h, w), columns [column, column + columns);
    its rows are `row` bytes apart."""
    f = Function(module, f"define internal void @{name}({PARAMETERS}) noinline #0")
    emitter = Emitter(f, target, kernel.args, pointers_of(f, kernel), kernel.dims)
    type_, size = vector(lanes, register_type(compute)), compute.itemsize
    spatial = len(kernel.windows)

    def strip(number: str, mask: str | None) -> None:
        """One vector of columns, all rows."""
        offset = f.mul(number, str(lanes))
        column, at = f.add("%column", offset), f.gep("i8", "%tile", f.mul(offset, str(size)))
        with f.loop("0", "%high", 1, [("ptr", at)], runs=True) as high:
            h = f.op(f"add i64 %h, {high.index}")
            with f.loop("0", "%wide", 1, [("ptr", high.values[0])], runs=True) as wide:
                w = f.op(f"add i64 %w, {wide.index}")
                places, deepest = ("%d", h, w)[3 - spatial :], (0, 2, 3)[3 - spatial :]
                levels = (0, *deepest, 0, 1)
                regions = (f.top, high.before, wide.before, None)
                scope = Scope(("%image", *places, "%group", column), levels, regions, spatial + 2, lanes, mask)
                acc = f.op(f"load {type_}, ptr {wide.values[0]}, align {size}")
                acc = convert(f, target, acc, compute, kernel.acc, lanes, None)
                acc = convert(f, target, acc, kernel.acc, kernel.result, lanes, None)
                values = emitter.emit(kernel.body, scope, acc=Value(acc, kernel.result, True, 3))
                for store in kernel.stores:
                    emitter.store(store, values, scope)
                wide.next = [f.op(f"getelementptr i8, ptr {wide.values[0]}, i64 %row")]
            high.next = [wide.results[0]]

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


class TileEmitter:
    """What emits a convolution from tiles: its helper functions, each emitted once."""

    def __init__(
        self, module: Module, target: Target, kernel: ConvKernel, compute: DType, lanes: int, name: str
    ) -> None:
        self.module, self.target, self.kernel, self.name = module, target, kernel, name
        self.compute, self.lanes, self.size = compute, lanes, compute.itemsize
        self.made: dict[object, str] = {}

    def _function(self, key: object, kind: str, emit: Callable[[str], None]) -> str:
        """The name of a function, emitted when it is first asked for."""
        if key not in self.made:
            self.made[key] = f"{self.name}_{kind}{len(self.made)}"
            emit(self.made[key])
        return self.made[key]

    def _epilogue(self) -> str:
        def emit(name: str) -> None:
            emit_epilogue(self.module, self.target, name, self.kernel, self.compute, self.lanes)

        return self._function("epilogue", "epilogue", emit)
