"""What a GPU can do at most, measured: the ruler that profiles are read by."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

_CHAINS = 8  # independent sums of a thread: more than the latency of a fused multiply-add
_THREADS = 256
_NAME = "duo_peak"
_TEXT = f"""extern "C" __global__ void __launch_bounds__({_THREADS}) {_NAME}(float *to, long long rounds) {{
  float x[{_CHAINS}];
  for (int k = 0; k < {_CHAINS}; k++) x[k] = 1.0f + k + threadIdx.x;
  for (long long r = 0; r < rounds; r++)
    for (int k = 0; k < {_CHAINS}; k++) x[k] = __fmaf_rn(x[k], 0.9999f, 1e-4f);
  float sum = 0.0f;
  for (int k = 0; k < {_CHAINS}; k++) sum += x[k];
  if (sum == -1.0f) *to = sum;
}}
"""


@dataclass(frozen=True)
class Peaks:
    """What the device does at most, measured: f32 fused multiply-adds without tensor cores (two operations each), bytes read and written by a
    copy of `nbytes`."""

    gflops: float
    gbytes: float

    def __str__(self) -> str:
        return f"{self.gflops:.0f} GFLOP/s, {self.gbytes:.0f} GB/s copying"


def measure(backend: Any, nbytes: int = 256 << 20, blocks: int = 8, rounds: int = 4096) -> Peaks:
    """The best of five; takes about 20 ms. blocks: of 256 threads for each multiprocessor."""
    runtime, driver = backend.runtime, backend.driver
    (module,) = backend.load_text([_TEXT])
    stream = runtime.stream
    source, target = stream.allocate(nbytes), stream.allocate(nbytes)
    grid = blocks * driver.properties.multiprocessors
    packed = struct.pack("2q", target.ptr, rounds)
    with runtime.lock, driver:
        function = driver.function(module, _NAME)
        arithmetic = _best(
            driver, stream.queue, lambda: driver.launch(function, grid, _THREADS, packed, 0, stream.queue)
        )
        copies = _best(driver, stream.queue, lambda: driver.copy(target.ptr, source.ptr, nbytes, stream.queue))
        driver.synchronize(stream.queue)
    operations = 2 * _CHAINS * rounds * _THREADS * grid
    return Peaks(operations / arithmetic * 1e-6, 2 * nbytes / copies * 1e-6)


def _best(driver: Any, queue: Any, work: Any) -> float:
    """Milliseconds of the fastest of five runs."""
    found = []
    for _ in range(5):
        first, last = driver.event(), driver.event()
        driver.record(first, queue)
        work()
        driver.record(last, queue)
        driver.wait(last)
        found.append(driver.elapsed(first, last))
    return max(min(found), 1e-6)
