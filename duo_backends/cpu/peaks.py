"""What this machine can do at most, measured: the ruler that profiles are read by."""

from __future__ import annotations

import ctypes
import functools
import time
from dataclasses import dataclass

import numpy as np

from duo_backends.cpu import jit
from duo_backends.cpu.backend import CpuBackend
from duo_backends.cpu.llvm import vector
from duo_backends.cpu.memory import fill_zero
from duo_backends.cpu.threads import get_num_threads
from duo_ir import pipeline
from duo_ir.core import Builder
from duo_ir.ops import neg
from duo_ir.types import TensorType, f32


@dataclass(frozen=True)
class Peaks:
    """What the machine does at most, measured: f32 fused multiply-adds on one core (two operations each), bytes read and
    written by a copy of 64 MiB on `threads` threads."""

    gflops: float
    gbytes: float
    threads: int

    def __str__(self) -> str:
        return f"{self.gflops:.0f} GFLOP/s a core, {self.gbytes:.0f} GB/s copying on {self.threads} threads"


def peaks() -> Peaks:
    """Measured once per number of threads; takes about 50 ms."""
    return _peaks(get_num_threads())


@functools.cache
def _peaks(threads: int) -> Peaks:
    return Peaks(_fma_rate(), _copy_rate(), threads)


_CHAINS = 24  # independent sums: more than latency times throughput of any core so far


def _fma_rate() -> float:
    machine = jit.machine()
    lanes = machine.target.vector_bytes // 4
    type_ = vector(lanes, "float")
    suffix = f"v{lanes}f32"
    phis, steps = [], []
    for k in range(_CHAINS):
        phis.append(f"  %a{k} = phi {type_} [ splat (float {k}.0), %entry ], [ %b{k}, %loop ]")
        steps.append(f"  %b{k} = call {type_} @llvm.fma.{suffix}({type_} %a{k}, {type_} %x, {type_} %x)")
    total = [f"  %s0 = fadd {type_} %b0, %b1"]
    for k in range(2, _CHAINS):
        total.append(f"  %s{k - 1} = fadd {type_} %s{k - 2}, %b{k}")
    text = "\n".join([
        f"declare {type_} @llvm.fma.{suffix}({type_}, {type_}, {type_})",
        "define void @duo_fma(i64 %n, ptr %out) #0 {",
        "entry:",
        f"  %x = load {type_}, ptr %out, align 4",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [ 0, %entry ], [ %j, %loop ]",
        *phis, *steps,
        "  %j = add i64 %i, 1",
        "  %more = icmp ult i64 %j, %n",
        "  br i1 %more, label %loop, label %exit",
        "exit:",
        *total,
        f"  store {type_} %s{_CHAINS - 2}, ptr %out, align 4",
        "  ret void",
        "}",
    ])  # fmt: skip
    library = jit.build(text, ["duo_fma"], machine)
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)(library.addresses["duo_fma"])
    rounds, best = 200_000, 0.0
    for _ in range(4):
        cell = np.full(lanes, 0.5, np.float32)
        start = time.perf_counter_ns()
        run(rounds, cell.ctypes.data)
        best = max(best, 2.0 * lanes * _CHAINS * rounds / (time.perf_counter_ns() - start))
    return best


def _copy_rate() -> float:
    nbytes = 64 << 20
    builder = Builder("copy")
    with builder:
        x = builder.parameter(TensorType(f32, (nbytes // 4,)))
        function = builder.build([neg(x)])
    backend = CpuBackend()
    bound = pipeline.compile(function, backend).bind({})
    source, best = backend.allocate(nbytes), 0.0
    fill_zero(source)
    for _ in range(4):
        start = time.perf_counter_ns()
        bound.run([source])
        best = max(best, 2.0 * nbytes / (time.perf_counter_ns() - start))
    return best
