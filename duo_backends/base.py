"""What the frontends see of a backend: compile a Program, bind it to sizes, run it on buffers.

A backend's buffers are its own class; the frontends only pass them on, ask for `nbytes`, and turn them from and into
NumPy arrays. Executables are immutable and may be used from several threads at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from duo_ir.types import DType

if TYPE_CHECKING:  # a program that was found on disk needs no passes
    from duo_ir.kernels.program import Program

Scalar: TypeAlias = float | int | bool


class Bound(Protocol):
    """A program with all sizes known. `givable`: numbers of the inputs that a result may overwrite."""

    givable: frozenset[int]

    def run(self, inputs: Sequence[Any], donated: Collection[int] = ()) -> list[Any]:
        """Runs once. `inputs`: a buffer per program input, or a Python number for one declared scalar. `donated`: numbers
        of inputs that may be overwritten: such a buffer may be a result's. Returns a buffer per program result; where a result is an
        input, that very buffer. Raises IndexOutOfRange when a bounds check fails, with all inputs as they were."""
        ...

    def begin(
        self, inputs: Sequence[Any], donated: Collection[int] = (), preferred: Sequence[tuple[int, int]] = ()
    ) -> Any:
        """The same as an object: `run()` runs it once, `results` lists the buffers from the start, `done` says whether they hold the
        results, truthfully also when an interrupt came out of `run()`. preferred: pairs (result, input) that should share a buffer. `close()` when
        all is done with it."""
        ...


class Executable(Protocol):
    """A compiled program."""

    program: Program

    def bind(self, sizes: Mapping[str, int] | None = None) -> Bound:
        """The program for these values of `program.dims`; the same object for equal sizes."""
        ...


class Backend(Protocol):
    """A place where programs run."""

    name: str

    def compile(self, program: Program, scalars: Collection[int] = (), numerics: str = "strict") -> Executable:
        """Machine code for every kernel of the program. `scalars`: numbers of 0-d inputs that will be Python numbers. `numerics`: "strict" keeps
        the orders and roundings that every backend shares; "fast" lets this one use what its hardware is quicker at."""
        ...

    def allocate(self, nbytes: int) -> Any:
        """A buffer with undefined contents."""
        ...

    def from_numpy(self, array: np.ndarray, copy: bool = True) -> Any:
        """A buffer with the array's contents in row-major order; without `copy`, its very memory where the device can
        address it (then the array must be C-contiguous)."""
        ...

    def to_numpy(self, buffer: Any, dtype: DType, shape: Sequence[int], copy: bool = True) -> np.ndarray:
        """The buffer's contents; without `copy`, a view that keeps the buffer alive where the host can address it."""
        ...

    def synchronize(self) -> None:
        """Waits until everything started on the device is done."""
        ...
