"""The `.duo` file: programs as object code for some targets and as IR text, and their weights.

    0   magic, 8 bytes           8   format version, u32; flags, u32 (0)
    16  bytes of the manifest    24  bytes of the whole file                 32  sha256 of the manifest
    64  the manifest: JSON, UTF-8; then sections at multiples of 4096 bytes, zeros between

Numbers are little-endian. The manifest names the artefact, its programs and its sections, each with kind, offset, size and sha256. Kinds: `code` (a shared
library for a target, see `elf.py`), `weights` (safetensors) and `ir` (the programs' text, with what their parameters are, in JSON); from version 2 of
the format, which is written where they are needed, `launch` (a GPU's launch plan, `launch_plan.py`, in JSON) and `cubin` (one of its modules). Of a
`launch` the manifest says the target, its compute capability times ten (`arch`), the numerics, the compiler, and the numbers of its sections: `ir`,
`modules`, and `weights`, in the first of which that has it a name is looked up. `read` checks everything that it returns and executes nothing; it
never takes more memory than the file has.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duo_ir.errors import FormatError
from duo_ir.types import DTYPES

MAGIC = b"\x89DUO\r\n\x1a\n"
VERSION = 2  # and 1, which has no code for GPUs
_HEAD = struct.Struct("<8sIIQQ32s")
_ALIGN = 4096
_MOST_DIMS, _MOST_SIZE = 64, 1 << 48
_KINDS = {1: ("code", "weights", "ir"), 2: ("code", "weights", "ir", "launch", "cubin")}


@dataclass(frozen=True)
class Section:
    """`about`: what the manifest says of it beside kind, offset, size and digest."""

    kind: str
    offset: int
    size: int
    sha256: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a file says of itself. `programs`: name, dims, inputs and outputs (name, dtype, shape) of each; `states`: name, dtype, shape."""

    name: str
    producer: str
    programs: tuple[Mapping[str, Any], ...]
    states: tuple[Mapping[str, Any], ...]
    sections: tuple[Section, ...]


def write(
    name: str,
    producer: str,
    programs: Sequence[Mapping[str, Any]],
    states: Sequence[Mapping[str, Any]],
    sections: Sequence[tuple[str, bytes, Mapping[str, Any]]],
) -> bytes:
    """The bytes of a file; sections as (kind, content, about)."""
    rows = [
        {**about, "kind": kind, "offset": 0, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for kind, content, about in sections
    ]

    def manifest() -> bytes:
        whole = {"name": name, "producer": producer, "programs": programs, "states": states, "sections": rows}
        return json.dumps(whole, separators=(",", ":")).encode()

    # Offsets are part of the manifest, whose length decides where sections begin: some room is left for their digits.
    at = _up(_HEAD.size + len(manifest()) + 20 * len(rows))
    for row in rows:
        row["offset"] = at
        at = _up(at + row["size"])
    text = manifest()
    version = 1 if all(kind in _KINDS[1] for kind, _, _ in sections) else VERSION
    out = bytearray(_HEAD.pack(MAGIC, version, 0, len(text), 0, hashlib.sha256(text).digest()) + text)
    for row, (_, content, _) in zip(rows, sections):
        out += bytes(row["offset"] - len(out))
        out += content
    struct.pack_into("<Q", out, 24, len(out))
    return bytes(out)


def read(content: Any, where: str) -> Manifest:
    """The manifest of a file's bytes. Raises FormatError, naming the file (`where`), for anything that is not as it should be."""
    reader = _Reader(memoryview(content), where)
    try:
        return reader.manifest()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise FormatError(f"{where} is damaged: {error}") from None


def section_bytes(content: Any, section: Section, where: str, verify: bool = True) -> memoryview:
    """A section's bytes, not copied. Raises FormatError if they are not those that were written."""
    part = memoryview(content)[section.offset : section.offset + section.size]
    if verify and hashlib.sha256(part).hexdigest() != section.sha256:
        raise FormatError(f"{where} is damaged: its {section.kind} is not what was written")
    return part


class _Reader:
    def __init__(self, content: memoryview, where: str) -> None:
        self.content, self.where = content, where

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.where} is damaged: {what}")

    def manifest(self) -> Manifest:
        total = len(self.content)
        if total < _HEAD.size or self.content[:8] != MAGIC:
            raise FormatError(f"{self.where} is not a .duo file")
        _, version, flags, length, size, digest = _HEAD.unpack(self.content[: _HEAD.size])
        if version not in _KINDS or flags != 0:
            raise FormatError(f"{self.where} has version {version} of the format; this duo reads versions up to {VERSION}")
        if size != total:
            raise self.fail(f"it has {total} bytes, and says {size}")
        if length > total - _HEAD.size:
            raise self.fail("its manifest ends beyond the file")
        text = bytes(self.content[_HEAD.size : _HEAD.size + length])
        if hashlib.sha256(text).digest() != digest:
            raise self.fail("its manifest is not what was written")
        found = json.loads(text.decode())
        sections = [self.section(row, _KINDS[version]) for row in _list(found["sections"])]
        end = _HEAD.size + length
        for s in sorted(sections, key=lambda s: (s.offset, s.size)):
            if s.offset < end:
                raise self.fail("its sections overlap")
            end = s.offset + s.size
        programs = tuple([self.program(row) for row in _list(found["programs"])])
        states = tuple([self.port(row, ()) for row in _list(found["states"])])
        if not programs or len({p["name"] for p in programs}) < len(programs):
            raise self.fail("it has no programs, or two of one name")
        return Manifest(_identifier(found["name"]), _text(found["producer"]), programs, states, tuple(sections))

    def section(self, row: Mapping[str, Any], kinds: Sequence[str]) -> Section:
        offset, size = _size(row["offset"]), _size(row["size"])
        if offset + size > len(self.content) or offset % _ALIGN:
            raise self.fail("a section ends beyond the file, or begins at an odd place")
        kind = row["kind"]
        if kind not in kinds:
            raise self.fail(f"it has a section of kind {kind!r}")
        known = ("kind", "offset", "size", "sha256")
        return Section(kind, offset, size, _text(row["sha256"]), {k: v for k, v in row.items() if k not in known})

    def program(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        dims = tuple([_identifier(d) for d in _list(row["dims"])])
        if len(dims) > _MOST_DIMS or len(set(dims)) < len(dims):
            raise self.fail("its free sizes are not distinct names")
        ports = {kind: tuple([self.port(p, dims) for p in _list(row[kind])]) for kind in ("inputs", "outputs")}
        names = [p["name"] for p in (*ports["inputs"], *ports["outputs"])]
        if len(set(names)) < len(names):
            raise self.fail("two inputs or outputs have one name")
        return {"name": _identifier(row["name"]), "dims": dims, **ports}

    def port(self, row: Mapping[str, Any], dims: Sequence[str]) -> Mapping[str, Any]:
        """dtype and shape of an input, output or state; a size is an int or a sum of products [coefficient, names...]."""
        if row["dtype"] not in DTYPES:
            raise self.fail(f"{row['dtype']!r} is not a dtype")
        shape = tuple([self.dim(d, dims) for d in _list(row["shape"])])
        if len(shape) > _MOST_DIMS:
            raise self.fail("a shape has too many sizes")
        return {"name": _text(row["name"]), "dtype": row["dtype"], "shape": shape}

    def dim(self, d: Any, dims: Sequence[str]) -> Any:
        if isinstance(d, int) and not isinstance(d, bool):
            return _size(d)
        terms = []
        for coefficient, *names in _list(d):
            if not isinstance(coefficient, int) or abs(coefficient) > _MOST_SIZE or any(n not in dims for n in names):
                raise self.fail("a size is not one of its free sizes")
            terms.append((coefficient, *names))
        return tuple(terms)


def _up(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def _list(x: Any) -> list:
    if not isinstance(x, list):
        raise TypeError("a list is missing in its manifest")
    return x


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError("a text is missing in its manifest")
    return x


def _identifier(x: Any) -> str:
    if not isinstance(x, str) or not x.isidentifier() or not x.isascii():
        raise TypeError(f"{x!r} is not a name")
    return x


def _size(x: Any) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or not 0 <= x <= _MOST_SIZE:
        raise ValueError(f"{x!r} is not a size")
    return x
