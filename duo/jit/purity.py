"""What C code a recorded function may call and still be replayed: functions whose result follows from their arguments alone.

Whatever is not listed (clocks, random numbers, files, printing, extension modules) makes a call record again instead.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import types
from typing import Any

_READERS = {
    list: {"__getitem__", "__len__", "__contains__", "__iter__", "copy", "count", "index", "__reversed__"},
    dict: {"__getitem__", "__len__", "__contains__", "__iter__", "copy", "get", "items", "keys", "values", "__reversed__"},
    set: {"__len__", "__contains__", "__iter__", "copy", "union", "intersection", "difference", "issubset", "issuperset", "isdisjoint",
          "symmetric_difference"},
}  # fmt: skip
_VALUES = (str, bytes, int, float, complex, tuple, frozenset, range, slice, bool)
_FUNCTIONS = {
    "abs", "all", "any", "ascii", "bin", "callable", "chr", "divmod", "format", "hex", "isinstance", "issubclass", "iter", "len",
    "max", "min", "next", "oct", "ord", "pow", "repr", "round", "sorted", "sum", "__build_class__",
}  # fmt: skip
REFLECTION = (getattr, hasattr)
MUTATION = (setattr, delattr)
# Classes in C whose instances follow from the arguments.
CLASSES = (
    *_VALUES, list, dict, set, object, super, type, zip, enumerate, map, filter, reversed, property, staticmethod, classmethod,
    types.MethodType, types.SimpleNamespace, BaseException, functools.partial, memoryview,
)  # fmt: skip
# Objects whose state a later call would find changed, or which change without saying so.
_STATEFUL = ("generator", "coroutine", "async_generator")


def pure(function: Any) -> bool:
    """Whether a C function or bound C method may be called without a guard (its arguments have theirs)."""
    owner = function.__self__
    if owner is builtins:
        return function.__name__ in _FUNCTIONS or function in (*REFLECTION, *MUTATION)
    if isinstance(owner, types.ModuleType):
        return owner is math or owner.__name__ in ("_operator", "operator", "_functools", "_abc", "itertools")
    if isinstance(owner, type):
        return (
            owner in _VALUES
            or owner in (dict, object, type)
            or function.__name__ in ("__new__", "__subclasshook__", "__init_subclass__")
        )
    cls = type(owner)
    if cls in _VALUES or function.__name__ in ("__init__", "__enter__", "__exit__", "__reduce_ex__"):
        return True
    return any(isinstance(owner, base) and function.__name__ in names for base, names in _READERS.items())


def mutates(function: Any) -> bool:
    """Whether it is a method that changes a Python container."""
    return isinstance(function.__self__, (list, dict, set)) and not pure(function)


def stateful(value: Any) -> bool:
    """Whether reading from `value` gives something that a guard cannot see: iterators, files, arrays, foreign objects with state."""
    cls = type(value)
    if cls.__name__ in _STATEFUL or hasattr(cls, "__next__"):
        return True
    return (
        cls.__module__ in ("numpy", "_io", "collections", "array", "mmap", "_thread")
        and not isinstance(value, (type, dict))
        and (cls.__module__ != "numpy" or cls.__name__ == "ndarray")
    )


def known_class(cls: type) -> bool:
    """Whether instances of `cls` are made by Python code, or by C code that is pure."""
    if cls in CLASSES or issubclass(cls, BaseException):
        return True
    for base in cls.__mro__:
        if base in CLASSES or base.__flags__ & (
            1 << 9
        ):  # Py_TPFLAGS_HEAPTYPE: made by a class statement (or a heap type in C)
            continue
        return False
    return "__module__" in cls.__dict__ and cls.__module__ not in (
        "_random",
        "_io",
        "collections",
        "_struct",
        "_hashlib",
        "functools",
    )


def callable_in_python(value: Any) -> bool:
    """Whether calling `value` runs Python code, which is seen."""
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return True
    call = inspect.getattr_static(type(value), "__call__", None)
    return isinstance(call, types.FunctionType)
