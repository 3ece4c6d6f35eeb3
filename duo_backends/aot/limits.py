"""Which values the free sizes of a program may have: a library is called with any, and must never read or write beyond its arrays.

A named size of the IR stands for 2 or more (types.py), and rules of types lean on that: a slice of the last two elements is fine for any named size.
Artefacts take 0 and 1 too, where every rule holds for them as well, which is tried here by inferring all types anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from duo_ir.core import Function
from duo_ir.errors import DuoError
from duo_ir.transforms.sizes import sized_type, with_sizes
from duo_ir.types import Dim

SMALL = 2  # below it a size is tried


def least_sizes(function: Function) -> dict[str, int]:
    """The least value of each free size (0, 1 or 2) from which on the program is one, also with two of them small."""
    least = {name: _least(function, name) for name in function.dims}
    for pair in itertools.combinations(function.dims, 2):
        for given in itertools.product(*[range(least[name], SMALL) for name in pair]):
            if not _holds(function, dict(zip(pair, given))):
                least |= dict.fromkeys(pair, SMALL)
                break
    return least


def signed_dims(function: Function) -> list[Dim]:
    """Sizes of arrays that may come out negative, `h - 2` say, each once."""
    found: dict[Dim, None] = {}
    for f in _functions(function):
        values = [*f.params, *[r for op in f.ops for r in op.results]]
        for d in (d for v in values for d in v.type.shape if isinstance(d, Dim)):
            if any(coefficient < 0 for _, coefficient in d.terms):
                found[d] = None
    return list(found)


def _functions(function: Function) -> list[Function]:
    return [function, *[inner for op in function.ops for region in op.regions for inner in _functions(region)]]


def _least(function: Function, name: str) -> int:
    least = SMALL
    while least > 0 and _holds(function, {name: least - 1}):
        least -= 1
    return least


def _holds(function: Function, sizes: Mapping[str, int]) -> bool:
    """Whether the program with some of its sizes fixed is the same program."""
    try:
        small = with_sizes(function, sizes)
    except DuoError:
        return False
    wanted = [sized_type(t, sizes) for t in function.result_types]
    return list(small.result_types) == wanted
