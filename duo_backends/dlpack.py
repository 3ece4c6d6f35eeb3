"""DLPack (https://dmlc.github.io/dlpack/latest/c_api.html): memory passed to and taken from other libraries, in capsules.

`export` makes a capsule of memory, `take` reads one. Both know the versioned form (DLPack 1.0) and the one before.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from duo_ir import types
from duo_ir.errors import ArgumentError, DTypeError
from duo_ir.types import DType

CPU, CUDA, PINNED, MANAGED = 1, 2, 3, 13  # kDLCPU, kDLCUDA, kDLCUDAHost, kDLCUDAManaged
_READ_ONLY = 1  # a flag of the versioned form
_DTYPES = {
    (0, 8): types.i8, (0, 16): types.i16, (0, 32): types.i32, (0, 64): types.i64, (1, 8): types.u8, (2, 16): types.f16, (2, 32): types.f32,
    (2, 64): types.f64, (4, 16): types.bf16, (6, 8): types.bool_,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# name of a capsule, its name when it has been taken, what it holds; capsules keep pointers to these very bytes
_KINDS: list[tuple[bytes, bytes, Any]] = [
    (b"dltensor_versioned", b"used_dltensor_versioned", _Versioned),
    (b"dltensor", b"used_dltensor", _Managed),
]
_api = ctypes.PyDLL(None)  # not `ctypes.pythonapi`, whose functions anybody may declare otherwise
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
_rename = _api.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_call_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_exported: dict[int, tuple[Any, ...]] = {}  # address of what a capsule holds -> what that needs
# The same address -> a capsule that may not have been taken yet. Capsules have no destructor: one in Python would run in the middle of whatever lets
# go of the capsule, with an error pending maybe, which it would lose. `sweep` finds those that nobody has any more.
_waiting: dict[int, Any] = {}


@_call_deleter
def _delete(address: int, pop: Any = _exported.pop) -> None:
    pop(address, None)


def sweep() -> None:
    """Lets go of memory whose capsule has ended without being taken; every `export` does."""
    for address in list(_waiting):
        if not any(_is_valid(id(_waiting[address]), name) for name, _, _ in _KINDS):
            del _waiting[address]  # taken: the deleter will be called
        elif sys.getrefcount(_waiting[address]) <= _ALONE:
            del _waiting[address]
            _exported.pop(address, None)


def _alone() -> int:
    held = {0: object()}
    return sys.getrefcount(held[0])


_ALONE = _alone()


def export(
    ptr: int,
    dtype: DType,
    shape: Sequence[int],
    strides: Sequence[int],
    device: tuple[int, int],
    owner: Any,
    versioned: bool,
) -> Any:
    """A capsule of the memory at `ptr`, which `owner` keeps alive; strides in elements. It is let go of when the consumer calls the deleter; that of a
    capsule that nobody has taken, when the next one is made."""
    sweep()
    kind = _Versioned if versioned else _Managed
    held = kind()
    rank = len(shape)
    sizes, steps = (ctypes.c_int64 * max(rank, 1))(*shape), (ctypes.c_int64 * max(rank, 1))(*strides)
    tensor = held.tensor
    tensor.data, tensor.ndim, tensor.lanes, tensor.byte_offset = ptr, rank, 1, 0
    tensor.device_type, tensor.device_id = device
    tensor.code, tensor.bits = _CODES[dtype]
    tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64))
    held.deleter = ctypes.cast(_delete, ctypes.c_void_p)
    if versioned:
        held.major, held.minor = 1, 0
    address = ctypes.addressof(held)
    _exported[address] = held, sizes, steps, owner
    capsule = _waiting[address] = _new(address, _KINDS[0 if versioned else 1][0], None)
    return capsule


class Owner:
    """Memory of another library: lets go of it at its end."""

    def __init__(self, address: int, deleter: int | None) -> None:
        self._address, self._deleter = address, deleter

    def __del__(self) -> None:
        if self._deleter:
            _call_deleter(self._deleter)(self._address)


class Taken(NamedTuple):
    """What a capsule held: address, dtype, sizes, strides in elements, (type, number) of the device, whether it must not be written."""

    ptr: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: tuple[int, int]
    read_only: bool
    owner: Owner


def take(capsule: Any) -> Taken:
    """Takes the memory out of a capsule, which can be done once. Raises ArgumentError, DTypeError."""
    found = next((kind for kind in _KINDS if _is_valid(id(capsule), kind[0])), None)
    if found is None:
        raise ArgumentError(f"{capsule!r} is no DLPack capsule, or one that was taken already")
    name, used, kind = found
    address = _pointer(id(capsule), name)
    held = kind.from_address(address)
    if kind is _Versioned and held.major > 1:
        raise ArgumentError(f"the capsule is of DLPack {held.major}.{held.minor}; duo knows 1.0 and earlier")
    tensor = held.tensor
    dtype = _DTYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        raise DTypeError(
            f"a DLPack tensor of type code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes has no dtype in duo; convert it first"
        )
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous(shape)
    read_only = kind is _Versioned and bool(held.flags & _READ_ONLY)
    _rename(id(capsule), used)
    return Taken(
        (tensor.data or 0) + tensor.byte_offset,
        dtype,
        shape,
        strides,
        (tensor.device_type, tensor.device_id),
        read_only,
        Owner(address, held.deleter),
    )


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of row-major order."""
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= max(n, 1)
    return tuple(reversed(out))
