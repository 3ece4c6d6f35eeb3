"""Convolution layers against PyTorch: initial values, outputs, gradients, state dicts, errors."""

import numpy as np
import pytest

import duo
from duo import nn
from duo_ir.errors import ArgumentError

torch = pytest.importorskip("torch")
rng = np.random.default_rng(4)

LAYERS = [
    ("Conv1d", (4, 6, 3), {}, (2, 4, 9)), ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 9)),
    ("Conv2d", (3, 5, 3), {"padding": 1}, (2, 3, 6, 7)), ("Conv2d", (3, 5, (1, 3)), {"padding": "same", "bias": False}, (2, 3, 6, 7)),
    ("Conv2d", (3, 6, 3), {"stride": (2, 1), "padding": (1, 0), "dilation": 2, "groups": 3}, (3, 8, 7)),
    ("Conv2d", (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 6, 7)),
    ("Conv2d", (3, 4, 4), {"padding": "same", "padding_mode": "circular"}, (2, 3, 6, 7)),
    ("Conv2d", (3, 4, 3), {"padding": "valid", "padding_mode": "replicate"}, (2, 3, 6, 7)),
    ("Conv3d", (2, 3, 2), {"stride": 2}, (1, 2, 4, 5, 4)),
    ("ConvTranspose1d", (4, 2, 3), {"stride": 2, "padding": 1}, (2, 4, 5)),
    ("ConvTranspose2d", (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (2, 4, 5, 3)),
    ("ConvTranspose2d", (4, 3, 2), {"dilation": 2, "bias": False}, (4, 5, 3)),
    ("ConvTranspose3d", (2, 3, 2), {"stride": (1, 2, 1)}, (1, 2, 3, 3, 2)),
]  # fmt: skip


def pair(name, args, options):
    ours, theirs = getattr(nn, name)(*args, **options), getattr(torch.nn, name)(*args, **options)
    ours.load_state_dict({k: duo.tensor(v.numpy()) for k, v in theirs.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("name, args, options, shape", LAYERS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(LAYERS)])
def test_like_torch(name, args, options, shape):
    ours, theirs = pair(name, args, options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = rng.standard_normal(shape).astype("f4")
    a, b = duo.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, z = ours(a), theirs(b)
    np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-5, atol=1e-5)
    g = rng.standard_normal(z.shape).astype("f4")
    (y * duo.tensor(g)).sum().backward()
    z.backward(torch.tensor(g))
    for p, q in [(a, b), *zip(ours.parameters(), theirs.parameters())]:
        np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name, bound", [("Conv2d", (8 * 9) ** -0.5), ("ConvTranspose2d", (64 * 9) ** -0.5)])
def test_initial_values_are_uniform_as_in_torch(name, bound):
    duo.manual_seed(0)
    layer = getattr(nn, name)(16, 128, 3, groups=2)
    for values in (layer.weight, layer.bias):
        v = np.abs(values.detach().numpy())
        assert bound * 0.9 < v.max() <= bound and abs(v.mean() - bound / 2) < bound / 10


def test_a_transposed_convolution_takes_the_size_of_its_result():
    ours, theirs = pair("ConvTranspose2d", (3, 4, 3), {"stride": 2})
    x = rng.standard_normal((1, 3, 5, 5)).astype("f4")
    for size in ((11, 12), (12, 11)):
        got, want = ours(duo.tensor(x), size), theirs(torch.tensor(x), size)
        np.testing.assert_allclose(got.detach().numpy(), want.detach().numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="spatial dim 1 of the result has 11 to 12 elements, not 13"):
        ours(duo.tensor(x), (11, 13))


def test_memory_formats_are_taken_and_change_nothing():
    layer, x = nn.Conv2d(3, 4, 3), duo.tensor(rng.standard_normal((1, 3, 5, 5)).astype("f4"))
    want = layer(x).tolist()
    x = x.to(memory_format=duo.channels_last).contiguous(memory_format=duo.contiguous_format)
    assert layer.to(memory_format=duo.channels_last)(x).tolist() == want


def test_errors():
    with pytest.raises(ArgumentError, match="Conv2d: 3 and 4 channels do not both make 2 groups"):
        nn.Conv2d(3, 4, 3, groups=2)
    with pytest.raises(ArgumentError, match="kernel_size is an int or 2 of them"):
        nn.Conv2d(3, 4, (3, 3, 3))
    with pytest.raises(ArgumentError, match="padding_mode is one of"):
        nn.Conv2d(3, 4, 3, padding_mode="mirror")
    with pytest.raises(ArgumentError, match="padding_mode is 'zeros', not 'reflect'"):
        nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect")
    with pytest.raises(ArgumentError, match="padding 'same' needs stride 1"):
        nn.Conv2d(3, 4, 3, stride=2, padding="same")(duo.ones(1, 3, 8, 8))
    with pytest.raises(duo.DuoError, match="the kernel reads 3 channels, but the input has 5"):
        nn.Conv2d(3, 4, 3)(duo.ones(1, 5, 8, 8))
