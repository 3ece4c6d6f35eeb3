"""`duo.save` and `duo.load`: nested dicts and lists of tensors and plain values, as one safetensors file.

A flat dict of tensors (a `state_dict`) is written as plain safetensors under its own names, which any other reader of the format
understands. Anything else keeps its structure as JSON in the file's metadata, with tensors by name. Loading executes nothing; the
safetensors library checks sizes, offsets and overlaps before data is touched.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from duo.eager.tensor import tensor_of
from duo.runtime import check_device
from duo_ir.errors import ArgumentError, FormatError
from duo_ir.types import DType
from duo_ir.types import dtype as as_dtype

_STRUCTURE = "duo.structure"
_CODES = {
    "F16": "f16", "BF16": "bf16", "F32": "f32", "F64": "f64", "I8": "i8", "I16": "i16", "I32": "i32", "I64": "i64", "U8": "u8",
    "BOOL": "bool",
}  # fmt: skip


@functools.cache
def _safetensors() -> Any:
    """The safetensors library, loaded with the first checkpoint."""
    importlib.import_module("safetensors.numpy")
    return importlib.import_module("safetensors")


def save_arrays(path: Any, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes named arrays as safetensors, through a temporary file so that a crash leaves no half-written checkpoint."""
    for array in arrays.values():
        as_dtype(array.dtype)  # an array of a dtype that duo does not have is refused before anything is written
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"cannot save {os.fspath(path)!r}: there is no folder {folder!r}")
    temporary = f"{os.fspath(path)}.tmp{os.getpid()}"
    try:
        _safetensors().numpy.save_file(
            {k: np.ascontiguousarray(a).reshape(a.shape) for k, a in arrays.items()},
            temporary,
            dict(metadata) if metadata else None,
        )
        os.replace(temporary, path)
    except _safetensors().SafetensorError as error:
        raise OSError(f"cannot save {os.fspath(path)!r}: {error}") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_arrays(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(named arrays, metadata) of a safetensors file. Raises FormatError for a file that is not one."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        rows = _safetensors().deserialize(content)
    except _safetensors().SafetensorError as error:
        raise FormatError(f"{os.fspath(path)!r} is not a safetensors file: {error}") from None
    arrays = {}
    for name, row in rows:
        kind = _dtype(row["dtype"], path)
        arrays[name] = np.frombuffer(bytearray(row["data"]), kind.numpy).reshape(row["shape"])
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return arrays, header.get("__metadata__", {})


def _dtype(code: str, path: Any) -> DType:
    if code not in _CODES:
        raise FormatError(f"{os.fspath(path)!r} holds a tensor of dtype {code}, which duo does not have")
    return as_dtype(_CODES[code])


def save(obj: Any, path: Any) -> None:
    """Writes `obj` (nested dicts, lists and tuples of tensors, NumPy arrays, numbers, strings, None) to `path`."""
    arrays: dict[str, np.ndarray] = {}
    if isinstance(obj, Mapping) and obj and all(isinstance(k, str) and _is_tensor(v) for k, v in obj.items()):
        for name, tensor in obj.items():
            arrays[name] = _array(tensor)
        save_arrays(path, arrays)
        return
    structure, arrays = flattened(obj)
    save_arrays(path, arrays, {_STRUCTURE: json.dumps(structure)})


def load(path: Any, map_location: Any = None) -> Any:
    """What `save` wrote; a plain safetensors file gives a dict of tensors. They are on the CPU, as a file does not say where they were, or on the
    device `map_location`."""
    device = check_device("cpu" if map_location is None else map_location)
    arrays, metadata = load_arrays(path)
    tensors = {name: tensor_of(a, device) for name, a in arrays.items()}
    if _STRUCTURE not in metadata:
        return OrderedDict(tensors)
    try:
        return _decode(json.loads(metadata[_STRUCTURE]), tensors)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"the structure in {os.fspath(path)!r} does not fit its tensors: {error!r}") from None


def flattened(obj: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """What `save` writes of nested dicts and lists: the structure, which is JSON in the metadata, and named arrays."""
    arrays: dict[str, np.ndarray] = {}
    return _encode(obj, "", arrays), arrays


def _is_tensor(x: Any) -> bool:
    return isinstance(x, np.ndarray) or hasattr(x, "_type")


def _array(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.detach()._array(share=False)


def _encode(x: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if _is_tensor(x):
        free = name or "value"
        while free in arrays:  # {"a": {"b": x}, "a.b": y}
            free += "'"
        arrays[free] = _array(x)
        return {"tensor": free}
    if isinstance(x, Mapping):
        rows = [[_key(k), _encode(v, f"{name}.{k}" if name else str(k), arrays)] for k, v in x.items()]
        return {"dict": rows}
    if isinstance(x, (list, tuple)):
        rows = [_encode(v, f"{name}.{i}" if name else str(i), arrays) for i, v in enumerate(x)]
        return {"tuple" if isinstance(x, tuple) else "list": rows}
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float):
        return {"float": x.hex()}
    if x is None or isinstance(x, (bool, int, str)):
        return {"value": x}
    raise ArgumentError(
        f"save cannot write {name or 'a value'} of class {type(x).__name__}; it writes tensors, numbers, strings, dicts and lists"
    )


def _key(key: Any) -> Any:
    if isinstance(key, (bool, int, str)):
        return key
    raise ArgumentError(f"save writes dicts with string or int keys, not {type(key).__name__}")


def _decode(node: dict[str, Any], tensors: dict[str, Any]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _decode(v, tensors) for k, v in content}
    if kind == "list":
        return [_decode(v, tensors) for v in content]
    if kind == "tuple":
        return tuple(_decode(v, tensors) for v in content)
    if kind == "float":
        return float.fromhex(content)
    if kind == "value":
        return content
    raise ValueError(f"unknown kind {kind!r}")
