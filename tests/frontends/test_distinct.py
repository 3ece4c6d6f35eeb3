"""Tensors that an op gives back as they are: values of their own to gradients and hooks, whenever the program runs."""

import pytest

import duo
import duo.graph as tf
from tests.frontends.eager_modes import flush_policy


@pytest.mark.parametrize("policy", ["lazy", "sync", "random1"])
@pytest.mark.parametrize("same", ["clone", "reshape", "expand", "contiguous"])
def test_a_tensor_that_equals_its_operand_has_gradients_of_its_own(policy, same):
    """Hooks and gradients of b, the same values as a, see what comes through b alone."""
    make = {
        "clone": lambda a: a.clone(),
        "reshape": lambda a: a.reshape(2, 3),
        "expand": lambda a: a.expand(2, 3),
        "contiguous": lambda a: a.contiguous().view(2, 3),
    }[same]
    with flush_policy(policy):
        x = duo.ones(2, 3).requires_grad_()
        a = x * 2
        b = make(a)
        seen = []
        b.register_hook(lambda g: seen.append(g.tolist()) or g * 0.5)
        (a * 1.0 + b * 3.0).sum().backward()
        assert seen == [[[3.0] * 3] * 2] and x.grad.tolist() == [[2.0 + 3.0] * 3] * 2
        c = x * 2
        d = make(c)
        assert duo.autograd.grad((c + d * 3).sum(), d)[0].tolist() == [[3.0] * 3] * 2


def test_gradients_in_a_graph_stop_at_the_tensor_asked_for():
    with tf.Graph().as_default(), tf.Session() as session:
        a = tf.constant([1.0, 2.0]) * 2.0
        b = tf.identity(a)
        c = tf.reshape(a, [2])
        loss = tf.reduce_sum(a + b * 3.0 + c * 5.0)
        got = session.run(tf.gradients(loss, [a, b, c]))
        assert [g.tolist() for g in got] == [[9.0, 9.0], [3.0, 3.0], [5.0, 5.0]]


@pytest.mark.parametrize("policy", ["lazy", "sync", "random1"])
def test_a_weight_may_change_before_a_backward_that_does_not_read_it(policy):
    """The gradient of x @ w by w alone reads x, so w may be written to after the forward pass, as in PyTorch; that of x would read it."""
    with flush_policy(policy):
        x, w = duo.full((2, 3), 2.0), duo.ones(3, 4).requires_grad_()
        y = x @ w
        with duo.no_grad():
            w.mul_(0.75)
        y.sum().backward()
        assert w.grad.tolist() == [[4.0] * 4] * 3
        x.requires_grad_()
        y = x @ w
        with duo.no_grad():
            w.mul_(0.75)
        with pytest.raises(duo.DuoError, match="overwritten"):
            y.sum().backward()
