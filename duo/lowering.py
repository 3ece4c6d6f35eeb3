"""The last step from a frontend's program to the text that `lower` shows: simplified, then canonical.

Both frontends hand over the Function they built and say which parameters are arguments and which results are new values of
states. Simplifying comes first, so that whatever a frontend's way of recording leaves behind (casts to the same dtype, reshapes to the
same shape, gradient stops) is gone before operands are put in order: the same model then is the same Function, with the same hash.
"""

from __future__ import annotations

from collections.abc import Mapping

from duo_ir.core import Builder, Function, Value
from duo_ir.transforms.canonical import Canonical, canonicalize
from duo_ir.transforms.rewrite import with_operands
from duo_ir.transforms.simplify import simplify
from duo_ir.transforms.sizes import with_sizes
from duo_ir.types import Dim


def canonical(function: Function, pinned: int, state_results: Mapping[int, int]) -> Canonical:
    """`function` in the form that is compared and compiled.

    The first `pinned` parameters keep their places. state_results: number of a parameter -> number of the result that is its next
    value. The other results come first, in order. See `duo_ir.transforms.canonical` for the order of the rest.
    """
    return canonicalize(simplify(function), pinned, state_results)


def renamed_sizes(function: Function) -> Function:
    """The same program with its named sizes called b, t, then d2, d3, ... in order of first appearance."""
    names = {old: ("b", "t")[i] if i < 2 else f"d{i}" for i, old in enumerate(function.dims)}
    if all(old == new for old, new in names.items()):
        return function
    return with_sizes(function, {old: Dim.symbol(new) for old, new in names.items()})


def without_unread(function: Function) -> tuple[Function, list[int]]:
    """The program without the parameters that nothing reads, and the numbers of those that stay."""
    read = set(function.results)
    for op in function.ops:
        read.update(op.operands)
    kept = [i for i, p in enumerate(function.params) if p in read]
    if len(kept) == len(function.params):
        return function, kept
    builder = Builder(function.name)
    env: dict[Value, Value] = {}
    for i in kept:
        env[function.params[i]] = builder.parameter(function.params[i].type, function.names[i])
    for op in function.ops:
        new = with_operands(op, tuple([env[v] for v in op.operands]))
        builder.ops.append(new)
        env.update(zip(op.results, new.results))
    return builder.build([env[r] for r in function.results]), kept
