"""Tensors shared with other libraries without a copy: DLPack, and `__cuda_array_interface__` for memory of a GPU.

Memory that others see is handled as what NumPy shares (sharing.py): who writes to it is seen by all, and results that were asked for before stay what
they were. On a GPU the streams of both sides wait for each other when memory changes hands, by the `stream` of either protocol; duo's streams also
wait for CUDA's default stream, where PyTorch and CuPy work unless told otherwise. Work that others give to streams of their own later is theirs to
wait for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo import devices, runtime
from duo.eager.sharing import Storage
from duo.eager.tensor import EagerTensor, from_numpy, material
from duo.eager.trace import state
from duo_backends import dlpack
from duo_ir.errors import ArgumentError, DeviceError, DTypeError
from duo_ir.types import DType, TensorType
from duo_ir.types import dtype as as_dtype

VERSION = (1, 0)  # of DLPack
ALIGNMENT = 16  # bytes that kernels of a GPU read at once: memory that starts elsewhere is copied
LEGACY, PER_THREAD = 1, 2  # streams that have numbers
_TYPESTRS = {"f": "f", "i": "i", "u": "u", "b": "b"}


# ------------------------------------------------------------------------------------------------------------- to others
class Shown:
    """Memory of a GPU that others see: `handle` is the stream that they read it on. When they let go of it, what they have started there may still be
    running."""

    __slots__ = ("__weakref__", "_pool", "buffer", "handle")

    def __init__(self, buffer: Any, handle: int) -> None:
        self.buffer, self.handle = buffer, handle
        self._pool = runtime.backend(buffer.device).runtime.pool
        buffer.shared = True

    def __del__(self) -> None:
        self._pool.shown.append((self.buffer, self.handle))


def dlpack_device(tensor: EagerTensor) -> tuple[int, int]:
    """(1, 0) for the CPU, (2, n) for GPU number n: the type and number that DLPack has for the device."""
    where = tensor.device
    return (dlpack.CPU, 0) if where.index is None else (dlpack.CUDA, where.index)


def to_dlpack(
    tensor: EagerTensor,
    stream: int | None = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """The tensor's memory for another library, whose `from_dlpack` calls this: NumPy's, PyTorch's, JAX's, CuPy's. A write to either is seen by the
    other; a view through indexing or transposition, and `copy=True`, give a copy. stream: where the other library will use memory of a GPU. Raises
    GradientError for a tensor that requires grad, BufferError for another device than the CPU or the tensor's own."""
    here = dlpack_device(tensor)
    if dl_device is not None and tuple(dl_device) != here:
        if tuple(dl_device) != (dlpack.CPU, 0) or copy is False:
            raise BufferError(
                f"a tensor on {tensor.device} is not handed over to DLPack device {dl_device}; move it by .to()"
            )
        return to_dlpack(tensor.detach().to("cpu"), None, max_version)
    if copy:
        tensor = tensor.detach().clone()
    versioned = max_version is not None and max_version[0] >= VERSION[0]
    dtype, shape = tensor.dtype, tensor._type.static_shape()
    if here[0] == dlpack.CPU:
        if stream is not None:
            raise ArgumentError("a tensor on the CPU has no stream: pass stream=None")
        array = tensor.numpy()
        strides = [s // array.itemsize for s in array.strides]
        return dlpack.export(array.ctypes.data, dtype, shape, strides, here, array, versioned)
    shown = show(tensor, stream)
    return dlpack.export(shown.buffer.ptr, dtype, shape, dlpack.contiguous(shape), here, shown, versioned)


def show(tensor: EagerTensor, stream: int | None) -> Shown:
    """The memory of a tensor on a GPU, ready to be read on that stream of another library (None: the default one; -1: whoever reads it waits)."""
    if stream == 0:
        raise ArgumentError("stream=0 may mean two things: 1 is the default stream, 2 that of the thread")
    handle = LEGACY if stream is None else stream
    shown = tensor._exposed(lambda buffer: Shown(buffer, handle))
    if handle >= 0:
        running = runtime.backend(shown.buffer.device).runtime
        running.hand_over(shown.buffer, handle)
    return shown  # type: ignore[no-any-return]


def array_interface(tensor: EagerTensor) -> dict[str, Any]:
    """The memory of a tensor on a GPU for libraries that read this protocol (version 3); they keep the tensor while they use it. Raises
    AttributeError for a tensor on the CPU."""
    if not tensor.is_cuda:
        raise AttributeError("a tensor on the CPU has no __cuda_array_interface__; it has __array__ and __dlpack__")
    array_type = tensor.dtype.numpy
    if array_type.kind not in _TYPESTRS:
        raise DTypeError(
            f"__cuda_array_interface__ has no {tensor.dtype.name}; use DLPack (from_dlpack of the other library)"
        )
    shown = show(tensor, -1)
    storage = tensor._storage
    if storage is not None and storage.shared is not None:
        storage.shared = _Forever(shown)  # nobody says when it has been read: whoever reads it keeps the tensor itself
    running = runtime.backend(shown.buffer.device).runtime
    running.hand_over(shown.buffer, None)
    return {
        "shape": tensor._type.static_shape(),
        "typestr": array_type.str,
        "data": (shown.buffer.ptr, False),
        "strides": None,
        "stream": running.driver.handle(running.stream.queue),
        "version": 3,
    }


class _Forever:
    """Says that memory is shared, as long as the storage lives."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def __call__(self) -> bool:
        return True


# ----------------------------------------------------------------------------------------------------------- from others
def from_dlpack(x: Any, *, device: Any = None, copy: bool | None = None) -> EagerTensor:
    """A tensor that shares the memory of `x`, an object with `__dlpack__` (of NumPy, PyTorch, JAX, CuPy...) or a capsule: writes to either are seen
    by the other. Memory that is not contiguous, or not to be written, is copied. device: where the tensor is to be; copy: True for memory of its own.
    Raises DeviceError for memory of a device that duo does not know, DTypeError for such a dtype."""
    _note_capture()
    if not hasattr(x, "__dlpack__"):
        taken = dlpack.take(x)
    elif x.__dlpack_device__()[0] in (dlpack.CUDA, dlpack.MANAGED):
        running = runtime.backend(_gpu(x.__dlpack_device__()[1])).runtime
        taken = dlpack.take(_capsule(x, stream=running.driver.handle(running.stream.queue)))
    else:
        taken = dlpack.take(_capsule(x))
    kind, number = taken.device
    if kind in (dlpack.CPU, dlpack.PINNED):
        out = from_numpy(_array(taken))
    elif kind in (dlpack.CUDA, dlpack.MANAGED):
        out = _on_gpu(taken.ptr, taken.dtype, taken.shape, taken.strides, _gpu(number), taken.owner, taken.read_only)
    else:
        raise DeviceError(
            f"duo does not know memory of DLPack device type {kind}; copy it to the CPU or a CUDA GPU first"
        )
    if device is not None:
        out = out.to(device)
    return out.clone() if copy else out


def from_array_interface(x: Any) -> EagerTensor:
    """A tensor that shares the memory of an object with `__cuda_array_interface__`, which is on the current GPU. See `from_dlpack`."""
    _note_capture()
    found = x.__cuda_array_interface__
    if found.get("mask") is not None:
        raise ArgumentError("an array with a mask is no tensor; fill it first")
    ptr, read_only = found["data"]
    array_type = np.dtype(found["typestr"])
    dtype, shape = as_dtype(array_type), tuple(found["shape"])
    strides = found.get("strides")
    steps = dlpack.contiguous(shape) if strides is None else tuple([s // array_type.itemsize for s in strides])
    device = _gpu(devices.current_gpu())
    stream = found.get("stream")
    if stream is not None:
        runtime.backend(device).runtime.take_over(stream)
    return _on_gpu(ptr or 0, dtype, shape, steps, device, x, read_only)


def is_foreign(x: Any) -> bool:
    """Whether another library says how to share `x`."""
    return hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")


def is_on_gpu(x: Any) -> bool:
    """Whether an object of another library is in memory of a GPU."""
    if hasattr(x, "__dlpack_device__"):
        return x.__dlpack_device__()[0] in (dlpack.CUDA, dlpack.MANAGED)
    return hasattr(x, "__cuda_array_interface__")


def from_foreign(x: Any) -> EagerTensor:
    """What shares the memory of an object that `is_foreign`."""
    return from_dlpack(x) if hasattr(x, "__dlpack__") else from_array_interface(x)


def _note_capture() -> None:
    if state.capture is not None:
        state.capture.impure("memory of another library is shared")


def _gpu(number: int) -> str:
    return runtime.check_device(f"cuda:{number}")


def _capsule(x: Any, **stream: int) -> Any:
    try:
        return x.__dlpack__(max_version=VERSION, **stream)
    except TypeError:  # an exporter from before DLPack 1.0
        return x.__dlpack__(**stream)


def _span(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """The first and last element that there is, counted from the one at index 0."""
    steps = [(n - 1) * s for n, s in zip(shape, strides)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)


def _array(taken: dlpack.Taken) -> np.ndarray:
    """The memory as an array, which keeps its owner alive."""
    item = taken.dtype.numpy
    if 0 in taken.shape:
        return np.empty(taken.shape, item)
    first, last = _span(taken.shape, taken.strides)
    memory: Any = (ctypes.c_char * ((last - first + 1) * item.itemsize)).from_address(taken.ptr + first * item.itemsize)
    memory.owner = taken.owner
    steps = [s * item.itemsize for s in taken.strides]
    array = np.ndarray(taken.shape, item, memory, -first * item.itemsize, steps)
    array.flags.writeable = not taken.read_only
    return array


def _on_gpu(
    ptr: int, dtype: DType, shape: tuple[int, ...], strides: Sequence[int], device: str, owner: Any, read_only: bool
) -> EagerTensor:
    """A tensor of memory of a GPU that is ready for the current stream; a copy of what kernels cannot read where it is."""
    kind, item = TensorType(dtype, shape), dtype.numpy.itemsize
    if 0 in shape:
        return EagerTensor(material(runtime.backend(device).allocate(0), kind))
    running = runtime.backend(device).runtime
    first, last = _span(shape, strides)
    memory = running.borrow(ptr + first * item, (last - first + 1) * item, owner)
    dense = all(n == 1 or s == want for n, s, want in zip(shape, strides, dlpack.contiguous(shape)))
    if dense and not read_only and memory.ptr % ALIGNMENT == 0:
        out = EagerTensor(material(memory, kind))
        out._storage = Storage(out._val)
        out._storage.shared = _always
        return out
    own = running.duplicate(memory)
    if dense:
        return EagerTensor(material(own, kind))
    flat = EagerTensor(material(own, TensorType(dtype, (last - first + 1,))))
    places = np.full(shape, -first, np.int64)
    for axis, (n, s) in enumerate(zip(shape, strides)):
        places += np.arange(n).reshape([n if k == axis else 1 for k in range(len(shape))]) * s
    return flat[places]


def _always() -> bool:
    return True


EagerTensor.__dlpack__ = to_dlpack  # type: ignore[attr-defined]
EagerTensor.__dlpack_device__ = dlpack_device  # type: ignore[attr-defined]
EagerTensor.__cuda_array_interface__ = property(array_interface)  # type: ignore[attr-defined]
