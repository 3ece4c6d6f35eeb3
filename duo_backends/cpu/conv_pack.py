"""Packing of a convolution's weights: panels of columns, [k][vectors * lanes], k running over (taps, channels).

What a frontend keeps as [o, c, taps...] has neither columns nor channels side by side; it is *turned*: read along its memory, (channel, tap), some
channels at a time, transposed in registers and put where (tap, channel) says. Anything else goes run by run through `gemm_pack.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from duo_backends.cpu.code import Target
from duo_backends.cpu.conv_plan import Plan
from duo_backends.cpu.conv_tile import RUN_WORDS
from duo_backends.cpu.convert import convert
from duo_backends.cpu.gemm_pack import emit_copy, emit_gather, emit_transpose, load_transposed
from duo_backends.cpu.gemm_tile import transposed_lanes
from duo_backends.cpu.llvm import Function, Module, memory_type, register_type, vector
from duo_ir.types import DType

OnDemand = Callable[[object, str, Callable[[str], None]], str]
MOST_TURNED = 64  # taps that the code of turning writes out
AHEAD = 256  # bytes that each column is fetched ahead: more streams than the hardware follows


class WeightPacker:
    """Emits the packing of panels. `function(key, kind, emit)`: the name of a function, emitted when it is first asked for."""

    def __init__(self, module: Module, target: Target, plan: Plan, dtype: DType, function: OnDemand) -> None:
        self.module, self.target, self.plan, self.dtype, self.function = module, target, plan, dtype, function

    @property
    def taps(self) -> int:
        return math.prod(axis.taps for axis in self.plan.axes)

    @property
    def turns(self) -> bool:
        """Whether w lies as [column, channel, taps...], the taps without gaps."""
        step, (_, c, n) = 1, self.plan.w_steps
        for axis in reversed(self.plan.axes):
            if axis.taps > 1 and axis.w_step != step:
                return False
            step *= axis.taps
        return n != 1 and 1 < step <= MOST_TURNED and c == step and self.plan.c >= 16 // self.plan.compute.itemsize

    def row(self, vectors: int) -> int:
        """Bytes of a packed k."""
        return vectors * self.plan.lanes * self.plan.compute.itemsize

    # --------------------------------------------------------------------------------------------------- whole panels
    def turn(self, f: Function, w: str, group: str, panel: str, to: str, vectors: int) -> None:
        """All k of one panel."""
        plan, item, lanes = self.plan, self.dtype.itemsize, self.plan.lanes
        group_step, _, n = plan.w_steps
        row = self.row(vectors)
        name = self.function(("turn", row), "turn", lambda name: self._emit_turn(name, row))
        column = f.mul(panel, str(plan.panel))
        start = f.gep("i8", w, f.add(f.mul(group, str(group_step * item)), f.mul(column, str(n * item))))
        last = f.sub(f.sub(str(plan.n), column), "1")
        with f.loop("0", str(vectors * lanes), lanes, runs=True) as lane:
            begin = f.min(lane.index, last)
            valid = f.min(f.sub(f.add(last, "1"), begin), str(lanes))
            from_ = f.gep("i8", start, f.mul(begin, str(n * item)))
            f.emit(
                f"call void @{name}(ptr {from_}, i64 {valid}, ptr {f.gep('i8', to, f.mul(lane.index, str(plan.compute.itemsize)))})"
            )

    def _emit_turn(self, name: str, row: int) -> None:
        """define void @name(ptr source, i64 valid, ptr to): one vector of columns."""
        plan, item, compute = self.plan, self.dtype.itemsize, self.plan.compute
        f = Function(
            self.module,
            f"define internal void @{name}(ptr noalias readonly %source, i64 %valid, ptr noalias %to) noinline #0",
        )
        apart, lanes, steps = plan.w_steps[2] * item, plan.lanes, 16 // compute.itemsize
        packed = vector(lanes, register_type(compute))

        # Where vectors are not full all goes element by element, like the last channels.
        full = f.op(f"icmp eq i64 %valid, {lanes}")
        whole = f.op(f"select i1 {full}, i64 {plan.c // steps * steps}, i64 0")
        with f.loop("0", whole, steps) as c:
            source = f.gep("i8", "%source", f.mul(c.index, str(self.taps * item)))
            at = f.gep("i8", "%to", f.mul(c.index, str(row)))
            for ahead in range(AHEAD, AHEAD + self.taps * steps * item, 64):
                for number in range(lanes):
                    place = f.gep("i8", source, str(number * apart + ahead))
                    f.emit(
                        f.intrinsic(
                            "prefetch", "void", [("ptr", place), ("i32", "0"), ("i32", "3"), ("i32", "1")], "p0"
                        )
                    )
            for i in range(self.taps):
                pieces = [f.gep("i8", source, str(lane * apart + i * steps * item)) for lane in range(lanes)]
                for j, value in enumerate(load_transposed(f, self.target, pieces, self.dtype, compute)):
                    of_group, of_tap = divmod(i * steps + j, self.taps)
                    place = f.gep("i8", at, str((of_tap * plan.c + of_group) * row))
                    f.emit(f"store {packed} {value}, ptr {place}, align {compute.itemsize}")
        with f.loop(whole, str(plan.c)) as c, f.loop("0", str(self.taps)) as tap, f.loop("0", "%valid") as lane:
            offset = f.add(
                f.mul(c.index, str(self.taps * item)), f.add(f.mul(tap.index, str(item)), f.mul(lane.index, str(apart)))
            )
            value = f.op(f"load {memory_type(self.dtype)}, ptr {f.gep('i8', '%source', offset)}, align {item}")
            value = convert(f, self.target, value, self.dtype, compute, 1, None)
            k = f.add(f.mul(tap.index, str(plan.c)), c.index)
            place = f.gep("i8", "%to", f.add(f.mul(k, str(row)), f.mul(lane.index, str(compute.itemsize))))
            f.emit(f"store {register_type(compute)} {value}, ptr {place}, align {compute.itemsize}")
        f.finish()

    # ---------------------------------------------------------------------------------------------------- run by run
    def _packer(self, vectors: int) -> tuple[str, int]:
        """(packing function, columns it packs at once)."""
        plan, module, target = self.plan, self.module, self.target
        _, c, n = plan.w_steps
        dtype, compute, lanes = self.dtype, plan.compute, plan.lanes
        if n == 1:
            copy = self.function(
                ("copy", vectors),
                "copy",
                lambda name: emit_copy(module, target, name, dtype, compute, lanes, vectors, lanes * compute.itemsize),
            )
            return copy, lanes * vectors
        gather = self.function("gather", "gather", lambda name: emit_gather(module, target, name, dtype, compute))
        if c != 1:
            return gather, lanes
        some = transposed_lanes(target, compute)
        transpose = self.function(
            "transpose", "transpose", lambda name: emit_transpose(module, target, name, gather, dtype, compute, some)
        )
        return transpose, some

    def pack(self, f: Function, w: str, group: str, panel: str, runs: str, count: str, to: str, vectors: int) -> None:
        """One K block, given its runs. Lanes wholly beyond the last column repeat it."""
        plan, item, size = self.plan, self.dtype.itemsize, self.plan.compute.itemsize
        name, at_once = self._packer(vectors)
        group_step, c, n = plan.w_steps
        row = self.row(vectors)
        column = f.mul(panel, str(plan.panel))
        start = f.add(f.mul(group, str(group_step * item)), f.mul(column, str(n * item)))
        with f.loop("0", count, 1, [("ptr", to)], runs=True) as run:
            entry = f.gep("i64", runs, f.mul(run.index, str(RUN_WORDS)))
            length = f.op(f"load i64, ptr {f.gep('i64', entry, '1')}, align 8")
            offset = f.op(f"load i64, ptr {f.gep('i64', entry, '2')}, align 8")
            source = f.gep("i8", w, f.add(start, f.mul(offset, str(item))))
            last = f.sub(f.sub(str(plan.n), column), "1")
            with f.loop("0", str(vectors * plan.lanes), at_once, runs=True) as lane:
                begin = f.min(lane.index, last)
                valid = f.min(f.sub(f.add(last, "1"), begin), str(at_once))
                from_ = f.gep("i8", source, f.mul(begin, str(n * item)))
                place = f.gep("i8", run.values[0], f.mul(lane.index, str(size)))
                f.emit(
                    f"call void @{name}(ptr {from_}, i64 {n * item}, i64 {c * item}, i64 {valid}, i64 {length}, ptr {place}, i64 {row})"
                )
            run.next = [f.gep("i8", run.values[0], f.mul(length, str(row)))]
