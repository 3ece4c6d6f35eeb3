"""One row of A times a panel of B (x w of one sample, weights cut into panels): several blocks of K at once.

A panel has few columns, so that one block after the other each multiply-add would wait for the one before it, and B would arrive no faster.
The blocks' sums do not depend on each other: those of some are carried side by side, and added in order afterwards (numerics contract, rule 2).
"""

from __future__ import annotations

from duo_backends.cpu.body import Emitter
from duo_backends.cpu.code import SIGNATURE, Target
from duo_backends.cpu.gemm_epilogue import emit_epilogue, pointers
from duo_backends.cpu.gemm_plan import SEQUENTIAL_K, Plan
from duo_backends.cpu.gemm_tile import BLOCK, broadcast, multiply_add, registers_of
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector
from duo_ir.kernels.kernel import Access

_UNROLLED = 2  # k steps


def blocks_at_once(plan: Plan, target: Target) -> int:
    """How many blocks' sums are carried at once; 0 where the product is no such line, or nothing is won."""
    kernel = plan.kernel
    types = {kernel.args[access.buffer].dtype for access in (kernel.a, kernel.b)}
    one_panel = kernel.m == 1 and kernel.n == plan.panel and kernel.b.at.strides[-1] == 1
    strides = (*kernel.batch, kernel.a.at.offset, kernel.b.at.offset, *kernel.a.at.strides, *kernel.b.at.strides)
    if not one_panel or types != {plan.compute} or not all(isinstance(d, int) for d in strides):
        return 0
    if not isinstance(kernel.k, int) or kernel.k > SEQUENTIAL_K:
        return 0
    most = registers_of(target) * 3 // 4 // plan.vectors
    return min(most, kernel.k // BLOCK) if most > 1 and kernel.k // BLOCK > 1 else 0


def emit_line(
    module: Module, target: Target, plan: Plan, name: str, linkage: str, streams: frozenset[int], at_once: int
) -> None:
    """@name (SIGNATURE): a unit is one entry of the batch."""
    kernel = plan.kernel
    multiply, finish = f"{name}_line", f"{name}_epilogue"
    _emit_sums(module, target, plan, multiply, at_once)
    emit_epilogue(module, target, plan, finish, streams)
    f = Function(module, f"define {linkage}void @{name}({SIGNATURE}) #0")
    emitter = Emitter(f, target, kernel.args, pointers(f, kernel), kernel.dims)
    type_ = vector(plan.lanes, register_type(plan.compute))
    tile = f.alloca(type_, plan.vectors)
    with f.loop("%begin", "%end") as unit:
        batch: list[str] = []
        number = unit.index
        for axis in reversed(range(len(kernel.batch))):
            size = emitter.dim(kernel.batch[axis])
            batch.insert(0, f.rem(number, size) if axis else number)
            number = f.div(number, size) if axis else number

        def operand(access: Access) -> str:
            at = emitter.dim(access.at.offset)
            for index, stride in zip(batch, access.at.strides, strict=False):
                at = f.add(at, f.mul(index, emitter.dim(stride)))
            return f.gep(memory_type(plan.compute), emitter.pointers[access.buffer], at)

        f.emit(f"call void @{multiply}(ptr {operand(kernel.a)}, ptr {operand(kernel.b)}, ptr {tile})")
        entry = "".join(f"i64 {b}, " for b in batch)
        row_bytes = plan.panel * plan.compute.itemsize
        f.emit(
            f"call void @{finish}(ptr %args, ptr %dims, ptr %status, {entry}i64 0, i64 1, i64 0, i64 {plan.panel}, "
            f"ptr {tile}, i64 {row_bytes})"
        )
    f.finish()


def _emit_sums(module: Module, target: Target, plan: Plan, name: str, at_once: int) -> None:
    """void name(ptr a, ptr b, ptr tile): all of K."""
    kernel, compute, vectors = plan.kernel, plan.compute, plan.vectors
    assert isinstance(kernel.k, int)
    parameters = "ptr noalias readonly %a, ptr noalias readonly %b, ptr noalias %tile"
    f = Function(module, f"define internal void @{name}({parameters}) noinline #0")
    element, item = register_type(compute), compute.itemsize
    type_, size = vector(plan.lanes, element), plan.lanes * item
    (*_, a_step), (*_, b_step, _) = kernel.a.at.strides, kernel.b.at.strides
    assert isinstance(a_step, int) and isinstance(b_step, int)
    a_bytes, b_bytes = a_step * item, b_step * item

    def sums(first: int, blocks: int, steps: int) -> list[list[str]]:
        """The sums of `blocks` blocks of `steps` steps from step `first` on."""
        unrolled = _UNROLLED if steps % _UNROLLED == 0 else 1
        start = [("ptr", f.gep("i8", "%a", str(first * a_bytes))), ("ptr", f.gep("i8", "%b", str(first * b_bytes)))]
        with f.loop("0", str(steps), unrolled, [*start, *[(type_, "zeroinitializer")] * (blocks * vectors)]) as loop:
            a_at, b_at, *acc = loop.values
            for u in range(unrolled):
                for block in range(blocks):
                    k = block * BLOCK + u
                    scalar = f.op(f"load {element}, ptr {f.gep('i8', a_at, str(k * a_bytes))}, align {item}")
                    splat = broadcast(f, scalar, plan.lanes, element)
                    for v in range(vectors):
                        at = f.gep("i8", b_at, str(k * b_bytes + v * size))
                        column = f.op(f"load {type_}, ptr {at}, align {item}")
                        place = block * vectors + v
                        acc[place] = multiply_add(f, type_, splat, column, acc[place], compute)
            loop.next = [
                f.op(f"getelementptr i8, ptr {a_at}, i64 {unrolled * a_bytes}"),
                f.op(f"getelementptr i8, ptr {b_at}, i64 {unrolled * b_bytes}"),
                *acc,
            ]
        found = loop.results[2:]
        return [found[i : i + vectors] for i in range(0, len(found), vectors)]

    total: list[str] = []
    add = "fadd" if compute.is_float else "add"
    full, rest = divmod(kernel.k, BLOCK)
    groups = [(k, min(at_once, full - k), BLOCK) for k in range(0, full, at_once)]
    for first, blocks, steps in [*groups, *([(full, 1, rest)] if rest else [])]:
        for block in sums(first * BLOCK, blocks, steps):
            total = [f.op(f"{add} {type_} {x}, {y}") for x, y in zip(total, block)] if total else block
    for v, value in enumerate(total):
        f.emit(f"store {type_} {value}, ptr {f.gep('i8', '%tile', str(v * size))}, align {size}")
    f.finish()
