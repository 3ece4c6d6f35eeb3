"""What the conformance tests share: one Function on the interpreter and on the CPU backend, fused and not, on one thread and
on two, compared by `==` on bits (NaN equal to NaN).

Work is split between threads however small it is, and the memory that results will take is poisoned first, so that an
element nobody writes shows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from duo_backends.cpu import table
from duo_backends.cpu.backend import CpuBackend
from duo_backends.cpu.threads import get_num_threads, set_num_threads
from duo_ir import ops
from duo_ir.core import Function, Value, bind_dims, current_builder, function_of
from duo_ir.interpret import interpret
from duo_ir.pipeline import compile as compile_function
from duo_ir.types import DType, TensorType
from duo_ir.types import dtype as dtype_of

sys.path.append(str(Path(__file__).parent.parent / "ir"))  # the op table and the random programs

POISON = 0xFD


@cache
def backend(cpu: str | None = None) -> CpuBackend:
    """One backend per machine for all tests, so that a kernel is compiled once."""
    return CpuBackend(cpu)


@contextmanager
def every_phase_split() -> Iterator[None]:
    """Programs bound inside share out all their work, also what is far too small to be worth it."""
    serial, share = table.SERIAL_NANOSECONDS, table.SHARE_NANOSECONDS
    table.SERIAL_NANOSECONDS, table.SHARE_NANOSECONDS = 0, 1e-9
    try:
        yield
    finally:
        table.SERIAL_NANOSECONDS, table.SHARE_NANOSECONDS = serial, share


@contextmanager
def thread_count(n: int) -> Iterator[None]:
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ comparing
def same(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and not differing(got, want).any()


def differing(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype and shape differ in bits and are not both NaN."""
    if got.dtype.kind in "iub":
        return np.asarray(got != want)
    bits = np.dtype(f"u{got.dtype.itemsize}")
    raw = [np.ascontiguousarray(x).view(bits).reshape(x.shape) for x in (got, want)]
    with np.errstate(all="ignore"):
        return np.asarray((raw[0] != raw[1]) & ~(np.isnan(got) & np.isnan(want)))


def difference(got: np.ndarray, want: np.ndarray, arrays: Sequence[np.ndarray] = ()) -> str:
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}"
    where = np.argwhere(differing(got, want))
    first = tuple(where[0])
    inputs = [a[first] for a in arrays if a.shape == got.shape]
    text = (
        f"{len(where)} of {got.size} elements differ; at {[int(i) for i in first]}: {got[first]!r}, not {want[first]!r}"
    )
    return text + (f" for {inputs}" if inputs else "")


# --------------------------------------------------------------------------------------------------------------- running
def outcomes(
    function: Function,
    *runs: Sequence[np.ndarray],
    fusions: Sequence[bool] = (True, False),
    threads: Sequence[int] = (1, 2),
    cpu: str | None = None,
) -> Iterator[tuple[str, int, list[np.ndarray]]]:
    """(how it ran, number of the run, results) of the compiled function for each choice and each list of arrays in `runs`."""
    machine = backend(cpu)
    for fusion in fusions:
        with every_phase_split():
            executable = compile_function(function, machine, fusion=fusion)
            bounds = [executable.bind(bind_dims(function.param_types, [a.shape for a in arrays])) for arrays in runs]
        for n in threads:
            with thread_count(n):
                for k, (bound, arrays) in enumerate(zip(bounds, runs)):
                    how = f"{cpu or 'native'}, {'fused' if fusion else 'unfused'}, {n} threads"
                    yield how, k, run_once(machine, function, bound, arrays)
                    if k == 0 and n == threads[-1]:
                        given_away = run_once(machine, function, bound, arrays, donated=range(len(arrays)))
                        yield f"{how}, inputs given away", k, given_away


def run_once(
    machine: Any, function: Function, bound: Any, arrays: Sequence[Any], donated: Collection[int] = ()
) -> list[np.ndarray]:
    """The results of one run on arrays (Python numbers where the program takes scalars), in memory that held poison."""
    buffers = [a if type(a) in (int, float, bool) else machine.from_numpy(np.asarray(a)) for a in arrays]
    sizes_of = bind_dims(function.param_types, [np.shape(a) for a in arrays])
    shapes = [t.static_shape(sizes_of) for t in function.result_types]
    sizes = [math.prod(s) * t.dtype.itemsize for s, t in zip(shapes, function.result_types)]
    poison = [machine.from_numpy(np.full(n, POISON, np.uint8)) for n in sizes]
    del poison  # the allocator hands these blocks out again
    results = bound.run(buffers, donated)
    return [machine.to_numpy(b, t.dtype, s) for b, t, s in zip(results, function.result_types, shapes)]


def mismatches(
    function: Function, *runs: Sequence[np.ndarray], labels: Sequence[str] = (), **choices: Any
) -> list[str]:
    """A line for each result that differs from the interpreter's, on any of `runs`."""
    wanted = [interpret(function, *arrays) for arrays in runs]
    found = []
    for how, k, results in outcomes(function, *runs, **choices):
        for i, (got, want) in enumerate(zip(results, wanted[k], strict=True)):
            if not same(got, want):
                label = labels[i] if labels else f"result {i}"
                found.append(f"{label}, run {k} ({how}): {difference(got, want)}")
    return found


def check(function: Function | Callable[..., Any], *runs: Sequence[np.ndarray], **choices: Any) -> None:
    """The compiled `function` gives the interpreter's bits on each list of arrays in `runs`."""
    if not isinstance(function, Function):
        function = function_of(function, *types_of(runs[0]))
    wrong = mismatches(function, *runs, **choices)
    assert not wrong, "\n".join([*wrong[:10], f"({len(wrong)} in all)", str(function)[:4000]])


def types_of(arrays: Sequence[np.ndarray]) -> list[TensorType]:
    return [TensorType(dtype_of(a.dtype), a.shape) for a in arrays]


# --------------------------------------------------------------------------------------------------------- hard inputs
@cache
def specials(dtype: DType) -> np.ndarray:
    """The values at which things break: zeros, infinities, NaN, denormals, the extremes, ties, and the ends of integer dtypes."""
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.is_integer:
        limits = np.iinfo(dtype.numpy)
        near = {
            0,
            1,
            2,
            3,
            7,
            limits.max,
            limits.max - 1,
            limits.min,
            limits.min + 1,
            limits.max // 2,
            dtype.bits,
            dtype.bits - 1,
        }
        return np.array(sorted(near | ({-1, -2, -3, -7} if limits.min else set())), dtype.numpy)
    info: Any = ml_dtypes.finfo(dtype.numpy)
    tiny, least, most, eps = (float(v) for v in (info.tiny, info.smallest_subnormal, info.max, info.eps))
    positive = [0.0, np.inf, np.nan, tiny, least, 3 * least, most, most / 2, 1.0, 1 + eps, 1 - eps / 2, 0.5, 1.5, 2.5, 3.0, 10.0, 88.7, 127.5, 300.0, 2.0**31, 2.0**63]  # fmt: skip
    with np.errstate(all="ignore"):
        return np.array([*positive, *[-v for v in positive]]).astype(dtype.numpy)


def salted(array: np.ndarray, rng: np.random.Generator, share: float = 0.4) -> np.ndarray:
    """The array with about that share of its elements replaced by special values."""
    chosen = rng.choice(specials(dtype_of(array.dtype)), array.shape)
    return np.where(rng.random(array.shape) < share, chosen, array)


# ---------------------------------------------------------------------------------------------- operands that are views
def as_view(array: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray, Callable[[Value], Value]]:
    """(what to pass, what the op then sees, how to get there): the operand behind a transpose, a strided slice, a flip or a
    broadcast, by `kind` modulo 4. The third is applied to the parameter; for a broadcast what is seen is not `array`."""
    rank = array.ndim
    axes = tuple(range(rank))
    kind %= 4
    if rank == 0:
        return (
            np.stack([array, array]),
            array,
            lambda v: ops.reshape(ops.slice(v, start=(1,), stop=(2,), step=(1,)), shape=()),
        )
    if kind == 0:
        order = axes[::-1]
        return np.ascontiguousarray(array.transpose(order)), array, lambda v: ops.transpose(v, permutation=order)
    if kind == 1:
        stop = tuple([2 * d + 1 for d in array.shape])
        outer = np.zeros(stop, array.dtype)
        outer[tuple([slice(1, None, 2)] * rank)] = array
        return outer, array, lambda v: ops.slice(v, start=(1,) * rank, stop=stop, step=(2,) * rank)
    if kind == 2:
        return np.ascontiguousarray(np.flip(array)), array, lambda v: ops.flip(v, axes=axes)
    if array.size == 0:
        return array, array, lambda v: v
    row = np.ascontiguousarray(array[..., :1])
    return row, np.broadcast_to(row, array.shape), lambda v: ops.broadcast(v, shape=array.shape)


def inline(function: Function, arguments: Sequence[Value]) -> tuple[Value, ...]:
    """The results of `function` on values of the Function under construction."""
    return current_builder().inline(function, arguments)
