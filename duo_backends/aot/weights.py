"""Weights and the first values of states as one block of safetensors, in which every array starts at a multiple of 64 bytes.

The format (safetensors' README, "Format"): eight bytes of length, a JSON header, then arrays without gaps between; gaps that alignment asks for are
arrays of bytes of their own. Names that begin with `duo.pad.` are theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duo_ir.errors import DuoError, FormatError
from duo_ir.types import dtype

ALIGN = 64
PAD = "duo.pad."
_CODES = {"f16": "F16", "bf16": "BF16", "f32": "F32", "f64": "F64", "bool": "BOOL"}
_NAMES = {code: name for name, code in _CODES.items()}


@dataclass(frozen=True)
class Block:
    """`content` begins with the header; `places[name]` is where an array starts in it."""

    content: bytes
    places: Mapping[str, int]


def block_of(arrays: Mapping[str, np.ndarray]) -> Block:
    """The block of named arrays."""
    rows: dict[str, object] = {}
    parts: list[bytes] = []
    offsets: dict[str, int] = {}
    at = 0
    for name, array in arrays.items():
        if at % ALIGN:
            gap = ALIGN - at % ALIGN
            rows[f"{PAD}{len(parts)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            parts.append(bytes(gap))
            at += gap
        data = np.ascontiguousarray(array).tobytes()
        code = code_of(array)
        rows[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + len(data)]}
        offsets[name] = at
        parts.append(data)
        at += len(data)
    header = json.dumps(rows, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % ALIGN)
    start = 8 + len(header)
    content = b"".join([len(header).to_bytes(8, "little"), header, *parts])
    return Block(content, {name: start + offset for name, offset in offsets.items()})


def checkpoint_header(arrays: Sequence[tuple[str, np.ndarray]], metadata: str) -> bytes:
    """What a safetensors file of these arrays, one after the other, begins with; `metadata`: the structure that `duo.load` gives them."""
    rows: dict[str, object] = {"__metadata__": {"duo.structure": metadata}}
    at = 0
    for name, array in arrays:
        rows[name] = {"dtype": code_of(array), "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    header = json.dumps(rows, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def code_of(array: np.ndarray) -> str:
    """What safetensors calls the array's dtype."""
    name = dtype(array.dtype).name
    return _CODES.get(name, name.upper())


def arrays_of(content: memoryview, where: str) -> dict[str, np.ndarray]:
    """The arrays of a block, views of it. Raises FormatError."""
    try:
        size = int.from_bytes(content[:8], "little")
        if size > len(content) - 8:
            raise ValueError("the header ends beyond the block")
        rows = json.loads(bytes(content[8 : 8 + size]))
        data = content[8 + size :]
        out = {}
        for name, row in rows.items():
            if name == "__metadata__":
                continue
            first, last = row["data_offsets"]
            kind, shape = dtype(_NAMES.get(row["dtype"], row["dtype"].lower())).numpy, tuple(row["shape"])
            if not 0 <= first <= last <= len(data) or any(d < 0 for d in shape):
                raise ValueError(f"{name} does not lie within the block")
            if last - first != math.prod(shape) * kind.itemsize:
                raise ValueError(f"{name} has {last - first} bytes and shape {shape}")
            out[name] = np.frombuffer(data[first:last], kind).reshape(shape)
        return out
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, DuoError) as error:
        raise FormatError(f"{where} is damaged: its weights cannot be read: {error}") from None
