"""The library's own functions for checkpoints, in the subset of Python that `subset.py` writes: states to and from safetensors files.

A file's header is known when the library is made, so that writing is easy. Reading takes any safetensors file that holds the states by name, in any
order, among others: the header is JSON of a few forms, read by a cursor that never leaves it, and nothing is changed before all of it fits.
`table` in the model's code: for each tensor of a checkpoint TABLE_WORDS words: where its name, dtype and shape stand, its state, bytes, and whether it is
of the optimiser, whose states may be missing altogether.
"""

from __future__ import annotations

from duo_backends.aot.runtime import (
    BAD_FILE,
    MESSAGE,
    MESSAGE_BYTES,
    NO_MEMORY,
    NULL_ARGUMENT,
    OK,
    STATES,
    allocate,
    release,
)
from duo_backends.aot.subset import c, load8, load64, store64

T_NAME, T_NAME_LENGTH, T_DTYPE, T_DTYPE_LENGTH, T_RANK, T_SHAPE, T_STATE, T_BYTES, T_OPTIMIZER = range(0, 72, 8)
TABLE_WORDS = 9
O_RDONLY, O_WRONLY, O_CREAT, O_TRUNC = 0, 1, 64, 512
SEEK_END = 2
PROT_READ, MAP_PRIVATE = 1, 2
QUOTE, BACKSLASH, COMMA, COLON, OPEN, CLOSE, LIST, LIST_END, MINUS = 34, 92, 44, 58, 123, 125, 91, 93, 45
MOST_DIGITS = 18
SUFFIX = 64  # bytes of what is added to a path


def complain(model: int, what: int | str, path: int) -> int:
    c("snprintf", model + MESSAGE, MESSAGE_BYTES, what, path)
    return BAD_FILE


def write_all(fd: int, data: int, nbytes: int) -> int:
    """Whether all of it has been written."""
    done = 0
    while done < nbytes:
        n = c("write", fd, data + done, nbytes - done)
        if n <= 0:
            return 0
        done += n
    return 1


def save(model: int, path: int, table: int, count: int, header: int, header_bytes: int, optimizer: int) -> int:
    """Writes a checkpoint through a file beside it. `optimizer`: whether its states go along; `header` is accordingly."""
    if model == 0 or path == 0:
        return NULL_ARGUMENT
    room = c("strlen", path) + SUFFIX
    name = allocate(model, room)
    if name == 0:
        return NO_MEMORY
    c("snprintf", name, room, "%s.tmp%lld", path, c("getpid"))
    fd = c("open", name, O_WRONLY | O_CREAT | O_TRUNC, 438)
    good = 0
    if fd >= 0:
        good = write_all(fd, header, header_bytes)
        k = 0
        while good and k < count:
            row = table + 8 * TABLE_WORDS * k
            if optimizer or load64(row + T_OPTIMIZER) == 0:
                good = write_all(fd, load64(load64(model + STATES) + 16 * load64(row + T_STATE)), load64(row + T_BYTES))
            k += 1
        if c("fsync", fd) != 0:
            good = 0
        if c("close", fd) != 0:
            good = 0
        if good and c("rename", name, path) != 0:
            good = 0
        if not good:
            c("unlink", name)
    release(model, name)
    if not good:
        return complain(model, "%s cannot be written", path)
    return OK


def load(model: int, path: int, table: int, count: int, texts: int, started: int) -> int:
    """Reads a checkpoint. `started`: where to store whether it has the optimiser's states."""
    if model == 0 or path == 0:
        return NULL_ARGUMENT
    fd = c("open", path, O_RDONLY, 0)
    if fd < 0:
        return complain(model, "%s cannot be opened", path)
    size = c("lseek", fd, 0, SEEK_END)
    content = -1
    if size > 8:
        content = c("mmap", 0, size, PROT_READ, MAP_PRIVATE, fd, 0)
    c("close", fd)
    if content == -1:
        return complain(model, "%s cannot be read", path)
    found = allocate(model, 8 * count + 8)
    bad = NO_MEMORY
    if found:
        c("memset", found, 255, 8 * count + 8)
        bad = read_states(model, path, content, size, table, count, texts, found, started)
        release(model, found)
    c("munmap", content, size)
    return bad


def read_states(
    model: int, path: int, content: int, size: int, table: int, count: int, texts: int, found: int, started: int
) -> int:
    length = load64(content)
    if length < 2 or length > size - 8:
        return complain(model, "%s is not a safetensors file", path)
    if not scan(content + 8, length, size - 8 - length, table, count, texts, found):
        return complain(model, "%s is not a safetensors file of these states", path)
    missing = 0
    there = 0
    k = 0
    while k < count:
        row = table + 8 * TABLE_WORDS * k
        absent = load64(found + 8 * k) < 0
        if absent and load64(row + T_OPTIMIZER) == 0:
            c("snprintf", model + MESSAGE, MESSAGE_BYTES, "%s has no tensor %s", path, texts + load64(row + T_NAME))
            return BAD_FILE
        if load64(row + T_OPTIMIZER):
            missing += absent
            there += not absent
        k += 1
    if missing and there:
        return complain(model, "%s has some of the optimizer's states only", path)
    data = content + 8 + length
    k = 0
    while k < count:
        row = table + 8 * TABLE_WORDS * k
        at = load64(found + 8 * k)
        if at >= 0:
            c("memcpy", load64(load64(model + STATES) + 16 * load64(row + T_STATE)), data + at, load64(row + T_BYTES))
        k += 1
    store64(started, there > 0)
    return OK


def scan(text: int, length: int, room: int, table: int, count: int, texts: int, found: int) -> int:
    """Reads the header: `found[k]` becomes where tensor k begins among `room` bytes of data. 0 where anything is wrong."""
    at = blanks(text, length, 0)
    if at >= length or load8(text + at) != OPEN:
        return 0
    at = blanks(text, length, at + 1)
    if at < length and load8(text + at) == CLOSE:
        return blanks(text, length, at + 1) == length
    while at < length:
        name = at + 1
        at = string(text, length, at)
        if at < 0:
            return 0
        k = lookup(text + name, at - 1 - name, table, count, texts)
        at = blanks(text, length, at)
        if at >= length or load8(text + at) != COLON:
            return 0
        at = blanks(text, length, at + 1)
        if k >= 0:
            if load64(found + 8 * k) >= 0:
                return 0  # twice
            at = tensor(text, length, at, room, table + 8 * TABLE_WORDS * k, texts, found + 8 * k)
        else:
            at = skip(text, length, at, 0)
        if at < 0:
            return 0
        at = blanks(text, length, at)
        if at >= length:
            return 0
        mark = load8(text + at)
        at = blanks(text, length, at + 1)
        if mark == CLOSE:
            return at == length
        if mark != COMMA:
            return 0
    return 0


def blanks(text: int, length: int, at: int) -> int:
    while at < length and (
        load8(text + at) == 32 or load8(text + at) == 10 or load8(text + at) == 13 or load8(text + at) == 9
    ):
        at += 1
    return at


def string(text: int, length: int, at: int) -> int:
    """Behind the string that begins here; -1: there is none."""
    if at >= length or load8(text + at) != QUOTE:
        return -1
    at += 1
    while at < length:
        mark = load8(text + at)
        if mark == QUOTE:
            return at + 1
        if mark == BACKSLASH:
            at += 1
        at += 1
    return -1


def skip(text: int, length: int, at: int, depth: int) -> int:
    """Behind the value that begins here: a string, a number, a list or an object; -1: there is none."""
    if at >= length or depth > 16:
        return -1
    mark = load8(text + at)
    if mark == QUOTE:
        return string(text, length, at)
    if mark != OPEN and mark != LIST:
        start = at
        while at < length and mark != COMMA and mark != CLOSE and mark != LIST_END and mark > 32 and mark != QUOTE:
            at += 1
            if at < length:
                mark = load8(text + at)
        return at if at > start else -1
    end = CLOSE if mark == OPEN else LIST_END
    keyed = mark == OPEN
    at = blanks(text, length, at + 1)
    if at < length and load8(text + at) == end:
        return at + 1
    while at < length:
        if keyed:
            at = string(text, length, at)
            if at < 0:
                return -1
            at = blanks(text, length, at)
            if at >= length or load8(text + at) != COLON:
                return -1
            at = blanks(text, length, at + 1)
        at = skip(text, length, at, depth + 1)
        if at < 0:
            return -1
        at = blanks(text, length, at)
        if at >= length:
            return -1
        mark = load8(text + at)
        if mark == end:
            return at + 1
        if mark != COMMA:
            return -1
        at = blanks(text, length, at + 1)
    return -1


def lookup(name: int, length: int, table: int, count: int, texts: int) -> int:
    """The number of the tensor of that name; -1: there is none."""
    k = 0
    while k < count:
        row = table + 8 * TABLE_WORDS * k
        if load64(row + T_NAME_LENGTH) == length and c("memcmp", texts + load64(row + T_NAME), name, length) == 0:
            return k
        k += 1
    return -1


def tensor(text: int, length: int, at: int, room: int, row: int, texts: int, found: int) -> int:
    """Behind an object with the row's dtype and shape and possible offsets, of which the first is stored; -1: it is none."""
    if at >= length or load8(text + at) != OPEN:
        return -1
    at = blanks(text, length, at + 1)
    seen = 0
    first = 0
    while at < length:
        key = at + 1
        at = string(text, length, at)
        if at < 0:
            return -1
        key_bytes = at - 1 - key
        at = blanks(text, length, at)
        if at >= length or load8(text + at) != COLON:
            return -1
        at = blanks(text, length, at + 1)
        if key_bytes == 5 and c("memcmp", text + key, "dtype", 5) == 0:
            value = at + 1
            at = string(text, length, at)
            if at < 0 or at - 1 - value != load64(row + T_DTYPE_LENGTH):
                return -1
            if c("memcmp", text + value, texts + load64(row + T_DTYPE), at - 1 - value) != 0:
                return -1
            seen = seen | 1
        elif key_bytes == 5 and c("memcmp", text + key, "shape", 5) == 0:
            at = numbers(text, length, at, load64(row + T_RANK), texts + load64(row + T_SHAPE), 0)
            seen = seen | 2
        elif key_bytes == 12 and c("memcmp", text + key, "data_offsets", 12) == 0:
            first = numbers(text, length, at, 2, 0, 1)
            last = numbers(text, length, at, 2, 0, 2)
            at = numbers(text, length, at, 2, 0, 0)
            if first < 0 or last > room or last - first != load64(row + T_BYTES):
                return -1
            seen = seen | 4
        else:
            return -1
        if at < 0:
            return -1
        at = blanks(text, length, at)
        if at >= length:
            return -1
        mark = load8(text + at)
        if mark == CLOSE:
            if seen != 7:
                return -1
            store64(found, first)
            return at + 1
        if mark != COMMA:
            return -1
        at = blanks(text, length, at + 1)
    return -1


def numbers(text: int, length: int, at: int, count: int, wanted: int, which: int) -> int:
    """Behind a list of `count` ints (`which` 0), which are those at `wanted` unless that is 0; or number `which` of them, from 1 on. -1: it is none."""
    if at >= length or load8(text + at) != LIST:
        return -1
    at = blanks(text, length, at + 1)
    k = 0
    picked = -1
    while k < count:
        value = 0
        digits = 0
        while at < length and load8(text + at) >= 48 and load8(text + at) <= 57 and digits <= MOST_DIGITS:
            value = 10 * value + load8(text + at) - 48
            digits += 1
            at += 1
        if digits == 0 or digits > MOST_DIGITS:
            return -1
        if wanted and load64(wanted + 8 * k) != value:
            return -1
        k += 1
        if k == which:
            picked = value
        at = blanks(text, length, at)
        if k < count:
            if at >= length or load8(text + at) != COMMA:
                return -1
            at = blanks(text, length, at + 1)
    if at >= length or load8(text + at) != LIST_END:
        return -1
    return picked if which else at + 1


FUNCTIONS = (
    complain, write_all, save, load, read_states, scan, blanks, string, skip, lookup, tensor, numbers,
)  # fmt: skip
