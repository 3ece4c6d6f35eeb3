"""Layers around one function each: that function's bits, and PyTorch's numbers and text."""

from __future__ import annotations

import numpy as np
import pytest

import duo
from duo import nn
from duo_ir.errors import ArgumentError
from tests.frontends.eager_modes import numbers

F = nn.functional
X, PAIR = (2, 4, 6, 5), ((3, 5), (3, 5))
ONE, TWO, THREE = (1, 2), (1, 0, 2, 1), (1, 1, 0, 2, 1, 0)
LAYERS = {  # name: (arguments, the function of F, its arguments after the tensors, shapes)
    "CELU": ((0.7,), F.celu, (0.7,), (X,)),
    "SELU": ((), F.selu, (), (X,)),
    "Hardsigmoid": ((), F.hardsigmoid, (), (X,)),
    "Hardswish": ((), F.hardswish, (), (X,)),
    "GLU": ((1,), F.glu, (1,), (X,)),
    "Hardshrink": ((0.3,), F.hardshrink, (0.3,), (X,)),
    "Softshrink": ((0.3,), F.softshrink, (0.3,), (X,)),
    "LogSigmoid": ((), F.logsigmoid, (), (X,)),
    "Softsign": ((), F.softsign, (), (X,)),
    "Tanhshrink": ((), F.tanhshrink, (), (X,)),
    "Threshold": ((0.1, 20.0), F.threshold, (0.1, 20.0), (X,)),
    "Softmin": ((1,), F.softmin, (1,), (X,)),
    "Softmax2d": ((), F.softmax, (1,), (X,)),
    "CosineSimilarity": ((0, 1e-3), F.cosine_similarity, (0, 1e-3), PAIR),
    "PairwiseDistance": ((1.0, 1e-3, True), F.pairwise_distance, (1.0, 1e-3, True), PAIR),
    "MarginRankingLoss": ((0.5,), F.margin_ranking_loss, (0.5,), (*PAIR, (3, 5))),
    "TripletMarginLoss": ((0.5, 1.0), F.triplet_margin_loss, (0.5, 1.0), (*PAIR, (3, 5))),
    **{
        f"{kind}Pad{len(sides) // 2}d": (
            (sides, *value), F.pad, (sides, mode, *value), (X if len(sides) < 6 else (1, *X),)
        )
        for kind, mode, value in (
            ("Constant", "constant", (1.5,)), ("Zero", "constant", ()), ("Reflection", "reflect", ()),
            ("Replication", "replicate", ()), ("Circular", "circular", ()),
        )
        for sides in (ONE, TWO, THREE)
        if len(sides) > 2 or kind in ("Constant", "Zero")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    given, function, more, shapes = LAYERS[name]
    arrays = [numbers(*s, seed=k) for k, s in enumerate(shapes)]
    layer = getattr(nn, name)(*given)
    got = layer(*map(duo.tensor, arrays)).numpy()
    assert np.array_equal(got, function(*map(duo.tensor, arrays), *more).numpy())
    torch = pytest.importorskip("torch")
    other = getattr(torch.nn, name)(*given)
    np.testing.assert_allclose(got, other(*map(torch.tensor, arrays)).numpy(), rtol=1e-5, atol=1e-6)
    assert repr(layer) == repr(other)


@pytest.mark.parametrize("kind", ["Reflection", "Replication", "Circular"])
def test_padding_of_one_axis(kind):
    layer, x = getattr(nn, f"{kind}Pad1d")(2), numbers(3, 4, 7)
    mode = {"Reflection": "reflect", "Replication": "edge", "Circular": "wrap"}[kind]
    assert np.array_equal(layer(duo.tensor(x)).numpy(), np.pad(x, ((0, 0), (0, 0), (2, 2)), mode))
    assert layer(duo.zeros(0, 4, 7)).shape == (0, 4, 11)


def test_mistakes():
    with pytest.raises(ArgumentError, match=r"ZeroPad2d: padding is an int or 4 of them, not \(1, 2\)"):
        nn.ZeroPad2d((1, 2))
