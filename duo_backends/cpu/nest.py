"""What the loop emitters share: a phase function's frame, work units to indices, loops over lanes, choice of width."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from duo_backends.cpu.body import Emitter
from duo_backends.cpu.code import SIGNATURE, Target
from duo_backends.cpu.llvm import Function, Module, is_literal
from duo_ir.kernels.collapse import accesses
from duo_ir.kernels.kernel import Body, Instr, Kernel, Stage
from duo_ir.types import DimLike, evaluate

BLOCK = 1024  # elements of a flat map in one work unit
_HEAVY = 12  # instructions of a body whose steps wait for each other long enough
_TOGETHER = 4  # vectors
_UNTIMED = ("const", "dim", "index", "reduced", "saved")
_MANY = 1 << 16  # points from which more code pays


def symbol(kernel: Kernel, target: Target) -> str:
    """A name that depends on the kernel and target alone."""
    text = f"{replace(kernel, sites=())!r} {target!r}"
    return "duo_" + hashlib.sha256(text.encode()).hexdigest()[:20]


class Phase:
    """A phase function being emitted: `f`, and `e` to emit bodies with. `streams`: arguments that whole vectors are stored to past
    the caches."""

    def __init__(
        self,
        module: Module,
        name: str,
        kernel: Kernel,
        target: Target,
        internal: bool = False,
        streams: frozenset[int] = frozenset(),
    ) -> None:
        linkage = "internal " if internal else ""
        self.f = Function(module, f"define {linkage}void @{name}({SIGNATURE}) #0")
        self.name = name
        self.target = target
        f = self.f
        pointers = [
            f.pure(f"load ptr, ptr {f.gep('ptr', '%args', str(k), f.top)}, align 8", f.top)
            for k in range(len(kernel.args))
        ]
        self.e = Emitter(f, target, kernel.args, pointers, kernel.dims, streams=streams)

    def unravel(self, unit: str, sizes: Sequence[DimLike]) -> list[str]:
        """The row-major indices of a flat number."""
        f, out = self.f, []
        for k in range(len(sizes) - 1, -1, -1):
            if k == 0:
                out.append(unit)
                break
            size = self.e.dim(sizes[k])
            out.append(f.rem(unit, size))
            unit = f.div(unit, size)
        return out[::-1]

    def lane_mask(self, count: str, width: int) -> str:
        """<width x i1>: lanes below the i64 `count` (which may exceed the width)."""
        bits = 32 if width <= 16 else 8
        f = self.f
        capped = f.min(count, str(width))
        short = f.pure(f"trunc i64 {capped} to i{bits}")
        lanes = f"<{', '.join(f'i{bits} {k}' for k in range(width))}>"
        return f.pure(f"icmp ult <{width} x i{bits}> {lanes}, {self.e.splat_scalar(short, f'i{bits}', width)}")

    def over_lanes(
        self,
        begin: str,
        end: str,
        width: int,
        emit: Callable[[str, int, str | None], None],
        scalar_tail: bool,
        together: int = 1,
    ) -> None:
        """emit(index, width, mask) over [begin, end): full vectors, first `together` of them as one, then what is left under a mask or one by
        one."""
        f = self.f
        if together > 1:
            wide = width * together
            count = f.sub(end, begin)
            whole = str(int(count) // wide * wide) if is_literal(count) else f.pure(f"and i64 {count}, {-wide}")
            if whole != "0":
                middle = f.add(begin, whole)
                with f.loop(begin, middle, wide) as loop:
                    emit(loop.index, wide, None)
                begin = middle
            if whole == count:
                return
        count = f.sub(end, begin)
        if is_literal(count):
            whole = str(int(count) // width * width)
        else:
            whole = f.pure(f"and i64 {count}, {-width}")
        middle = f.add(begin, whole)
        if whole != "0":
            with f.loop(begin, middle, width) as loop:
                emit(loop.index, width, None)
        if whole == count:
            return
        if scalar_tail:
            with f.loop(middle, end) as loop:
                emit(loop.index, 1, None)
            return
        if is_literal(count):
            emit(middle, width, self.lane_mask(str(int(count) - int(whole)), width))
            return
        with f.when(f.pure(f"icmp slt i64 {middle}, {end}")):
            emit(middle, width, self.lane_mask(f.sub(end, middle), width))


def lanes_for(bodies: Sequence[Body], target: Target) -> int:
    """Lanes that fill a vector with the widest element that is loaded, converted or computed (addresses aside)."""
    widest = 1
    for body in bodies:
        for instr in body:
            if instr.op in ("index", "dim", "check", "const") or (instr.op != "load" and instr.dtype.name == "i64"):
                continue
            widest = max(widest, instr.dtype.itemsize)
    return max(2, target.vector_bytes // widest)


def together(stage: Stage, axis: int, points: DimLike) -> int:
    """How many vectors along `axis` to compute as one, instruction by instruction: a long body is a chain of instructions that wait for each other,
    and a processor that meets the chains one after the other sees only as many as its queues hold. `points`: of the stage."""
    large = isinstance(points, int) and points >= _MANY
    return _TOGETHER if large and is_long(stage) and is_plain(stage, axis) else 1


def _timed(stage: Stage) -> list[Instr]:
    return [i for i in stage.body if i.op not in _UNTIMED]


def is_long(stage: Stage) -> bool:
    """Whether its body is a long chain."""
    return len(_timed(stage)) >= _HEAVY


def is_plain(stage: Stage, axis: int) -> bool:
    """Whether several vectors along `axis` are as good as one: elements of one size, side by side."""
    timed = _timed(stage)
    size = max((i.dtype.itemsize for i in timed), default=1)
    near = all(a.at.strides[axis] in (0, 1) and not a.index_strides and not a.guards for a, _ in accesses(stage))
    return near and all(i.op not in ("check", "convert") and i.dtype.itemsize in (1, size) for i in timed)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def points(sizes: Sequence[DimLike], values: Mapping[str, int]) -> int:
    total = 1
    for d in sizes:
        total *= evaluate(d, values)
    return total
