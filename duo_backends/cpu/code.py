"""What the CPU emitters are given and what they hand back: `Target` in, `KernelCode` out.

A kernel becomes LLVM text with one function per phase. Phases run one after the other with a barrier in between;
within a phase any split of its work units over threads gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from duo_ir.errors import DeviceError

SIGNATURE = "ptr %args, ptr %dims, i64 %begin, i64 %end, i64 %tid, ptr %scratch, ptr %status"


@dataclass(frozen=True)
class Target:
    """The machine to emit for. `attributes` is the text between the braces of `attributes #0 = { ... }`; `cores`: how many work units
    there should be at least, where small ones cost something."""

    vector_bytes: int
    fma: bool = True
    arch: str = "x86_64"
    attributes: str = "nounwind"
    cores: int = 2

    def __post_init__(self) -> None:
        if self.vector_bytes not in (16, 32, 64):
            raise DeviceError(f"a CPU target has vectors of 16, 32 or 64 bytes, not {self.vector_bytes}")
        if not self.fma:
            raise DeviceError(
                "this CPU has no fused multiply-add (FMA3 on x86-64: Intel Haswell or AMD Piledriver and later), "
                "which duo's arithmetic is defined by; run on such a CPU or on a GPU"
            )

    @property
    def has_half(self) -> bool:
        """Whether f16 <-> f32 is one instruction."""
        return self.arch == "aarch64" or "+f16c" in self.attributes

    @property
    def has_masks(self) -> bool:
        """Whether loads and stores of any element size take a lane mask at no cost."""
        return self.vector_bytes == 64


@dataclass(frozen=True)
class Phase:
    """`symbol` is a function `void (SIGNATURE)`; `units` gives its number of parallel work units."""

    symbol: str
    units: Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class KernelCode:
    """`text`: functions and declarations of a module, without the attribute group #0. `scratch`: bytes that all phases
    share, for (sizes, number of threads). `cost`: rough nanoseconds on one thread."""

    text: str
    phases: tuple[Phase, ...]
    scratch: Callable[[Mapping[str, int], int], int]
    cost: Callable[[Mapping[str, int]], float]


def no_scratch(sizes: Mapping[str, int], threads: int) -> int:
    return 0
