"""Kernels of loops built by hand, and a plain NumPy reading of the kernel IR that they are compared with, by `==` on bits."""

from __future__ import annotations

import ctypes
import itertools
import math
from functools import cache

import numpy as np

from duo_backends.cpu.emit import compile_kernel
from duo_backends.cpu.jit import build, machine
from duo_ir.errors import DeviceError
from duo_ir.kernels.kernel import (
    Access,
    Affine,
    Arg,
    Instr,
    LoopKernel,
    Reduce,
    Stage,
    Store,
)
from duo_ir.scalar.numpy_eval import NumpyScalar
from duo_ir.types import bf16, bool_, evaluate, f16, f32, i64, row_major

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
