"""RNN, LSTM, GRU and their cells beside PyTorch's, and one result in all modes."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn
from duo_ir.errors import ArgumentError, GradientError, ShapeError

KINDS = ("RNN", "LSTM", "GRU")


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def flat(result) -> list[np.ndarray]:
    out, state = result
    return [t.detach().numpy() for t in (out, *(state if isinstance(state, tuple) else (state,)))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False, "bidirectional": True},
        {"num_layers": 3},
    ],
    ids=["plain", "deep", "no bias", "three"],
)
def test_beside_torch(kind, options):
    torch = pytest.importorskip("torch")
    mine, theirs = getattr(nn, kind)(5, 7, **options), getattr(torch.nn, kind)(5, 7, **options)
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    mine.load_state_dict({n: duo.tensor(p.detach().numpy()) for n, p in theirs.named_parameters()})
    x = floats(0, 4, 3, 5)
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    batch = 4 if options.get("batch_first") else 3
    h = [floats(k, count, batch, 7) for k in range(2 if kind == "LSTM" else 1)]
    for state in (None, h):
        both = []
        for package, layer in ((duo, mine), (torch, theirs)):
            hx = (
                None
                if state is None
                else tuple(map(package.tensor, state))
                if kind == "LSTM"
                else package.tensor(state[0])
            )
            given = package.tensor(x)
            given.requires_grad_()
            layer.zero_grad()
            out = layer(given, hx)
            (out[0] * out[0]).sum().backward()
            both.append([*flat(out), given.grad.numpy(), *[p.grad.numpy() for p in layer.parameters()]])
        for a, b in zip(*both):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_batch_and_cells(kind):
    layer, cell = getattr(nn, kind)(5, 7), getattr(nn, f"{kind}Cell")(5, 7)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, name).data = getattr(layer, f"{name}_l0").data
    x = duo.tensor(floats(1, 6, 5))
    alone, together = flat(layer(x)), flat(layer(x.unsqueeze(1)))
    assert all((a == b.reshape(a.shape)).all() for a, b in zip(alone, together))
    state = None
    for t in range(6):
        state = cell(x[t], state)
    h = state[0] if kind == "LSTM" else state
    assert (h.detach().numpy() == alone[0][-1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_result_in_all_modes_and_for_any_batch(kind):
    duo.manual_seed(0)
    layer = getattr(nn, kind)(5, 7, num_layers=2, batch_first=True)
    x = floats(2, 5, 4, 5)
    want = flat(layer(duo.tensor(x)))
    assert all((a == b).all() for a, b in zip(want, flat(duo.compile(layer)(duo.tensor(x)))))
    with tf.Graph().as_default(), tf.Session() as session:
        given = tf.placeholder(tf.float32, [None, 4, 5])
        out, _ = layer(given)
        for n in (1, 3, 5):
            assert (session.run(out, {given: x[:n]}) == want[0][:n]).all(), n


def test_mistakes():
    with pytest.raises(ShapeError, match=r"LSTM: input \[4, 3, 6\] is not \[length, batch, 5\]"):
        nn.LSTM(5, 7)(duo.zeros(4, 3, 6))
    with pytest.raises(ShapeError, match=r"GRU: the first state is \[2, 3, 7\], not \[1, 3, 7\]"):
        nn.GRU(5, 7)(duo.zeros(4, 3, 5), duo.zeros(2, 3, 7))
    with pytest.raises(ArgumentError, match="nonlinearity"):
        nn.RNN(5, 7, nonlinearity="sine")
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [None, 3, 5])  # a loop over a free length, which has no gradient
        with pytest.raises(GradientError, match="sequences of a known length"):
            tf.gradients(nn.RNN(5, 7)(x)[0], [x])
