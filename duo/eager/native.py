"""Recording, lanes and looks at values by native code (`duo_backends/cpu/recorder_text.py`), which eager tensors get when a program has shown
that it comes again: what comes once is done before such code is loaded. Python's functions stay behind it and do all that is not common.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from duo import runtime
from duo.devices import CPU
from duo.dispatch import apply_generally, use_quick
from duo.eager.cells import layout, offset_of
from duo.eager.flush import FlushPlan, flush
from duo.eager.keeping import Kept, Mark
from duo.eager.sharing import Sharers, Storage
from duo.eager.tensor import DETACHED, OPERATORS, EagerTensor
from duo.eager.trace import END, ROOTS, Stamp, Trace, Val, forks, full, hooks, recorded_elsewhere, state
from duo.eager.trie import LEAF, NOTHING, Info, Node

_LOOKS = ("detach", "numpy", "__array__")
_python = {name: EagerTensor.__dict__[name] for name in (*OPERATORS, *_LOOKS)}
_free = runtime.Buffer.__del__


@functools.cache
def _recorder() -> Any:
    """None where objects are not laid out as native code takes for granted."""
    if layout() is None:
        return None
    val = Val(None, 0, None, NOTHING)
    node = Node(None, ("probe",), (NOTHING,), True, None)
    owners = {
        "trace": Trace(True), "value": val, "node": node, "info": object.__new__(Info),
        "tensor": EagerTensor(val), "storage": Storage(val), "stamp": Stamp(), "hooks": type(hooks)(), "plan": FlushPlan(node),
        "sharers": object.__new__(Sharers), "kept": Kept((), None, [], None), "mark": Mark(),
    }  # fmt: skip
    objects: dict[str, Any] = {
        "none": None, "true": True, "false": False, "empty": (), "zero": 0, "minus_one": -1, "float": float, "int": int, "bool": bool, "tuple": tuple,
        "RLock": _RLock, "tensor": EagerTensor, "Val": Val, "Node": Node, "Trace": Trace, "Storage": Storage, "Sharers": Sharers,
        "FlushPlan": FlushPlan, "Kept": Kept, "END": END, "LEAF": LEAF, "NOTHING": NOTHING, "detached": DETACHED, "root_grad": ROOTS[True, CPU],
        "root_plain": ROOTS[False, CPU], "cpu": CPU, "state": state, "hooks": hooks, "forks": forks, "full": full, "record": apply_generally, "flush": flush,
        "elsewhere": recorded_elsewhere, "dict_name": "__dict__", "trace_name": "trace", "grad_name": "grad", "capture_name": "capture",
        "acquire": _RLock.acquire, "release": _RLock.release,
    }  # fmt: skip
    for name in _LOOKS:
        objects[f"python.{name}"] = _python[name]
    for name in OPERATORS:
        objects[f"general.{name}"] = _python[name]
        objects[f"body.{name}"] = getattr(super(EagerTensor, EagerTensor), name).body
    return runtime.recorder(offset_of, owners, objects, OPERATORS)


def _end_buffers(end: Any) -> None:
    runtime.Buffer.__del__ = end  # type: ignore[method-assign]


_lock = threading.RLock()
_RLock: Any = type(threading.RLock())
_wanted = False
_paused = 0


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def install() -> None:
    """From here on steps seen before are recorded by native code."""
    global _wanted
    with _lock:
        _wanted = True
        found = _recorder()
        if found is None or _paused:
            return
        use_quick(EagerTensor, found.record, found.chain)
        hooks.flush = found.flush
        _end_buffers(found.free)
        for name, method in found.methods.items():
            setattr(EagerTensor, name, method)


def remove() -> None:
    """Back to Python's."""
    global _wanted
    with _lock:
        _wanted = False
        _use_python()


def _use_python() -> None:
    for name, function in _python.items():
        setattr(EagerTensor, name, function)
    hooks.flush = flush
    _end_buffers(_free)
    use_quick(None, None)


class Paused:
    """Python's functions while a function is watched that is being compiled: what it calls must be there to be seen."""

    def __enter__(self) -> None:
        global _paused
        with _lock:
            _paused += 1
            if _wanted and _paused == 1:
                _use_python()

    def __exit__(self, *_: object) -> None:
        global _paused
        with _lock:
            _paused -= 1
            if _wanted and not _paused:
                install()


hooks.repeated = install
