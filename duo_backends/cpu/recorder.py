"""The recorder's native functions (`recorder_text.py`), loaded: what they are given of the frontend, and Python objects made of them."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from duo_backends.cpu import object_text, share_text
from duo_backends.cpu import recorder_text as text
from duo_backends.cpu.fingerprint import fingerprint
from duo_backends.cpu.library import build_for_host
from duo_backends.cpu.memory import BlockClass, Buffer, allocator
from duo_backends.cpu.runner import METH_FASTCALL, METH_KEYWORDS, MethodDef, python_symbols

TUPLE_ITEMS = tuple.__basicsize__  # where a tuple's items begin


class Recorder:
    """`record`, `chain` and `flush`, functions, `free`, a Buffer's end, and `methods`, one for each operator and for what looks at values, of the class given as `tensor`."""

    def __init__(
        self,
        offset_of: Callable[[Any, str], int],
        owners: Mapping[str, Any],
        objects: Mapping[str, Any],
        operators: Sequence[str],
    ) -> None:
        buffer = Buffer(0, 0, None)
        owners = {**owners, "buffer": buffer, "blocks": BlockClass(0, allocator)}
        objects = {**objects, "Buffer": Buffer, "blocks": BlockClass, "append_name": "append", "ndarray": np.ndarray}
        pairs = {slot: slot.split(".") for slot in text.SLOTS}
        offsets = {slot: offset_of(owners[owner], name) for slot, (owner, name) in pairs.items()}
        buffer._home = None
        source = text.recorder_text(offsets, operators, TUPLE_ITEMS)
        entries = ["record", "chain", "flush", "__del__", *operators, *share_text.METHODS]
        symbols = ["duo_recorder_objects", *[f"duo_{name}" for name in entries]]
        self._library = build_for_host(
            source, symbols, fingerprint(), {**python_symbols(tuple(object_text.SIGNATURES)), **_numpy_symbols()}, None
        )
        addresses = self._library.addresses
        names = text.object_names(operators)
        self._objects = [objects[name] for name in names]  # native code holds no references of its own
        table = (ctypes.c_void_p * len(names))(*map(id, self._objects))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(addresses["duo_recorder_objects"])(ctypes.addressof(table))
        flags = dict.fromkeys(share_text.METHODS, METH_FASTCALL | METH_KEYWORDS)
        self._methods = [
            MethodDef(n.encode(), addresses[f"duo_{n}"], flags.get(n, METH_FASTCALL), None) for n in entries
        ]
        function, method = ctypes.pythonapi.PyCMethod_New, ctypes.pythonapi.PyDescr_NewMethod
        function.restype = method.restype = ctypes.py_object
        function.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p]
        method.argtypes = [ctypes.py_object, ctypes.c_void_p]
        at = [ctypes.addressof(m) for m in self._methods]
        self.record: Any = function(at[0], None, None, None)
        self.chain: Any = function(at[1], None, None, None)
        self.flush: Any = function(at[2], None, None, None)
        self.free: Any = method(Buffer, at[3])
        self.methods: dict[str, Any] = {n: method(objects["tensor"], place) for n, place in zip(entries[4:], at[4:])}


def _numpy_symbols() -> dict[str, int]:
    """Addresses of NumPy's C functions."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    core = importlib.import_module(
        "numpy._core._multiarray_umath" if hasattr(np, "_core") else "numpy.core._multiarray_umath"
    )
    table = get(core._ARRAY_API, None)
    return {n: ctypes.c_void_p.from_address(table + 8 * k).value or 0 for n, k in share_text.ARRAYS.items()}
