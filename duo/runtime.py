"""Where frontends meet backends: buffers, executables, devices.

A `Runnable` is a compiled Function: it takes buffers (and Python numbers for scalar parameters) and gives buffers. They are cached by
canonical hash and bounded in number, so equal programs, from whichever frontend, are compiled once for a device. Each device that is used has a
backend; a buffer says where it is (`device`). `DUO_BACKEND=interpret` runs everything by the reference interpreter, which gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from duo.devices import CPU, canonical
from duo_backends.cpu.memory import Buffer, allocate
from duo_ir.core import Function
from duo_ir.errors import ArgumentError, DeviceError, IndexOutOfRange
from duo_ir.types import TensorType

MAX_EXECUTABLES = 2048
MAX_SAVED_ALONE = 256
_LARGE_COPY = 32 << 20  # bytes from which a copy is worth a program


@dataclass
class Statistics:
    """What this process has compiled and run. `compiled`: programs; `fused`: of those, compiled as a whole; `hits`: found in the cache;
    `overwritten`: bytes of inputs of eager programs whose memory results took, as nobody could read them any more."""

    compiled: int = 0
    fused: int = 0
    from_disk: int = 0
    hits: int = 0
    overwritten: int = 0


statistics = Statistics()


_backends: dict[str, Any] = {}
_there: dict[str, str] = {CPU: CPU}  # devices that were looked for and found, under their canonical names


def backend(device: str = CPU) -> Any:
    """The backend of a device. Emitters and passes are loaded here, at the first compilation, so that `import duo` stays quick."""
    found = _backends.get(device)
    if found is None:
        with _making:
            found = _backends.get(device)
            if found is None:
                found = _backends[device] = _make_backend(device)
    return found


def _make_backend(device: str) -> Any:
    if device == CPU:
        return importlib.import_module("duo_backends.cpu.backend").CpuBackend()
    kind, _, number = device.partition(":")
    return importlib.import_module(f"duo_backends.{kind}.backend").CudaBackend(int(number))


def use_backend(device: str, backend: Any) -> None:
    """Makes `backend` the one of a device, or with None, forgets the one it has. Programs are compiled anew."""
    if backend is None:
        _backends.pop(device, None)
        _there.pop(device, None)
    else:
        _backends[device] = backend
    clear_cache()


def in_use() -> list[str]:
    """The devices that have a backend by now."""
    return list(_backends)


@functools.cache
def _pipeline() -> Any:
    return importlib.import_module("duo_ir.pipeline")


@functools.cache
def _saved() -> Any:
    return importlib.import_module("duo_backends.cpu.saved")


@functools.cache
def _interpreter() -> Any:
    return importlib.import_module("duo_ir.interpret")


class Interpreted:
    """Runs a Function by the reference interpreter. With `check`, an op whose result holds the first NaN or infinity raises NanError."""

    givable: frozenset[int] = frozenset()  # it overwrites no input

    def __init__(self, function: Function, check: bool = False, device: str = CPU) -> None:
        self.function, self.check, self.device = function, check, device

    def run(self, inputs: Sequence[Any], donated: Collection[int] = ()) -> list[Any]:
        arrays = [
            to_numpy(b, p.type, copy=True) if hasattr(b, "device") else np.asarray(b, p.type.dtype.numpy)
            for b, p in zip(inputs, self.function.params)
        ]
        run = _interpreter().interpret_checked if self.check else _interpreter().interpret
        return [from_numpy(a, device=self.device) for a in run(self.function, *arrays)]


_cache: OrderedDict[tuple[str, bool, tuple[int, ...], str, str], Any] = OrderedDict()
_lock = threading.RLock()  # what is freed while it is held may take it
_making = threading.RLock()
_saved_alone = 0
_use_interpreter = os.environ.get("DUO_BACKEND", "cpu") == "interpret"
_check_nan = False
_fusion = os.environ.get("DUO_FUSION", "1") != "0"


def _renew_lock() -> None:
    global _lock, _making, _pauses
    _lock, _making = threading.RLock(), threading.RLock()  # another thread of the parent may have held them
    if _pauses:  # by threads that are not there any more, or by this one, which may still be within
        _pauses = 0
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def set_backend(name: str) -> None:
    """'cpu' (compiled code) or 'interpret' (the reference interpreter), for programs compiled from now on."""
    global _use_interpreter
    if name not in ("cpu", "interpret"):
        raise ArgumentError(f"backend {name!r} is not known; there are 'cpu' and 'interpret'")
    _use_interpreter = name == "interpret"
    clear_cache()


def set_fusion(enabled: bool) -> None:
    """Whether programs compiled from now on are fused (the default) or run one kernel per op, with the same bits."""
    global _fusion
    _fusion = enabled
    clear_cache()


def set_check_nan(enabled: bool) -> None:
    """Whether programs are run op by op in search of the first NaN or infinity."""
    global _check_nan
    _check_nan = enabled
    clear_cache()


def clear_cache() -> None:
    """Forgets compiled programs (object code stays in the disk cache)."""
    with _lock:
        _cache.clear()
    for listener in cache_listeners:
        listener()


cache_listeners: list[Any] = []


def runnable(
    function: Function,
    fused: bool = True,
    scalars: Collection[int] = (),
    device: str = CPU,
    numerics: str = "strict",
) -> Any:
    """The compiled form, for a device, of a Function whose types are static. `scalars`: numbers of 0-d parameters given as Python numbers.
    `numerics`: see `duo.set_numerics`."""
    fused = fused and _fusion
    key = (function.hash, fused, tuple(scalars), device, "strict" if device == CPU else numerics)
    found = _cache.get(key)
    if found is not None:
        statistics.hits += 1
        try:
            _cache.move_to_end(key)
        except KeyError:
            pass
        return found
    made = _make(function, fused, scalars, device, numerics=numerics)
    with _lock:
        statistics.compiled += 1
        statistics.fused += fused
        _cache[key] = made
        while len(_cache) > MAX_EXECUTABLES:
            _cache.popitem(last=False)
    return made


class Hoisted(NamedTuple):
    """A program in two: `main` takes the inputs of the whole and then the results of `prologue`, which takes those numbered `constants`."""

    prologue: Any
    main: Any
    constants: tuple[int, ...]


def hoist(function: Function, constants: Iterable[int], scalars: Collection[int] = ()) -> Hoisted | None:
    """`runnable` on the CPU of a Function in two; None where little depends on the parameters numbered `constants` alone."""
    if _use_interpreter or _check_nan:
        return None
    simple = _pipeline().simplify(function)
    split = importlib.import_module("duo_ir.transforms.hoist").hoist(simple, constants, backend().panel_columns)
    if split is None:
        return None
    return Hoisted(runnable(split.prologue), runnable(split.main, scalars=scalars), split.constants)


def compile_alone(function: Function, scalars: Collection[int] = ()) -> Any:
    """`runnable` on the CPU without fusion, for a caller that keeps what it gets. There may be one for every shape that a program meets, so only
    the first MAX_SAVED_ALONE of a process are kept on disk."""
    global _saved_alone
    with _lock:
        statistics.compiled += 1
        _saved_alone += 1
    return _make(function, False, scalars, CPU, _saved_alone <= MAX_SAVED_ALONE)


def recorder(
    offset_of: Callable[[Any, str], int],
    owners: Mapping[str, Any],
    objects: Mapping[str, Any],
    operators: Sequence[str],
) -> Any:
    """Native functions that record eager ops (`duo_backends/cpu/recorder.py`). offset_of: says where a slot is in an object; owners: objects that
    have the slots they use; objects: those that they name."""
    return importlib.import_module("duo_backends.cpu.recorder").Recorder(offset_of, owners, objects, operators)


def interpreted(function: Function) -> Interpreted:
    """`runnable` on the CPU by the reference interpreter, for programs that are not worth compiling."""
    return Interpreted(function, _check_nan)


def _make(
    function: Function, fused: bool, scalars: Collection[int], device: str, save: bool = True, numerics: str = "strict"
) -> Any:
    if _use_interpreter or _check_nan:
        return Interpreted(function, _check_nan, device)
    if device != CPU:
        compile = _pipeline().compile
        return compile(function, backend(device), fusion=fused, scalars=scalars, numerics=numerics).bind({})
    return _compile(function, fused, scalars, save)


_pauses = 0  # compilations under way for which automatic garbage collection was switched off


class _Uncollected:
    """Without automatic garbage collection, in the threads that compile and in the others: a compiler allocates much that lives until it ends, and
    collections, which would look at all of it again and again, keep the threads of the code generator waiting for the interpreter."""

    __slots__ = ("_mine",)

    def __init__(self) -> None:
        global _pauses
        self._mine = False
        with _lock:
            if _pauses > 0 or gc.isenabled():
                _pauses += 1
                self._mine = True
                gc.disable()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends its pause, once."""
        global _pauses
        with _lock:
            if self._mine and _pauses:
                self._mine = False
                _pauses -= 1
                if _pauses == 0:
                    gc.enable()

    def __del__(self) -> None:  # where an interrupt came between, before the end
        if self._mine:
            self.end()


def _compile(function: Function, fused: bool, scalars: Collection[int], save: bool) -> Any:
    saved = _saved()
    found = saved.load(function, fused, scalars)
    if found is not None:
        statistics.from_disk += 1
        return found
    with _Uncollected():
        importlib.import_module("duo_backends.cpu.runner").prepare()
        made = _pipeline().compile(function, backend(), fusion=fused, scalars=scalars).bind({})
        if save:
            saved.store(function, fused, scalars, made)
    return made


# ---------------------------------------------------------------------------------------------------------- buffers
def from_numpy(array: np.ndarray, copy: bool = True, device: str = CPU) -> Any:
    """A buffer with the array's contents; on the CPU without `copy`, its very memory (C-contiguous arrays)."""
    if device != CPU:
        return backend(device).from_numpy(array)
    if not copy:
        return Buffer.from_numpy(array)
    array = np.ascontiguousarray(array)
    buffer = allocate(array.nbytes)
    ctypes.memmove(buffer.ptr, array.ctypes.data, array.nbytes)
    return buffer


def filled(value: Any, type: TensorType, device: str = CPU) -> Any:
    """A buffer whose elements are all that Python number or NumPy scalar."""
    if device != CPU:
        return backend(device).filled(value, type.dtype, type.static_shape())
    buffer = allocate(type.dtype.numpy.itemsize * math.prod(type.static_shape()))
    buffer.fill(value, type.dtype, type.static_shape())
    return buffer


def to_numpy(buffer: Any, type: TensorType, copy: bool = False) -> np.ndarray:
    """The buffer as an array of that type; on the CPU without `copy`, a view that keeps the buffer alive. Raises IndexOutOfRange when a program
    that a GPU ran before met one."""
    shape = type.static_shape()
    if buffer.__class__ is not Buffer:
        return backend(buffer.device).to_numpy(buffer, type.dtype, shape)
    return buffer.read(type.dtype, shape) if copy else buffer.numpy(type.dtype, shape)


def moved(buffer: Any, type: TensorType, device: str) -> Any:
    """A buffer with the same contents on another device, or the very buffer where it is there already."""
    if buffer.device == device:
        return buffer
    return from_numpy(to_numpy(buffer, type), device=device)


def copied(buffer: Any, type: TensorType) -> Any:
    """A buffer of its own, on the same device, with the same contents."""
    if buffer.__class__ is not Buffer:
        return backend(buffer.device).runtime.duplicate(buffer)
    nbytes = type.dtype.numpy.itemsize * math.prod(type.static_shape())
    if nbytes == buffer.nbytes >= _LARGE_COPY and not _use_interpreter:
        return backend().duplicate(buffer)
    out = allocate(nbytes)
    ctypes.memmove(out.ptr, buffer.ptr, nbytes)
    return out


def copied_part(buffer: Buffer, offset: int, nbytes: int) -> Buffer:
    """A buffer of its own with `nbytes` from `offset` on; on the CPU."""
    out: Buffer = allocate(nbytes)
    ctypes.memmove(out.ptr, buffer.ptr + offset, nbytes)
    return out


def overwrite(target: Any, source: Any, type: TensorType) -> None:
    """Writes the contents of `source` into the memory of `target`, which others see; both are on one device."""
    nbytes = type.dtype.numpy.itemsize * math.prod(type.static_shape())
    if target.__class__ is not Buffer:
        backend(target.device).runtime.copy(target, source, nbytes)
    else:
        ctypes.memmove(target.ptr, source.ptr, nbytes)


_C_TYPES: dict[str, Any] = {
    "f32": ctypes.c_float, "f64": ctypes.c_double, "i64": ctypes.c_int64, "i32": ctypes.c_int32, "i16": ctypes.c_int16,
    "i8": ctypes.c_int8, "u8": ctypes.c_uint8, "bool": ctypes.c_bool,
}  # fmt: skip


def read_number(buffer: Any, type: TensorType) -> Any:
    """The only element of a buffer as a Python number."""
    found = _C_TYPES.get(type.dtype.name)
    if found is not None and buffer.__class__ is Buffer:
        return found.from_address(buffer.ptr).value
    return to_numpy(buffer, type, copy=True).item()


def synchronize() -> None:
    """Waits for programs that were started, on every device in use. Those on the CPU have finished when they return. Raises IndexOutOfRange for
    one that met an index out of range."""
    for used in list(_backends.values()):
        used.synchronize()


def explained(device: str, explain: Callable[[IndexOutOfRange], Exception]) -> Any:
    """Entered while this thread runs programs on a GPU: an index out of range that is noticed later is raised as `explain` tells it."""
    return backend(device).runtime.explained(explain)


def check_device(device: object) -> str:
    """The canonical name of a device on which programs can run; None is the default device. Raises DeviceError, which says what is missing."""
    if device.__class__ is str and device in _there:
        return _there[device]  # type: ignore[index]
    name = canonical(device)
    if name not in _there:
        try:
            found = backend(name)
            _ = found.driver, found.compiler  # looked for here
        except DeviceError as error:
            _backends.pop(name, None)
            raise DeviceError(f"device {name!r} cannot be used: {error}") from None
        _there[name] = name
    return name


def gpu_backend(device: str) -> Any:
    """The backend of a GPU, by its canonical name, for code that is compiled already. Raises DeviceError, which says what is missing."""
    try:
        found = backend(device)
        _ = found.driver
    except DeviceError as error:
        _backends.pop(device, None)
        raise DeviceError(f"device {device!r} cannot be used: {error}") from None
    return found


def gpu_count() -> int:
    """How many GPUs programs can run on, numbered from 0; none where anything is missing (`why_no_gpu`). Takes nothing of them."""
    return _gpus()[0]


def why_no_gpu() -> str | None:
    """What is missing for programs to run on a GPU; None where nothing is."""
    return _gpus()[1]


def _gpus() -> tuple[int, str | None]:
    given = max([int(name.partition(":")[2]) + 1 for name in _backends if name != CPU], default=0)
    try:
        count = importlib.import_module("duo_backends.cuda.driver").device_count()
        importlib.import_module("duo_backends.cuda.compiler").find_compiler()
    except DeviceError as error:
        return given, None if given else str(error)
    return max(count, given), None if count or given else "the CUDA driver finds no GPU"


def cuda_source(function: Function, device: str | None) -> str:
    """The CUDA C of a Function's kernels, for a GPU that is there or (None) one of the latest kind that is known."""
    emitter, code = (importlib.import_module(f"duo_backends.cuda.{name}") for name in ("emit", "code"))
    kernels = importlib.import_module("duo_backends.binding").kernels_of(_pipeline().lower(function, _fusion))
    target = code.GpuTarget() if device is None else backend(device).target
    return "\n".join([emitter.compile_kernel(kernel, target).text for kernel in dict.fromkeys(kernels)])


# ---------------------------------------------------------------------------------------------------------- profiles
def recordings(capacity: int) -> dict[str, Any]:
    """A profile of each device in use, to be entered. Raises ArgumentError where programs run by the interpreter."""
    if _use_interpreter or _check_nan:
        raise ArgumentError("duo.profile times kernels, and programs run by the reference interpreter have none")
    found = {name: backend(name).recording(capacity) for name in _backends if name != CPU}
    return {CPU: importlib.import_module("duo_backends.cpu.profile").Recording(capacity), **found}


def peaks(device: str = CPU) -> Any:
    """The device's measured peaks: `gflops` (of the CPU, of one core) and `gbytes`."""
    if device != CPU:
        return backend(device).peaks
    return importlib.import_module("duo_backends.cpu.peaks").peaks()
