"""Programs for sizes at which a program is another one: a product of floats with one column adds up in another order (numerics contract, rule 2).

`with_special` gives such a program a second one beside it, the same Function with those sizes fixed, which reads the same weights; the library picks by
the sizes of a call (`entries.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from duo_backends.aot.source import ProgramSource, Source, Special
from duo_ir.core import Function
from duo_ir.errors import DuoError
from duo_ir.opdef import Contraction
from duo_ir.transforms.sizes import sized_type, with_sizes
from duo_ir.types import Dim

MOST = 8  # special programs of one program; sizes beyond them are refused
TRIED = 4  # sizes below it are tried for a number of columns that is a polynomial


def with_special(source: Source) -> Source:
    """`source` with the special programs that its programs need."""
    special = [made for program in source.programs for made in _special(program)]
    return replace(source, programs=(*source.programs, *special))


def free_columns(function: Function) -> tuple[Dim, ...]:
    """How many columns products of floats have, where that depends on free sizes, each once."""
    found: dict[Dim, None] = {}
    for op in function.ops:
        for region in op.regions:
            found.update(dict.fromkeys(free_columns(region)))
        if isinstance(op.definition.kind, Contraction) and op.result.type.dtype.is_float:
            n = op.result.type.shape[-1]
            if isinstance(n, Dim):
                found[n] = None
    return tuple(found)


def _special(program: ProgramSource) -> list[ProgramSource]:
    made: dict[frozenset[tuple[str, int]], Function] = {}
    waiting: list[tuple[Mapping[str, int], Function]] = [({}, program.function)]
    while waiting:
        known, function = waiting.pop(0)
        for n in free_columns(function):
            for more in _single(n):
                sizes = {**known, **more}
                key = frozenset(sizes.items())
                if key in made or len(made) == MOST:
                    continue
                try:
                    special = with_sizes(function, more)
                except DuoError:
                    continue  # no sizes of the program
                if list(special.result_types) != [sized_type(t, sizes) for t in program.function.result_types]:
                    continue
                made[key] = special
                waiting.append((sizes, special))
    out = []
    for key, function in made.items():
        sizes = dict(sorted(key))
        name = f"_{program.name}_{'_'.join(f'{n}{v}' for n, v in sizes.items())}"
        special_of = Special(program.name, program.function.dims, tuple(sizes.items()))
        out.append(ProgramSource(name, function, program.params, program.results, special_of))
    return out


def _single(n: Dim) -> Iterator[Mapping[str, int]]:
    """Small sizes that make n 1, as far as they are few."""
    if len(n.names) > 2:
        return
    for values in itertools.product(range(TRIED), repeat=len(n.names)):
        sizes = dict(zip(n.names, values))
        if n.evaluate(sizes) == 1:
            yield sizes
