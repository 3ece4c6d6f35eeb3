"""Templates: kernels of other shapes become one kernel with sizes, and mean what the static kernels mean, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import op_table
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_programs import programs

import duo.functional as F
import duo_ir.ops as ops
from duo_ir.core import Function, Value, function_of
from duo_ir.interpret import interpret
from duo_ir.kernels.evaluate import evaluate
from duo_ir.kernels.fuse import fuse
from duo_ir.kernels.generic import generalize, generalize_program
from duo_ir.kernels.kernel import (
    Access,
    Affine,
    Arg,
    ContractKernel,
    ConvKernel,
    Guard,
    Instr,
    Kernel,
    LoopKernel,
    Stage,
    Store,
)
from duo_ir.kernels.plan import plan
from duo_ir.kernels.program import Cond, Program, Step, While
from duo_ir.kernels.text import print_kernel, print_program
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.transforms.derivatives import grad_function
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, f32, i64


def ft(*shape: Any) -> TensorType:
    return TensorType(f32, shape)


def steps(program: Program) -> list[Step]:
    out: list[Step] = []
    for item in program.items:
        if isinstance(item, Step):
            out.append(item)
        for nested in (
            (item.then, item.orelse)
            if isinstance(item, Cond)
            else (item.test, item.body)
            if isinstance(item, While)
            else ()
        ):
            out += steps(nested)
    return out


def unfused(fn: Callable[..., Any] | Function, *types: TensorType) -> Program:
    return lower(fn if isinstance(fn, Function) else function_of(fn, *types), fusion=False)


def templates(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> list[Kernel]:
    return [s.kernel for s in steps(unfused(fn, *[ft(*s) for s in shapes]))]


def the_only(kernels: list[Kernel]) -> str:
    (kernel,) = dict.fromkeys(kernels)
    return print_kernel(kernel)


def check(function: Function, *arrays: np.ndarray) -> None:
    """interpret == evaluate of the templates, and of the fused kernels as templates."""
    want = interpret(function, *arrays)
    static = plan(fuse(simplify(function)), fusion=True)
    for program in (lower(function, fusion=False), generalize_program(static)):
        for step in steps(program):
            assert tuple(name for name, _ in step.sizes) == step.kernel.dims
            assert all(size >= 2 for _, size in step.sizes)
        for w, g in zip(want, evaluate(program, *arrays), strict=True):
            assert (w.dtype, w.shape) == (g.dtype, g.shape)
            same = (
                (w == g) & (np.signbit(w) == np.signbit(g)) | (w != w) & (g != g)
                if w.dtype.kind not in "iub"
                else w == g
            )
            assert same.all(), print_program(program)


# ------------------------------------------------------------------------------------------------------ one template
SHAPES = [((2, 3), (5, 7)), ((4, 4), (9, 2)), ((35, 12), (12, 35))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + x,
        lambda x: nd.sum(x, 1),
        lambda x: nd.sum(x, 0),
        lambda x: nd.sum(x),
        lambda x: nd.transpose(x, (1, 0)) * 2.0,
        lambda x: ops.flip(x, axes=(0,)) + 1.0,
        lambda x: ops.cumsum(x, axis=0),
        lambda x: x - nd.broadcast_to(nd.reshape(nd.sum(x, 1), (x.type.shape[0], 1)), x.type.shape),
        lambda x: nd.matmul(x, nd.swap_last(x)),
        lambda x: ops.concat(x, x, axis=1),
    ],
    ids=["add", "rows", "columns", "sum", "transpose", "flip", "cumsum", "centre", "matmul", "concat"],
)
def test_sizes_do_not_enter_the_kernel(fn: Callable[[Value], Value], shapes: tuple[tuple[int, ...], ...]) -> None:
    first, second = (templates(fn, s) for s in shapes)
    assert first == second
    assert [hash(k) for k in first] == [hash(k) for k in second]


def test_indexed_kernels_are_free_of_sizes() -> None:
    def made(n: int, width: int, count: int) -> list[Kernel]:
        function = function_of(lambda x, i: ops.gather(x, i, axes=(0,)), ft(n, width), TensorType(i64, (count,)))
        gradient = grad_function(
            function_of(lambda x, i: nd.sum(ops.gather(x, i, axes=(0,)) * 2.0), *function.param_types)
        )
        return [s.kernel for p in (function, gradient) for s in steps(unfused(p))]

    assert made(11, 12, 35) == made(7, 3, 2) == made(5, 5, 5)


def test_text_of_templates() -> None:
    assert the_only(templates(lambda x: nd.sum(x, 1) + 0.0, (4, 7))[:1]) == (
        "kernel(a0: f32[d0*d1], a1: f32[d0] out) for i0 < d0\n"
        "  stage 0 for j0 < d1\n"
        "    %0: f32 = load a0[d1*i0 + j0]\n"
        "    sum %0 in f32 -> r0.0\n"
        "  stage 1\n"
        "    %0: f32 = reduced r0.0\n"
        "    a1[i0] = %0\n"
    )
    program = unfused(lambda x, y: nd.matmul(x, y), ft(5, 6), ft(6, 7))
    assert "with d0 = 5, d1 = 7, d2 = 6" in print_program(program)


def test_equal_extents_get_names_of_their_own() -> None:
    square, oblong = (
        templates(lambda x: x - nd.sum(x, 1, keepdims=True), (7, 7)),
        templates(lambda x: x - nd.sum(x, 1, keepdims=True), (7, 5)),
    )
    assert square == oblong


def test_zero_and_one_stay() -> None:
    assert templates(lambda x: nd.sum(x, 1), (4, 1)) != templates(lambda x: nd.sum(x, 1), (4, 2))
    (column,) = templates(lambda x, y: nd.matmul(x, y), (4, 5), (5, 1))
    assert isinstance(column, LoopKernel)  # another order of summation than a contraction's
    (row,) = templates(lambda x, y: nd.matmul(x, y), (1, 5), (5, 3))
    assert isinstance(row, ContractKernel) and row.m == 1


def test_slices_have_strides_and_offsets_of_their_own() -> None:
    def fn(x: Value) -> Value:
        return ops.slice(x, start=(0, 2), stop=(3, 4), step=(1, 1)) + 1.0

    # the last slice begins at 2 and row 5 long rows: neither stride nor offset is a product of what is walked
    assert len(dict.fromkeys(templates(fn, (3, 5)) + templates(fn, (3, 9)))) == 1


def _loop_kernel(axes: tuple[int, ...], at: Affine, size: int) -> LoopKernel:
    body = (Instr("load", (), f32, Access(0, at)),)
    out = Affine(0, tuple([int(np.prod(axes[k + 1 :])) for k in range(len(axes))]))
    args = (Arg(f32, size), Arg(f32, int(np.prod(axes)), True))
    return LoopKernel(args, axes, (Stage((), body, (Store(Access(1, out), 0),)),))


def names(*wanted: str) -> list[Dim]:
    return [Dim.symbol(n) for n in wanted]


def test_strides_of_contiguous_memory_are_products() -> None:
    a, b, c = names("d0", "d1", "d2")
    kernel, sizes = generalize(_loop_kernel((4, 5, 6), Affine(0, (6, 24, 1)), 120))
    assert isinstance(kernel, LoopKernel)
    load = kernel.stages[0].body[0].attr
    assert isinstance(load, Access)
    assert load.at == Affine(0, (c, a * c, 1)) and kernel.args[0].size == a * b * c
    assert sizes == (("d0", 4), ("d1", 5), ("d2", 6))


def test_backward_walks_start_at_their_end() -> None:
    a, b = names("d0", "d1")
    kernel, _ = generalize(_loop_kernel((4, 6), Affine(18, (-6, 1)), 24))
    assert isinstance(kernel, LoopKernel)
    load = kernel.stages[0].body[0].attr
    assert isinstance(load, Access) and load.at == Affine((a - 1) * b, (-b, 1))
    small, _ = generalize(_loop_kernel((2, 6), Affine(6, (-6, 1)), 12))
    assert small == kernel


def test_guards_and_large_numbers() -> None:
    at = Access(0, Affine(-3, (1,)), (Guard(Affine(-3, (1,)), 9, 2),))
    body = (
        Instr("const", (), f32, 3.0),
        Instr("load", (0,), f32, at),
        Instr("index", (), i64, Affine(-(2**63), (3,))),
        Instr("dim", (), i64, 7),
    )
    kernel = LoopKernel(
        (Arg(f32, 9), Arg(f32, 15, True)), (15,), (Stage((), body, (Store(Access(1, Affine(0, (1,))), 1),)),)
    )
    made, sizes = generalize(kernel)
    assert isinstance(made, LoopKernel)
    values = dict(sizes)
    const, load, index, dim = made.stages[0].body
    assert const == body[0]
    assert isinstance(load.attr, Access) and load.attr.guards[0].step == 2
    assert isinstance(load.attr.at.offset, Dim) and load.attr.at.offset.evaluate(values) == -3
    bound = load.attr.guards[0].bound
    assert isinstance(bound, Dim) and bound.evaluate(values) == 9
    assert isinstance(index.attr, Affine) and index.attr.offset == -(2**63)  # does not fit what passes it: stays
    assert isinstance(dim.attr, Dim) and dim.attr.evaluate(values) == 7


def test_kernels_with_named_sizes_stay() -> None:
    function = function_of(lambda x: x + 1.0, ft(Dim.symbol("b"), 3))
    (step,) = steps(lower(function, fusion=False))
    assert step.kernel.dims == ("b",) and step.sizes == () and step.dims() == ("b",)
    assert generalize(step.kernel) == (step.kernel, ())
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(evaluate(lower(function, fusion=False), x)[0], x + 1)


def test_programs_with_templates_have_no_sizes_of_their_own() -> None:
    program = unfused(lambda x: x + 1.0, ft(2, 3))
    assert program.dims == () and steps(program)[0].dims() == ()


# ------------------------------------------------------------------------------------------------------- their meaning
@pytest.mark.parametrize("row", op_table.TABLE, ids=lambda r: r.name)
def test_every_op(row: op_table.Row) -> None:
    for case in op_table.cases([row]):
        check(case.function(), *case.arrays())


@given(programs(f32))
def test_random_programs(case: tuple[Function, list[np.ndarray]]) -> None:
    check(case[0], *case[1])


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.permutations(range(3)), st.booleans())
def test_movement(shape: list[int], order: list[int], flip: bool) -> None:
    def fn(x: Value) -> Value:
        y = nd.transpose(x, tuple(order))
        y = ops.flip(y, axes=(0, 2)) if flip else y
        return nd.reshape(y, (x.type.size,)) + 1.0

    function = function_of(fn, ft(*shape))
    check(function, np.random.default_rng(0).normal(size=shape).astype(np.float32))


def network(x: Value, target: Value, w1: Value, b1: Value, w2: Value, b2: Value) -> Value:
    return F.cross_entropy(F.linear(F.relu(F.linear(x, w1, b1)), w2, b2), target)


def attention(x: Value, g: Value, b: Value, w: Value) -> Value:
    n, t, d = x.type.shape
    h = F.layer_norm(x, (d,), g, b)
    q, k, v = (F.permute(F.reshape(F.linear(h, m), (n, t, 2, d // 2)), (0, 2, 1, 3)) for m in (w, w * 2.0, w * 3.0))
    return nd.sum(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def random(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_network_and_gradients(n: int) -> None:
    x, *weights = random((n, 6), (9, 6), (9,), (4, 9), (4,))
    labels = np.arange(n) % 4
    function = function_of(network, ft(n, 6), TensorType(i64, (n,)), *[ft(*w.shape) for w in weights])
    check(grad_function(function, value=True), x, labels, *weights)


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (3, 7), (2, 33)], ids=str)
def test_attention_and_gradients(sizes: tuple[int, int]) -> None:
    arrays = random((*sizes, 4), (4,), (4,), (4, 4))
    function = function_of(attention, *[ft(*a.shape) for a in arrays])
    check(grad_function(function, value=True), *arrays)


def test_a_model_of_another_length_has_no_new_kernels() -> None:
    def kernels(n: int, t: int) -> set[Kernel]:
        types = [ft(n, t, 4), ft(4), ft(4), ft(4, 4)]
        return {s.kernel for s in steps(unfused(function_of(attention, *types)))}

    known = kernels(3, 5)
    assert kernels(7, 11) == known and kernels(5, 3) == known
    # sizes of which one divides or equals another may leave other reshapes and contiguous runs
    assert len(kernels(4, 4) - known) <= 3 and len(kernels(2, 8) - known) <= 3


def test_large_convolutions_keep_their_sizes() -> None:
    """Code for any sizes is too slow for them."""

    def conv(x: Value, w: Value) -> Value:
        return ops.conv(x, w, strides=(1, 1), padding=((1, 1), (1, 1)), x_dilation=(1, 1), w_dilation=(1, 1), groups=1)

    (small,) = templates(conv, (2, 8, 8, 4), (3, 3, 4, 8))
    assert isinstance(small, ConvKernel) and small.dims and isinstance(small.images, Dim)
    (large,) = templates(conv, (2, 56, 56, 64), (3, 3, 64, 64))
    assert isinstance(large, ConvKernel) and not large.dims and large.images == 2
