"""What calls of bound programs share on all backends: who overwrites what, numbers as arrays, index errors. It needs no compiler, nor passes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from duo_ir.errors import IndexOutOfRange
from duo_ir.types import DType


def choose_donors(
    donations: Sequence[tuple[int, int]],
    results: Sequence[int],
    inputs: int,
    donated: Collection[int],
    preferred: Sequence[tuple[int, int]],
) -> dict[int, int]:
    """Output number -> the given-away input that it overwrites, of the pairs that the program allows. Pairs (result, input) that are
    `preferred` come first. `inputs`: how many there are."""
    donors: dict[int, int] = {}
    allowed = set(donations)
    first = [(results[k] - inputs, given) for k, given in preferred]
    for output, given in [*[pair for pair in first if pair in allowed], *donations]:
        if output not in donors and given in donated and given not in donors.values():
            donors[output] = given
    return donors


def rounded(value: object, dtype: DType) -> np.ndarray:
    """A Python number as a 0-d array."""
    with np.errstate(over="ignore"):
        return np.asarray(value, dtype.numpy)


class Site(Protocol):
    """Of a step, what an index error says: the user's line, and what each of its checks is."""

    @property
    def where(self) -> str: ...
    @property
    def sites(self) -> Sequence[str]: ...


def index_error(note: Site, site: int, index: int, bound: int) -> IndexOutOfRange:
    """The error for what check number `site` - 1 of a step reported."""
    sites = note.sites
    what = sites[site - 1] if 0 < site <= len(sites) else "an indexed access"
    if "{index}" in what:
        return IndexOutOfRange(what.replace("{index}", str(index)))
    where = f"{note.where}: " if note.where else ""
    return IndexOutOfRange(f"{where}{what}: index {index} is out of range for an axis of size {bound}")
