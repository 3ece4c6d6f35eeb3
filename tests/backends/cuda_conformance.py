"""What the CUDA conformance tests share: generated kernels on the emulated GPU beside `duo_ir.kernels.evaluate`, kernel by kernel.

Every kernel of a program is given the memory that the reference gives it, under each schedule of the emulator (same object code), and what it
leaves there has the same bits; so a fault names its kernel. Every buffer is an allocation of its own: what goes past its end is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import conformance as c
import numpy as np

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import STATUS_WORDS, GpuTarget, KernelCode
from duo_backends.cuda.emit import compile_kernel, source
from duo_ir.core import Function, function_of
from duo_ir.errors import DeviceError, IndexOutOfRange
from duo_ir.kernels import evaluate as reference
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program
from duo_ir.kernels.text import print_kernel
from duo_ir.pipeline import lower
from tests.cuda_emulator import build
from tests.cuda_emulator.support import ORDERS, driver

UNIT = 150_000  # characters of CUDA C that go into one run of g++
NOWHERE = 16  # the address of an empty buffer: any access is told
MOST_SHARED = 227 << 10  # bytes that a block may ask for
MOST_KEPT = 64  # device allocations kept for the next kernel


@dataclass(frozen=True)
class Case:
    """A program and the arrays of its runs."""

    label: str
    program: Program
    runs: Sequence[Sequence[np.ndarray]]


def cases(
    label: str,
    function: Function | Callable[..., Any],
    *runs: Sequence[np.ndarray],
    fusions: Sequence[bool] = (True,),
    types: Sequence[Any] | None = None,
) -> Iterator[Case]:
    """`function` lowered with and without fusion. `types`: of its parameters where they are not those of the arrays."""
    if not isinstance(function, Function):
        function = function_of(function, *(types or c.types_of(runs[0])))
    for fusion in fusions:
        yield Case(f"{label}{'' if fusion else ', unfused'}", lower(function, fusion), runs)


@dataclass
class Tally:
    """What was compared: distinct kernels, and runs of a kernel under one schedule."""

    kernels: set[Kernel] = field(default_factory=set)
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def check(given: Iterable[Case], target: GpuTarget | None = None, orders: Sequence[str] = ORDERS) -> Tally:
    """Every kernel of every case leaves the reference's bits. All are compiled together."""
    chosen = list(given)
    codes = {k: compile_kernel(k, target or GpuTarget()) for case in chosen for k in kernels_of(case.program)}
    gpu = Gpu(codes.values())
    tally = Tally()
    for case in chosen:
        gpu.compare(case, codes, tally, orders)
    gpu.close()
    assert not tally.wrong, "\n".join([*tally.wrong[:5], f"({len(tally.wrong)} in all)"])
    return tally


def units(codes: Iterable[KernelCode]) -> Iterator[list[KernelCode]]:
    """Codes in groups of about the size of a compilation unit, each text once."""
    group: list[KernelCode] = []
    total = 0
    for code in {code.text: code for code in codes}.values():
        if group and total + len(code.text) > UNIT:
            yield group
            group, total = [], 0
        group.append(code)
        total += len(code.text)
    if group:
        yield group


class Gpu:
    """Compiled kernels and memory of the emulated GPU."""

    def __init__(self, codes: Iterable[KernelCode]) -> None:
        self.driver = driver()
        groups = list(units(codes))
        with ThreadPoolExecutor(2) as pool:
            images = list(pool.map(build.compile_text, map(source, groups)))
        self.functions: dict[str, Any] = {}
        self.modules = []
        self.kept: dict[int, list[int]] = {}
        self.count = 0
        with self.driver:
            self.stream = self.driver.stream()
            for group, image in zip(groups, images):
                module = self.driver.load(image)
                self.modules.append(module)
                for launch in [launch for code in group for launch in code.launches]:
                    self.functions[launch.symbol] = self.driver.function(module, launch.symbol, MOST_SHARED)

    def close(self) -> None:
        with self.driver:
            for ptr in [ptr for ptrs in self.kept.values() for ptr in ptrs]:
                self.driver.free(ptr)
        self.kept.clear()

    # ------------------------------------------------------------------------------------------------------ comparing
    def compare(
        self, case: Case, codes: Mapping[Kernel, KernelCode], tally: Tally, orders: Sequence[str] = ORDERS
    ) -> None:
        """Runs the case; what differs goes into `tally`."""
        execute = reference.execute

        def both(kernel: Kernel, buffers: Sequence[np.ndarray], sizes: Mapping[str, int]) -> None:
            before = [b.copy() for b in buffers]
            report, error = "", None
            try:
                execute(kernel, buffers, sizes)
            except IndexOutOfRange as raised:
                report, error = str(raised), raised
            tally.kernels.add(kernel)
            code = codes[kernel]
            for order in orders:
                tally.runs += 1
                said = self._differs(kernel, code, before, buffers, sizes, report, order)
                if said:
                    text = f"{print_kernel(kernel)[:1500]}\n{code.text[:3000]}" if not tally.wrong else ""
                    tally.wrong.append(f"{case.label}, sizes {dict(sizes)}, schedule {order}: {said}\n{text}")
            if error is not None:
                raise error

        with mock.patch.object(reference, "execute", both), np.errstate(all="ignore"):
            for arrays in case.runs:
                try:
                    reference.evaluate(case.program, *arrays)
                except IndexOutOfRange:
                    continue

    def _differs(
        self,
        kernel: Kernel,
        code: KernelCode,
        before: Sequence[np.ndarray],
        after: Sequence[np.ndarray],
        sizes: Mapping[str, int],
        report: str,
        order: str,
    ) -> str:
        """What is wrong with the kernel under one schedule; empty: nothing."""
        try:
            got, status = self.run(kernel, code, before, after, sizes, order)
        except DeviceError as error:
            return str(error)
        told = kernel.sites[int(status[2]) - 1].format(index=int(status[3])) if status[1] else ""
        if told != report:
            return f"reports {told or 'nothing'!r}, not {report or 'nothing'!r}"
        if report:
            return ""
        for n, (arg, mine, want) in enumerate(zip(kernel.args, got, after)):
            if arg.output and not c.same(mine, want):
                return f"argument {n}: {c.difference(mine, want)}"
        return ""

    # -------------------------------------------------------------------------------------------------------- running
    def run(
        self,
        kernel: Kernel,
        code: KernelCode,
        before: Sequence[np.ndarray],
        identity: Sequence[np.ndarray],
        sizes: Mapping[str, int],
        order: str,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The contents of all buffers and the status words after the launches. Buffers that are one in `identity` are one on the device."""
        d, status = self.driver, np.zeros(STATUS_WORDS, np.int64)
        taken: list[tuple[int, int]] = []

        def memory(nbytes: int) -> int:
            if not nbytes:
                return NOWHERE
            ptr = self._allocate(nbytes)
            taken.append((nbytes, ptr))
            return ptr

        with d, schedule(order):
            places: dict[int, int] = {}
            try:
                for array, same in zip(before, identity):
                    if id(same) not in places:
                        places[id(same)] = ptr = memory(array.nbytes)
                        if array.nbytes:
                            d.to_device(ptr, array.view(np.uint8).ctypes.data, array.nbytes, self.stream)
                nbytes = code.scratch(sizes)
                scratch, words = memory(nbytes), memory(status.nbytes)
                if nbytes:
                    d.fill(scratch, 0xFF, nbytes, self.stream)
                d.fill(words, 0, status.nbytes, self.stream)
                pointers = [places[id(same)] for same in identity]
                packed = np.array([*pointers, scratch, words, *[sizes[n] for n in kernel.dims]], np.int64).tobytes()
                for launch in code.launches:
                    blocks, shared = launch.blocks(sizes), launch.shared(sizes)
                    if blocks:
                        function = self.functions[launch.symbol]
                        d.launch(function, blocks, launch.threads, packed, shared, self.stream)
                d.synchronize(self.stream)
                out = []
                for arg, array, ptr in zip(kernel.args, before, pointers):
                    result = np.empty_like(array)
                    if arg.output and array.nbytes:
                        d.to_host(result.view(np.uint8).ctypes.data, ptr, array.nbytes, self.stream)
                    out.append(result)
                d.to_host(status.ctypes.data, words, status.nbytes, self.stream)
                d.synchronize(self.stream)
            finally:
                for nbytes, ptr in taken:
                    self._free(nbytes, ptr)
        return out, status

    def _allocate(self, nbytes: int) -> int:
        kept = self.kept.get(nbytes)
        if kept:
            self.count -= 1
            return kept.pop()
        return int(self.driver.allocate(nbytes))

    def _free(self, nbytes: int, ptr: int) -> None:
        if self.count >= MOST_KEPT:
            self.driver.free(ptr)
            return
        self.count += 1
        self.kept.setdefault(nbytes, []).append(ptr)


@contextmanager
def schedule(order: str) -> Iterator[None]:
    """What runs inside, runs under this schedule."""
    before = os.environ.get("DUO_EMU_ORDER")
    os.environ["DUO_EMU_ORDER"] = order
    try:
        yield
    finally:
        if before is None:
            del os.environ["DUO_EMU_ORDER"]
        else:
            os.environ["DUO_EMU_ORDER"] = before


# ------------------------------------------------------------------------------------------------------------- inputs
def numbers(*types: Any, seed: int = 0, salt: float = 0.0) -> list[np.ndarray]:
    """An array for each TensorType: normal numbers, small integers, coin tosses; that share of them special values."""
    rng = np.random.default_rng(seed)
    out = []
    for t in types:
        shape = t.static_shape({})
        if t.dtype.kind == "b":
            array = np.asarray(rng.random(shape) < 0.7)
        elif t.dtype.is_integer:
            array = np.asarray(rng.integers(0 if t.dtype.kind == "u" else -100, 100, shape), t.dtype.numpy)
        else:
            array = np.asarray(rng.normal(0, 1, shape)).astype(t.dtype.numpy)
        out.append(c.salted(array, rng, salt) if salt else array)
    return out


