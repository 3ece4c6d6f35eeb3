"""The CUDA emulator finds what it is there for: missing barriers, accesses out of bounds, use after free, reading too early."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from duo_ir.errors import DeviceError
from tests.cuda_emulator import build
from tests.cuda_emulator.support import ORDERS, driver, every_order, needs_emulator

pytestmark = needs_emulator

# sums of rows of 256 by a tree in shared memory
TREE = r"""
extern "C" __global__ void __launch_bounds__(256) NAME(const float *x, float *y) {
  extern __shared__ __align__(16) unsigned char shared[];
  float *s = (float *)shared;
  s[threadIdx.x] = x[blockIdx.x * 256LL + threadIdx.x];
  __syncthreads();
  for (int half = 128; half; half /= 2) {
    if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
    BARRIER
  }
  if (threadIdx.x == 0) y[blockIdx.x] = s[0];
}
"""
# c = a b^T + 1 for rows of eight words
MMA = r"""
extern "C" __global__ void mma_KIND(const unsigned *a, const unsigned *b, float *c) {
  const int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  unsigned x[4], y[2];
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int i = 0; i < 4; i++) x[i] = a[(g + (i % 2) * 8) * 8 + q + (i / 2) * 4];
  for (int i = 0; i < 2; i++) y[i] = b[g * 8 + q + i * 4];
  duo_mma_KIND(d, x, y);
  for (int i = 0; i < 4; i++) c[(g + (i / 2) * 8) * 8 + q * 2 + i % 2] = d[i];
}
"""
OTHERS = r"""
extern "C" __global__ void scale(const float *x, float *y, long long n) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2.0f * x[i];
}
extern "C" __global__ void scale_one_too_many(const float *x, float *y, long long n) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i <= n) y[i] = 2.0f * x[i];
}
// A matrix transposed; `stride` is that of a row of x.
extern "C" __global__ void transpose(const float *x, float *y, long long rows, long long columns, long long stride) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < rows * columns) y[i] = x[i % rows * stride + i / rows];
}
extern "C" __global__ void past_shared(float *y, long long at) {
  extern __shared__ __align__(16) unsigned char shared[];
  ((volatile float *)shared)[at] = 1.0f;
  y[threadIdx.x] = 0.0f;
}
extern "C" __global__ void half_a_barrier(float *y) {
  if (threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = 0.0f;
}
extern "C" __global__ void two_barriers(float *y) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 0.0f;
}
extern "C" __global__ void half_a_shuffle(float *y) {
  float v = threadIdx.x;
  if (threadIdx.x % 2) v = __shfl_xor_sync(0xffffffffu, v, 1);
  __syncthreads();
  y[threadIdx.x] = v;
}
extern "C" __global__ void collectives(float *sum, long long *vote, long long *count) {
  float v = threadIdx.x + 1.0f;
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  if (threadIdx.x < 16) v += __shfl_down_sync(0xffffu, (float)threadIdx.x, 8, 16);   // half a warp by itself
  v += __shfl_sync(0xffffffffu, v, 0, 8) * 0.0f;
  sum[threadIdx.x] = v;
  vote[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
  int n = __syncthreads_count(threadIdx.x % 5 == 0);
  atomicAdd(count, n);
}
extern "C" __global__ void spin(unsigned long long *lock, long long *total) {
  for (bool done = false; !done;)
    if (atomicCAS(lock, 0ull, 1ull) == 0ull) { *total += threadIdx.x; atomicExch(lock, 0ull); done = true; }
}
"""
KERNELS = OTHERS + "".join(MMA.replace("KIND", kind) for kind in ("bf16", "f16", "tf32"))
for _name, _barrier in (("tree", "__syncthreads();"), ("tree_without", "")):
    KERNELS += TREE.replace("NAME", _name).replace("BARRIER", _barrier)


class Gpu:
    """Arrays on the emulated GPU, and launches that wait."""

    def __init__(self) -> None:
        self.driver = driver()
        with self.driver:
            self.stream = self.driver.stream()
            self.module = self.driver.load(build.compile_text(KERNELS))
        self.live: list[int] = []

    def array(self, array: np.ndarray) -> int:
        pinned = self.driver.pinned(array.nbytes)
        ctypes.memmove(pinned.ptr, array.ctypes.data, array.nbytes)
        ptr = self.driver.allocate(array.nbytes)
        self.live.append(ptr)
        self.driver.to_device(ptr, pinned.ptr, array.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return ptr

    def read(self, ptr: int, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
        out = np.empty(shape, dtype)
        pinned = self.driver.pinned(out.nbytes)
        self.driver.to_host(pinned.ptr, ptr, out.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        ctypes.memmove(out.ctypes.data, pinned.ptr, out.nbytes)
        return out

    def run(self, name: str, blocks: int, threads: int, *arguments: int, shared: int = 0) -> None:
        function = self.driver.function(self.module, name, shared)
        packed = struct.pack(f"{len(arguments)}q", *arguments)
        with self.driver:
            self.driver.launch(function, blocks, threads, packed, shared, self.stream)
            self.driver.synchronize(self.stream)


@pytest.fixture
def gpu():
    made = Gpu()
    with made.driver:
        yield made
        for ptr in made.live:
            made.driver.free(ptr)


def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (3, 256)).astype("f4")


@every_order
def test_kernels_run_under_every_schedule(gpu, order, monkeypatch):
    monkeypatch.setenv("DUO_EMU_ORDER", order)
    x = rows()
    y = gpu.array(np.zeros(3, "f4"))
    gpu.run("tree", 3, 256, gpu.array(x), y, shared=1024)
    assert (gpu.read(y, (3,)) == x.sum(1)).all()


def test_a_dropped_barrier_is_caught(gpu, monkeypatch):
    x = rows()
    right = []
    for order in ORDERS:
        monkeypatch.setenv("DUO_EMU_ORDER", order)
        y = gpu.array(np.zeros(3, "f4"))
        gpu.run("tree_without", 3, 256, gpu.array(x), y, shared=1024)
        right.append((gpu.read(y, (3,)) == x.sum(1)).all())
    assert not all(right)


@pytest.mark.parametrize("n", [1, 3, 4, 1000, 4096])
def test_an_access_past_the_end_is_caught(gpu, n):
    x = np.arange(n, dtype="f4")
    y = gpu.array(np.zeros(n, "f4"))
    gpu.run("scale", n // 128 + 1, 128, gpu.array(x), y, n)
    assert (gpu.read(y, (n,)) == 2 * x).all()
    with pytest.raises(DeviceError, match="past the end of an allocation"):
        gpu.run("scale_one_too_many", n // 128 + 1, 128, gpu.array(x), gpu.array(np.zeros(n, "f4")), n)
    gpu.run("scale", n // 128 + 1, 128, gpu.array(x), y, n)  # and life goes on


def test_a_wrong_stride_is_caught(gpu):
    x = np.arange(12, dtype="f4").reshape(3, 4)
    source = gpu.array(x)
    y = gpu.array(np.zeros(12, "f4"))
    gpu.run("transpose", 1, 32, source, y, 3, 4, 4)
    assert (gpu.read(y, (4, 3)) == x.T).all()
    with pytest.raises(DeviceError, match="past the end of an allocation of 48 bytes"):
        gpu.run("transpose", 1, 32, source, y, 3, 4, 5)
    gpu.run("transpose", 1, 32, source, y, 3, 4, 3)
    assert not (gpu.read(y, (4, 3)) == x.T).all()


@pytest.mark.parametrize("at", [64, 66, 4096, -1])
def test_an_access_outside_shared_memory_is_caught(gpu, at):
    y = gpu.array(np.zeros(32, "f4"))
    gpu.run("past_shared", 1, 32, y, 63, shared=256)
    with pytest.raises(DeviceError, match=r"shared memory|access"):
        gpu.run("past_shared", 1, 32, y, at, shared=256)


@pytest.mark.parametrize("name", ["half_a_barrier", "two_barriers", "half_a_shuffle"])
def test_divergent_barriers_are_caught(gpu, name):
    with pytest.raises(DeviceError, match=r"returned|wait|never come"):
        gpu.run(name, 1, 64, gpu.array(np.zeros(64, "f4")))


@every_order
def test_collectives(gpu, order, monkeypatch):
    monkeypatch.setenv("DUO_EMU_ORDER", order)
    total, vote, count = (gpu.array(np.zeros(64, kind)) for kind in ("f4", "i8", "i8"))
    gpu.run("collectives", 1, 64, total, vote, count)
    lane = np.arange(64) % 32
    want = np.where(np.arange(64) < 32, 528.0, 1552.0)
    first = np.arange(64) < 16
    want = want + np.where(first, np.where(lane % 16 < 8, lane + 8, lane), 0)
    assert (gpu.read(total, (64,)) == want).all()
    votes = [sum(1 << i for i in range(32) if (32 * w + i) % 3 == 0) for w in (0, 1)]
    assert (gpu.read(vote, (64,), "i8") == np.repeat(votes, 32)).all()
    assert gpu.read(count, (1,), "i8")[0] == 64 * 13
    lock, total = gpu.array(np.zeros(1, "i8")), gpu.array(np.zeros(1, "i8"))
    gpu.run("spin", 2, 64, lock, total)
    assert gpu.read(total, (1,), "i8")[0] == 2 * sum(range(64))


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_tensor_core_products(gpu, kind):
    rng = np.random.default_rng(1)
    depth = 8 if kind == "tf32" else 16
    a, b = (rng.integers(-8, 8, (n, depth)).astype("f4") for n in (16, 8))
    if kind == "bf16":
        packed = [(x.view("u4") >> 16).astype("u2") for x in (a, b)]
    else:
        packed = [x.astype("f2") if kind == "f16" else x for x in (a, b)]
    c = gpu.array(np.zeros((16, 8), "f4"))
    gpu.run(f"mma_{kind}", 1, 32, gpu.array(packed[0]), gpu.array(packed[1]), c)
    assert (gpu.read(c, (16, 8)) == a @ b.T + 1).all()


def test_memory_is_poisoned_and_gone_after_free(gpu):
    ptr = gpu.driver.allocate(64)
    assert np.isnan(gpu.read(ptr, (16,))).all()
    gpu.driver.free(ptr)
    with pytest.raises(DeviceError, match="freed"):
        gpu.run("scale", 1, 16, ptr, gpu.array(np.zeros(16, "f4")), 16)


def test_streams_run_when_somebody_waits(gpu):
    """What is read before waiting is old: the emulator is as asynchronous as can be."""
    d = gpu.driver
    pinned = d.pinned(64)
    host = np.frombuffer((ctypes.c_char * 64).from_address(pinned.ptr), "f4")
    x, y = gpu.array(np.ones(16, "f4")), gpu.array(np.zeros(16, "f4"))
    event, other = d.event(), d.stream()
    d.launch(d.function(gpu.module, "scale"), 1, 16, struct.pack("3q", x, y, 16), 0, gpu.stream)
    d.record(event, gpu.stream)
    d.stream_wait(other, event)
    d.to_host(pinned.ptr, y, 64, other)
    assert not d.ready(event) and not (host == 2).any()
    d.synchronize(other)
    assert d.ready(event) and (host == 2).all()
