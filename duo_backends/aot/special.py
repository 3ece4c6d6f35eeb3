"""Programs for small sizes at which a program is another one. A library picks by the sizes of a call (`entries.py`).

A named size stands for 2 or more (types.py), and artefacts are called with 0 and 1 too. Where a product of floats has one column it adds up in another
order (numerics contract, rule 2), and kernels may lean on a size of 2 or more (a mask that is always true). `with_special` puts beside such a program
the same Function with those sizes fixed, which reads the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from duo_backends.aot.limits import SMALL, least_sizes
from duo_backends.aot.source import ProgramSource, Source, Special
from duo_ir import pipeline
from duo_ir.core import Function
from duo_ir.errors import DuoError
from duo_ir.kernels.access import Noted, assumptions, seems_nonnegative
from duo_ir.kernels.program import Program
from duo_ir.opdef import Contraction
from duo_ir.transforms.sizes import sized_type, with_sizes
from duo_ir.types import Dim, substitute

MOST = 8  # special programs of one program; sizes that need more are refused
TRIED = 4  # sizes below it are tried for a number of columns that is a polynomial
Sizes = Mapping[str, int]


def with_special(source: Source) -> tuple[Source, dict[str, Program]]:
    """`source` with the special programs that its programs need and the least sizes of all, and what each was lowered to, by name."""
    programs: list[ProgramSource] = []
    lowered: dict[str, Program] = {}
    for program in source.programs:
        programs += _family(program, lowered)
    return replace(source, programs=tuple(programs)), lowered


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


def _family(program: ProgramSource, lowered: dict[str, Program]) -> list[ProgramSource]:
    """The program, then those that stand in for it."""
    made = {frozenset[tuple[str, int]](): program}
    waiting = list(made)
    for key in waiting:
        p = made[key]
        with assumptions() as noted:
            lowered[p.name] = pipeline.lower(p.function)
        least = least_sizes(p.function)
        columns = [sizes for n in free_columns(p.function) for sizes in _single(n)]
        for needed, more in [*[(False, s) for s in columns], *[(True, s) for s in _failing(noted)]]:
            other = key.union(more.items())
            if other in made or any(n < least[name] for name, n in more.items()):
                continue
            special = _fixed(program, dict(sorted(other))) if len(made) <= MOST else None
            if special is not None:
                made[other] = special
                waiting.append(other)
            elif needed:
                least |= {name: n + 1 for name, n in more.items()}
        made[key] = replace(p, least=least)
    return list(made.values())


def _fixed(program: ProgramSource, sizes: Sizes) -> ProgramSource | None:
    """The program with some of its sizes fixed; None where it is none for these."""
    try:
        function = with_sizes(program.function, sizes)
    except DuoError:
        return None
    if list(function.result_types) != [sized_type(t, sizes) for t in program.function.result_types]:
        return None
    name = f"_{program.name}_{'_'.join(f'{n}{v}' for n, v in sizes.items())}"
    special = Special(program.name, program.function.dims, tuple(sizes.items()))
    return replace(program, name=name, function=function, special=special)


def _single(n: Dim) -> Iterator[Sizes]:
    """Small sizes that make n 1, as far as they are few."""
    if len(n.names) > 2:
        return
    for values in itertools.product(range(TRIED), repeat=len(n.names)):
        sizes = dict(zip(n.names, values))
        if n.evaluate(sizes) == 1:
            yield sizes


def _failing(noted: Noted) -> Iterator[Sizes]:
    """Small sizes, as few as suffice, at which one of these may be negative in a loop that runs, each for others of 2 and more."""
    for d, loops in noted:
        found: list[Sizes] = []
        choices = itertools.product((None, *range(SMALL)), repeat=len(d.names))
        for values in sorted(choices, key=lambda row: len(row) - row.count(None)):
            sizes = {name: n for name, n in zip(d.names, values) if n is not None}
            if any(f.items() <= sizes.items() for f in found) or any(substitute(n, sizes) == 0 for n in loops):
                continue
            if seems_nonnegative(substitute(d, sizes)):
                continue
            found.append(sizes)
            yield sizes
