"""Storages, and the sharing of their memory with NumPy and other libraries.

A Storage is what tensors that alias have in common. NumPy may see its memory (`from_numpy`, `.numpy()`), others may (exchange.py), and write to it at any time, which
nobody tells us: while an array that shares it is alive, every write goes into the same memory at once, and every read either takes a snapshot
or is run before Python goes on (views, gathers, replays of compiled functions), which copies no more than it reads.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from duo import runtime
from duo.eager.autograd import GradLeaf
from duo.eager.flush import finish, flush
from duo.eager.segments import unmarked
from duo.eager.trace import Trace, Val, settle, state
from duo.eager.trie import Info
from duo_ir.types import TensorType, bool_

_getrefcount = sys.getrefcount


class Storage:
    """What tensors that alias have in common: the base value, how often it was written, the leaf that the base is. `shared`: says whether
    NumPy can see the memory."""

    __slots__ = ("base", "leaf", "shared", "val", "version")

    def __init__(self, val: Val, leaf: GradLeaf | None = None, base: Any = None) -> None:
        self.base: weakref.ref | None = (
            weakref.ref(base) if base is not None else None
        )  # the tensor that it was made for
        self.val = val
        self.leaf = leaf  # of the base, where it is one: its values stay leaves whoever writes them
        self.version = 0
        self.shared: Callable[[], bool] | None = None


class Sharers:
    """Whether any array that shares a storage's memory is alive. `first`: what said so before."""

    __slots__ = ("arrays", "first")

    def __init__(self, first: Callable[[], bool] | None, array: Any) -> None:
        self.first = first
        self.arrays = [weakref.ref(array)]

    def add(self, array: Any) -> None:
        self.arrays = [r for r in self.arrays if r() is not None]
        self.arrays.append(weakref.ref(array))

    def __call__(self) -> bool:
        for array in self.arrays:
            if array() is not None:
                return True
        return self.first is not None and self.first()


def still_shared(storage: Storage) -> bool:
    """Whether NumPy sees the memory now."""
    if storage.shared is None:
        return False
    if storage.shared():
        return True
    storage.shared = None
    storage.version += 1  # what was read before is a snapshot of it
    return False


def snapshot(storage: Storage) -> Val:
    """A copy of memory that NumPy may write to at any time, with its history."""
    base = storage.val
    buffer = runtime.copied(settle(base), base.info.type)
    val = unmarked(base)
    val.buf = buffer
    return val


def readable(storage: Storage) -> bool:
    """Whether the memory may be read where it is: the value has no history that a gradient would need."""
    base = storage.val
    return base.extra is None and not base.info.requires_grad and storage.leaf is None


def now(storage: Storage, read: Callable[[Val], Val], most: bool = True) -> Val | None:
    """What `read` makes of a storage's value, which it may record: run at once on the memory itself, in a trace of its own, so that nothing
    pending reads memory that NumPy may write to. The value has a buffer that nobody else holds. Without `most`, None where it is most of
    the memory: a snapshot costs no more, and what is made of that can be fused with what follows."""
    base = storage.val
    settle(base)
    outer = state.trace
    try:
        state.trace = Trace(state.grad)
        val = read(unmarked(base))
        trace = state.trace
    finally:
        state.trace = outer
    if not most and 2 * _size(val) > _size(base):
        finish(trace)
        return None
    if settle(val) is not base.buf:
        return val
    out = unmarked(val)
    out.buf = runtime.copied(val.buf, val.info.type)
    return out


def _size(val: Val) -> int:
    return math.prod(val.info.type.static_shape()) * val.info.type.dtype.itemsize


def write_through(storage: Storage, val: Val) -> Val:
    """`val` written into the memory that NumPy sees: the storage's new base."""
    shared = settle(storage.val)
    runtime.overwrite(shared, settle(val), val.info.type)
    out = unmarked(val)
    out.buf = shared
    return out


def share_memory(tensor: Any, storage: Storage, make: Callable[[Any], Any] | None = None) -> Any:
    """The memory of the storage, which `tensor` has, as an array, or as what `make` makes of the buffer; a write to either is seen by the other."""
    shared = storage.shared
    if shared is None or not shared():
        shared = storage.shared = None
        val = storage.val
        if val.buf is None:
            settle(val)
        if tensor._chain:
            tensor._val, tensor._seen = val, -1
        base = storage.base() if storage.base is not None else None
        # Nothing else may read the memory any more, so what others hold too is copied.
        holders = 1 + (tensor._val is val) + (base is not None and base is not tensor and base._val is val)
        if _getrefcount(val) - holders != _SOLE_VAL or _getrefcount(val.buf) != _SOLE_BUFFER:
            _make_sole_owner(storage, holders)
    val = storage.val
    kind = val.info.type
    buffer: Any = val.buf or settle(val)
    array = buffer.numpy(kind.dtype, kind.shape) if make is None else make(buffer)
    if shared.__class__ is Sharers:
        shared.add(array)  # type: ignore[union-attr]
    else:
        storage.shared = Sharers(shared, array)
    return array


def _make_sole_owner(storage: Storage, holders: int) -> None:
    """Gives the storage memory of its own, unless it was only this thread's trace that held its value besides `holders`."""
    val = storage.val
    if val in state.trace.leaves:
        flush()
        if (_getrefcount(val) - holders, _getrefcount(val.buf)) == (_SOLE_VAL, _SOLE_BUFFER):
            return
    own = storage.val = unmarked(val)
    own.buf, own.stamp = runtime.copied(settle(val), val.info.type), val.stamp
    storage.version += 1


def _sole_owner() -> tuple[int, int]:
    """The counts that `share_memory` sees, less the holders, for a value and buffer that nobody else holds."""
    storage = Storage(Val(None, 0, None, Info(TensorType(bool_, ()))))
    storage.val.buf = object()  # type: ignore[assignment]
    val = storage.val
    return _getrefcount(val) - 1, _getrefcount(val.buf)


_SOLE_VAL, _SOLE_BUFFER = _sole_owner()


def is_shared(array: np.ndarray) -> Callable[[], bool]:
    """Says whether anybody but a tensor made of the array can still write to it."""
    if not array.flags.owndata:
        return lambda: True
    # Our closure, its cell's use and the buffer hold it; anyone else means that it can be written to.
    return lambda: sys.getrefcount(array) > _OWN_REFERENCES


_OWN_REFERENCES = 3
