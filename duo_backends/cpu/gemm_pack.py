"""Packing of a contraction's operands: a strip of lanes by k steps, widened, laid out as micro-kernels read it.

A *lane* is a column of B or a row of A; in packed form each k step holds the lanes side by side. Three functions cover all strides:
`copy` (lanes contiguous), `transpose` (k contiguous, transposed in registers) and `gather` (anything). Lanes beyond the valid
ones hold anything: nothing reads the sums they enter. k is never padded.
"""

from __future__ import annotations

from collections.abc import Sequence

from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.llvm import Function, Module, mangle, memory_type, register_type, vector
from duo_ir.types import DType

# All packers: source, bytes between lanes, bytes between k steps, valid lanes (at least 1), k, target, bytes between
# k steps of the target.
PARAMETERS = "ptr noalias readonly %source, i64 %lane, i64 %step, i64 %valid, i64 %k, ptr noalias %target, i64 %row"


def _function(module: Module, name: str) -> Function:
    return Function(module, f"define internal void @{name}({PARAMETERS}) noinline #0")


def emit_copy(
    module: Module, target: Target, name: str, dtype: DType, compute: DType, lanes: int, vectors: int, apart: int
) -> None:
    """Lanes contiguous: `vectors` vectors of `lanes` lanes a k step, put `apart` bytes from each other, masked where fewer than
    all lanes are valid."""
    f = _function(module, name)
    source, packed = vector(lanes, memory_type(dtype)), vector(lanes, register_type(compute))
    mask_type = vector(lanes, "i1")
    full = f.op(f"icmp sge i64 %valid, {lanes * vectors}")

    def pack(masks: list[str] | None) -> None:
        with f.loop("0", "%k", 1, [("ptr", "%source"), ("ptr", "%target")]) as loop:
            from_, to = loop.values
            for v in range(vectors):
                at = f.gep("i8", from_, str(v * lanes * dtype.itemsize))
                if masks is None:
                    loaded = f.op(f"load {source}, ptr {at}, align {dtype.itemsize}")
                else:
                    operands = [("ptr", at), ("i32", str(dtype.itemsize)), (mask_type, masks[v])]
                    operands.append((source, "zeroinitializer"))
                    loaded = f.op(f.intrinsic("masked.load", source, operands, f"{mangle(source)}.p0"))
                place = f.gep("i8", to, str(v * apart))
                f.emit(
                    f"store {packed} {convert(f, target, loaded, dtype, compute, lanes, None)}, ptr {place}, align {compute.itemsize}"
                )
            loop.next = [
                f.op(f"getelementptr i8, ptr {from_}, i64 %step"),
                f.op(f"getelementptr i8, ptr {to}, i64 %row"),
            ]

    with f.when(full):
        pack(None)
    with f.when(f.op(f"xor i1 {full}, true")):
        index_type = vector(lanes, "i64")
        first = f.op(f"insertelement {index_type} poison, i64 %valid, i64 0")
        count = f.op(f"shufflevector {index_type} {first}, {index_type} poison, <{lanes} x i32> zeroinitializer")
        masks = []
        for v in range(vectors):
            numbers = ", ".join(f"i64 {v * lanes + lane}" for lane in range(lanes))
            masks.append(f.op(f"icmp slt {index_type} <{numbers}>, {count}"))
        pack(masks)
    f.finish()


def emit_copy_tiles(
    module: Module, target: Target, name: str, dtype: DType, compute: DType, rows: int, stride: int, tile_bytes: int
) -> None:
    """void name(source, bytes between k steps, tiles, k, target): tiles of `rows` contiguous rows each, one after the other in memory, to
    packed tiles `tile_bytes` apart with `stride` elements between k steps. A whole row of the source at a time."""
    parameters = "ptr noalias readonly %source, i64 %step, i64 %tiles, i64 %k, ptr noalias %target"
    f = Function(module, f"define internal void @{name}({parameters}) noinline #0")
    most = target.vector_bytes // compute.itemsize
    pieces = [(at, min(most, rows - at)) for at in range(0, rows, most)]

    def piece(source: str, target_: str, at: int, count: int) -> None:
        lanes = 1 << (count - 1).bit_length()
        loose, packed = vector(lanes, memory_type(dtype)), vector(lanes, register_type(compute))
        from_, to = f.gep("i8", source, str(at * dtype.itemsize)), f.gep("i8", target_, str(at * compute.itemsize))
        if count == lanes:
            loaded = f.op(f"load {loose}, ptr {from_}, align {dtype.itemsize}")
        else:
            mask = f"<{', '.join(f'i1 {int(lane < count)}' for lane in range(lanes))}>"
            operands = [
                ("ptr", from_),
                ("i32", str(dtype.itemsize)),
                (vector(lanes, "i1"), mask),
                (loose, "zeroinitializer"),
            ]
            loaded = f.op(f.intrinsic("masked.load", loose, operands, f"{mangle(loose)}.p0"))
        value = convert(f, target, loaded, dtype, compute, lanes, None)
        f.emit(f"store {packed} {value}, ptr {to}, align {compute.itemsize}")

    with f.loop("0", "%k", 1, [("ptr", "%source"), ("ptr", "%target")]) as steps:
        with f.loop("0", "%tiles", 1, [("ptr", v) for v in steps.values], runs=True) as loop:
            for at, count in pieces:
                piece(loop.values[0], loop.values[1], at, count)
            loop.next = [
                f.op(f"getelementptr i8, ptr {loop.values[0]}, i64 {rows * dtype.itemsize}"),
                f.op(f"getelementptr i8, ptr {loop.values[1]}, i64 {tile_bytes}"),
            ]
        steps.next = [
            f.op(f"getelementptr i8, ptr {steps.values[0]}, i64 %step"),
            f.op(f"getelementptr i8, ptr {steps.values[1]}, i64 {stride * compute.itemsize}"),
        ]
    f.finish()


def emit_gather(module: Module, target: Target, name: str, dtype: DType, compute: DType) -> None:
    """Any strides: element by element."""
    f = _function(module, name)
    source, packed = memory_type(dtype), register_type(compute)
    with f.loop("0", "%k", 1, [("ptr", "%source"), ("ptr", "%target")]) as steps:
        with f.loop("0", "%valid", 1, [("ptr", steps.values[0]), ("ptr", steps.values[1])], runs=True) as loop:
            value = f.op(f"load {source}, ptr {loop.values[0]}, align {dtype.itemsize}")
            value = convert(f, target, value, dtype, compute, 1, None)
            f.emit(f"store {packed} {value}, ptr {loop.values[1]}, align {compute.itemsize}")
            loop.next = [
                f.op(f"getelementptr i8, ptr {loop.values[0]}, i64 %lane"),
                f.op(f"getelementptr i8, ptr {loop.values[1]}, i64 {compute.itemsize}"),
            ]
        steps.next = [
            f.op(f"getelementptr i8, ptr {steps.values[0]}, i64 %step"),
            f.op(f"getelementptr i8, ptr {steps.values[1]}, i64 %row"),
        ]
    f.finish()


def emit_transpose(
    module: Module, target: Target, name: str, gather: str | None, dtype: DType, compute: DType, lanes: int
) -> None:
    """k contiguous: `lanes` lanes, as many k steps at a time as a 128-bit piece holds. The last block ends at k and may redo
    some of the block before it; a k shorter than a block goes to `gather` (None where that
    does not happen)."""
    f = _function(module, name)
    steps = 16 // compute.itemsize
    packed = vector(lanes, register_type(compute))
    last = f.op("sub i64 %valid, 1")  # lanes beyond the valid ones repeat it
    rows = [f.gep("i8", "%source", f.mul("%lane", f.min(str(lane), last))) for lane in range(lanes)]
    long = f.op(f"icmp sge i64 %k, {steps}")
    with f.when(long):
        final = f.op(f"sub i64 %k, {steps}")
        with f.loop("0", "%k", steps, runs=True) as loop:
            k = f.min(loop.index, final)
            offset = f.mul(k, str(dtype.itemsize))
            _prefetch(f, f.op(f"and i64 {f.div(loop.index, str(steps))}, 3"), lanes, offset)
            columns = [f.gep("i8", row, offset) for row in rows]
            to = f.gep("i8", "%target", f.mul(k, "%row"))
            for value in load_transposed(f, target, columns, dtype, compute):
                f.emit(f"store {packed} {value}, ptr {to}, align {compute.itemsize}")
                to = f.op(f"getelementptr i8, ptr {to}, i64 %row")
    if gather is not None:
        with f.when(f.op(f"xor i1 {long}, true")):
            f.emit(f"call void @{gather}(ptr %source, i64 %lane, i64 %step, i64 %valid, i64 %k, ptr %target, i64 %row)")
    f.finish()


def emit_turn(
    module: Module, target: Target, name: str, rest: str | None, dtype: DType, compute: DType, lane: int
) -> None:
    """k contiguous, vectors of lanes `lane` bytes apart: squares of as many k steps as a vector has lanes. The last square ends at k. Fewer
    lanes or a shorter k go to `rest` (None where that does not happen)."""
    f = _function(module, name)
    lanes = target.vector_bytes // compute.itemsize
    packed, size = vector(lanes, register_type(compute)), lanes * dtype.itemsize
    whole = f.op(f"icmp sge i64 %k, {lanes}")
    if rest is not None:
        whole = f.op(f"and i1 {whole}, {f.op(f'icmp sge i64 %valid, {lanes}')}")
    with f.when(whole):
        final = f.op(f"sub i64 %k, {lanes}")
        with f.loop("0", "%k", lanes, runs=True) as loop:
            k = f.min(loop.index, final)
            first = f.gep("i8", "%source", f.mul(k, str(dtype.itemsize)))
            starts = [f.gep("i8", first, str(lane * i)) for i in range(lanes)]
            to = f.gep("i8", "%target", f.mul(k, "%row"))
            values = load_square(f, target, starts, dtype, compute)
            for start in starts:
                ahead = [("ptr", f.gep("i8", start, str(2 * size))), ("i32", "0"), ("i32", "3"), ("i32", "1")]
                f.emit(f.intrinsic("prefetch", "void", ahead, "p0"))
            for value in values:
                f.emit(f"store {packed} {value}, ptr {to}, align {compute.itemsize}")
                to = f.op(f"getelementptr i8, ptr {to}, i64 %row")
    if rest is not None:
        with f.when(f.op(f"xor i1 {whole}, true")):
            f.emit(f"call void @{rest}(ptr %source, i64 %lane, i64 %step, i64 %valid, i64 %k, ptr %target, i64 %row)")
    f.finish()


def _prefetch(f: Function, turn: str, lanes: int, offset: str) -> None:
    """Fetches the next strip into the second-level cache, a quarter of its lanes each turn: a cache line lasts four turns or more,
    and rows are too short and too many for the hardware to foresee."""
    share = max(1, lanes // 4)
    first = f.add(f.mul(turn, str(share)), str(lanes))
    at = f.gep("i8", "%source", f.add(f.mul(first, "%lane"), offset))
    for _ in range(share):
        f.emit(f.intrinsic("prefetch", "void", [("ptr", at), ("i32", "0"), ("i32", "2"), ("i32", "1")], "p0"))
        at = f.gep("i8", at, "%lane")


def load_transposed(f: Function, target: Target, lanes: list[str], dtype: DType, compute: DType) -> list[str]:
    """One vector for each of the k steps that a 128-bit piece holds (4 or 2), given the address of each lane's piece."""
    steps = 16 // compute.itemsize
    type_ = vector(steps, memory_type(dtype))
    pieces = [f.op(f"load {type_}, ptr {at}, align {dtype.itemsize}") for at in lanes]
    strided = []  # strided[i]: of every group of `steps` lanes the i-th
    for i in range(steps):
        whole = concatenate(f, pieces[i::steps], steps, memory_type(dtype))
        strided.append(convert(f, target, whole, dtype, compute, len(lanes), None))
    return interleave(f, strided, len(lanes), vector(len(lanes), register_type(compute)))


def load_square(f: Function, target: Target, lanes: list[str], dtype: DType, compute: DType) -> list[str]:
    """One vector for each of as many k steps as there are lanes: whole vectors are loaded, so that each cache line is asked for
    once, and 128-bit pieces exchanged until they lie as `load_transposed` has them."""
    count, steps = len(lanes), 16 // compute.itemsize
    type_, loose = vector(count, register_type(compute)), vector(count, memory_type(dtype))
    rows = [
        convert(f, target, f.op(f"load {loose}, ptr {at}, align {dtype.itemsize}"), dtype, compute, count, None)
        for at in lanes
    ]
    width = count // steps  # pieces of a vector
    out = []
    strided = [_exchange(f, rows[i::steps], width, steps, type_) for i in range(steps)]
    for piece in range(width):
        out += interleave(f, [some[piece] for some in strided], count, type_)
    return out


def _exchange(f: Function, rows: list[str], width: int, steps: int, type_: str) -> list[str]:
    """The transpose of `width` (1, 2 or 4) rows of `width` pieces of `steps` elements."""

    def pick(x: str, y: str, pieces: Sequence[int]) -> str:
        mask = ", ".join(f"i32 {piece * steps + e}" for piece in pieces for e in range(steps))
        return f.op(f"shufflevector {type_} {x}, {type_} {y}, <{width * steps} x i32> <{mask}>")

    if width == 1:
        return rows
    if width == 2:
        return [pick(rows[0], rows[1], pieces) for pieces in ((0, 2), (1, 3))]
    even, odd = (0, 2, 4, 6), (1, 3, 5, 7)
    low = [pick(rows[i], rows[i + 1], even) for i in (0, 2)]  # pieces 0 and 2 of two rows
    high = [pick(rows[i], rows[i + 1], odd) for i in (0, 2)]
    return [pick(pair[0], pair[1], pieces) for pieces in (even, odd) for pair in (low, high)]


def concatenate(f: Function, pieces: list[str], width: int, element: str) -> str:
    """Vectors of `width` elements, a power of two of them, side by side."""
    while len(pieces) > 1:
        type_ = vector(width, element)
        mask = ", ".join(f"i32 {i}" for i in range(2 * width))
        pieces = [
            f.op(f"shufflevector {type_} {x}, {type_} {y}, <{2 * width} x i32> <{mask}>")
            for x, y in zip(pieces[::2], pieces[1::2])
        ]
        width *= 2
    return pieces[0]


def interleave(f: Function, rows: list[str], lanes: int, type_: str) -> list[str]:
    """In each 128-bit lane (of len(rows), 2 or 4, elements) the transpose of the rows; each step is one unpack instruction
    on x86-64."""
    count = len(rows)

    def unpack(x: str, y: str, unit: int, high: bool) -> str:
        pick = []
        for lane in range(0, lanes, count):
            for part in range(count // (2 * unit)):
                start = lane + (count // 2 if high else 0) + part * unit
                pick += [start + i for i in range(unit)] + [lanes + start + i for i in range(unit)]
        mask = ", ".join(f"i32 {i}" for i in pick)
        return f.op(f"shufflevector {type_} {x}, {type_} {y}, <{lanes} x i32> <{mask}>")

    if count == 2:
        return [unpack(rows[0], rows[1], 1, high) for high in (False, True)]
    pairs = [unpack(rows[i], rows[i + 1], 1, high) for i in (0, 2) for high in (False, True)]
    return [unpack(pairs[i], pairs[i + 2], 2, high) for i in (0, 1) for high in (False, True)]
