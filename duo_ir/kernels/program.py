"""A program: kernels in order over numbered buffers, what `plan.py` makes and a backend compiles.

Slots 0..inputs-1 are the inputs, then come the outputs that the program writes, then temporaries. A `Step` runs one
kernel; `Cond` and `While` run sub-programs over the same slot numbering idea: each sub-program has its own slots, of which the
first are bound to slots of the parent. Sizes may be symbolic; a backend binds them once per set of sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from duo_ir.kernels.kernel import Kernel
from duo_ir.types import DimLike, TensorType


@dataclass(frozen=True, slots=True)
class Step:
    """Runs `kernel` with its argument number i in slot `slots[i]`. `where` is the user's line, for errors and profiles.

    `sizes` gives the values of `kernel.dims`, in order, where the kernel is a template (`generic.py`) with names of its own; without it
    the kernel's names are the program's."""

    kernel: Kernel
    slots: tuple[int, ...]
    where: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    def dims(self) -> tuple[str, ...]:
        """Named sizes of the program that the kernel depends on."""
        return () if self.sizes else self.kernel.dims

    def bind(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The values of `kernel.dims`, in order, for the program's `sizes`."""
        return dict(self.sizes) if self.sizes else {name: sizes[name] for name in self.kernel.dims}


@dataclass(frozen=True, slots=True)
class Copy:
    """Copies slot `source` to slot `target`, same number of bytes."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Cond:
    """Runs `then` if the bool in slot `predicate` is true, else `orelse`. The sub-programs' inputs are bound to `inputs`, their
    outputs to `outputs`."""

    predicate: int
    then: Program
    orelse: Program
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class While:
    """carried := initial; while test(carried, constants): carried := body(carried, constants).

    `outputs` are the slots of the carried values (written by the loop); `test` and `body` take carried then constants.
    """

    test: Program
    body: Program
    initial: tuple[int, ...]
    constants: tuple[int, ...]
    outputs: tuple[int, ...]


Item: TypeAlias = Step | Copy | Cond | While


@dataclass(frozen=True, slots=True)
class Temp:
    """A temporary: its size, and the first and last item (index in `items`) that touch it. Two whose lifetimes do not
    overlap may share memory; an item's inputs and outputs never do unless `Program.in_place` says so."""

    nbytes: DimLike
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Program:
    """`inputs`, `outputs`: their types. `results[k]` is the slot whose contents are result k: an output's slot, or an input's
    (returned as it is, without a copy); two results may name one slot. `donations`: pairs (output number, input number) that may share memory when
    the caller gives that input away. `dims`: named sizes in the order a backend takes them."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    temps: tuple[Temp, ...]
    items: tuple[Item, ...]
    results: tuple[int, ...]
    donations: tuple[tuple[int, int], ...] = ()
    dims: tuple[str, ...] = ()


def reads_writes(item: Item) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Slots that an item reads, and those it writes."""
    if isinstance(item, Step):
        pairs = list(zip(item.slots, item.kernel.args))
        return tuple([s for s, a in pairs if not a.output]), tuple([s for s, a in pairs if a.output])
    if isinstance(item, Copy):
        return (item.source,), (item.target,)
    if isinstance(item, Cond):
        return (item.predicate, *item.inputs), item.outputs
    return item.initial + item.constants, item.outputs


def touched(item: Item) -> tuple[int, ...]:
    reads, writes = reads_writes(item)
    return reads + writes
