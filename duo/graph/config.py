"""`tf.ConfigProto` and what devices there are: how a Session runs, and on what.

What duo has no use for is taken all the same, as programs set it, and does nothing: memory always grows as it is needed, and threads are a matter of
the process (`duo.set_num_threads`), not of a Session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duo import runtime
from duo.graph.errors import InvalidArgumentError
from duo_ir.errors import DeviceError


@dataclass
class GPUOptions:
    """per_process_gpu_memory_fraction: the most that this process takes of a GPU's memory, from 0 to 1 (0: what there is); it holds for the
    process, from the first run there on. visible_device_list: '1,0' makes '/gpu:0' the GPU that CUDA numbers 1. allow_growth is always so."""

    per_process_gpu_memory_fraction: float = 0.0
    allow_growth: bool = True
    visible_device_list: str = ""
    allocator_type: str = ""
    deferred_deletion_bytes: int = 0
    polling_active_delay_usecs: int = 0
    polling_inactive_delay_msecs: int = 0
    force_gpu_compatible: bool = False
    experimental: Any = None


@dataclass
class ConfigProto:
    """allow_soft_placement: what is placed on a GPU that is not there runs on the CPU (else it is an error). log_device_placement: print where
    each placed operation runs when a run is prepared. device_count: {'GPU': 0} hides all GPUs, {'GPU': n} all but the first n. The numbers of
    threads are taken and not used: see `duo.set_num_threads`."""

    allow_soft_placement: bool = False
    log_device_placement: bool = False
    gpu_options: GPUOptions = field(default_factory=GPUOptions)
    device_count: Mapping[str, int] = field(default_factory=dict)
    intra_op_parallelism_threads: int = 0
    inter_op_parallelism_threads: int = 0
    use_per_session_threads: bool = False
    operation_timeout_in_ms: int = 0
    graph_options: Any = None
    experimental: Any = None

    def gpu(self, number: int) -> str:
        """The device that '/gpu:number' is: 'cuda:n'. Raises DeviceError where there is none."""
        most = dict(self.device_count).get("GPU")
        if most is not None and number >= most:
            raise DeviceError(f"ConfigProto(device_count={{'GPU': {most}}}) hides '/gpu:{number}'")
        listed = self.gpu_options.visible_device_list
        if listed:
            try:
                visible = [int(n) for n in listed.split(",")]
            except ValueError:
                raise InvalidArgumentError(
                    f"visible_device_list is numbers with commas between, not {listed!r}"
                ) from None
            if number >= len(visible):
                raise DeviceError(f"visible_device_list={listed!r} has no '/gpu:{number}'")
            number = visible[number]
        device = runtime.check_device(f"cuda:{number}")
        fraction = self.gpu_options.per_process_gpu_memory_fraction
        if fraction:
            if not 0 < fraction <= 1:
                raise InvalidArgumentError(f"per_process_gpu_memory_fraction is from 0 to 1, not {fraction}")
            backend = runtime.backend(device)
            backend.runtime.pool.limit = int(fraction * backend.driver.properties.memory)
        return device


@dataclass(frozen=True)
class PhysicalDevice:
    """name: '/physical_device:GPU:0'; device_type: 'CPU' or 'GPU'."""

    name: str
    device_type: str


def list_physical_devices(device_type: str | None = None) -> list[PhysicalDevice]:
    """The CPU and the GPUs of this machine, or those of one type."""
    found = [PhysicalDevice("/physical_device:CPU:0", "CPU")]
    found += [PhysicalDevice(f"/physical_device:GPU:{n}", "GPU") for n in range(runtime.gpu_count())]
    return [d for d in found if device_type in (None, d.device_type)]


class experimental:
    """`tf.config.experimental`, as far as it is there."""

    list_physical_devices = staticmethod(list_physical_devices)

    @staticmethod
    def set_memory_growth(device: PhysicalDevice, enable: bool) -> None:
        """Memory always grows as it is needed: nothing to do."""
