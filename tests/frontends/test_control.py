"""duo.cond and duo.while_loop: values, gradients, captured tensors, under duo.compile, and their errors."""

from __future__ import annotations

import pytest

import duo
from duo_ir.errors import DTypeError, ShapeError, TraceError


def clipped(x):
    return duo.cond(x.sum() > 0, lambda x: x * 2, lambda x: -x, (x,))


@pytest.mark.parametrize(("values", "want"), [([1.0, 2.0], [2.0, 4.0]), ([-1.0, -2.0], [1.0, 2.0])])
def test_only_the_chosen_branch(values, want):
    assert clipped(duo.tensor(values)).tolist() == want


@pytest.mark.parametrize(("values", "want"), [([1.0, 2.0], [2.0, 2.0]), ([-1.0, -2.0], [-1.0, -1.0])])
def test_gradient(values, want):
    x = duo.tensor(values, requires_grad=True)
    clipped(x).sum().backward()
    assert x.grad.tolist() == want


def test_captured_tensors_get_gradients():
    w = duo.tensor([3.0, 4.0], requires_grad=True)
    x = duo.tensor([1.0, 1.0])
    out = duo.cond(x.sum() > 0, lambda x: (x * w, w.sum()), lambda x: (x, x.sum()), (x,))
    assert [t.tolist() for t in out] == [[3.0, 4.0], 7.0]
    (out[0].sum() + out[1]).backward()
    assert w.grad.tolist() == [2.0, 2.0]


def test_a_python_bool_is_decided_at_once():
    assert duo.cond(True, lambda: duo.ones(1), lambda: 1 / 0).tolist() == [1.0]


def test_both_choices_of_a_compiled_function():
    @duo.compile
    def f(x):
        return clipped(x) + 1

    for _ in range(3):
        assert f(duo.tensor([1.0])).tolist() == [3.0]
        assert f(duo.tensor([-1.0])).tolist() == [2.0]


def test_while_counts():
    limit = duo.tensor(100)
    n, total = duo.while_loop(lambda n, t: n < limit, lambda n, t: (n + 1, t + n), (duo.tensor(0), duo.tensor(0)))
    assert (n.item(), total.item()) == (100, 4950)


def test_while_that_never_runs():
    (n,) = duo.while_loop(lambda n: n < 0, lambda n: (n + 1,), (duo.tensor(5),))
    assert n.item() == 5


def test_newton():
    target = duo.tensor(2.0, dtype=duo.float64)
    (root,) = duo.while_loop(
        lambda r: (r * r - target).abs() > 1e-14, lambda r: ((r + target / r) / 2,), (duo.tensor(1.0, dtype=duo.float64),)
    )
    assert abs(root.item() - 2**0.5) < 1e-14


def test_equal_bits_when_flushed_everywhere():
    x = duo.randn(5)
    want = clipped(x).tolist()
    duo.debug.configure(sync=True)
    try:
        assert clipped(x).tolist() == want
    finally:
        duo.debug.configure(sync=False)


def test_errors():
    x = duo.ones(2)
    with pytest.raises(DTypeError, match="bool"):
        duo.cond(x.sum(), lambda: x, lambda: x)
    with pytest.raises(ShapeError, match="where"):
        duo.cond(x > 0, lambda: x, lambda: x)
    with pytest.raises(ShapeError, match="agree"):
        duo.cond(x.sum() > 0, lambda x: x, lambda x: x.sum(), (x,))
    with pytest.raises(TraceError, match="only types"):
        duo.cond(x.sum() > 0, lambda x: x * x.sum().item(), lambda x: x, (x,))
    with pytest.raises(TraceError, match="draw before"):
        duo.cond(x.sum() > 0, lambda x: duo.nn.functional.dropout(x), lambda x: x, (x,))
    with pytest.raises(ShapeError, match="carries"):
        duo.while_loop(lambda n: n.sum() < 3, lambda n: (n.sum(),), (x,))
