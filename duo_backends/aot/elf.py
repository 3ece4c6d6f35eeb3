"""Shared libraries from object code, without a linker: one ELF file of position-independent code that needs libc alone.

The file is its own image: places in it are offsets of addresses at run time (but for variables that are zero at the start, which only take addresses). First
come headers and what the dynamic linker reads, then code, then constants, then variables and the addresses of imported functions, then data
that is mapped as it is (weights). Nothing is writable and executable at once. Formats: see `objects.py`; GNU_STACK: Linux Standard Base 5, chapter 9.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence

from duo_backends.aot.objects import (
    ABSOLUTE,
    ADDRESS,
    ALLOC,
    ARM_CALL,
    ARM_GOT,
    EXEC,
    MACHINES,
    UNDEFINED,
    WRITE,
    X86_GOT,
    X86_PLT,
    LinkError,
    Object,
    relocate,
)  # fmt: skip

_PAGES = {"x86_64": 1 << 12, "aarch64": 1 << 16}  # the largest pages
_HEADER, _PROGRAM, _SECTION, _SYMBOL, _RELOCATION = 64, 56, 64, 24, 24
_GLOB_DAT = {"x86_64": 6, "aarch64": 1025}
_RELATIVE = {"x86_64": 8, "aarch64": 1027}
_DYNAMIC_WORDS = 12  # entries of two words, of which the last is zero


class _Layout:
    """Where everything lies. `places[number, k]`: of section k of object `number`."""

    def __init__(self, start: int, objects: Sequence[Object], stubs: int, data: bytes, page: int) -> None:
        self.places: dict[tuple[int, int], int] = {}
        self.page = page
        at = self.code_at = _up(start, page)
        at = self._put(at, objects, lambda f: bool(f & EXEC), False)
        self.stubs_at = at = _up(at, 16)
        at += 16 * stubs
        self.code_end = at
        at = self.constants_at = _up(at, page)
        at = self._put(at, objects, lambda f: not f & (EXEC | WRITE), False)
        self.constants_end = at
        at = self.variables_at = _up(at, page)
        at += 16 * _DYNAMIC_WORDS
        self.got_at = at
        at = _up(at + 8 * stubs, 64)
        at = self._put(at, objects, lambda f: bool(f & WRITE), False)
        self.file_end = at
        at = self._put(at, objects, lambda f: bool(f & WRITE), True)
        self.variables_end = at
        self.data_file = _up(self.file_end, page)
        self.data_at = _up(at, page)
        self.data_size = len(data)

    def _put(self, at: int, objects: Sequence[Object], wanted: object, nobits: bool) -> int:
        for number, each in enumerate(objects):
            for k, section in enumerate(each.sections):
                if section.flags & ALLOC and section.nobits == nobits and wanted(section.flags):  # type: ignore[operator]
                    at = _up(at, section.align)
                    self.places[number, k] = at
                    at += section.size
        return at


def shared_library(
    codes: Sequence[bytes], arch: str, exports: Collection[str], soname: str, data: bytes = b"", data_symbol: str = ""
) -> bytes:
    """The library of these objects. `exports`: the functions that it shows; `data`: what lies at `data_symbol`, read-only.

    Raises LinkError for objects that are not understood, or a function that is defined twice with different code."""
    objects, defined = _resolve(codes, arch, data_symbol)
    imports = _imports(objects, defined, arch)
    missing = [name for name in exports if name not in defined]
    if missing:
        raise LinkError(f"nothing defines {', '.join(missing)}")
    names = _Names()
    needed, own = names.add("libc.so.6"), names.add(soname)
    listed = [*imports, *exports]
    for name in listed:
        names.add(name)
    programs = 6 + bool(data)
    symbols_at = _HEADER + _PROGRAM * programs
    names_at = symbols_at + _SYMBOL * (len(listed) + 1)
    hash_at = _up(names_at + len(names.text), 8)
    buckets = _hash_table([*listed])
    relocations_at = _up(hash_at + len(buckets), 8)
    absolute = sum(r[1] == ADDRESS[arch] for o in objects for s in o.sections if s.flags & ALLOC for r in s.relocations)
    relocations = len(imports) + absolute
    end = relocations_at + _RELOCATION * relocations
    lay = _Layout(end, objects, len(imports), data, _PAGES[arch])
    image = bytearray(lay.file_end)
    addresses: dict[str, int] = {data_symbol: lay.data_at} if data_symbol else {}
    for name, (number, section, value) in defined.items():
        if name != data_symbol:
            addresses[name] = lay.places[number, section] + value
    slots = {name: k for k, name in enumerate(imports)}
    pointers: list[tuple[int, int]] = []
    for number, each in enumerate(objects):
        pointers += _fill(image, lay, number, each, addresses, slots, arch)
    for k, (place, target) in enumerate(pointers, len(imports)):
        struct.pack_into("<QQq", image, relocations_at + _RELOCATION * k, place, _RELATIVE[arch], target)
    for name, k in slots.items():
        _stub(image, arch, lay.stubs_at + 16 * k, lay.got_at + 8 * k)
        struct.pack_into(
            "<QQq", image, relocations_at + _RELOCATION * k, lay.got_at + 8 * k, (k + 1) << 32 | _GLOB_DAT[arch], 0
        )
        struct.pack_into("<IBBHQQ", image, symbols_at + _SYMBOL * (k + 1), names.at[name], 1 << 4 | 2, 0, 0, 0, 0)
    for k, name in enumerate(exports, len(imports) + 1):
        section = 5  # of the table below: code
        struct.pack_into(
            "<IBBHQQ", image, symbols_at + _SYMBOL * k, names.at[name], 1 << 4 | 2, 0, section, addresses[name], 0
        )
    image[names_at : names_at + len(names.text)] = names.text
    image[hash_at : hash_at + len(buckets)] = buckets
    dynamic = [
        (1, needed), (14, own), (4, hash_at), (5, names_at), (6, symbols_at), (10, len(names.text)), (11, _SYMBOL),
        (7, relocations_at), (8, _RELOCATION * relocations), (9, _RELOCATION),
    ]  # fmt: skip
    # BIND_NOW goes without saying: addresses of imports are ordinary relocations. The list ends with the zeros behind it.
    dynamic = dynamic if relocations else dynamic[:7]
    for k, (tag, value) in enumerate(dynamic):
        struct.pack_into("<QQ", image, lay.variables_at + 16 * k, tag, value)
    _program_headers(image, lay, end, bool(data))
    out = image
    if data:
        out += bytes(lay.data_file - len(out)) + data
    table, text = _section_table(
        lay, symbols_at, names_at, len(names.text), hash_at, len(buckets), relocations_at, listed, relocations
    )
    out += bytes(-len(out) % 8)
    strings_at = len(out) + len(table)
    struct.pack_into("<Q", table, _SECTION * 8 + 24, strings_at)
    _file_header(out, arch, len(out), programs)
    return bytes(out + table + text)


def _up(n: int, align: int) -> int:
    return -(-n // align) * align


def _resolve(
    codes: Sequence[bytes], arch: str, data_symbol: str
) -> tuple[list[Object], dict[str, tuple[int, int, int]]]:
    """The objects, and (object, section, value) of every symbol that one of them defines for all."""
    objects = [Object(code, arch) for code in codes]
    defined: dict[str, tuple[int, int, int]] = {data_symbol: (-1, 0, 0)} if data_symbol else {}
    for number, each in enumerate(objects):
        for symbol in each.symbols:
            if symbol.local or not symbol.name or symbol.section == UNDEFINED:
                continue
            if symbol.name in defined:
                raise LinkError(f"{symbol.name} is defined twice")
            if symbol.section == ABSOLUTE:
                raise LinkError("absolute symbols")
            defined[symbol.name] = (number, symbol.section, symbol.value)
    return objects, defined


def _imports(objects: Sequence[Object], defined: Mapping[str, object], arch: str) -> list[str]:
    """Functions that the objects call and nobody here defines."""
    found: dict[str, None] = {}
    for each in objects:
        for section in each.sections:
            for _, _, number, _ in section.relocations:
                symbol = each.symbols[number]
                if symbol.section == UNDEFINED and symbol.name not in defined:
                    found[symbol.name] = None
    return list(found)


def _fill(
    image: bytearray,
    lay: _Layout,
    number: int,
    each: Object,
    addresses: Mapping[str, int],
    slots: Mapping[str, int],
    arch: str,
) -> list[tuple[int, int]]:
    """Puts an object's sections where they belong, and its relocations right; gives those (place, target) that are left to the dynamic linker."""
    pointers = []
    for k, section in enumerate(each.sections):
        place = lay.places.get((number, k))
        if place is None or section.nobits:
            continue
        image[place : place + section.size] = section.data
        for offset, kind, index, addend in section.relocations:
            symbol = each.symbols[index]
            through = kind in (X86_GOT if arch == "x86_64" else ARM_GOT)
            if symbol.section != UNDEFINED:
                if through:
                    raise LinkError(f"{symbol.name} is reached through a table")
                target = lay.places[number, symbol.section] + symbol.value
            elif symbol.name in addresses:
                if through:
                    raise LinkError(f"{symbol.name} is reached through a table")
                target = addresses[symbol.name]
            elif through:
                target = lay.got_at + 8 * slots[symbol.name]
            elif kind in (X86_PLT if arch == "x86_64" else ARM_CALL):
                target = lay.stubs_at + 16 * slots[symbol.name]
            else:
                raise LinkError(f"variable {symbol.name} of another library")
            if kind == ADDRESS[arch]:
                if not section.flags & WRITE:
                    raise LinkError(f"an address in {section.name}, which cannot be written")
                pointers.append((place + offset, target + addend))
            else:
                relocate(arch, image, place + offset, kind, target + addend)
    return pointers


def _stub(image: bytearray, arch: str, place: int, slot: int) -> None:
    """Code that goes to the function whose address is in `slot`."""
    if arch == "x86_64":
        image[place : place + 6] = b"\xff\x25" + struct.pack("<i", slot - (place + 6))  # jmp *slot(%rip)
        return
    words = (0x90000010, 0xF9400211, 0xD61F0220)  # adrp x16, slot; ldr x17, [x16, :lo12:slot]; br x17
    struct.pack_into("<III", image, place, *words)
    relocate(arch, image, place, 275, slot)
    relocate(arch, image, place + 4, 286, slot)


class _Names:
    """A table of strings."""

    def __init__(self) -> None:
        self.text = b"\0"
        self.at: dict[str, int] = {}

    def add(self, name: str) -> int:
        if name not in self.at:
            self.at[name] = len(self.text)
            self.text += name.encode() + b"\0"
        return self.at[name]


def _hash_table(names: Sequence[str]) -> bytes:
    """DT_HASH for the symbols 1, 2, ... of these names."""
    buckets = max(1, len(names))
    first, chain = [0] * buckets, [0] * (len(names) + 1)
    for k, name in enumerate(names, 1):
        h = 0
        for byte in name.encode():
            h = (h << 4) + byte
            high = h & 0xF0000000
            h = (h ^ high >> 24) & ~high & 0xFFFFFFFF
        chain[k] = first[h % buckets]
        first[h % buckets] = k
    return struct.pack(f"<{2 + buckets + len(chain)}I", buckets, len(chain), *first, *chain)


def _program_headers(image: bytearray, lay: _Layout, headers_end: int, data: bool) -> None:
    def load(flags: int, offset: int, address: int, in_file: int, in_memory: int) -> tuple[int, ...]:
        return 1, flags, offset, address, address, in_file, in_memory, lay.page

    variables = lay.file_end - lay.variables_at
    rows = [
        load(4, 0, 0, headers_end, headers_end),
        load(5, lay.code_at, lay.code_at, lay.code_end - lay.code_at, lay.code_end - lay.code_at),
        load(4, lay.constants_at, lay.constants_at, *[lay.constants_end - lay.constants_at] * 2),
        load(6, lay.variables_at, lay.variables_at, variables, lay.variables_end - lay.variables_at),
        (2, 6, lay.variables_at, lay.variables_at, lay.variables_at, *[16 * _DYNAMIC_WORDS] * 2, 8),
        (0x6474E551, 6, 0, 0, 0, 0, 0, 16),  # GNU_STACK: not executable
    ]
    if data:
        rows.insert(4, load(4, lay.data_file, lay.data_at, lay.data_size, lay.data_size))
    for k, (kind, flags, offset, address, physical, in_file, in_memory, align) in enumerate(rows):
        struct.pack_into(
            "<IIQQQQQQ",
            image,
            _HEADER + _PROGRAM * k,
            kind,
            flags,
            offset,
            address,
            physical,
            in_file,
            in_memory,
            align,
        )


def _section_table(
    lay: _Layout, symbols_at: int, names_at: int, names_size: int, hash_at: int, hash_size: int, relocations_at: int,
    listed: Sequence[str], relocations: int,
) -> tuple[bytearray, bytes]:  # fmt: skip
    """Sections, for linkers and debuggers, which do not look at program headers; and their names."""
    names = _Names()
    rows = [
        ("", 0, 0, 0, 0, 0, 0, 0, 0),
        (".hash", 5, ALLOC, hash_at, hash_size, 2, 0, 8, 4),
        (".dynsym", 11, ALLOC, symbols_at, _SYMBOL * (len(listed) + 1), 3, 1, 8, _SYMBOL),
        (".dynstr", 3, ALLOC, names_at, names_size, 0, 0, 1, 0),
        (".rela.dyn", 4, ALLOC, relocations_at, _RELOCATION * relocations, 2, 0, 8, _RELOCATION),
        (".text", 1, ALLOC | EXEC, lay.code_at, lay.code_end - lay.code_at, 0, 0, 64, 0),
        (".rodata", 1, ALLOC, lay.constants_at, lay.constants_end - lay.constants_at, 0, 0, 64, 0),
        (".dynamic", 6, ALLOC | WRITE, lay.variables_at, 16 * _DYNAMIC_WORDS, 3, 0, 8, 16),
        (".shstrtab", 3, 0, 0, 0, 0, 0, 1, 0),
    ]
    table = bytearray()
    for name, kind, flags, at, size, link, info, align, entry in rows:
        table += struct.pack(
            "<IIQQQQIIQQ",
            names.add(name) if name else 0,
            kind,
            flags,
            at if flags else 0,
            at,
            size,
            link,
            info,
            align,
            entry,
        )
    struct.pack_into("<Q", table, _SECTION * 8 + 32, len(names.text))
    return table, names.text


def _file_header(image: bytearray, arch: str, sections_at: int, programs: int) -> None:
    image[:16] = b"\x7fELF\x02\x01\x01" + bytes(9)
    struct.pack_into(
        "<HHIQQQIHHHHHH",
        image,
        16,
        3,
        MACHINES[arch],
        1,
        0,
        _HEADER,
        sections_at,
        0,
        _HEADER,
        _PROGRAM,
        programs,
        _SECTION,
        9,
        8,
    )
