"""Object code to callable functions: `load` gives a `Library` of symbol addresses.

Objects are loaded by `objects.py`, or by LLVM's linker (`jit.link`) where that does not know the format. What was found on disk
comes here without `jit.py`, the emitters' side: a program that an earlier process compiled is ready sooner for it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from duo_backends.cache import disk_cache
from duo_backends.cpu.objects import OWN_LOADER, Unsupported, load_objects


class Library(NamedTuple):
    """Loaded code; the addresses are valid while it is referenced. `key`: the name of its object file in the disk cache."""

    addresses: Mapping[str, int]
    tracker: Any
    key: str = ""


def load(code: bytes, symbols: Sequence[str], imports: Mapping[str, int] | None = None) -> Library:
    """Links one object file against the process (and `imports`: name -> address) and finds `symbols`."""
    return load_many([(code, symbols)], imports)[0]


def load_many(
    objects: Sequence[tuple[bytes, Sequence[str]]], imports: Mapping[str, int] | None = None
) -> list[Library]:
    """`load` for several (object file, symbols) that will be kept together."""
    if OWN_LOADER and objects:
        try:
            found, memory = load_objects([code for code, _ in objects], imports)
            return [Library({s: each[s] for s in symbols}, memory) for each, (_, symbols) in zip(found, objects)]
        except Unsupported:
            pass
    link = compiler().link
    return [link(code, symbols, imports or {}) for code, symbols in objects]


def compiler() -> Any:
    """`jit.py`, which is loaded when something has to be compiled."""
    return importlib.import_module("duo_backends.cpu.jit")


def host_key(text: str, fingerprint: str) -> str:
    """The name of the object code of `text` for this machine, where `fingerprint` tells of it and of the code generator."""
    return hashlib.sha256("\0".join(("host", fingerprint, text)).encode()).hexdigest()


def build_for_host(
    text: str,
    symbols: Sequence[str],
    fingerprint: str | None,
    imports: Mapping[str, int],
    code: bytes | None,
) -> Library:
    """`jit.build` for this machine, of `code` if it has been made. With a `fingerprint`, object code that an earlier process
    made loads without LLVM."""
    key = None if fingerprint is None else host_key(text, fingerprint)
    if code is None and key is not None:
        code = disk_cache().get(key)
        if code is not None:
            return load(code, symbols, imports)
    if code is None:
        jit = compiler()
        (code,) = jit.object_codes([text], jit.machine("native"))
        assert code is not None
    if key is not None:
        disk_cache().put(key, code)
    return load(code, symbols, imports)
