"""Which items of a program may fail: a check of an index that is out of range stops the program there.

A check that an earlier item has made of every element of the same memory cannot fail any more: an embedding's gradient writes at the rows
that the embedding has read. Outputs that are written when nothing can fail any more may take the memory of inputs, which stay
whole where a program fails.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from duo_ir.kernels.kernel import Access, Body, ContractKernel, ConvKernel, Kernel, LoopKernel, ScatterKernel
from duo_ir.kernels.program import Cond, Copy, Item, Program, Step, reads_writes
from duo_ir.types import DimLike, product

# What is computed of the elements of buffers at one and the same place, and the bound that it must be below.
Check: TypeAlias = tuple[Hashable, DimLike]


def failing(items: Sequence[Item]) -> list[int]:
    """The numbers of the items that may fail."""
    out: list[int] = []
    made: set[Check] = set()
    for n, item in enumerate(items):
        if not _has_checks(item):
            continue
        checks = list(_checks(item)) if isinstance(item, Step) else []
        if not checks or any(check not in made for check, _ in checks):
            out.append(n)
        made.update(check for check, whole in checks if check is not None and whole)
    return out


def written_after_checks(program: Program) -> frozenset[int]:
    """The outputs that are first written when every item that may fail (an index out of range) has run."""
    last = max(failing(program.items), default=-1)
    early = {slot for item in program.items[: last + 1] for slot in reads_writes(item)[1]}
    return frozenset([n for n in range(len(program.outputs)) if len(program.inputs) + n not in early])


def _has_checks(item: Item) -> bool:
    if isinstance(item, Step):
        return bool(item.kernel.sites)
    if isinstance(item, Copy):
        return False
    parts = (item.then, item.orelse) if isinstance(item, Cond) else (item.test, item.body)
    return any(_has_checks(inner) for part in parts for inner in part.items)


def _checks(step: Step) -> Iterator[tuple[Check | None, bool]]:
    """Each check of a step (None where it is not known what it depends on) and whether it is made of every element of the memory that it reads."""
    if step.sizes:  # a template, whose bounds are names of its own
        yield None, False
        return
    for axes, body in _bodies(step.kernel):
        terms: list[tuple[Hashable, Access | None] | None] = []
        for instr in body:
            args = [terms[k] for k in instr.args]
            if instr.op == "check":
                term = args[0]
                if term is None or term[1] is None:
                    yield None, False
                    terms.append(None)
                    continue
                bound = instr.attr[0]  # type: ignore[index]
                size = step.kernel.args[term[1].buffer].size
                yield (term[0], bound), _covers(term[1], axes, size)
                terms.append(None)
            elif instr.op == "load":
                access = instr.attr
                assert isinstance(access, Access)
                plain = not access.guards and not access.index_strides
                slot, size = step.slots[access.buffer], step.kernel.args[access.buffer].size
                terms.append((("load", slot, size), access) if plain else None)
            elif instr.op in ("index", "dim", "reduced", "acc") or None in args:
                terms.append(None)
            else:
                places = [term[1] for term in args if term is not None and term[1] is not None]
                parts = tuple([term[0] for term in args if term is not None])
                one = all(_same_place(place, places[0], step.kernel) for place in places)
                key = (instr.op, instr.dtype, repr(instr.attr), parts)
                terms.append((key, places[0] if places else None) if one else None)


def _bodies(kernel: Kernel) -> Iterator[tuple[tuple[DimLike, ...], Body]]:
    """The bodies of a kernel with the axes that each runs over."""
    if isinstance(kernel, LoopKernel):
        for stage in kernel.stages:
            yield kernel.axes + stage.axes, stage.body
    elif isinstance(kernel, ContractKernel):
        yield (*kernel.batch, kernel.m, kernel.n), kernel.body
    elif isinstance(kernel, ConvKernel | ScatterKernel):
        yield kernel.axes, kernel.body


def _same_place(a: Access, b: Access, kernel: Kernel) -> bool:
    return a.at == b.at and kernel.args[a.buffer].size == kernel.args[b.buffer].size


def _covers(access: Access, axes: tuple[DimLike, ...], size: DimLike) -> bool:
    """Whether the access reads every one of the `size` elements while the axes run."""
    if not all(isinstance(d, int) and d > 0 for d in axes) or access.at.offset != 0:
        return False
    walked = [(stride, count) for stride, count in zip(access.at.strides, axes) if stride != 0 and count != 1]
    if not all(isinstance(stride, int) and stride > 0 for stride, _ in walked):
        return False
    walked.sort(key=lambda pair: pair[0])  # type: ignore[arg-type, return-value]
    steps = [(1, 1), *walked]
    return product(tuple([n for _, n in walked])) == size and all(b[0] == a[0] * a[1] for a, b in pairwise(steps))
