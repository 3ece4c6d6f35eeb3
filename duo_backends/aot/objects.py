"""Relocatable ELF objects as LLVM writes them, for x86-64 and AArch64: sections, symbols and relocations, and what a relocation does.

Formats: System V ABI (gabi, chapters 4 and 5); its x86-64 supplement, section 4.4; ELF for the Arm 64-bit Architecture, section 5.7.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from duo_ir.errors import DeviceError

MACHINES = {"x86_64": 62, "aarch64": 183}
ALLOC, WRITE, EXEC, TLS = 2, 1, 4, 0x400
NOBITS = 8
_SYMTAB, _RELA = 2, 4
UNDEFINED, ABSOLUTE, _RESERVED = 0, 0xFFF1, 0xFF00


class LinkError(DeviceError):
    """Object code that cannot be put into a library."""


@dataclass
class Section:
    """`relocations`: (offset, type, symbol number, addend)."""

    name: str
    flags: int
    nobits: bool
    data: bytes
    size: int
    align: int
    relocations: list[tuple[int, int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Symbol:
    name: str
    section: int
    value: int
    local: bool


class Object:
    """One parsed object for a machine, a key of MACHINES. Raises LinkError for what it does not know."""

    def __init__(self, code: bytes, arch: str) -> None:
        if code[:7] != b"\x7fELF\x02\x01\x01" or struct.unpack_from("<HH", code, 16) != (1, MACHINES[arch]):
            raise LinkError(f"not a relocatable ELF object for {arch}")
        start, size, count, names = (*struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HHH", code, 58))
        heads = [struct.unpack_from("<IIQQQQIIQQ", code, start + k * size) for k in range(count)]
        at = heads[names][4]
        self.sections: list[Section] = []
        for name, kind, flags, _, offset, length, _, _, align, _ in heads:
            text = code[at + name : code.index(b"\0", at + name)].decode()
            data = b"" if kind == NOBITS else code[offset : offset + length]
            if flags & ALLOC and flags & TLS:
                raise LinkError("thread-local variables")
            self.sections.append(Section(text, flags, kind == NOBITS, data, length, max(align, 1)))
        self.symbols: list[Symbol] = []
        for head, section in zip(heads, self.sections):
            if head[1] == _SYMTAB:
                self._read_symbols(section.data, self.sections[head[6]].data)
        for head, section in zip(heads, self.sections):
            if head[1] == _RELA and self.sections[head[7]].flags & ALLOC:
                for entry in range(0, section.size, 24):
                    offset, info, addend = struct.unpack_from("<QQq", section.data, entry)
                    self.sections[head[7]].relocations.append((offset, info & 0xFFFFFFFF, info >> 32, addend))

    def _read_symbols(self, table: bytes, names: bytes) -> None:
        for at in range(0, len(table), 24):
            name, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", table, at)
            if section >= _RESERVED and section != ABSOLUTE:
                raise LinkError("common symbols")
            self.symbols.append(Symbol(names[name : names.index(b"\0", name)].decode(), section, value, info >> 4 == 0))


# ------------------------------------------------------------------------------------------------------ relocations
_X86_RELATIVE = {2, 4, 9, 41, 42}  # PC32, PLT32, GOTPCREL, GOTPCRELX, REX_GOTPCRELX
X86_GOT = {9, 41, 42}
X86_PLT = {4}
ARM_GOT = {311, 312}  # ADR_GOT_PAGE, LD64_GOT_LO12_NC
ARM_CALL = {282, 283}  # JUMP26, CALL26
ADDRESS = {"x86_64": 1, "aarch64": 257}  # R_X86_64_64, R_AARCH64_ABS64: known when the library is loaded only
_ARM_LOADS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4, 312: 3}  # ..._LO12_NC: shift of the immediate


def relocate(arch: str, image: bytearray, place: int, kind: int, target: int) -> None:
    """Puts the distance to `target` (a place in the image, addend included) into what lies at `place`. Raises LinkError."""
    if arch == "x86_64":
        if kind not in _X86_RELATIVE:
            raise LinkError(f"relocations of type {kind}")
        struct.pack_into("<i", image, place, target - place)
        return
    if kind == 261:  # PREL32
        struct.pack_into("<i", image, place, target - place)
        return
    if kind == 260:  # PREL64
        struct.pack_into("<q", image, place, target - place)
        return
    (word,) = struct.unpack_from("<I", image, place)
    if kind in (275, 311):  # ADR_PREL_PG_HI21, ADR_GOT_PAGE
        pages = (target >> 12) - (place >> 12)
        word = word & 0x9F00001F | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind in _ARM_LOADS:
        word = word & 0xFFC003FF | (target & 0xFFF) >> _ARM_LOADS[kind] << 10
    elif kind in ARM_CALL:
        word = word & 0xFC000000 | (target - place) >> 2 & 0x3FFFFFF
    elif kind == 280:  # CONDBR19
        word = word & 0xFF00001F | ((target - place) >> 2 & 0x7FFFF) << 5
    elif kind == 274:  # ADR_PREL_LO21
        distance = target - place
        word = word & 0x9F00001F | (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5
    else:
        raise LinkError(f"relocations of type {kind}")
    struct.pack_into("<I", image, place, word)
