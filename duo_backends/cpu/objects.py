"""Loads relocatable ELF objects for x86-64 into memory, without LLVM: so a program found on disk needs no compiler at all.

LLVM's code generator, asked for position-independent code in the small model, leaves two kinds of relocation: distances
within the object and calls of functions outside. All objects loaded together share one mapping, code first, then constants,
then variables; calls to the outside go through stubs at the end of the code. Nothing is ever writable and executable at once.
Formats: System V ABI (gabi, chapters 4 and 5) and its x86-64 supplement, section 4.4.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from duo_backends.cpu.system import system
from duo_ir.errors import DeviceError

OWN_LOADER = sys.platform == "linux" and platform.machine() == "x86_64"  # whether objects made here load without LLVM
_MAGIC = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian
_RELOCATABLE, _X86_64 = 1, 62
_SYMTAB, _RELA, _NOBITS = 2, 4, 8
_WRITE, _ALLOC, _EXEC, _TLS = 1, 2, 4, 0x400
_UNDEFINED, _ABSOLUTE, _RESERVED = 0, 0xFFF1, 0xFF00
_PC32, _PLT32 = 2, 4
_STUB = b"\xff\x25\x00\x00\x00\x00"  # jmp *0(%rip): the address follows
_STUB_BYTES = 16
_PAGE = 4096


class Unsupported(DeviceError):
    """An object with something in it that this loader does not know."""


class _Section(NamedTuple):
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


class _Object:
    """One parsed object. Raises Unsupported for anything unexpected."""

    def __init__(self, code: bytes) -> None:
        kind, machine = struct.unpack_from("<HH", code, 16) if len(code) >= 64 else (0, 0)
        if code[:7] != _MAGIC or kind != _RELOCATABLE or machine != _X86_64:
            raise Unsupported("not a relocatable ELF object for x86-64")
        self.code = code
        start, size, count = (*struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HH", code, 58))
        self.sections: list[_Section] = []
        for k in range(count):
            _, kind, flags, _, offset, length, link, info, align, _ = struct.unpack_from(
                "<IIQQQQIIQQ", code, start + k * size
            )
            if flags & _ALLOC and flags & _TLS:
                raise Unsupported("thread-local variables")
            if kind != _NOBITS and offset + length > len(code):
                raise Unsupported("a section beyond the end of the file")
            self.sections.append(_Section(kind, flags, offset, length, link, info, max(align, 1)))
        self.symbols: list[_Symbol] = []
        self.relocations: list[tuple[int, int, int, int, int]] = []  # section, offset, type, symbol, addend
        for section in self.sections:
            if section.kind == _SYMTAB:
                self._read_symbols(section)
        for section in self.sections:
            if section.kind == _RELA and self.sections[section.info].flags & _ALLOC:
                for at in range(section.offset, section.offset + section.size, 24):
                    offset, info, addend = struct.unpack_from("<QQq", code, at)
                    self.relocations.append((section.info, offset, info & 0xFFFFFFFF, info >> 32, addend))

    def _read_symbols(self, table: _Section) -> None:
        names = self.sections[table.link]
        text = self.code[names.offset : names.offset + names.size]
        for at in range(table.offset, table.offset + table.size, 24):
            name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self.code, at)
            if section >= _RESERVED and section != _ABSOLUTE:
                raise Unsupported("common symbols")
            self.symbols.append(_Symbol(text[name : text.index(b"\0", name)].decode(), section, value))


class Memory:
    """Memory that loaded code lies in; it is given back when nobody refers to it any more."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # a thread that nobody waited for may run in it to the very end
            system.unmap_block(self.address, self.nbytes)


def load_objects(
    codes: Sequence[bytes], imports: Mapping[str, int] | None = None
) -> tuple[list[dict[str, int]], Memory]:
    """(the addresses of each object's global symbols, the memory they lie in, which must be kept). `imports`: addresses of functions outside,
    beside those of the process. Raises Unsupported for what only a full linker could load, DeviceError for an unknown symbol."""
    try:
        objects = [_Object(code) for code in codes]
    except (struct.error, ValueError, IndexError, UnicodeDecodeError) as error:
        raise Unsupported(f"not a whole object file: {error}") from None
    outside = _outside(objects, imports or {})
    places, sizes = _lay_out(objects, len(outside))
    total = sum(sizes)
    base = system.map_block(total)
    if base == 0:
        raise DeviceError(f"the system has no memory for {total} bytes of code")
    memory = Memory(base, total)
    image = bytearray(total)
    stubs: dict[str, int] = {}
    at = sizes[0] - _STUB_BYTES * len(outside)
    for name, address in outside.items():
        stubs[name] = base + at
        image[at : at + 14] = _STUB + struct.pack("<Q", address)
        at += _STUB_BYTES
    for number, each in enumerate(objects):
        for k, section in enumerate(each.sections):
            if section.flags & _ALLOC and section.kind != _NOBITS:
                start = places[number, k]
                image[start : start + section.size] = each.code[section.offset : section.offset + section.size]
        for section_number, offset, kind, symbol, addend in each.relocations:
            _relocate(
                image,
                base,
                each.symbols[symbol],
                kind,
                places[number, section_number] + offset,
                addend,
                number,
                places,
                stubs,
            )
    ctypes.memmove(base, bytes(image), total)
    system.protect(base, sizes[0], executable=True)
    if sizes[1]:
        system.protect(base + sizes[0], sizes[1], executable=False)
    found = []
    for number, each in enumerate(objects):
        here = {
            s.name: base + places[number, s.section] + s.value
            for s in each.symbols
            if s.name and (number, s.section) in places
        }
        found.append(here)
    return found, memory


def _outside(objects: Sequence[_Object], imports: Mapping[str, int]) -> dict[str, int]:
    """Name -> address of every function that the objects call and do not have."""
    process = ctypes.CDLL(None)
    out: dict[str, int] = {}
    for each in objects:
        for symbol in each.symbols:
            if symbol.section != _UNDEFINED or not symbol.name or symbol.name in out:
                continue
            address = imports.get(symbol.name)
            if address is None:
                try:
                    address = ctypes.cast(getattr(process, symbol.name), ctypes.c_void_p).value
                except AttributeError:
                    raise DeviceError(f"object code does not link: there is no function {symbol.name!r}") from None
            out[symbol.name] = address or 0
    return out


def _lay_out(objects: Sequence[_Object], stubs: int) -> tuple[dict[tuple[int, int], int], tuple[int, int, int]]:
    """(place of each (object, section) in the mapping, bytes of code, constants, variables, whole pages each)."""
    places: dict[tuple[int, int], int] = {}
    sizes = []
    end = 0
    for group in range(3):
        start = end
        for number, each in enumerate(objects):
            for k, section in enumerate(each.sections):
                if not section.flags & _ALLOC or _group(section) != group:
                    continue
                end = -(-end // section.align) * section.align
                places[number, k] = end
                end += section.size
        if group == 0:
            end = -(-end // _STUB_BYTES) * _STUB_BYTES + stubs * _STUB_BYTES
        end = -(-end // _PAGE) * _PAGE
        sizes.append(end - start)
    return places, (sizes[0], sizes[1], sizes[2])


def _group(section: _Section) -> int:
    return 0 if section.flags & _EXEC else 2 if section.flags & _WRITE else 1


def _relocate(
    image: bytearray,
    base: int,
    symbol: _Symbol,
    kind: int,
    place: int,
    addend: int,
    number: int,
    places: Mapping[tuple[int, int], int],
    stubs: Mapping[str, int],
) -> None:
    if kind not in (_PC32, _PLT32):
        raise Unsupported(f"relocations of type {kind}")
    if symbol.section == _UNDEFINED:
        if kind != _PLT32:
            raise Unsupported("variables outside")
        target = stubs[symbol.name]
    elif symbol.section == _ABSOLUTE:
        raise Unsupported("absolute symbols in distances")
    else:
        target = base + places[number, symbol.section] + symbol.value
    struct.pack_into("<i", image, place, target + addend - (base + place))
