"""Tensors as cells: what native code must know to read and overwrite the values that tensors hold.

Offsets of slots are found by looking for a known object in an instance's memory, and what native code takes for granted (reference counts and
classes in an object's first words, the interpreter's lock) is tried out first; where it does not hold there is no layout, and programs are
called with buffers.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
import threading
import weakref
from typing import Any

import numpy as np

from duo.eager.autograd import GradLeaf
from duo.eager.sharing import Storage
from duo.eager.tensor import EagerTensor
from duo.eager.trace import Val
from duo.eager.trie import NOTHING
from duo.runtime import Buffer
from duo_backends.cells import CELL_LAYOUT


class Flight:
    """What values wait for that a long program is overwriting (`Val.trace` meanwhile): its lock is held until the program has run."""

    __slots__ = ("__weakref__", "done", "lock")

    def __init__(self) -> None:
        self.done = True
        self.lock = threading.RLock()
        _flights.add(self)


_flights: weakref.WeakSet[Flight] = weakref.WeakSet()
_grounded: list[Flight] = []


def _before_fork() -> None:
    _grounded[:] = list(_flights)
    for flight in _grounded:
        flight.lock.acquire()  # no value is pending in the child for a program that runs in a thread of the parent


def _after_fork() -> None:
    while _grounded:
        _grounded.pop().lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def _words(x: Any, count: int) -> Any:
    return (ctypes.c_size_t * count).from_address(id(x))


def offset_of(x: Any, name: str) -> int:
    """How far into an object in memory its slot is, in bytes. Raises LookupError."""
    probe = object()
    setattr(x, name, probe)
    found = [8 * k for k, word in enumerate(_words(x, type(x).__basicsize__ // 8)) if word == id(probe)]
    if len(found) != 1:
        raise LookupError(name)
    return found[0]


def _counts_tell() -> bool:
    """Whether an object's first word counts its references and its second is its class."""
    held = [Val(None, 0, None, NOTHING)]
    word = ctypes.c_uint32.from_address(id(held[0]))
    once = word.value
    keep = held[0]
    twice = word.value
    del keep
    return (once, twice, word.value) == (1, 2, 1) and _words(held[0], 2)[1] == id(Val)


@functools.cache
def layout() -> np.ndarray | None:
    """The words of `CELL_LAYOUT`, or None."""
    plain = sys.implementation.name == "cpython" and sys.byteorder == "little" and ctypes.sizeof(ctypes.c_void_p) == 8
    if not plain or sysconfig.get_config_var("Py_GIL_DISABLED") or not _counts_tell():
        return None
    val = Val(None, 0, None, NOTHING)
    tensor, storage, buffer, leaf = EagerTensor(val), Storage(val), Buffer(0, 0, None), GradLeaf(EagerTensor(val))
    owners = {"cell": tensor, "value": val, "storage": storage, "buffer": buffer, "leaf": leaf}
    slots = {
        "cell.value": "_val", "cell.storage": "_storage", "cell.leaf": "_leaf", "cell.chain": "_chain", "cell.seen": "_seen",
        "buffer.home": "_home", "buffer.shared": "_shared",
    }  # fmt: skip
    words = []
    try:
        for name in CELL_LAYOUT:
            if name == "none":
                words.append(id(None))
            elif name == "type":
                words.append(id(EagerTensor))
            elif name == "empty":
                words.append(id(()))
            else:
                owner, slot = name.split(".")
                words.append(offset_of(owners[owner], slots.get(name, slot)))
    except LookupError:
        return None
    finally:
        buffer._home = None
    return np.array(words, np.int64)
