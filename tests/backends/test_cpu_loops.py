"""Loop, scan and scatter kernels of the CPU backend against a plain NumPy reading of the kernel IR, by `==` on bits."""

from __future__ import annotations

import ctypes
import itertools
import math
from functools import cache

import numpy as np
import pytest

from duo_backends.cpu import loops, nest, row_waves, stream, turn
from duo_backends.cpu.code import Target
from duo_backends.cpu.emit import compile_kernel
from duo_backends.cpu.jit import build, machine
from duo_backends.cpu.llvm import Module, register_type
from duo_backends.cpu.nest import Phase
from duo_ir.errors import DeviceError
from duo_ir.kernels.body import BodyBuilder
from duo_ir.kernels.kernel import (
    Access,
    Affine,
    Arg,
    Guard,
    Instr,
    LoopKernel,
    Reduce,
    ScanKernel,
    ScatterKernel,
    Stage,
    Store,
)
from duo_ir.scalar import math as recipes
from duo_ir.scalar.numpy_eval import NumpyScalar
from duo_ir.types import DTYPES, Dim, bf16, bool_, evaluate, f16, f32, f64, i8, i32, i64, row_major, u8

NP = NumpyScalar()


def available(name: str) -> bool:
    try:
        machine(name)
    except DeviceError:
        return False
    return True


MACHINES = [m for m in ("native", "native/32", "native/16", "x86-64-v3", "x86-64-v3/16") if available(m)]


# ------------------------------------------------------------------------------------------------------- reference
def position(affine, grids, sizes):
    total = np.full((), evaluate(affine.offset, sizes), np.int64)
    for stride, grid in zip(affine.strides, grids, strict=True):
        total = total + evaluate(stride, sizes) * grid
    return total


def guard_mask(access, grids, sizes):
    mask = np.True_
    for g in access.guards:
        at = position(g.position, grids, sizes)
        mask = mask & (at >= 0) & (at < evaluate(g.bound, sizes)) & (at % g.step == 0)
    return mask


def run_body(body, grids, shape, buffers, sizes, reduced, status):
    values = []
    for instr in body:
        args = [values[k] for k in instr.args]
        if instr.op == "const":
            out = np.full(shape, NP.const(instr.attr, instr.dtype))
        elif instr.op == "index":
            out = position(instr.attr, grids, sizes)
        elif instr.op == "dim":
            out = np.int64(evaluate(instr.attr, sizes))
        elif instr.op == "reduced":
            out = reduced[instr.attr]
        elif instr.op == "check":
            bound = evaluate(instr.attr[0], sizes)
            bad = (args[0] < 0) | (args[0] >= bound)
            if bad.any():
                status.append((instr.attr[1] + 1, bound))
            out = np.where(bad, 0, args[0])
        elif instr.op == "load":
            at = position(instr.attr.at, grids, sizes)
            for value, stride in zip(args, instr.attr.index_strides, strict=False):
                at = at + value * evaluate(stride, sizes)
            mask = np.broadcast_to(guard_mask(instr.attr, grids, sizes), shape)
            at = np.broadcast_to(at, shape)
            data = buffers[instr.attr.buffer]
            assert (at[mask] >= 0).all() and (at[mask] < data.size).all()
            out = np.zeros(shape, data.dtype)
            out[mask] = data[at[mask]]
            if instr.attr.guards:
                out = np.where(mask, out, args[-1])
        elif instr.op in ("bitcast", "convert"):
            out = getattr(NP, instr.op)(args[0], instr.dtype)
        else:
            out = getattr(NP, instr.op)(*args)
        values.append(np.broadcast_to(out, shape))
    return values


def tree(items):
    items = list(items)
    while len(items) > 1:
        pairs = [items[k] + items[k + 1] for k in range(0, len(items) - 1, 2)]
        items = pairs + items[len(items) - len(items) % 2 :]
    return items[0]


def ordered_sum(kind, args):
    """Rule 3 of the contract over the last axis of [points, n] arrays."""
    x = args[0]
    points, n = x.shape
    combine = np.multiply if kind == "prod" else np.add
    start = 1 if kind == "prod" else 0
    chunks = max(1, math.ceil(n / 1024))
    partials = []
    for c in range(chunks):
        acc = np.full((points, 16), start, x.dtype)
        for i in range(c * 1024, min(n, (c + 1) * 1024), 16):
            m = min(16, n - i)
            if kind == "dot":
                acc[:, :m] = NP.fma(x[:, i : i + m], args[1][:, i : i + m], acc[:, :m])
            else:
                acc[:, :m] = combine(acc[:, :m], x[:, i : i + m])
        partials.append(acc)
    while len(partials) > 1:
        odd = partials[len(partials) - len(partials) % 2 :]
        partials = [combine(partials[k], partials[k + 1]) for k in range(0, len(partials) - 1, 2)] + odd
    lanes = partials[0]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = combine(lanes[:, :half], lanes[:, half:])
    return lanes[:, 0]


def maximum(x, sign):
    """IEEE 754-2019 maximum (sign 1) or minimum (-1) over the last axis."""
    if x.dtype.kind not in "f":
        return x.max(-1) if sign > 0 else x.min(-1)
    out = x[:, 0]
    for k in range(1, x.shape[1]):
        y = x[:, k]
        better = y > out if sign > 0 else y < out
        better |= (y == out) & (np.signbit(out) if sign > 0 else np.signbit(y))
        out = np.where(np.isnan(out), out, np.where(better | np.isnan(y), y, out))
    return out


def reference_reduce(reduce, args):
    kind = reduce.kind
    if kind in ("sum", "prod", "dot"):
        if args[0].dtype.kind == "f":
            return ordered_sum(kind, args)
        x = args[0] * args[1] if kind == "dot" else args[0]
        return (np.prod if kind == "prod" else np.sum)(x, -1, dtype=x.dtype)
    if kind in ("max", "min"):
        return maximum(args[0], 1 if kind == "max" else -1)
    if kind in ("any", "all"):
        return args[0].any(-1) if kind == "any" else args[0].all(-1)
    return np.argmax(args[0], -1) if kind == "argmax" else np.argmin(args[0], -1)


def reference(kernel, buffers, sizes):
    """Runs a LoopKernel on flat arrays, in place; the list of (site + 1, bound) that failed."""
    buffers = [b.copy() for b in buffers]
    status: list = []
    outer = tuple(evaluate(d, sizes) for d in kernel.axes)
    reduced: dict = {}
    with np.errstate(all="ignore"):
        for number, stage in enumerate(kernel.stages):
            inner = tuple(evaluate(d, sizes) for d in stage.axes)
            shape = outer + inner
            grids = np.indices(shape, np.int64, sparse=True) if shape else ()
            wide = {k: v.reshape(outer + (1,) * len(inner)) for k, v in reduced.items()}
            values = run_body(stage.body, grids, shape, buffers, sizes, wide, status)
            for store in stage.stores:
                do_store(store, values, grids, shape, buffers, sizes)
            for n, r in enumerate(stage.reduces):
                args = [values[k].reshape(math.prod(outer), math.prod(inner)) for k in r.args]
                reduced[number, n] = reference_reduce(r, args).reshape(outer)
    return buffers, status


def do_store(store, values, grids, shape, buffers, sizes):
    at = position(store.access.at, grids, sizes)
    for k, stride in zip(store.indices, store.access.index_strides, strict=True):
        at = at + values[k] * evaluate(stride, sizes)
    mask = np.broadcast_to(guard_mask(store.access, grids, sizes), shape)
    buffers[store.access.buffer][np.broadcast_to(at, shape)[mask]] = values[store.value][mask]


# ----------------------------------------------------------------------------------------------------------- running
@cache
def compiled(kernel, name):
    m = machine(name)
    code = compile_kernel(kernel, m.target)
    library = build(code.text, [p.symbol for p in code.phases], m)
    return code, library


def run(kernel, buffers, sizes, name, threads=1, split=None, shift=0):
    """Runs every phase, its units cut in `split` pieces that take turns as threads, on copies of the buffers, which lie `shift` bytes
    behind a cache line's start."""
    code, library = compiled(kernel, name)
    buffers = [b.copy() for b in buffers]
    pad = 64  # canaries around each buffer
    padded = [_lines(b.nbytes + 2 * pad, shift) for b in buffers]
    for p, b in zip(padded, buffers, strict=True):
        p[pad : pad + b.nbytes] = b.view(np.uint8)
    args = (ctypes.c_void_p * (len(buffers) + 1))(*[p.ctypes.data + pad for p in padded])
    dims = (ctypes.c_int64 * (len(kernel.dims) + 1))(*[sizes[d] for d in kernel.dims])
    need = code.scratch(sizes, threads)
    scratch = np.full(need + 128, 0x5A, np.uint8)
    base = -scratch.ctypes.data % 64
    status = (ctypes.c_int64 * 4)()
    for phase in code.phases:
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)(
            library.addresses[phase.symbol]
        )
        units = phase.units(sizes)
        cuts = sorted({0, units, *(units * k // (split or 1) for k in range(split or 1))})
        for k, (begin, end) in enumerate(itertools.pairwise(cuts)):
            function(args, dims, begin, end, k % threads, scratch.ctypes.data + base, status)
    assert (scratch[base + need :] == 0x5A).all(), "wrote past its scratch"
    out = []
    for p, b in zip(padded, buffers, strict=True):
        assert (p[:pad] == 0xA5).all() and (p[pad + b.nbytes :] == 0xA5).all(), "wrote outside a buffer"
        out.append(p[pad : pad + b.nbytes].view(b.dtype))
    return out, list(status)


def _lines(nbytes, shift):
    raw = np.full(nbytes + 64 + shift, 0xA5, np.uint8)
    start = -raw.ctypes.data % 64 + shift
    return raw[start : start + nbytes]


def same(x, y):
    if x.dtype.kind == "V" or (x.dtype.itemsize == 2 and x.dtype.kind not in "iu"):
        x, y = x.astype(np.float32), y.astype(np.float32)
    bits = np.dtype(f"u{x.dtype.itemsize}")
    equal = x.view(bits) == y.view(bits)
    if x.dtype.kind == "f":
        equal |= np.isnan(x) & np.isnan(y)
    return equal.all()


def check(kernel, buffers, sizes=None, machines=MACHINES, expect_status=None, splits=((1, None), (2, 3))):
    sizes = sizes or {}
    expected, status = reference(kernel, buffers, sizes)
    for name in machines:
        for threads, split in splits:
            got, words = run(kernel, buffers, sizes, name, threads, split)
            for k, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert same(a, b), (name, threads, k, a[:40], b[:40])
            if status:
                assert (words[0], words[2]) in status
            else:
                assert words[0] == 0


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3e38, -3e38, 1.5, -2.5, 65504.0, 65520.0, 6e-8, 2.0**-133]


def narrowed(values, dtype):
    with np.errstate(all="ignore"):
        return np.asarray(values, np.float64).astype(dtype.numpy)


def data(dtype, n, seed=0, special=0.0):
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(n) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype.numpy)
        return rng.integers(info.min, info.max, n, dtype.numpy, endpoint=True)
    x = rng.standard_normal(n) * np.exp2(rng.integers(-6, 6, n))
    if special:
        where = rng.random(n) < special
        x[where] = rng.choice(SPECIAL, where.sum())
    with np.errstate(all="ignore"):
        return x.astype(dtype.numpy)


# ------------------------------------------------------------------------------------------------- building kernels
def contiguous(shape, offset=0):
    return Affine(offset, row_major(tuple(shape)))


def total(shape):
    out = 1
    for d in shape:
        out = out * d
    return out


def body(*rows):
    return tuple(Instr(*row) if len(row) == 4 else Instr(*row, None) for row in rows)


def map_kernel(shape, source, source_size, dtype=f32, dims=()):
    """out[shape] = -x at `source`, plus 1 for numbers."""
    b = [("load", (), dtype, Access(0, source))]
    if dtype in (f16, bf16):
        b += [("convert", (0,), f32), ("neg", (1,), f32), ("convert", (2,), dtype)]
    elif dtype is bool_:
        b += [("not_", (0,), dtype)]
    else:
        b += [("const", (), dtype, 1), ("add", (0, 1), dtype)]
    store = Store(Access(1, contiguous(shape)), len(b) - 1)
    args = (Arg(dtype, source_size), Arg(dtype, total(shape), True))
    return LoopKernel(args, tuple(shape), (Stage((), body(*b), (store,)),), dims)


SIZES = [0, 1, 2, 15, 16, 17, 31, 33, 1023, 1024, 1025, 5000]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_map_dtypes(dtype):
    for n in (0, 1, 3, 16, 17, 63, 65, 3000):
        check(map_kernel((n,), contiguous((n,)), n, dtype), [data(dtype, n, special=0.2), np.zeros(n, dtype.numpy)])


@pytest.mark.parametrize("n", SIZES)
def test_map_sizes(n):
    check(map_kernel((n,), contiguous((n,)), n), [data(f32, n), np.zeros(n, np.float32)])


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 5), (17, 33), (2, 3, 40), (7, 1, 20), (0, 4), (4, 0), (5, 2100)])
def test_map_accesses(shape):
    n = math.prod(shape)
    rank = len(shape)
    x = data(f32, max(1, n))
    strides = row_major(shape)
    forms = {
        "plain": Affine(0, strides),
        "flipped": Affine(max(n - 1, 0), tuple(-s for s in strides)),
        "transposed": Affine(0, tuple(row_major(shape[::-1])[::-1])),
        "broadcast": Affine(0, (0,) * rank),
    }
    if rank > 1:
        forms["rows"] = Affine(0, (*strides[:-1], 0))
        forms["flip last"] = Affine(shape[-1] - 1, (*strides[:-1], -1))
    for at in forms.values():
        if n == 0 or rank == 0:
            at = Affine(0, (0,) * rank)
        check(map_kernel(shape, at, x.size), [x, np.zeros(n, np.float32)])


def across_kernel(shape, dtype, beside):
    """out[shape] = x, turned in its last two axes, + a bias of the rows, and with `beside` + y, which lies as `out`; and x alone."""
    outer, rows, columns = (1, *shape)[-3:]
    turned = Affine(0, (rows * columns, 1, rows)[-len(shape) :])
    row_wise = Affine(0, (0, 1, 0)[-len(shape) :])
    b = [("load", (), dtype, Access(0, turned)), ("load", (), dtype, Access(1, row_wise)), ("add", (0, 1), dtype)]
    if beside:
        b += [("load", (), dtype, Access(2, contiguous(shape))), ("add", (2, 3), dtype)]
    n = outer * rows * columns
    args = (Arg(dtype, n), Arg(dtype, rows), Arg(dtype, n), Arg(dtype, n, True), Arg(dtype, n, True))
    stores = (Store(Access(3, contiguous(shape)), len(b) - 1), Store(Access(4, contiguous(shape)), 0))
    return LoopKernel(args, tuple(shape), (Stage((), body(*b), stores),))


@pytest.mark.parametrize("dtype", [f32, f64, i32, i64], ids=str)
@pytest.mark.parametrize(
    "shape", [(16, 16), (64, 49), (33, 17), (15, 40), (2, 32, 50), (3, 16, 64), (20, 1024 + 7), (16, 2048 + 20)]
)
def test_maps_that_read_across(shape, dtype):
    n, rows = math.prod(shape), shape[-2]
    for beside in (False, True):
        zeros = np.zeros(n, dtype.numpy)
        buffers = [data(dtype, n, 1, 0.1), data(dtype, rows, 2), data(dtype, n, 3), zeros, zeros]
        check(across_kernel(shape, dtype, beside), buffers)


def test_which_maps_are_turned():
    """Not what has too few columns, or would compute twice what its result may lie on."""

    def turned(shape, beside=False, streams=frozenset()):
        kernel = across_kernel(shape, f32, beside)
        return turn.can_turn(Phase(Module(), "phase", kernel, machine("native/16").target, False, streams), kernel, 4)

    assert all(turned(shape) for shape in ((64, 49), (64, 4), (64, 1024 + 4), (64, 4096 + 5)))
    assert not turned((64, 3)) and not turned((64, 4096 + 3))
    assert turned((64, 48), beside=True) and not turned((64, 49), beside=True)
    assert turned((64, 48), streams=frozenset([3])) and not turned((64, 49), streams=frozenset([3]))


def test_strided_and_column_slices():
    for dtype in (f32, f64, u8, bf16):
        x = data(dtype, 3 * 40 * 5)
        kernel = map_kernel((40, 3), Affine(4, (15, 5)), x.size, dtype)  # x[:, :, 4] of [40, 3, 5]
        check(kernel, [x, np.zeros(120, dtype.numpy)])


@pytest.mark.parametrize("shape,pad", [((6, 20), (1, 3)), ((20, 6), (2, 1)), ((1, 70), (0, 5)), ((33, 4), (3, 3))])
@pytest.mark.parametrize("dtype", [f32, i8, bf16, f64, bool_], ids=str)
def test_guards(shape, pad, dtype):
    """Padding on all sides: a load with guards and a fill; and a guarded store that crops."""
    rows, columns = shape
    out = (rows + 2 * pad[0], columns + 2 * pad[1])
    at = Affine(-pad[0] * columns - pad[1], (columns, 1))
    guards = (Guard(Affine(-pad[0], (1, 0)), rows), Guard(Affine(-pad[1], (0, 1)), columns))
    b = body(("const", (), dtype, 1), ("load", (0,), dtype, Access(0, at, guards)))
    args = (Arg(dtype, rows * columns), Arg(dtype, math.prod(out), True), Arg(dtype, rows * columns, True))
    stores = (Store(Access(1, contiguous(out)), 1), Store(Access(2, at, guards), 1))
    kernel = LoopKernel(args, out, (Stage((), b, stores),))
    zeros = np.zeros(math.prod(out), dtype.numpy)
    check(kernel, [data(dtype, rows * columns), zeros, zeros[: rows * columns]])


def test_interior_guard():
    """Every third element of the output comes from the input, by a computed index."""
    n = 50
    b = body(
        ("const", (), f32, 7.0),
        ("index", (), i64, Affine(0, (1,))),
        ("const", (), i64, 3),
        ("idiv", (1, 2), i64),
        ("load", (3, 0), f32, Access(0, Affine(0, (0,)), (Guard(Affine(0, (1,)), 3 * n, 3),), (1,))),
    )
    args = (Arg(f32, n), Arg(f32, 3 * n, True))
    kernel = LoopKernel(args, (3 * n,), (Stage((), b, (Store(Access(1, Affine(0, (1,))), 4),)),))
    check(kernel, [data(f32, n), np.zeros(3 * n, np.float32)])


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("rows,width", [(5, 40), (40, 1), (37, 3), (1, 1)])
def test_gather(rows, width, bad):
    """out[r, :] = table[index[r], :], with checked indices."""
    size = 11
    index = np.random.default_rng(0).integers(0, size, rows)
    if bad:
        index[rows // 2] = -3 if rows % 2 else size
    b = body(
        ("load", (), i64, Access(1, Affine(0, (1, 0)))),
        ("check", (0,), i64, (size, 4)),
        ("load", (1,), f32, Access(0, Affine(0, (0, 1)), (), (width,))),
    )
    args = (Arg(f32, size * width), Arg(i64, rows), Arg(f32, rows * width, True))
    kernel = LoopKernel(args, (rows, width), (Stage((), b, (Store(Access(2, Affine(0, (width, 1))), 2),)),))
    check(kernel, [data(f32, size * width), index, np.zeros(rows * width, np.float32)])


def test_conversions():
    values = {
        d: np.concatenate([data(d, 400, special=0.3), narrowed(SPECIAL, d)]) if d.kind == "f" else data(d, 415)
        for d in DTYPES.values()
    }
    values[i64][:60] >>= np.arange(60)
    values[f64][:100] = values[f32][:100].astype(np.float64) * (1 + 2.0**-30)
    for source in DTYPES.values():
        for target in DTYPES.values():
            if target is bool_ or (source.kind == "f" and target.kind != "f"):
                continue
            x = values[source]
            b = body(("load", (), source, Access(0, Affine(0, (1,)))), ("convert", (0,), target))
            args = (Arg(source, x.size), Arg(target, x.size, True))
            kernel = LoopKernel(args, (x.size,), (Stage((), b, (Store(Access(1, Affine(0, (1,))), 1),)),))
            check(kernel, [x, np.zeros(x.size, target.numpy)], machines=MACHINES[:1], splits=((1, None),))


def test_f16_bits():
    """Every f16 through f32 and back, and the narrowing of values around every rounding case."""
    every = np.arange(65536, dtype=np.uint16)
    for d in (f16, bf16):
        b = body(("load", (), d, Access(0, Affine(0, (1,)))), ("convert", (0,), f32))
        kernel = LoopKernel(
            (Arg(d, 65536), Arg(f32, 65536, True)), (65536,), (Stage((), b, (Store(Access(1, Affine(0, (1,))), 1),)),)
        )
        check(kernel, [every.view(d.numpy), np.zeros(65536, np.float32)], splits=((1, None),))
        bits = np.random.default_rng(1).integers(0, 1 << 32, 60000, np.uint32)
        bits[::3] &= 0xFFFFF000
        bits[::3] |= 0x1000
        b = body(("load", (), f32, Access(0, Affine(0, (1,)))), ("convert", (0,), d))
        kernel = LoopKernel(
            (Arg(f32, 60000), Arg(d, 60000, True)), (60000,), (Stage((), b, (Store(Access(1, Affine(0, (1,))), 1),)),)
        )
        check(kernel, [bits.view(np.float32), np.zeros(60000, d.numpy)], splits=((1, None),))


def test_f16_without_an_instruction_for_it(monkeypatch):
    """Targets that cannot convert f16 do it by integer arithmetic: the same bits."""
    monkeypatch.setattr(Target, "has_half", False)
    compiled.cache_clear()
    test_f16_bits()
    compiled.cache_clear()


@pytest.mark.parametrize("d", [f32, f64])
def test_ldexp_on_vectors_and_scalars(d):
    """Every power that the instruction takes, so also results that underflow part of the way, all of it and not at all."""
    most = {f32: 2 * 127 - 3, f64: 2 * 1023 - 3}[d]
    y = np.arange(-most, most + 1).astype(d.numpy)
    x = np.random.default_rng(5).uniform(0.51, 1.99, y.size).astype(d.numpy)
    y = np.append(y, np.array(np.nan, d.numpy))
    x = np.append(x, np.array(np.nan, d.numpy))
    with np.errstate(all="ignore"):
        want = np.ldexp(x.astype(np.longdouble), np.where(np.isnan(y), 0, y).astype(int)).astype(d.numpy)
        assert np.array_equal(NP.ldexp(x, y), want, equal_nan=True)
    for n in (y.size, 1):  # one element: no vectors
        rows = (
            Instr("load", (), d, Access(0, Affine(0, (1,)))),
            Instr("load", (), d, Access(1, Affine(0, (1,)))),
            Instr("ldexp", (0, 1), d),
        )
        stores = (Store(Access(2, Affine(0, (1,))), 2),)
        kernel = LoopKernel((Arg(d, n), Arg(d, n), Arg(d, n, True)), (n,), (Stage((), rows, stores),))
        for start in (0, y.size // 4, y.size - 1) if n == 1 else (0,):
            part = slice(start, start + n)
            check(kernel, [x[part].copy(), y[part].copy(), np.zeros(n, d.numpy)], splits=((1, None),))


@pytest.mark.parametrize("operands", [1, 2])
@pytest.mark.parametrize("d", [f32, f64])
def test_long_bodies_on_several_vectors_at_once(d, operands, monkeypatch):
    """exp(x) (+ exp(y)), as of a large array: powers that underflow, rows that end anywhere between the vectors."""
    monkeypatch.setattr(nest, "_MANY", 0)
    monkeypatch.setattr(loops, "_FAR_FROM", 64)
    compiled.cache_clear()
    for shape in ((1,), (63,), (129,), (1500,), (3, 64), (2, 321)):
        b, at, n = BodyBuilder(), Affine(0, row_major(shape)), math.prod(shape)
        total = recipes.exp(b, b.load(Access(0, at), d))
        if operands == 2:
            total = b.add(total, recipes.exp(b, b.load(Access(1, at), d)))
        args = (*(Arg(d, n) for _ in range(operands)), Arg(d, n, True))
        store = Store(Access(operands, at), total)
        kernel = LoopKernel(args, shape, (Stage((), tuple(Instr(*row) for row in b.rows), (store,)),))
        width = machine(MACHINES[0]).target.vector_bytes // d.itemsize * (8 if operands == 1 else 4)
        assert n == 1 or f"<{width} x {register_type(d)}>" in compile_kernel(kernel, machine(MACHINES[0]).target).text
        with np.errstate(over="ignore"):
            inputs = [data(d, n, seed=k, special=0.02) * d.numpy.type(40 if d is f32 else 300) for k in range(operands)]
        check(kernel, [*inputs, np.zeros(n, d.numpy)])
    compiled.cache_clear()


def test_scalar_instructions():
    """Every float and integer instruction on every dtype, operands with special values."""
    n = 100
    for d in (f32, f64, i8, i32, i64, u8):
        builder = BodyBuilder()
        x = builder.put("load", (), d, Access(0, Affine(0, (1,))))
        y = builder.put("load", (), d, Access(1, Affine(0, (1,))))
        outs = [builder.put(op, (x, y), d) for op in ("add", "sub", "mul")]
        if d.kind == "f":
            outs += [builder.put(op, (x, y), d) for op in ("div", "copysign")]
            outs += [builder.put(op, (x,), d) for op in ("neg", "fabs", "sqrt", "floor", "ceil", "trunc", "rint")]
            outs += [builder.put("fma", (x, y, x), d)]
        else:
            outs += [builder.put(op, (x, y), d) for op in ("and_", "or_", "xor")]
            outs += [builder.put(op, (x,), d) for op in ("neg", "not_")]
            one = builder.put("const", (), d, 3)
            odd = builder.put("or_", (y, builder.put("const", (), d, 1)), d)
            safe = builder.put("and_", (odd, builder.put("const", (), d, 127)), d)
            outs += [builder.put(op, (x, one), d) for op in ("shl", "lshr", "ashr")]
            outs += [builder.put(op, (x, safe), d) for op in ("idiv", "irem")]
        compared = [builder.put(op, (x, y), bool_) for op in ("eq", "ne", "lt", "le", "gt", "ge")]
        outs += [builder.put("select", (c, x, y), d) for c in compared]
        rows = tuple(Instr(*row) for row in builder.rows)
        stores = tuple(Store(Access(2 + k, Affine(0, (1,))), v) for k, v in enumerate(outs))
        args = (Arg(d, n), Arg(d, n), *(Arg(d, n, True) for _ in outs))
        kernel = LoopKernel(args, (n,), (Stage((), rows, stores),))
        blank = [np.zeros(n, d.numpy) for _ in outs]
        check(kernel, [data(d, n, 1, 0.4), data(d, n, 2, 0.4), *blank], splits=((1, None),))


# --------------------------------------------------------------------------------------------------------- reductions
def reduce_kernel(outer, inner, kind, dtype, source, size, dims=()):
    loads = [("load", (), dtype, Access(0, source))]
    args = (0,)
    value = dtype
    if dtype in (f16, bf16):
        loads.append(("convert", (0,), f32))
        args, value = (1,), f32
    if kind == "dot":
        loads.append(("fabs", args, value) if value.kind == "f" else ("neg", args, value))
        args = (*args, len(loads) - 1)
    result = i64 if kind.startswith("arg") else value
    last = body(("reduced", (), result, (0, 0)))
    out = Store(Access(1, contiguous(outer)), 0)
    stages = (Stage(tuple(inner), body(*loads), (), (Reduce(kind, args, result),)), Stage((), last, (out,)))
    return LoopKernel((Arg(dtype, size), Arg(result, total(outer), True)), tuple(outer), stages, dims), result


def kinds_of(dtype):
    if dtype is bool_:
        return ["any", "all"]
    return ["sum", "prod", "dot", "max", "min", "argmax", "argmin"]


def check_reduce(outer, inner, kind, dtype, strides, special=0.0, **options):
    size = math.prod(outer) * math.prod(inner)
    kernel, result = reduce_kernel(outer, inner, kind, dtype, Affine(0, strides), max(size, 1))
    x = data(dtype, max(size, 1), len(inner), special)
    if kind == "prod" and dtype.kind == "f":
        x = (1 + x.astype(np.float32) / 64).astype(dtype.numpy)
    check(kernel, [x, np.zeros(math.prod(outer), result.numpy)], **options)


@pytest.mark.parametrize("n", SIZES)
def test_rows_sums(n):
    for kind in ("sum", "dot", "prod"):
        check_reduce((3,), (n,), kind, f32, (n, 1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_reduction(dtype):
    for kind in kinds_of(dtype):
        for special in (0.0, 0.02):
            check_reduce((3,), (1100,), kind, dtype, (1100, 1), special)
            check_reduce((5,), (37,), kind, dtype, (37, 1), special, machines=MACHINES[:2])
            check_reduce((40,), (33,), kind, dtype, (1, 40), special, machines=MACHINES[-2:])


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 33, 1023, 1024, 1025, 3100, 7 * 1024 + 5])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40, 130])
def test_column_sums(n, columns):
    check_reduce((columns,), (n,), "sum", f32, (1, columns), machines=MACHINES[:1] + MACHINES[-1:])


def test_wide_columns():
    check_reduce((5000,), (40,), "sum", f64, (1, 5000))
    check_reduce((3, 700), (20,), "argmax", f32, (20 * 700, 1, 700), 0.1)


@pytest.mark.parametrize("n", [32, 127, 128, 161, 1024 + 171])
def test_rows_of_columns_taken_together(n):
    for kind, dtype in (("sum", bf16), ("dot", f32), ("prod", f64), ("argmax", f32), ("max", f32), ("any", bool_)):
        check_reduce((37,), (n,), kind, dtype, (1, 37), 0.02, machines=MACHINES[:1])


@pytest.mark.parametrize("inner", [(3, 7), (5, 16), (4, 49), (40, 33), (7, 3, 50), (2, 1024), (3, 1000), (1, 1)])
def test_several_reduced_axes(inner):
    """x[N, C, *]: reduces the first and last axes for each channel."""
    channels = 3
    first, rest = inner[0], inner[1:]
    n = math.prod(rest)
    strides = (n, channels * n, *row_major(rest))
    for kind, dtype in (("sum", f32), ("dot", f64), ("argmax", f32), ("max", i32)):
        check_reduce((channels,), (first, *rest), kind, dtype, strides, 0.02)


@pytest.mark.parametrize("n", [65536, 65537, 200000])
@pytest.mark.parametrize("kind", ["sum", "dot", "max", "argmax", "argmin"])
def test_split_full_reduction(n, kind):
    check_reduce((), (n,), kind, f32, (1,), splits=((1, None), (2, 5)), machines=MACHINES[:2])
    check_reduce((2,), (n,), kind, f32, (n, 1), machines=MACHINES[:1])
    if kind not in ("sum", "dot"):
        check_reduce((), (n,), kind, f64, (1,), 1e-4, splits=((1, None), (2, 5)), machines=MACHINES[:1])
        check_reduce((2,), (n,), kind, i8, (n, 1), machines=MACHINES[:1])


@pytest.mark.parametrize("n", [16384, 20001, 8192 * 7 + 1])
def test_split_column_reduction(n):
    for kind in ("sum", "max", "dot"):
        check_reduce((5,), (n,), kind, f32, (1, 5), splits=((1, None), (2, 5)), machines=MACHINES[:2])
    check_reduce((2, 17), (n,), "sum", f64, (17 * n, 1, 17), splits=((2, 5),), machines=MACHINES[:1])


def test_reducing_stage_that_stores_and_reduction_of_nothing():
    """exp-like numerators stored while they are summed; a reduction over no axes is its one element."""
    for rows, columns, along in ((3, 37, 1), (37, 3, 0), (1100, 20, 0), (4, 1100, 1)):
        outer, inner = (rows, columns) if along else (columns, rows)
        strides = (columns, 1) if along else (1, columns)
        b = body(("load", (), f32, Access(0, Affine(0, strides))), ("mul", (0, 0), f32))
        stages = (
            Stage((inner,), b, (Store(Access(1, Affine(0, strides)), 1),), (Reduce("sum", (1,), f32),)),
            Stage((), body(("reduced", (), f32, (0, 0)), ("neg", (0,), f32)), (), (Reduce("max", (1,), f32),)),
            Stage((), body(("reduced", (), f32, (1, 0))), (Store(Access(2, Affine(0, (1,))), 0),)),
        )
        n = rows * columns
        kernel = LoopKernel((Arg(f32, n), Arg(f32, n, True), Arg(f32, outer, True)), (outer,), stages)
        check(kernel, [data(f32, n, 0, 0.1), np.zeros(n, np.float32), np.zeros(outer, np.float32)])


@pytest.mark.parametrize("dtype", [f16, bf16, f32, f64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 15, 17, 33, 300])
def test_extremes_of_few_values(dtype, n):
    """Rows of one, two or three of the values that an order of floats by their bits must tell apart."""
    tiny, large = (1e-40, 3e38) if dtype in (f32, bf16) else (6e-8, 6e4) if dtype is f16 else (5e-324, 1e308)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, tiny, -tiny, large, -large]
    some = [c for k in (1, 2, 3) for c in itertools.combinations(range(len(values)), k)]
    numbers = np.array(values).astype(dtype.numpy)
    if dtype is f32:
        numbers = np.append(
            numbers, np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
        )
        some += [(k, *c) for k in range(12, 16) for c in ((), (2,), (3,), (7,))]
    rng = np.random.default_rng(n)
    x = np.stack([numbers[rng.choice(c, n)] for c in some]).reshape(-1)
    for kind in ("max", "min"):
        kernel, result = reduce_kernel((len(some),), (n,), kind, dtype, Affine(0, (n, 1)), x.size)
        check(kernel, [x, np.zeros(len(some), result.numpy)])
        for start in (0, 40 * n, 70 * n):  # one row: lanes without elements
            kernel, result = reduce_kernel((), (n,), kind, dtype, Affine(start, (1,)), x.size)
            check(kernel, [x, np.zeros(1, result.numpy)], machines=MACHINES[:1])
        outer, inner = 7, (n, len(some) // 7)
        kernel, result = reduce_kernel((outer,), inner, kind, dtype, Affine(0, (1, 7 * inner[1], 7)), x.size)
        check(kernel, [x, np.zeros(outer, result.numpy)], machines=MACHINES[:2])


def test_arg_of_equal_elements():
    """All elements equal to the worst value: the first is meant."""
    for d, kind, worst in (
        (f32, "argmax", -np.inf),
        (f32, "argmin", np.inf),
        (i8, "argmax", -128),
        (u8, "argmin", 255),
    ):
        for outer, n, strides in ((3, 40, (40, 1)), (40, 5, (1, 40))):
            kernel, _ = reduce_kernel((outer,), (n,), kind, d, Affine(0, strides), outer * n)
            x = np.full(outer * n, worst, d.numpy)
            check(kernel, [x, np.ones(outer, np.int64)])
            x[7::9] = 3
            check(kernel, [x, np.ones(outer, np.int64)])


@pytest.mark.parametrize("n", [0, 1, 1000, 5000, 70000])
def test_symbolic_reductions(n):
    t = Dim.symbol("t")
    for outer, strides in (((), (1,)), ((3,), (t, 1)), ((33,), (1, 33))):
        kernel, _ = reduce_kernel(outer, (t,), "sum", f32, Affine(0, strides), t * math.prod(outer), ("t",))
        x = data(f32, n * math.prod(outer))
        check(kernel, [x, np.zeros(math.prod(outer), np.float32)], {"t": n}, machines=MACHINES[:1])


def test_sum_of_negative_zeros():
    kernel, _ = reduce_kernel((2,), (40,), "sum", f32, Affine(0, (40, 1)), 80)
    got, _ = run(kernel, [np.full(80, -0.0, np.float32), np.ones(2, np.float32)], {}, MACHINES[0])
    assert not np.signbit(got[1]).any()


def softmax_like(rows, columns, along, dims=()):
    """Three stages: max, sum of (x - max)^2, their quotient; rows along `along` of a contiguous [rows, columns]."""
    strides = (columns, 1) if along == 1 else (1, columns)
    outer, inner = (rows, columns) if along == 1 else (columns, rows)
    at = Access(0, Affine(0, strides))
    square = [("load", (), f32, at), ("reduced", (), f32, (0, 0)), ("sub", (0, 1), f32), ("mul", (2, 2), f32)]
    stages = (
        Stage((inner,), body(("load", (), f32, at)), (), (Reduce("max", (0,), f32),)),
        Stage((inner,), body(*square), (), (Reduce("sum", (3,), f32), Reduce("argmin", (3,), i64))),
        Stage(
            (inner,),
            body(*square, ("reduced", (), f32, (1, 0)), ("div", (3, 4), f32)),
            (Store(Access(1, Affine(0, strides)), 5),),
        ),
        Stage((), body(("reduced", (), i64, (1, 1))), (Store(Access(2, Affine(0, (1,))), 0),)),
    )
    args = (Arg(f32, rows * columns), Arg(f32, rows * columns, True), Arg(i64, outer, True))
    return LoopKernel(args, (outer,), stages, dims)


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("rows,columns", [(1, 1), (4, 33), (33, 16), (3, 1500), (1500, 20), (130, 7)])
def test_stages(rows, columns, along):
    outer = rows if along == 1 else columns
    blank = [np.zeros(rows * columns, np.float32), np.zeros(outer, np.int64)]
    check(softmax_like(rows, columns, along), [data(f32, rows * columns), *blank])
    r, c = Dim.symbol("r"), Dim.symbol("c")
    kernel = softmax_like(r, c, along, ("r", "c"))
    check(kernel, [data(f32, rows * columns), *blank], {"r": rows, "c": columns}, machines=MACHINES[:2])


def softmax_of(r, c, dims=(), d=f32):
    """softmax along c as it is fused: exp(x - max) in the sum and again in the quotient."""
    at = Access(0, Affine(0, (c, 1)))
    builders = []
    for last in (False, True):
        b = BodyBuilder()
        top = recipes.exp(b, b.sub(b.load(at, d), b.reduced(0, 0, d)))
        builders.append((b, b.div(top, b.reduced(1, 0, d)) if last else top))
    (b1, top), (b2, quotient) = builders
    stages = (
        Stage((c,), body(("load", (), d, at)), (), (Reduce("max", (0,), d),)),
        Stage((c,), tuple(Instr(*row) for row in b1.rows), (), (Reduce("sum", (top,), d),)),
        Stage((c,), tuple(Instr(*row) for row in b2.rows), (Store(Access(1, Affine(0, (c, 1))), quotient),)),
    )
    return LoopKernel((Arg(d, r * c), Arg(d, r * c, True)), (r,), stages, dims)


@pytest.mark.parametrize("many", [None, 0])
@pytest.mark.parametrize("rows,columns", [(3, 1), (2, 16), (5, 37), (3, 129), (3, 1029), (2, 3000)])
def test_softmax_keeps_the_exponentials(rows, columns, many, monkeypatch):
    """exp(x - max) of the sum and of the quotient is one expression: computed once, same bits, also where vectors are taken together."""
    if many is not None:
        monkeypatch.setattr(nest, "_MANY", many)
    compiled.cache_clear()

    buffers = [data(f32, rows * columns, 0, 0.001), np.zeros(rows * columns, np.float32)]
    kernel = softmax_of(rows, columns)
    check(kernel, buffers)
    if columns > 1:
        assert compile_kernel(kernel, machine().target).scratch({}, 1) > 0
    r, c = Dim.symbol("r"), Dim.symbol("c")
    check(softmax_of(r, c, ("r", "c")), buffers, {"r": rows, "c": columns}, machines=MACHINES[:2])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "rows,columns,d", [(1, 512, f32), (2, 1024, f32), (3, 960, f32), (9, 4096, f32), (7, 2048, f64)]
)
def test_softmax_in_waves(rows, columns, d, streamed, monkeypatch):
    """Stages of consecutive rows side by side: whatever rows a thread gets, the bits of one stage after the other; also in place."""
    monkeypatch.setattr(row_waves, "_MANY", 0)
    monkeypatch.setattr(row_waves, "_MANY_ROWS", 0)
    if streamed:
        monkeypatch.setattr(stream, "_BEYOND", 0)
    compiled.cache_clear()
    kernel = softmax_of(rows, columns, (), d)
    assert row_waves.runs_in_waves(kernel, None)
    buffers = [data(d, rows * columns, 0, 0.001), np.zeros(rows * columns, d.numpy)]
    check(kernel, buffers)
    plain = softmax_of(rows, columns - 1, (), d)  # not whole vectors
    assert not row_waves.runs_in_waves(plain, None)

    code, library = compiled(kernel, MACHINES[0])
    x = buffers[0].copy()
    (expected, _), scratch = reference(kernel, buffers, {}), np.zeros(code.scratch({}, 1) + 64, np.uint8)
    args = (ctypes.c_void_p * 2)(x.ctypes.data, x.ctypes.data)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)(
        library.addresses[code.phases[0].symbol]
    )
    function(args, None, 0, rows, 0, scratch.ctypes.data, None)
    assert same(x, expected[1])
    compiled.cache_clear()


def test_in_place_map():
    """The output may be the input's memory."""
    n = 100
    kernel = map_kernel((n,), contiguous((n,)), n)
    code, library = compiled(kernel, MACHINES[0])
    x = data(f32, n)
    y = x.copy()
    args = (ctypes.c_void_p * 2)(y.ctypes.data, y.ctypes.data)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)(
        library.addresses[code.phases[0].symbol]
    )
    function(args, None, 0, code.phases[0].units({}), 0, None, None)
    assert (y == x + np.float32(1)).all()


@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
@pytest.mark.parametrize("shape", [(5000,), (1, 1), (33, 2080)])
def test_results_past_the_caches(dtype, shape, monkeypatch):
    """Large results are stored so where they are aligned; what is written is the same everywhere."""
    monkeypatch.setattr(stream, "_BEYOND", 0)
    n = math.prod(shape)
    kernel = map_kernel(shape, contiguous(shape), n, dtype)
    assert "!nontemporal" in compile_kernel(kernel, machine(MACHINES[0]).target).text or n == 1
    buffers = [data(dtype, n, special=0.02), np.zeros(n, dtype.numpy)]
    check(kernel, buffers)
    expected, _ = reference(kernel, buffers, {})
    shifted, _ = run(kernel, buffers, {}, MACHINES[0], shift=dtype.itemsize)
    assert same(shifted[1], expected[1])


def test_rows_past_the_caches(monkeypatch):
    monkeypatch.setattr(stream, "_BEYOND", 0)
    for rows, columns in ((3, 1024), (4, 1000), (5, 33)):
        kernel = softmax_like(rows, columns, 1)
        text = compile_kernel(kernel, machine(MACHINES[0]).target).text
        assert ("!nontemporal" in text) == (columns == 1024)  # the others' rows do not begin with lines
        zeros = [np.zeros(rows * columns, np.float32), np.zeros(rows, np.int64)]
        check(kernel, [data(f32, rows * columns, seed=1), *zeros])


def test_in_place_map_past_the_caches(monkeypatch):
    monkeypatch.setattr(stream, "_BEYOND", 0)
    test_in_place_map()


# ------------------------------------------------------------------------------------------------- scan and scatter
@pytest.mark.parametrize(
    "shape,axis",
    [
        ((40,), 0),
        ((3, 50), 1),
        ((8, 50), 1),
        ((50, 37), 0),
        ((2, 9, 20), 1),
        ((2, 6, 20), 2),
        ((5, 0), 1),
        ((0, 5), 1),
        ((1, 1), 0),
    ],
)
def test_scan(shape, axis):
    for dtype in (f32, bf16, i32, f64):
        acc = f32 if dtype is bf16 else dtype
        strides = row_major(shape)
        order = [k for k in range(len(shape)) if k != axis] + [axis]
        at = Affine(0, tuple(strides[k] for k in order))
        n = math.prod(shape)
        step = [("load", (), dtype, Access(0, at)), ("saved", (), acc, 0)]
        step += [("convert", (0,), acc), ("add", (1, 2), acc), ("convert", (3,), dtype)] if acc is not dtype else []
        step += [("add", (1, 0), acc)] if acc is dtype else []
        kernel = ScanKernel(
            (Arg(dtype, n), Arg(dtype, n, True)),
            tuple(shape[k] for k in order[:-1]),
            shape[axis],
            ((acc, 0),),
            (3 if acc is not dtype else 2,),
            body(*step),
            (Store(Access(1, at), len(step) - 1),),
        )
        x = data(dtype, n)
        wide = x.reshape(shape).astype(acc.numpy)
        expected = np.add.accumulate(wide, axis, dtype=acc.numpy) + acc.numpy.type(0)
        for name in MACHINES:
            got, _ = run(kernel, [x, np.zeros(n, dtype.numpy)], {}, name, 2, 3)
            assert same(got[1], expected.astype(dtype.numpy).ravel()), (name, dtype)


@pytest.mark.parametrize("mode", ["add", "set"])
@pytest.mark.parametrize("updates,width", [(9, 40), (30, 1), (0, 5), (7, 700)])
def test_scatter(mode, updates, width):
    """out[index[u], :] += or = values[u, :], repeated indices in order."""
    rows = 6
    for dtype in (f32, bf16, i64):
        index = np.random.default_rng(3).integers(0, rows, updates)
        base, values = data(dtype, rows * width, 1), data(dtype, updates * width, 2)
        b = body(
            ("load", (), i64, Access(1, Affine(0, (1, 0)))),
            ("check", (0,), i64, (rows, 0)),
            ("load", (), dtype, Access(2, Affine(0, (width, 1)))),
        )
        args = (Arg(dtype, base.size), Arg(i64, updates), Arg(dtype, values.size), Arg(dtype, base.size, True))
        store = Store(Access(3, Affine(0, (0, 1)), (), (width,)), 2, (1,))
        kernel = ScatterKernel(args, base.size, (updates, width), 1, b, store, mode)
        expected = base.copy().reshape(rows, width)
        for u in range(updates):
            new = values.reshape(updates, width)[u]
            if mode == "add":
                new = (expected[index[u]].astype(f32.numpy if dtype is bf16 else dtype.numpy) + new).astype(dtype.numpy)
            expected[index[u]] = new
        for name in MACHINES:
            got, _ = run(kernel, [base, index, values, np.zeros_like(base)], {}, name, 2, 3)
            assert same(got[3], expected.ravel()), (name, dtype)


def test_scatter_without_window_is_sequential():
    index = np.array([2, 0, 2, 2, 1, 7])
    values = data(f32, 6)
    b = body(("load", (), i64, Access(1, Affine(0, (1,)))), ("load", (), f32, Access(2, Affine(0, (1,)))))
    args = (Arg(f32, 8), Arg(i64, 6), Arg(f32, 6), Arg(f32, 8, True))
    kernel = ScatterKernel(args, 8, (6,), 1, b, Store(Access(3, Affine(0, (0,)), (), (1,)), 1, (0,)), "add")
    expected = np.zeros(8, np.float32)
    for i, v in zip(index, values, strict=True):
        expected[i] += v
    got, _ = run(kernel, [np.zeros(8, np.float32), index, values, np.zeros(8, np.float32)], {}, MACHINES[0])
    assert same(got[3], expected)


def test_a_target_needs_fma():
    with pytest.raises(DeviceError, match="fused multiply-add"):
        Target(16, fma=False)


def test_text_is_deterministic():
    kernel = softmax_like(4, 33, 1)
    m = machine(MACHINES[0])
    assert compile_kernel(kernel, m.target).text == compile_kernel(kernel, m.target).text
