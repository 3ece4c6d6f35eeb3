"""What eager autograd refuses: the exception, and that it names the op, the types and the user's line, under every flush policy."""

import re

import numpy as np
import pytest

import duo
from duo import nn
from duo_ir.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    DuoError,
    GradientError,
    IndexOutOfRange,
    ShapeError,
)
from tests.frontends.eager_modes import POLICIES, flush_policy, numbers


@pytest.fixture(params=list(POLICIES), autouse=True)
def policy(request):
    with flush_policy(request.param):
        yield request.param


def leaf(*shape, seed=0):
    return duo.tensor(numbers(*shape, seed=seed), requires_grad=True)


def line_of(error):
    """The line of this file that an error names."""
    found = re.search(r"test_eager_errors\.py:(\d+)", str(error))
    assert found, error
    return int(found[1])


def here():
    import sys

    return sys._getframe(1).f_lineno


def test_twice_without_retain():
    w = leaf(19)
    line = here() + 1
    y = w.exp().sum()
    y.backward()
    with pytest.raises(GradientError, match=r"exp.*retain_graph=True") as error:
        y.backward()
    assert line_of(error.value) == line


def test_twice_after_a_look():
    w = leaf(3)
    y = (w * w).sum()
    y.item()
    y.backward()
    with pytest.raises(GradientError, match=r"mul.*retain_graph"):
        y.backward()


def test_a_shared_trunk_freed():
    w = leaf(3)
    trunk = w.exp()
    one, two = (trunk * 2).sum(), (trunk * 3).sum()
    one.backward()
    with pytest.raises(GradientError, match=r"exp.*retain_graph"):
        two.backward()


def test_retained_then_freed():
    w = leaf(3)
    y = w.exp().sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(GradientError, match="exp"):
        y.backward()


def test_linear_ops_save_nothing():
    """As in PyTorch, ops that save nothing can be gone through twice."""
    w = leaf(3)
    y = (w * 3 + 1 - w).sum()
    y.backward()
    y.backward()
    assert w.grad.tolist() == [4, 4, 4]


def test_freed_through_grad():
    w = leaf(3)
    y = w.exp().sum()
    duo.autograd.grad(y, w)
    with pytest.raises(GradientError, match="exp"):
        duo.autograd.grad(y, w)


def test_first_order_graph_has_no_second():
    w = leaf(3)
    (g,) = duo.autograd.grad((w**3).sum(), w)
    with pytest.raises(GradientError, match="does not require grad"):
        duo.autograd.grad(g.sum(), w)


def test_in_place_on_a_saved_value():
    w = leaf(17)
    h = w * 2
    line = here() + 1
    y = (h * h).sum()
    h.add_(1)
    with pytest.raises(GradientError, match=r"mul.*in-place") as error:
        y.backward()
    assert line_of(error.value) == line


def test_in_place_on_a_saved_result():
    w = leaf(3)
    y = w.exp()
    z = y.sum()
    y += 1
    with pytest.raises(GradientError, match=r"exp.*in-place"):
        z.backward()


def test_in_place_on_a_saved_constant():
    w, c = leaf(3), duo.ones(3)
    y = (w * c).sum()
    c.mul_(2)
    with pytest.raises(GradientError, match=r"mul.*in-place"):
        y.backward()


def test_in_place_through_a_view_of_a_saved_value():
    w = leaf(3)
    h = w * 2
    y = (h * h).sum()
    h[0] = 5.0
    with pytest.raises(GradientError, match="in-place"):
        y.backward()


def test_in_place_on_a_saved_leaf():
    w = leaf(3)
    y = (w * w).sum()
    with duo.no_grad():
        w += 1
    with pytest.raises(GradientError, match=r"mul.*in-place"):
        y.backward()


def test_a_step_between_forward_and_backward():
    w = leaf(3)
    opt = duo.optim.SGD([w], lr=0.1)
    y = (w * w).sum()
    y.backward(retain_graph=True)
    opt.step()
    with pytest.raises(GradientError, match=r"mul.*in-place"):
        y.backward()


def test_data_writes_are_not_checked():
    w = leaf(3)
    before = w.tolist()
    y = (w * w).sum()
    w.data.mul_(10)
    y.backward()
    assert w.grad.tolist() == [2 * v for v in before]


def test_in_place_on_what_nobody_saved():
    w = leaf(3)
    h = w + 1
    y = (h + h).sum()
    h.mul_(2)
    y.backward()
    assert w.grad.tolist() == [2, 2, 2]


def test_in_place_on_leaves():
    w = leaf(3)
    for bad in (lambda: w.add_(1), lambda: w[0].mul_(2), lambda: w.__setitem__(0, 1.0), lambda: w.view(3).fill_(1)):
        with pytest.raises(GradientError, match=r"leaf.*no_grad"):
            bad()
    with pytest.raises(GradientError, match=r"leaf.*f32\[3\]"):
        w += 1


def test_no_gradient_to_be_had():
    w = leaf(3)
    with pytest.raises(GradientError, match=r"one element.*f32\[3\]"):
        (w * 2).backward()
    with pytest.raises(ShapeError, match=r"\[2\].*f32\[3\]"):
        (w * 2).backward(duo.ones(2))
    with pytest.raises(GradientError, match="does not require grad"):
        duo.ones(3).sum().backward()
    with pytest.raises(GradientError, match="does not require grad"):
        w.detach().sum().backward()
    with duo.no_grad():
        y = (w * w).sum()
    with pytest.raises(GradientError, match="no_grad"):
        y.backward()
    with pytest.raises(GradientError, match="does not require grad"):
        duo.autograd.grad((w * w).sum(), duo.ones(3))
    with pytest.raises(GradientError, match="allow_unused"):
        duo.autograd.grad((w * w).sum(), leaf(2))
    with pytest.raises(ArgumentError):
        duo.autograd.backward([(w * w).sum()], [None, None])


def test_flags():
    w = leaf(3)
    with pytest.raises(GradientError, match="leaves"):
        (w * 2).requires_grad_(False)
    with pytest.raises(DTypeError, match="floating"):
        duo.arange(3).requires_grad_()
    with pytest.raises(DTypeError):
        duo.arange(3).requires_grad = True
    with pytest.raises(GradientError, match="hook"):
        duo.ones(3).register_hook(print)
    with pytest.raises(ShapeError):
        w.grad = duo.ones(2)
    with pytest.raises(GradientError):
        (w * 2).grad = duo.ones(3)


def test_shapes_and_dtypes():
    x, y = duo.ones(2, 3), duo.ones(4, 3)
    for bad, words in (
        (lambda: x + y, ["add", "f32[2,3]", "f32[4,3]"]),
        (lambda: x @ y, ["matmul", "f32[2,3]", "f32[4,3]"]),
        (lambda: x.view(4), ["f32[2,3]"]),
        (lambda: duo.cat([x, duo.ones(2, 2)]), ["cat", "f32[2,3]"]),
        (lambda: nn.Linear(4, 2)(x), ["linear", "f32[2,3]"]),
        (lambda: x.expand(4, 3), ["f32[2,3]"]),
    ):
        with pytest.raises(ShapeError) as error:
            bad()
        assert all(w in str(error.value) for w in words), error.value
    for bad in (lambda: x + "a", lambda: duo.ones(2).bool() @ duo.ones(2).bool(), lambda: x.to("f33"), lambda: x & 1):
        with pytest.raises((DTypeError, TypeError)):
            bad()
    with pytest.raises(IndexOutOfRange, match=r"5.*f32\[2,3\]|f32\[2,3\].*5"):
        x[5]
    with pytest.raises(DeviceError, match="cuda"):
        x.to("cuda:63")
    with pytest.raises(DeviceError, match="cuda"):
        duo.ones(2, device="cuda:63")
    with pytest.raises(ShapeError, match=r"one element.*f32\[2,3\]"):
        x.item()
    with pytest.raises(ShapeError, match=r"f32\[2,3\]"):
        bool(x)
    assert (
        issubclass(ShapeError, ValueError)
        and issubclass(DTypeError, TypeError)
        and issubclass(GradientError, RuntimeError)
    )
    assert issubclass(IndexOutOfRange, IndexError) and issubclass(DuoError, Exception)


def test_an_index_out_of_range_is_raised_where_it_is_looked_at():
    table, good = leaf(4, 2), duo.ones(3) * 2
    line = here() + 3
    with pytest.raises(IndexOutOfRange, match=r"7.*axis 0.*4") as error:
        # raised at once with DUO_SYNC=1, else when a value that depends on it is looked at
        y = nn.functional.embedding(duo.tensor([0, 7]), table)
        z = (y + 1).sum()
        z.item()
    assert line_of(error.value) == line
    assert good.tolist() == [2, 2, 2] and table.shape == (4, 2)
    (table * 2).sum().backward()
    assert table.grad.tolist() == [[2, 2]] * 4


def test_a_failure_poisons_what_depends_on_it_and_nothing_else(policy):
    if policy == "sync":
        pytest.skip("raised at the op")
    duo.manual_seed(5)
    expected = duo.rand(4).tolist()
    duo.manual_seed(5)
    table = leaf(4, 2)
    made = duo.rand(4)
    weight = nn.Parameter(duo.zeros(3) + 1)
    broken = table[duo.tensor([1, 9])]
    worse = broken * 2
    fine = (weight * 3).sum()
    for _ in range(2):
        with pytest.raises(IndexOutOfRange, match="9"):
            worse.tolist()
    with pytest.raises(IndexOutOfRange, match="9"):
        broken.sum().backward()
    with pytest.raises(IndexOutOfRange, match="9"):
        print(broken + 1)
    assert made.tolist() == expected and weight.tolist() == [1, 1, 1] and fine.item() == 9
    fine.backward()
    assert weight.grad.tolist() == [3, 3, 3]
    assert np.isfinite(duo.randn(3).numpy()).all()


def test_a_failing_step_leaves_the_parameters():
    table = nn.Embedding(4, 2)
    opt = duo.optim.SGD(table.parameters(), lr=0.1)
    before = table.weight.tolist()
    with pytest.raises(IndexOutOfRange):
        loss = table(duo.tensor([0, 4])).sum()
        loss.item()
        loss.backward()
        opt.step()
    opt.zero_grad()
    assert table.weight.tolist() == before
    table(duo.tensor([0, 3])).sum().backward()
    opt.step()
    assert table.weight.tolist() != before
