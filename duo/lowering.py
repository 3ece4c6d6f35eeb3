"""The last step from a frontend's program to the text that `lower` shows: simplified, then canonical.

Both frontends hand over the Function they built and say which parameters are arguments and which results are new values of
states. Simplifying comes first, so that whatever a frontend's way of recording leaves behind (casts to the same dtype, reshapes to the
same shape, gradient stops) is gone before operands are put in order: the same model then is the same Function, with the same hash.
"""

from __future__ import annotations

from collections.abc import Mapping

from duo_ir.core import Function
from duo_ir.transforms.canonical import Canonical, canonicalize
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
