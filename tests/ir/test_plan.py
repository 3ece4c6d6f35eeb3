"""Planning: slots, results that are inputs or copies, lifetimes, donations, control flow; printing; the pipeline's stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import duo_ir.ops as ops
from duo_ir.core import Function, Value, function_of
from duo_ir.errors import ArgumentError, VerifyError
from duo_ir.interpret import interpret
from duo_ir.kernels import order
from duo_ir.kernels.checks import failing, written_after_checks
from duo_ir.kernels.evaluate import evaluate, run
from duo_ir.kernels.program import Cond, Copy, Program, Step, While, reads_writes, touched
from duo_ir.kernels.text import print_program
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import compile, lower
from duo_ir.types import Dim, TensorType, bool_, f32, i64

B = Dim.symbol("b")


def F(*shape: Any) -> TensorType:
    return TensorType(f32, shape)


def planned(fn: Any, *types: TensorType) -> Program:
    return lower(function_of(fn, *types))


def check(fn: Any, *arrays: np.ndarray) -> Program:
    """The fused program, once its results are the interpreter's."""
    types = [TensorType({"f": f32, "i": i64, "b": bool_}[a.dtype.kind], a.shape) for a in arrays]
    function = fn if isinstance(fn, Function) else function_of(fn, *types)
    program = lower(function)
    want = interpret(function, *arrays)
    for p in (program, lower(function, fusion=False)):
        for w, g in zip(want, evaluate(p, *arrays), strict=True):
            assert w.shape == g.shape and w.dtype == g.dtype and np.array_equal(w, g, equal_nan=w.dtype.kind == "f")
    return program


def x(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- results
def test_inputs_are_returned_as_they_are() -> None:
    program = check(lambda a, b: (b, a + b, a, a + b), x(3), x(3))
    assert program.results == (1, 2, 0, 2) and len(program.outputs) == 1
    assert program.donations == ()  # both inputs are results


def test_other_shapes_of_one_memory_are_copies() -> None:
    def fn(a: Value) -> tuple[Value, ...]:
        y = ops.tanh(a)
        return nd.reshape(a, (6,)), y, nd.reshape(y, (3, 2)), nd.reshape(y, (6,)), nd.reshape(y, (6,))

    program = check(fn, x(2, 3))
    assert [str(t) for t in program.outputs] == ["f32[6]", "f32[2,3]", "f32[3,2]", "f32[6]"]
    assert program.results == (1, 2, 3, 4, 4)
    assert [type(i) for i in program.items].count(Copy) == 3


def test_the_first_result_gives_memory_its_shape() -> None:
    program = check(lambda a: nd.reshape(ops.tanh(a), (3, 2)), x(2, 3))
    assert len(program.items) == 1 and str(program.outputs[0]) == "f32[3,2]"


def test_constants_and_nothing() -> None:
    check(lambda a: (nd.full((2, 2), 3.0, f32), nd.iota((4,), 0), nd.constant_of(True, bool_)), x(1))
    check(lambda a: nd.sum(a) + nd.full((0, 3), 1.0, f32), x(2))


# ------------------------------------------------------------------------------------------------ lifetimes, donation
def test_lifetimes() -> None:
    def fn(a: Value, w: Value) -> Value:
        for _ in range(4):
            a = nd.matmul(ops.tanh(a), w)
        return a

    program = check(fn, x(3, 3), x(3, 3))
    base = len(program.inputs) + len(program.outputs)
    for n, temp in enumerate(program.temps):
        items = [k for k, item in enumerate(program.items) if base + n in touched(item)]
        assert (temp.first, temp.last) == (min(items), max(items)) and temp.nbytes == 36
        written = [k for k in items if base + n in reads_writes(program.items[k])[1]]
        assert written[0] == temp.first
    assert len({(t.first, t.last) for t in program.temps}) == len(program.temps)


def run_donated(program: Program, *arrays: np.ndarray, pairs: Any = None) -> list[np.ndarray]:
    """The results when outputs take the memory of inputs: `pairs`, or as many as there can be."""
    memory = [np.ascontiguousarray(a).reshape(-1).copy() for a in arrays]
    count = len(memory)
    chosen: dict[int, int] = {}
    for out, i in program.donations if pairs is None else pairs:
        if out not in chosen and i not in chosen.values():
            chosen[out] = i
    given = {out: memory[i] for out, i in chosen.items()}
    slots = run(program, memory, {}, given)
    types = program.inputs + program.outputs
    assert all(slots[count + out] is buffer for out, buffer in given.items())
    return [slots[s].reshape(types[s].shape) for s in program.results]


DONATING: dict[str, tuple[Any, list[np.ndarray], tuple[tuple[int, int], ...]]] = {
    "same element": (lambda a, b: ops.tanh(a) + b, [x(5), x(5)], ((0, 0), (0, 1))),
    "softmax": (lambda a: ops.exp(a - nd.max(a, 1, True)) / nd.sum(ops.exp(a - nd.max(a, 1, True)), 1, True), [x(3, 4)], ((0, 0),)),
    "transposed": (lambda a: nd.transpose(a, (1, 0)) + 1.0, [x(3, 3)], ()),
    "other elements": (lambda a: a + ops.flip(a, axes=(0,)), [x(4)], ()),
    "read again later": (lambda a, w: (a * 2.0, nd.matmul(a, w)), [x(2, 2), x(2, 2)], ((0, 0), (0, 1))),
    "read again with it": (lambda a: (a * 2.0, nd.matmul(a, a * 2.0)), [x(3, 3)], ()),
    "epilogue": (lambda a, w, r: nd.matmul(a, w) + r, [x(2, 3), x(3, 4), x(2, 4)], ((0, 2),)),
    "operand of the product": (lambda a, w: nd.matmul(a, w), [x(3, 3), x(3, 3)], ()),
    "read before": (lambda a, w: nd.matmul(nd.matmul(a, w) * 1.0, w), [x(3, 3), x(3, 3)], ((0, 0),)),
    "row after its sum": (lambda a: a / nd.sum(a, 1, True), [x(3, 4)], ((0, 0),)),
    "whole after its sum": (lambda a: a / nd.sum(a), [x(3, 4)], ((0, 0),)),
    "columns": (lambda a: (a * 2.0, nd.sum(a, 0)), [x(3, 4)], ((0, 0),)),
    "scatter": (
        lambda a, u: ops.scatter(a, u, nd.iota((2,), 0), axes=(0,), mode="add"), [x(4), x(2)], ((0, 0),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DONATING)
def test_donation(name: str) -> None:
    fn, arrays, most = DONATING[name]
    program = check(fn, *arrays)
    assert program.donations == most
    want = evaluate(program, *arrays)
    for pairs in (None, *[[pair] for pair in program.donations]):
        for w, g in zip(want, run_donated(program, *arrays, pairs=pairs), strict=True):
            assert np.array_equal(w, g)


def test_outputs_written_after_the_last_check() -> None:
    """A gather may fail; only what is written after it may take an input's memory and still leave that input whole."""

    def fn(table: Value, i: Value, w: Value) -> Value:
        early, late = ops.tanh(w), nd.sum(ops.gather(table, i, axes=(0,))) + w
        return early, late

    program = check(fn, x(5, 3), np.array([1, 4]), x(4))
    found = failing(program.items)
    assert found == [n for n, item in enumerate(program.items) if item.kernel.sites]
    for out in range(len(program.outputs)):
        first = min(n for n, item in enumerate(program.items) if len(program.inputs) + out in reads_writes(item)[1])
        assert (out in written_after_checks(program)) == (first > max(found))


def test_a_check_made_of_every_index_is_not_made_again() -> None:
    """An embedding and its gradient: the gradient's indices have been checked, so a state may be overwritten before it."""

    def embedding(table: Value, i: Value, w: Value) -> tuple[Value, ...]:
        y = nd.sum(ops.gather(table, i, axes=(0,)) * 2.0) + w
        later = ops.scatter(table, nd.broadcast_to(nd.sum(y), (2, 3)), i, axes=(0,), mode="add")
        return y, later

    program = check(embedding, x(5, 3), np.array([1, 4]), x(4))
    checked = [n for n, item in enumerate(program.items) if item.kernel.sites]
    assert len(checked) == 2 and failing(program.items) == checked[:1]
    assert 1 in written_after_checks(program)


OTHER_CHECKS: dict[str, Any] = {
    "another index": lambda t, u, i, j, n: (ops.gather(t, i, axes=(0,)), ops.gather(t, j, axes=(0,))),
    "a smaller table": lambda t, u, i, j, n: (ops.gather(t, i, axes=(0,)), ops.gather(u, i, axes=(0,))),
    "a part of the indices": lambda t, u, i, j, n: (
        ops.gather(t, ops.slice(i, start=(0,), stop=(2,), step=(1,)), axes=(0,)), ops.gather(t, i, axes=(0,))
    ),
    "another number": lambda t, u, i, j, n: (ops.gather(t, i, axes=(0,)), ops.gather(t, i + 1, axes=(0,))),
    "no elements": lambda t, u, i, j, n: (ops.gather(n, i, axes=(0,)), ops.gather(t, i, axes=(0,))),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CHECKS)
def test_other_checks_are_made(name: str) -> None:
    program = check(OTHER_CHECKS[name], x(5, 3), x(4, 3), np.array([1, 0, 2]), np.array([0, 3, 1]), x(5, 0))
    checked = [n for n, item in enumerate(program.items) if item.kernel.sites]
    assert failing(program.items) == checked and len(checked) >= 1


def test_scatter_into_fresh_zeros_needs_no_copy() -> None:
    def fn(u: Value, i: Value) -> Value:
        return ops.scatter(nd.full((5, 2), 0.0, f32), u, i, axes=(0,), mode="add")

    program = check(fn, x(3, 2), np.array([1, 4, 1]))
    assert program.temps == () and program.items[1].slots[0] == program.items[1].slots[-1]


# --------------------------------------------------------------------------------------------------- order of items
def training(fails: bool = False) -> Any:
    """Forward, the whole backward pass, then the updates: as frontends build it. With `fails`, indices are checked before the updates."""

    def fn(a: Value, i: Value, *weights: Value) -> tuple[Value, ...]:
        kept = [a]
        for w in weights:
            kept.append(ops.tanh(nd.matmul(kept[-1], w)))
        g = kept[-1] * 2.0
        pairs = []
        for n in reversed(range(len(weights))):
            g = g * (1.0 - kept[n + 1] * kept[n + 1])
            pairs.append((kept[n], g))
            g = nd.matmul(g, nd.transpose(weights[n], (1, 0)))
        new = [w - nd.matmul(nd.transpose(x, (1, 0)), g) for w, (x, g) in zip(weights, reversed(pairs))]
        return tuple([w * nd.sum(ops.gather(g, i, axes=(0,))) for w in new] if fails else new)

    return fn


@pytest.mark.parametrize("fails", [False, True])
def test_updates_run_when_they_free_memory(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [x(24, 16) / 4, np.array([3, 0]), *[x(16, 16) / 4 + n for n in range(6)]]
    plain = check(training(fails), *arrays)
    monkeypatch.setattr(order, "WORTH", 0)
    program = check(training(fails), *arrays)

    def live(p: Program) -> int:
        base = len(p.inputs) + len(p.outputs)
        return order.largest_live_set(p.items, {base + n: t.nbytes for n, t in enumerate(p.temps)})

    assert sorted(map(repr, program.items)) == sorted(map(repr, plain.items))
    if fails:  # nothing may be overwritten before the indices were looked at
        assert failing(program.items) and written_after_checks(program) == written_after_checks(plain) == set(range(6))
    else:
        assert live(program) < live(plain)
    assert {(n, 2 + n) for n in range(6)} <= set(program.donations)
    want = evaluate(program, *arrays)
    for w, g in zip(want, run_donated(program, *arrays, pairs=[(n, 2 + n) for n in range(6)]), strict=True):
        assert np.array_equal(w, g)


@pytest.mark.parametrize("worth", [0, order.WORTH])
def test_updates_wait_for_what_reads_the_old_value(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a norm's weight, whose gradient may come before the one that reads the weight."""

    def later(w: Value, a: Value, g: Value) -> tuple[Value, ...]:
        return w - nd.sum(a * g, (0,)), nd.sum(g * w, (1,))

    def for_good(w: Value, a: Value, g: Value) -> tuple[Value, ...]:
        new = w - nd.sum(a * g, (0,))
        return new, nd.sum(g * nd.sum(new) * w, (1,))

    monkeypatch.setattr(order, "WORTH", worth)
    arrays = [x(16), x(24, 16), x(24, 16) / 2]
    assert (0, 0) not in check(for_good, *arrays).donations
    program = check(later, *arrays)
    assert (0, 0) in program.donations
    want = evaluate(program, *arrays)
    for w, g in zip(want, run_donated(program, *arrays, pairs=[(0, 0)]), strict=True):
        assert np.array_equal(w, g)


# ----------------------------------------------------------------------------------------------------- control flow
def _countdown(body: Any, *types: TensorType) -> Any:
    test = function_of(lambda n, *rest: nd.gt(n, 0), TensorType(i64), *types, name="test")
    step = function_of(lambda n, *rest: (n - 1, *body(*rest)), TensorType(i64), *types, name="body")
    return test, step


def test_while() -> None:
    test, body = _countdown(lambda v, w: (ops.tanh(nd.matmul(v, w)) + v,), F(2, 2), F(2, 2))

    def fn(n: Value, v: Value, w: Value) -> tuple[Value, ...]:
        (
            count,
            v,
        ) = ops.while_(n, ops.sin(v), w, test=test, body=body, carried=2)[:2]
        return v * 2.0, count

    for n in (0, 1, 5):
        program = check(fn, np.asarray(n), x(2, 2), x(2, 2))
    assert any(isinstance(i, While) for i in program.items)


def test_while_that_swaps_and_passes_through() -> None:
    test, body = _countdown(lambda p, q, c: (q, p), F(3), F(3), F(3))

    def fn(n: Value, p: Value, q: Value, c: Value) -> tuple[Value, ...]:
        return ops.while_(n, p, q, c, test=test, body=body, carried=3)[1:]

    for n in (0, 1, 2):
        check(fn, np.asarray(n), x(3), x(3) + 1, x(3))


def test_cond_with_shared_and_passed_results() -> None:
    then = function_of(lambda a, b: (a, a, nd.reshape(a + b, (3,))), F(3), F(3), name="then")
    orelse = function_of(lambda a, b: (b, ops.exp(a), nd.full((3,), 1.0, f32)), F(3), F(3), name="orelse")

    def fn(p: Value, a: Value, b: Value) -> tuple[Value, ...]:
        return ops.cond(p, a * 2.0, b, then=then, orelse=orelse)

    for p in (True, False):
        program = check(fn, np.asarray(p), x(3), x(3))
    (cond,) = [i for i in program.items if isinstance(i, Cond)]
    assert cond.then.results == (2, 3, 4) == cond.orelse.results  # result k is output k


# -------------------------------------------------------------------------------------------------- pipeline, printing
def test_symbolic_sizes() -> None:
    program = planned(lambda a: ops.concat(a, a * 2.0, axis=0) + 1.0, F(B, 3))
    assert program.dims == ("b",) and program.outputs == (F(2 * B, 3),)
    for n in (2, 5):
        a = x(n, 3)
        assert np.array_equal(evaluate(program, a)[0], np.concatenate([a, a * 2]) + 1)


def test_print(golden: Any) -> None:
    def fn(a: Value, w: Value, bias: Value, i: Value) -> tuple[Value, ...]:
        y = nd.maximum(nd.matmul(a, w) + bias, 0.0)
        y = y / nd.sum(y, 1, True)
        z = ops.pad(ops.gather(y, i, axes=(0,)), nd.constant_of(1.0, f32), low=(0, 1), high=(0, 0), interior=(0, 1))
        return z, ops.cumsum(y, axis=0), ops.scatter(y, nd.full((2, 4), 0.5, f32), i, axes=(0,), mode="set")

    golden("program.txt", print_program(planned(fn, F(B, 3), F(3, 4), F(4), TensorType(i64, (2,)))))


def test_dump_and_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Backend:
        def compile(self, program: Program, scalars: Any = (), numerics: str = "strict") -> tuple[Program, Any]:
            return program, scalars

    function = function_of(lambda a: a + 0.0 * 1.0, F(2))
    monkeypatch.setenv("DUO_DUMP", "simplify,plan")
    monkeypatch.setenv("DUO_VERIFY", "1")
    program, scalars = compile(function, Backend(), scalars=(0,))
    assert isinstance(program.items[0], Step) and scalars == (0,)
    shown = capsys.readouterr().err
    assert "after simplify" in shown and "after plan" in shown and "after fuse" not in shown
    monkeypatch.setenv("DUO_DUMP", "all")
    compile(function, Backend())
    assert all(f"after {stage}" in capsys.readouterr().err or stage != "input" for stage in ("input",))
    monkeypatch.setenv("DUO_DUMP", "nonsense")
    with pytest.raises(ArgumentError, match="nonsense"):
        compile(function, Backend())


def test_verify_stops_a_faulty_function(monkeypatch: pytest.MonkeyPatch) -> None:
    function = function_of(lambda a: ops.tanh(a), F(2))
    broken = Function([], function.ops, function.results)
    monkeypatch.setenv("DUO_VERIFY", "1")
    with pytest.raises(VerifyError):
        lower(broken)
