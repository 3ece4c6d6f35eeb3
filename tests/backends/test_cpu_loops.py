"""Loops without reductions, scan and scatter kernels of the CPU backend against a plain NumPy reading of the kernel IR (`loop_kernels.py`)."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from loop_kernels import (
    MACHINES,
    NP,
    SIZES,
    SPECIAL,
    body,
    check,
    compiled,
    contiguous,
    data,
    map_kernel,
    narrowed,
    reference,
    run,
    same,
    softmax_like,
)

from duo_backends.cpu import loops, nest, stream, turn
from duo_backends.cpu.chains import side_by_side
from duo_backends.cpu.code import Target
from duo_backends.cpu.emit import compile_kernel
from duo_backends.cpu.jit import machine
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
    ScanKernel,
    ScatterKernel,
    Stage,
    Store,
)
from duo_ir.scalar import math as recipes
from duo_ir.types import DTYPES, bf16, bool_, f16, f32, f64, i8, i32, i64, row_major, u8


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


def test_chains_that_meet_late_are_written_side_by_side():
    """exp(a) * exp(exp(b)): the longer chain begins first and the shorter one among it, each instruction behind what it uses; no value changes."""
    b = BodyBuilder()
    short = recipes.exp(b, b.load(Access(0, Affine(0, (1,))), f32))
    long = recipes.exp(b, recipes.exp(b, b.load(Access(1, Affine(0, (1,))), f32)))
    store = Store(Access(2, Affine(0, (1,))), b.mul(short, long))
    stage = Stage((), tuple(Instr(*row) for row in b.rows), (store,))
    moved = side_by_side(stage)
    assert moved.body != stage.body
    assert all(a < k for k, instr in enumerate(moved.body) for a in instr.args)
    loads = [instr.attr.buffer for instr in moved.body if instr.op == "load"]
    assert loads == [1, 0]
    begin = next(k for k, instr in enumerate(moved.body) if instr.op == "load" and instr.attr.buffer == 0)
    before, behind = ({instr.op for instr in part} for part in (moved.body[:begin], moved.body[begin:]))
    assert "ldexp" in before and "fma" in behind

    def expression(stage, k):
        instr = stage.body[k]
        return instr.op, instr.attr, instr.dtype, *(expression(stage, a) for a in instr.args)

    assert expression(moved, moved.stores[0].value) == expression(stage, stage.stores[0].value)


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
