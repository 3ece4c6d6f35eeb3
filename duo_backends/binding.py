"""What executables of all backends share: one bound program per set of sizes, its types, and the kernels of a program."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from duo_ir.errors import ArgumentError
from duo_ir.kernels.checks import written_after_checks
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Cond, Program, Step, While
from duo_ir.types import TensorType, evaluate

BOUND_LIMIT = 256  # sets of sizes that an executable remembers
B = TypeVar("B")


class SizedExecutable(ABC, Generic[B]):
    """A compiled program for any sizes. `scalars`: numbers of the inputs that are given as Python numbers."""

    def __init__(self, program: Program, scalars: Collection[int] = ()) -> None:
        for k in scalars:
            if not 0 <= k < len(program.inputs) or program.inputs[k].shape != ():
                raise ArgumentError(f"input {k} cannot be a Python number: it is not a 0-d input of the program")
        self.program = program
        self.scalars = frozenset(scalars)
        self._bound: OrderedDict[tuple[int, ...], B] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def make_bound(self, sizes: Mapping[str, int]) -> B:
        """The program for these sizes, which are all there and not negative."""

    def bind(self, sizes: Mapping[str, int] | None = None) -> B:
        """The program for these values of `program.dims`. Raises ArgumentError when one is missing or negative."""
        sizes = sizes or {}
        try:
            key = tuple([sizes[name] for name in self.program.dims])
        except KeyError as error:
            raise ArgumentError(
                f"bind() needs sizes for {', '.join(self.program.dims)}; {error.args[0]!r} is missing"
            ) from None
        bound = self._bound.get(key)
        if bound is not None:
            return bound
        if any(size < 0 for size in key):
            raise ArgumentError(f"sizes must not be negative: {dict(zip(self.program.dims, key))}")
        with self._lock:
            bound = self._bound.get(key)
            if bound is None:
                bound = self._bound[key] = self.make_bound(dict(zip(self.program.dims, key)))
                if len(self._bound) > BOUND_LIMIT:
                    self._bound.popitem(last=False)
        return bound


@dataclass(frozen=True)
class Signature:
    """A program's types with all sizes known. `results[k]` is an input's number, or the number of inputs plus an output's; `donations`: pairs
    (output, input) that may share memory; `safe`: outputs that are not written before everything that may fail has run; `scalars`: inputs given
    as Python numbers."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    results: tuple[int, ...]
    donations: tuple[tuple[int, int], ...]
    safe: frozenset[int]
    scalars: frozenset[int]


def signature(program: Program, sizes: Mapping[str, int], scalars: frozenset[int]) -> Signature:
    """What a bound program of these sizes takes and gives."""
    inputs = tuple([TensorType(t.dtype, t.static_shape(sizes)) for t in program.inputs])
    outputs = tuple([TensorType(t.dtype, t.static_shape(sizes)) for t in program.outputs])
    safe = frozenset(written_after_checks(program))  # a program that fails leaves its inputs as they were
    donations = tuple(
        (output, given)
        for output, given in program.donations
        if given not in program.results
        and given not in scalars
        and byte_count(inputs[given]) >= byte_count(outputs[output])
        and output in safe
    )
    return Signature(inputs, outputs, program.results, donations, safe, scalars)


def byte_count(type: TensorType) -> int:
    """Bytes of a type whose sizes are known."""
    return evaluate(type.nbytes, {})


def kernels_of(program: Program) -> Iterator[Kernel]:
    """All kernels of a program and of those nested in it."""
    for item in program.items:
        if isinstance(item, Step):
            yield item.kernel
        elif isinstance(item, Cond):
            yield from kernels_of(item.then)
            yield from kernels_of(item.orelse)
        elif isinstance(item, While):
            yield from kernels_of(item.test)
            yield from kernels_of(item.body)
