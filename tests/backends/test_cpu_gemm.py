"""The CPU contraction kernel against the order that the numerics contract fixes (rule 2), bit for bit.

Kernels are built by hand and called through ctypes, one phase after the other, their units split at random points.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from duo_backends.cpu import gemm, gemm_line, gemm_plan, stream
from duo_backends.cpu.code import KernelCode
from duo_backends.cpu.gemm import compile_contract
from duo_backends.cpu.jit import Library, Machine, build, machine
from duo_ir.errors import ArgumentError, DeviceError
from duo_ir.kernels.kernel import Access, Affine, Arg, ContractKernel, Guard, Instr, Store
from duo_ir.scalar.numpy_eval import fma
from duo_ir.types import Dim, DimLike, DType, bf16, dtype, f16, f32, f64, row_major

WIDTHS = ("native", "native/32", "native/16")
CANARY = 0x5A


def machine_or_skip(name: str) -> Machine:
    try:
        return machine(name)
    except (ArgumentError, DeviceError) as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------------------- reference
def reference(a: np.ndarray, b: np.ndarray, acc: DType, result: DType) -> np.ndarray:
    """(..., m, k) x (..., k, n) in the contract's order."""
    if not acc.is_float:
        return (a.astype(np.int64) @ b.astype(np.int64)).astype(acc.numpy).astype(result.numpy)
    a, b = a.astype(acc.numpy), b.astype(acc.numpy)
    k = a.shape[-1]
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    blocks = []
    for start in range(0, k, 512):
        total = np.zeros(shape, acc.numpy)
        for i in range(start, min(start + 512, k)):
            total = fma(a[..., :, i, None], b[..., None, i, :], total)
        blocks.append(total)
    if not blocks:
        return np.zeros(shape, acc.numpy).astype(result.numpy)
    with np.errstate(all="ignore"):
        sums = blocks
        if k > 16384:
            sums = [functools.reduce(np.add, blocks[i : i + 8]) for i in range(0, len(blocks), 8)]
            while len(sums) > 1:
                pairs = [sums[i] + sums[i + 1] for i in range(0, len(sums) - 1, 2)]
                sums = pairs + sums[len(sums) - len(sums) % 2 :]
        return functools.reduce(np.add, sums).astype(result.numpy)


def same(x: np.ndarray, y: np.ndarray) -> bool:
    """Equal bits, but NaN equal to NaN."""
    if x.dtype.kind in "iub":
        return bool((x == y).all())
    bits = f"u{x.dtype.itemsize}"
    return bool(((x.view(bits) == y.view(bits)) | (np.isnan(x) & np.isnan(y))).all())


# ------------------------------------------------------------------------------------------------------- harness
class Buffer:
    """`size` elements between canaries."""

    def __init__(self, size: int, numpy: np.dtype) -> None:
        self.raw = np.full(size * numpy.itemsize + 256, CANARY, np.uint8)
        start = 64 + -(self.raw.ctypes.data) % 64
        self.data = self.raw[start : start + size * numpy.itemsize].view(numpy)
        self.start, self.end = start, start + size * numpy.itemsize

    def check(self) -> None:
        assert (self.raw[: self.start] == CANARY).all() and (self.raw[self.end :] == CANARY).all(), "wrote outside"


def view(flat: np.ndarray, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> np.ndarray:
    size = flat.itemsize
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, [s * size for s in strides])


def run(
    kernel: ContractKernel,
    buffers: Sequence[np.ndarray],
    sizes: Mapping[str, int],
    where: Machine,
    rng: np.random.Generator | None = None,
    compiled: tuple[KernelCode, Library] | None = None,
) -> None:
    code, library = compiled or compile_(kernel, where)
    threads = 1 if rng is None else 3
    scratch = Buffer(code.scratch(sizes, threads), np.dtype(np.uint8))
    status = np.zeros(8, np.int64)
    pointers = (ctypes.c_void_p * max(1, len(buffers)))(*(b.ctypes.data for b in buffers))
    dims = (ctypes.c_int64 * max(1, len(kernel.dims)))(*(sizes[name] for name in kernel.dims))
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    for phase in code.phases:
        units = phase.units(sizes)
        cuts = [0, units]
        if rng is not None and units > 1:
            cuts = sorted({0, units, *(int(c) for c in rng.integers(0, units + 1, 3))})
        call = ctypes.CFUNCTYPE(None, pointer, pointer, long, long, long, pointer, pointer)(
            library.addresses[phase.symbol]
        )
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            tid = number % threads
            call(pointers, dims, begin, end, tid, scratch.data.ctypes.data, status.ctypes.data)
    scratch.check()
    assert not status.any()
    assert code.cost(sizes) > 0


def compile_(kernel: ContractKernel, where: Machine) -> tuple[KernelCode, Library]:
    code = compile_contract(kernel, where.target)
    return code, build(code.text, [p.symbol for p in code.phases], where)


def plain(store: Access, result: DType) -> tuple[tuple[Instr, ...], tuple[Store, ...]]:
    return (Instr("acc", (), result),), (Store(store, 0),)


def values(rng: np.random.Generator, size: int, d: DType) -> np.ndarray:
    if d.is_float:
        return rng.standard_normal(size).astype(d.numpy)
    info = np.iinfo(d.numpy)
    return rng.integers(info.min, info.max, size, d.numpy, endpoint=True)


ORDERS = ("row", "column", "strided", "reversed")


def layout(rows: int, columns: int, order: str) -> tuple[tuple[int, int], int, int]:
    """(strides, offset, elements needed) of a rows x columns matrix."""
    if order == "row":
        return (columns, 1), 0, rows * columns
    if order == "column":
        return (1, rows), 0, rows * columns
    if order == "strided":
        return (2 * columns + 3, 2), 1, rows * (2 * columns + 3) + 1
    return (-columns, -1), max(rows * columns - 1, 0), rows * columns


def matmul(
    where: Machine,
    m: int,
    n: int,
    k: int,
    *,
    a_order: str = "row",
    b_order: str = "row",
    d: DType = f32,
    result: DType | None = None,
    batch: int | None = None,
    shared: str = "",
    symbolic: str = "",
    seed: int = 0,
    special: bool = False,
) -> None:
    """Runs one matmul and compares. `shared`: which operand has batch stride 0; `symbolic`: letters of symbolic sizes."""
    rng = np.random.default_rng(seed)
    acc = f32 if d.is_narrow_float else d
    result = result or d
    (a_strides, a_offset, a_size), (b_strides, b_offset, b_size) = layout(m, k, a_order), layout(k, n, b_order)
    count = 1 if batch is None else batch
    a_buffer = Buffer(a_size * (1 if "a" in shared else count), d.numpy)
    b_buffer = Buffer(b_size * (1 if "b" in shared else count), d.numpy)
    c_buffer = Buffer(count * m * n, result.numpy)
    for buffer in (a_buffer, b_buffer):
        buffer.data[:] = values(rng, len(buffer.data), d)
        if special and len(buffer.data):
            picks = rng.integers(0, len(buffer.data), 1 + len(buffer.data) // 50)
            odd = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 3e38 if d is not f16 else 65504.0])
            buffer.data[picks] = rng.choice(odd, len(picks))
    sizes = {name: value for name, value in (("m", m), ("n", n), ("k", k), ("b", count)) if name in symbolic}

    def size(name: str, value: int) -> DimLike:
        return Dim.symbol(name) if name in symbolic else value

    ms, ns, ks = size("m", m), size("n", n), size("k", k)
    exact_a: Sequence[DimLike] = (ks, 1) if a_order == "row" else (1, ms) if a_order == "column" else a_strides
    exact_b: Sequence[DimLike] = (ns, 1) if b_order == "row" else (1, ks) if b_order == "column" else b_strides
    a_lead = () if batch is None else (0 if "a" in shared else a_size,)
    b_lead = () if batch is None else (0 if "b" in shared else b_size,)
    out = Access(2, Affine(0, (*(() if batch is None else (ms * ns,)), ns, 1)))
    body, stores = plain(out, result)
    kernel = ContractKernel(
        (Arg(d, len(a_buffer.data)), Arg(d, len(b_buffer.data)), Arg(result, len(c_buffer.data), True)),
        () if batch is None else (size("b", count),), ms, ns, ks,
        Access(0, Affine(a_offset, (*a_lead, *exact_a))), Access(1, Affine(b_offset, (*b_lead, *exact_b))),
        acc, result, body, stores, tuple(sizes),
    )  # fmt: skip
    run(kernel, [a_buffer.data, b_buffer.data, c_buffer.data], sizes, where, rng)
    for buffer in (a_buffer, b_buffer, c_buffer):
        buffer.check()
    a_lead_n, b_lead_n = tuple(int(x) for x in a_lead), tuple(int(x) for x in b_lead)
    shape = () if batch is None else (batch,)
    a = view(a_buffer.data, (*shape, m, k), (*a_lead_n, *a_strides), a_offset)
    b = view(b_buffer.data, (*shape, k, n), (*b_lead_n, *b_strides), b_offset)
    got = c_buffer.data.reshape((*shape, m, n))
    assert same(got, reference(a, b, acc, result)), f"{m}x{n}x{k} {a_order} {b_order} {d} {symbolic}"


# ----------------------------------------------------------------------------------------------------------- tests
EDGES = (1, 2, 7, 8, 13, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 65, 100)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("m", EDGES)
def test_tile_edges(width: str, m: int) -> None:
    where = machine_or_skip(width)
    rng = np.random.default_rng(m)
    for n in rng.choice(EDGES[1:], 3, replace=False):
        order = ORDERS[int(rng.integers(4))], ORDERS[int(rng.integers(4))]
        matmul(where, m, int(n), int(rng.integers(1, 40)), a_order=order[0], b_order=order[1], seed=m)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", (0, 1, 2, 3, 15, 16, 17, 511, 512, 513, 1025, 5000))
def test_k_blocks(width: str, k: int) -> None:
    where = machine_or_skip(width)
    matmul(where, 5, 35, k, seed=k)
    matmul(where, 17, 18, k, b_order="column", seed=k, special=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("m", (1, 3, 8, 9))
def test_few_rows_and_columns_along_k(width: str, m: int) -> None:
    """B is turned in registers: around whole strips of k, whole vectors and panels of columns, with columns that share cache sets."""
    where = machine_or_skip(width)
    for n, k in ((2, 16), (64, 15), (70, 33), (130, 530)):
        matmul(where, m, n, k, b_order="column", seed=m, special=k == 33)
    matmul(where, m, 40, 256, b_order="column", symbolic="k")
    matmul(where, m, 40, 30, b_order="column", a_order="column", symbolic="n", batch=2)
    for name in ("f16", "bf16", "f64", "i8"):
        matmul(where, m, 36, 37, d=dtype(name), b_order="column")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", (1023, 1024, 1025, 3136))
def test_one_row_times_a_panel(width: str, k: int) -> None:
    """The sums of several blocks side by side: as many as fit, the rest, a block cut short."""
    where = machine_or_skip(width)
    for n, batch in ((where.target.vector_bytes // 4, 3), (where.target.vector_bytes // 2, None)):
        matmul(where, 1, n, k, batch=batch, seed=k, special=k == 1025)
    if k < 2000:
        for name in ("f64", "i32"):
            matmul(where, 1, where.target.vector_bytes // 4, k, d=dtype(name), batch=2)


def test_which_products_carry_several_blocks() -> None:
    """A line of weights in a panel does, with as many as registers hold; what has other rows, columns or one block does not."""
    where = machine_or_skip("native/32")

    def carried(m: int, n: int, k: int, b_step: int) -> int:
        kernel = ContractKernel(
            (Arg(f32, m * k), Arg(f32, k * b_step), Arg(f32, m * n, True)), (), m, n, k, Access(0, Affine(0, (k, 1))),
            Access(1, Affine(0, (b_step, 1))), f32, f32, (Instr("acc", (), f32),), (Store(Access(2, Affine(0, (n, 1))), 0),), (),
        )  # fmt: skip
        return gemm_line.blocks_at_once(gemm_plan.make_plan(kernel, where.target), where.target)

    assert [carried(1, 16, k, 16) for k in (511, 1023, 1024, 3136, 16384)] == [0, 0, 2, 6, 6]
    assert carried(1, 16, 3136, 40) == 6
    assert carried(2, 16, 3136, 16) == carried(1, 12, 3136, 12) * 0 == carried(1, 256, 3136, 256) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_turns_whole_squares(width: str) -> None:
    where = machine_or_skip(width)
    for n, k in ((64, 528), (64, 40), (64, 9), (40, 16)):
        matmul(where, 20, n, k, b_order="column", special=True)
        matmul(where, 40, n, k, a_order="column", b_order="column", d=dtype("bf16"))
    matmul(where, 20, 48, 72, b_order="column", d=f64)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("symbolic", ("", "m", "k"))
def test_tiles_of_a_that_lie_side_by_side(width: str, symbolic: str) -> None:
    """A is packed for all tiles at once, two heights of them, more than fit the cache's share."""
    where = machine_or_skip(width)
    matmul(where, 401, 80, 24, a_order="column", symbolic=symbolic, special=True)
    matmul(where, 101, 70, 530, a_order="column", symbolic=symbolic, d=f16)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("packed", ("a", "b"))
def test_packing_a_block_ahead(width: str, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks of K, units, batch entries and calls, with tiles and panels of two sizes and a last block so short that not every micro-kernel has
    a piece to pack. Sizes for which an operand would be packed are large: here it is in any case, in small units."""
    where, plans = machine_or_skip(width), []
    monkeypatch.setattr(gemm_plan, "_conflicts", lambda *given: packed == "a")
    monkeypatch.setattr(gemm_plan, "_thrashes", lambda *given: packed == "b")
    monkeypatch.setattr(gemm_plan, "UNIT_WORK", 1 << 14)
    monkeypatch.setattr(gemm_plan, "AHEAD_CALLS", 2)
    monkeypatch.setattr(gemm, "make_plan", lambda *given: plans.append(gemm_plan.make_plan(*given)) or plans[-1])
    order = "column" if packed == "a" else "row"
    matmul(where, 61, 200, 514, a_order=order, special=True)
    matmul(where, 40, 150, 1030, a_order=order)
    matmul(where, 45, 150, 20, a_order=order, batch=3, shared="b")
    matmul(where, 61, 120, 3, a_order=order, d=f64)
    assert {(plan.ahead, plan.pack_a, plan.pack_b) for plan in plans} == {(True, packed == "a", packed == "b")}


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("m, n", ((27, 144), (18, 144), (26, 288), (20, 64)))
def test_a_at_the_end_of_memory(width: str, m: int, n: int) -> None:
    """Tiles of fewer rows than a vector has lanes, packed: nothing is read beyond the last row."""
    where, rng, k = machine_or_skip(width), np.random.default_rng(m), 512
    pages = -(-4 * m * k // mmap.PAGESIZE)
    block = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    a = np.frombuffer(block, np.float32, m * k, pages * mmap.PAGESIZE - 4 * m * k)
    a[:] = values(rng, m * k, f32)
    b, c = values(rng, k * n, f32), np.zeros(m * n, np.float32)
    body, stores = plain(Access(2, Affine(0, (n, 1))), f32)
    kernel = ContractKernel(
        (Arg(f32, m * k), Arg(f32, k * n), Arg(f32, m * n, True)), (), m, n, k, Access(0, Affine(0, (k, 1))),
        Access(1, Affine(0, (n, 1))), f32, f32, body, stores,
    )  # fmt: skip
    compiled, libc = compile_(kernel, where), ctypes.CDLL(None, use_errno=True)
    end = ctypes.c_void_p(a.ctypes.data + a.nbytes)
    assert libc.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    run(kernel, [a, b, c], {}, where, None, compiled)
    assert same(c.reshape(m, n), reference(a.reshape(m, k), b.reshape(k, n), f32, f32))


@pytest.mark.parametrize("k", (16384, 16385, 17000, 20480, 29000))
def test_long_k(k: int) -> None:
    where = machine_or_skip("native")
    matmul(where, 3, 5, k, b_order="column")
    matmul(where, 3, 5, k, symbolic="k")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ("f16", "bf16", "f64", "i8", "u8", "i16", "i32", "i64"))
@pytest.mark.parametrize("b_order", ("row", "column", "strided"))
def test_dtypes(width: str, name: str, b_order: str) -> None:
    where, d = machine_or_skip(width), dtype(name)
    matmul(where, 19, 37, 33, d=d, b_order=b_order)
    matmul(where, 50, 70, 530, d=d, b_order=b_order, a_order="column")
    matmul(where, 2, 70, 5, d=d, b_order=b_order)


@pytest.mark.parametrize("width", WIDTHS)
def test_narrow_floats_round_once_to_the_result(width: str) -> None:
    where = machine_or_skip(width)
    matmul(where, 19, 37, 33, d=f16, result=f32)
    matmul(where, 19, 37, 33, d=bf16, result=f32, special=True)
    matmul(where, 20, 100, 70, d=f16, special=True)


@pytest.mark.parametrize("a_order", ORDERS)
@pytest.mark.parametrize("b_order", ORDERS)
def test_layouts(a_order: str, b_order: str) -> None:
    where = machine_or_skip("native")
    matmul(where, 60, 130, 70, a_order=a_order, b_order=b_order)
    matmul(where, 1, 300, 70, a_order=a_order, b_order=b_order)
    matmul(where, 30, 100, 600, a_order=a_order, b_order=b_order, special=True)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shared", ("", "a", "b"))
def test_batch(width: str, shared: str) -> None:
    where = machine_or_skip(width)
    matmul(where, 9, 33, 20, batch=4, shared=shared)
    matmul(where, 9, 33, 520, batch=2, shared=shared, b_order="column")
    matmul(where, 3, 33, 21, batch=5, shared=shared, b_order="column", symbolic="b")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("symbolic", ("m", "n", "k", "mn", "mnk"))
def test_symbolic_sizes(width: str, symbolic: str) -> None:
    where = machine_or_skip(width)
    for m, n, k in ((2, 2, 2), (13, 33, 17), (31, 100, 515), (100, 64, 64)):
        for orders in (("row", "row"), ("row", "column"), ("column", "row")):
            matmul(where, m, n, k, a_order=orders[0], b_order=orders[1], symbolic=symbolic)


def test_large() -> None:
    where = machine_or_skip("native")
    matmul(where, 530, 530, 70)
    matmul(where, 530, 290, 40, batch=2)
    matmul(where, 1100, 130, 515)  # groups of units, the last one smaller
    matmul(where, 600, 300, 260)  # rows of B far from each other
    matmul(where, 200, 1100, 600, b_order="column", symbolic="m")
    matmul(where, 300, 60, 1030, a_order="column", symbolic="mk")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("m, k", ((21, 0), (21, 3), (21, 530), (5, 40)))
def test_epilogue(width: str, transposed: bool, m: int, k: int) -> None:
    """relu(acc + bias[n]) * scale[m] + residual[b, m, n], in place of the residual, and the sum itself beside it. Its memory is asked for
    during the last block of k, which may be shorter than there are lines; not where B is turned in registers."""
    where, rng = machine_or_skip(width), np.random.default_rng(1)
    batch, n = 3, 53
    a, b = values(rng, batch * m * k, f32), values(rng, k * n, f32)
    bias, scale, residual = values(rng, n, f32), values(rng, m, f32), values(rng, batch * m * n, f32)
    out = Buffer(batch * m * n, f32.numpy)
    out.data[:] = residual
    raw = Buffer(batch * m * n, f64.numpy)
    name = Dim.symbol("m")
    at = Affine(0, (name * n, n, 1))
    raw_at = Affine(0, (name * n, 1, name)) if transposed else at
    size, b_at = m if transposed else name, Affine(0, (0, 1, k) if transposed else (0, n, 1))
    body = (
        Instr("acc", (), f32),
        Instr("load", (), f32, Access(2, Affine(0, (0, 0, 1)))),
        Instr("add", (0, 1), f32),
        Instr("const", (), f32, 0.0),
        Instr("gt", (2, 3), dtype("bool")),
        Instr("select", (4, 2, 3), f32),
        Instr("load", (), f32, Access(3, Affine(0, (0, 1, 0)))),
        Instr("mul", (5, 6), f32),
        Instr("load", (), f32, Access(4, at)),
        Instr("add", (7, 8), f32),
        Instr("convert", (0,), f64),
    )
    total = batch * m * n
    kernel = ContractKernel(
        (Arg(f32, batch * m * k), Arg(f32, k * n), Arg(f32, n), Arg(f32, m), Arg(f32, total), Arg(f32, total, True),
         Arg(f64, total, True)),
        (batch,), size, n, k, Access(0, Affine(0, (name * k, k, 1))), Access(1, b_at), f32, f32, body,
        (Store(Access(5, at), 9), Store(Access(6, raw_at), 10)), ("m",),
    )  # fmt: skip
    run(kernel, [a, b, bias, scale, out.data, out.data, raw.data], {"m": m}, where, rng)
    acc = reference(a.reshape(batch, m, k), b.reshape(n, k).T if transposed else b.reshape(k, n), f32, f32)
    hidden = acc + bias
    expected = np.where(hidden > 0, hidden, np.float32(0)) * scale[:, None] + residual.reshape(batch, m, n)
    assert same(out.data.reshape(batch, m, n), expected)
    got = raw.data.reshape(batch, n, m).transpose(0, 2, 1) if transposed else raw.data.reshape(batch, m, n)
    assert same(np.ascontiguousarray(got), acc.astype(np.float64))
    out.check(), raw.check()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "m, n, k", ((1, 1024, 600), (2, 1031, 511), (3, 1040, 513), (5, 1100, 545), (7, 1024, 1024), (8, 1030, 1057), (9, 1025, 512), (16, 1024, 513))
)
def test_passes(width: str, m: int, n: int, k: int) -> None:
    """Few rows times a far B: blocks of K taken in passes, around the edges of passes, blocks, panels, and one row fewer and more than that is for."""
    matmul(machine_or_skip(width), m, n, k, special=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_results_past_the_caches(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large results are stored so; here all whose rows are whole cache lines."""
    monkeypatch.setattr(stream, "_BEYOND", 0)
    where = machine_or_skip(width)
    for m, n, k in ((17, 64, 530), (8, 48, 20), (1, 80, 3)):
        matmul(where, m, n, k, special=True)
        matmul(where, m, n, k, batch=2, b_order="column", result=f16)
    matmul(where, 3, 40, 5)  # rows that are not


def test_threads_share_nothing() -> None:
    """Many units with several blocks of K and a long K, in any split, each thread in its own part of the scratch."""
    where = machine_or_skip("native")
    matmul(where, 200, 300, 1100, batch=2, seed=3)
    matmul(where, 100, 100, 17000, symbolic="k", seed=4)


def test_one_text_per_kernel() -> None:
    """Text depends on the kernel alone, so that object code can be cached; two kernels never share a symbol."""
    where = machine_or_skip("native")
    codes = []
    for n in (8, 8, 9):
        body, stores = plain(Access(2, Affine(0, (n, 1))), f32)
        args = (Arg(f32, 16), Arg(f32, 4 * n), Arg(f32, 4 * n, True))
        a, b = Access(0, Affine(0, (4, 1))), Access(1, Affine(0, (n, 1)))
        codes.append(compile_contract(ContractKernel(args, (), 4, n, 4, a, b, f32, f32, body, stores), where.target))
    assert codes[0].text == codes[1].text
    assert codes[0].phases[0].symbol != codes[2].phases[0].symbol


def test_empty() -> None:
    where = machine_or_skip("native")
    for m, n, k in ((0, 5, 3), (3, 0, 3), (0, 0, 0)):
        matmul(where, m, n, k)
    matmul(where, 3, 5, 3, batch=0)
    matmul(where, 2, 5, 0, batch=3)


def test_operands_with_guards_are_refused() -> None:
    where = machine_or_skip("native")
    guarded = Access(0, Affine(0, (4, 1)), (Guard(Affine(0, (1, 0)), 4),))
    out = Access(2, Affine(0, row_major((4, 4))))
    body, stores = plain(out, f32)
    args = (Arg(f32, 16), Arg(f32, 16), Arg(f32, 16, True))
    kernel = ContractKernel(args, (), 4, 4, 4, guarded, Access(1, Affine(0, (4, 1))), f32, f32, body, stores)
    with pytest.raises(ArgumentError, match="matmul"):
        compile_contract(kernel, where.target)
