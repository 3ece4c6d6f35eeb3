"""Mistakes that users make, in both modes: each gives an error of the right class that says what, on which types, and where."""

from __future__ import annotations

import re

import numpy as np
import pytest

import duo
import duo.graph as tf
import duo.nn.functional as F
from duo_ir import errors

HERE = r"test_errors\.py:\d+"


def twice_backward():
    x = duo.ones(3, requires_grad=True)
    y = (x * x).sum()
    y.backward()
    y.backward()


def twice_backward_after_a_look():
    x = duo.ones(3, requires_grad=True)
    y = (x * x).sum()
    y.item()
    y.backward()
    y.backward()


def overwritten():
    x = duo.ones(3, requires_grad=True)
    z = x.exp()
    w = (z * z).sum()
    z.add_(1)
    w.backward()


def overwritten_after_a_look():
    x = duo.ones(3, requires_grad=True)
    z = x.exp()
    w = (z * z).sum()
    w.item()
    z.add_(1)
    w.backward()


def branch_on_a_value():
    @duo.compile
    def f(x):
        return x if x.sum() > 0 else -x

    f(duo.ones(3))


def nan():
    with duo.debug.check_nan():
        (duo.tensor([1.0, -1.0]) * 2).log().sum().item()


def nan_in_a_graph():
    with duo.debug.check_nan(), tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [2])
        session.run(tf.log(x), {x: [1.0, -1.0]})


def run(build, feed=None):
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, 3], name="x")
        return session.run(build(x), {x: feed} if feed is not None else None)


def uninitialised():
    with tf.Graph().as_default(), tf.Session() as session:
        session.run(tf.get_variable("weights", [2]) + 1)


def shape_in_a_graph():
    with tf.Graph().as_default():
        tf.matmul(tf.zeros([2, 3]), tf.zeros([4, 5]))


def embedding():
    F.embedding(duo.tensor([1, 9]), duo.ones(4, 2)).sum().item()


def no_grad_needed():
    duo.ones(2).sum().backward()


MISTAKES = {
    # name: (what is done, class, class that Python users expect, what the message holds)
    "shapes of matmul": (lambda: duo.ones(2, 3) @ duo.ones(2, 3), errors.ShapeError, ValueError, ["matmul", r"f32\[2,3\]", HERE]),
    "shapes of add": (lambda: duo.ones(2, 3) + duo.ones(4), errors.ShapeError, ValueError, ["add", r"f32\[2,3\]", r"f32\[4\]", HERE]),
    "reshape": (lambda: duo.ones(2, 3).reshape(4), errors.ShapeError, ValueError, ["reshape", r"f32\[2,3\]", "4"]),
    "linear": (lambda: duo.nn.Linear(3, 4)(duo.ones(2, 5)), errors.ShapeError, ValueError, ["linear", r"f32\[2,5\]", r"f32\[4,3\]"]),
    "dim": (lambda: duo.ones(2, 3).sum(5), errors.ArgumentError, IndexError, ["sum", "5", "-2 to 1"]),
    "dtype": (lambda: duo.ones(2) & duo.ones(2), errors.DTypeError, TypeError, ["and", r"f32\[2\]", HERE]),
    "device": (lambda: duo.ones(2, device="cuda:63"), errors.DeviceError, RuntimeError, ["cuda"]),
    "move to a device": (lambda: duo.ones(2).to("cuda:63"), errors.DeviceError, RuntimeError, ["cuda"]),
    "backward twice": (twice_backward, errors.GradientError, RuntimeError, ["retain_graph=True", "mul", HERE]),
    "backward twice after a look": (twice_backward_after_a_look, errors.GradientError, RuntimeError, ["retain_graph=True", HERE]),
    "overwritten": (overwritten, errors.GradientError, RuntimeError, ["mul", "in-place", "clone", HERE]),
    "overwritten after a look": (overwritten_after_a_look, errors.GradientError, RuntimeError, ["in-place", "clone", HERE]),
    "in-place on a leaf": (
        lambda: duo.ones(2, requires_grad=True).add_(1), errors.GradientError, RuntimeError, ["leaf", r"f32\[2\]", "no_grad"],
    ),
    "backward without grad": (no_grad_needed, errors.GradientError, RuntimeError, [r"f32\[\]", "requires_grad"]),
    "backward of many": (lambda: duo.ones(2, requires_grad=True).exp().backward(), errors.GradientError, RuntimeError, [r"f32\[2\]"]),
    "missing feed": (lambda: run(lambda x: x * 2), errors.DuoError, ValueError, ["'x'", r"f32\[", "feed_dict", HERE]),
    "shape of a feed": (lambda: run(lambda x: x * 2, np.ones((2, 4), "f4")), errors.DuoError, ValueError, [r"\(2, 4\)", "x:0", HERE]),
    "dtype of a feed": (lambda: run(lambda x: x * 2, np.array([["a"] * 3])), errors.DuoError, (TypeError, ValueError), ["x:0"]),
    "unknown fetch": (lambda: run(lambda x: "nothing:0"), errors.DuoError, KeyError, ["nothing"]),
    "uninitialised variable": (uninitialised, errors.DuoError, RuntimeError, ["weights", "global_variables_initializer", HERE]),
    "shapes in a graph": (shape_in_a_graph, errors.ShapeError, ValueError, ["matmul", r"f32\[2,3\]", r"f32\[4,5\]", HERE]),
    "branch under compile": (branch_on_a_value, errors.TraceError, RuntimeError, [r"bool\[\]", "duo.where", HERE]),
    "index out of range": (embedding, errors.IndexOutOfRange, IndexError, ["gather", "9", "4", HERE]),
    "nan": (nan, errors.NanError, FloatingPointError, ["log", r"f32\[2\]", "NaN", HERE]),
    "nan in a graph": (nan_in_a_graph, errors.NanError, FloatingPointError, ["log", "NaN", HERE]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    act, kind, expected, parts = MISTAKES[name]
    with pytest.raises(kind) as caught:
        act()
    assert isinstance(caught.value, expected)
    for part in parts:
        assert re.search(part, str(caught.value)), f"{part!r} not in: {caught.value}"


def test_a_failed_program_leaves_the_rest_alone():
    good = duo.ones(3) * 2
    duo.synchronize()
    bad = F.embedding(duo.tensor([9]), duo.ones(4, 2))
    for _ in range(2):
        with pytest.raises(IndexError):
            bad.sum().item()
    assert good.tolist() == [2.0, 2.0, 2.0]
    assert (good + 1).tolist() == [3.0, 3.0, 3.0]
