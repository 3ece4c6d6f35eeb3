"""GPUs that artefacts are made for: `cuda:sm_90` and the like, which need not be there.

What runs on a device is chosen by its compute capability; how many multiprocessors a target has only decides how work is shared out, never a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from duo_backends.cuda.code import GpuTarget
from duo_ir.errors import ArgumentError

PREFIX = "cuda:sm_"
# Compute capability times ten -> multiprocessors of the usual device, KB of shared memory that a block may have (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
_DEVICES = {80: (108, 163), 86: (84, 99), 89: (142, 99), 90: (132, 227), 100: (148, 227), 120: (170, 99)}
CUDA_NAMES = tuple([f"{PREFIX}{arch}" for arch in _DEVICES])


@dataclass(frozen=True)
class CudaTarget:
    """`arch`: compute capability times ten. `code`: what emitters see, but for the numerics; `numerics`: 'strict' or 'fast'."""

    arch: int
    code: GpuTarget
    numerics: str = "strict"

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.arch}"


def is_cuda(name: str) -> bool:
    """Whether a target's name means a GPU."""
    return name.split(":")[0] == "cuda"


def cuda_target(name: str, numerics: str = "strict") -> CudaTarget:
    """The target of that name. Raises ArgumentError for one that is not known."""
    if name not in CUDA_NAMES:
        raise ArgumentError(f"target {name!r} is not known; of GPUs there are {', '.join(CUDA_NAMES)}")
    arch = int(name.removeprefix(PREFIX))
    multiprocessors, shared = _DEVICES[arch]
    return CudaTarget(arch, GpuTarget(arch, multiprocessors, False, shared << 10), numerics)


def runs_on(made_for: int, device: int) -> bool:
    """Whether a cubin for one compute capability runs on another: of the same generation, and not an older one."""
    return made_for // 10 == device // 10 and made_for <= device
