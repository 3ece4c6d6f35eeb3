"""What is recorded, whatever came next the last time: steps of equal keys, branches in turns, numbers of several kinds, many gradients at once."""

import numpy as np
import pytest

import duo
from duo import nn
from duo.eager.trace import forget
from tests.frontends.eager_modes import in_every_mode, numbers


def test_the_same_op_on_the_same_operands():
    def program(T):
        x, y = T.tensor(numbers(4)), T.tensor(numbers(4, seed=1))
        a, b, c = x * y, x * y, x * y
        d, e, f = x.tanh(), x.tanh(), x.tanh()
        b += 1
        return a, b, c, d + e + f, x.sum(0), x.sum(0)

    expected = numbers(4) * numbers(4, seed=1)
    for _ in range(3):
        a, b, c, *_ = in_every_mode(program)
        assert np.array_equal(a, expected) and np.array_equal(b, expected + 1) and np.array_equal(c, expected)


def test_branches_in_turns():
    x, y = duo.tensor(numbers(5)), duo.tensor(numbers(5, seed=1))
    ops = [
        (lambda t: t * y, lambda a: a * numbers(5, seed=1)),
        (lambda t: t * x, lambda a: a * numbers(5)),
        (lambda t: t * 2.0, lambda a: a * np.float32(2)),
        (lambda t: t * 3, lambda a: a * np.float32(3)),
        (lambda t: t - 2.5, lambda a: a - np.float32(2.5)),
        (lambda t: t.reshape(5, 1).sum(1), lambda a: a),
        (lambda t: t.sum(0, keepdim=True) + t * 0, lambda a: None),
    ]
    rng = np.random.default_rng(0)
    for trial in range(200):
        if trial == 100:
            forget()
        t, a = x + 0, numbers(5)
        for k in rng.integers(0, len(ops), 4):
            t, a = ops[k][0](t), ops[k][1](a) if a is not None else None
        if a is not None:
            assert np.array_equal(t.numpy(), a)


def test_numbers_of_several_kinds():
    i = duo.tensor([1, 2, 3])
    for _ in range(3):
        assert (i * 2).dtype is duo.int64 and (i * 2.0).dtype is duo.float32 and (i * True).dtype is duo.int64
        assert duo.full((2,), 1).dtype is duo.int64 and duo.full((2,), 1.0).dtype is duo.float32
        assert duo.full((2,), True).dtype is duo.bool
        assert str(duo.full((1,), 0.0).tolist()) == "[0.0]" and str(duo.full((1,), -0.0).tolist()) == "[-0.0]"


def test_a_program_that_is_recorded_from_deeper_calls():
    """The place of a program's first recording is looked for at the depth where it was found; any other depth works as well."""
    w = duo.tensor(numbers(3), requires_grad=True)
    layer = nn.Sequential(nn.Sequential(nn.Tanh()), nn.ReLU())

    def deep(n):
        return deep(n - 1) if n else layer(w * 2).sum()

    expected = deep(0).item()
    for n in (0, 5, 0, 3, 60, 0):
        loss = deep(n)
        loss.backward()
        assert loss.item() == expected
    assert w.grad.shape == (3,)


def test_gradients_of_many_losses():
    """Backward passes that are one entry and those that are not give equal gradients."""

    def program(T):
        w, v = T.tensor(numbers(3), requires_grad=True), T.tensor(numbers(3, seed=1), requires_grad=True)
        out = []
        for k in range(3):
            h = (w * v).tanh()
            if k == 1:
                h.sum().item()
            loss = (h * w).sum()
            loss.backward()
            out += [w.grad.clone(), v.grad.clone()]
        return out

    torch = pytest.importorskip("torch")
    ours = in_every_mode(program)
    for a, b in zip(ours, program(torch)):
        np.testing.assert_allclose(a, b.numpy(), rtol=2e-6)


def test_hyperparameters_are_read_at_each_step():
    w = duo.tensor([1.0], requires_grad=True)
    betas = [0.5, 0.9]
    sgd, adam = duo.optim.SGD([w], lr=1.0), duo.optim.Adam([w], lr=0.0, betas=betas)
    for lr in (1.0, 0.5, 0.25):
        w.grad = duo.tensor([1.0])
        before = w.item()
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
        assert w.item() == before - lr
    adam.param_groups[0]["betas"] = betas
    w.grad = duo.tensor([1.0])
    adam.step()
    betas[0] = 0.0  # a list may change unnoticed
    adam.step()
    assert adam.state[w]["exp_avg"].item() == 1.0
