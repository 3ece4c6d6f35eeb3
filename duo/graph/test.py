"""`tf.test`: whether there is a GPU."""

from __future__ import annotations

from typing import Any

from duo import runtime


def is_gpu_available(cuda_only: bool = False, min_cuda_compute_capability: Any = None) -> bool:
    """Whether programs can run on a GPU here, of at least that compute capability, a pair such as (8, 0)."""
    for n in range(runtime.gpu_count()):
        arch = runtime.backend(f"cuda:{n}").driver.properties.arch
        if min_cuda_compute_capability is None or divmod(arch, 10) >= tuple(min_cuda_compute_capability):
            return True
    return False


def gpu_device_name() -> str:
    """'/device:GPU:0' where there is a GPU, else ''."""
    return "/device:GPU:0" if is_gpu_available() else ""


def is_built_with_cuda() -> bool:
    """duo makes code for GPUs wherever it is."""
    return True
