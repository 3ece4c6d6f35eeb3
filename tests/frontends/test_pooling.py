"""Pooling against PyTorch: values, indices, gradients; ties, NaN and -inf; windows that overlap, hang over, hold padding."""

import itertools

import numpy as np
import pytest

import duo
import duo.nn.functional as F
from duo import nn
from duo_ir.errors import ArgumentError, ShapeError
from tests.frontends.functional_support import gradients, run

torch = pytest.importorskip("torch")
TF = torch.nn.functional

rng = np.random.default_rng(3)
SHAPES = {1: [(2, 3, 11), (3, 8)], 2: [(2, 3, 7, 8), (2, 9, 6)], 3: [(1, 2, 5, 6, 4)]}
WINDOWS = [  # kernel_size, stride, padding, dilation
    (2, None, 0, 1), (2, 1, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 3, 0, 1), (3, 3, 1, 1), (2, 2, 1, 2), (1, 2, 0, 1), (2, 1, 1, 3),
]  # fmt: skip


def values(shape, seed, special=True):
    """Few different numbers, so that there are ties; some NaN and infinities."""
    x = np.random.default_rng(seed).integers(-3, 3, shape).astype(np.float64)
    if special:
        flat, pick = x.reshape(-1), np.random.default_rng(seed + 1)
        for v in (np.nan, -np.inf, np.inf, -0.0):
            flat[pick.integers(0, flat.size, max(1, flat.size // 10))] = v
    return x


def check(ours, theirs, x, tolerance=0.0):
    """Equal values (and indices), and equal gradients for random cotangents."""
    t = torch.tensor(x, requires_grad=x.dtype.kind == "f")
    want = theirs(t)
    want = want if isinstance(want, tuple) else (want,)
    got = run(ours, x)
    got = got if isinstance(got, (tuple, list)) else (got,)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == b.detach().numpy().dtype
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=tolerance, atol=tolerance)
    if x.dtype.kind == "f":
        g = np.random.default_rng(5).integers(1, 9, want[0].shape).astype(x.dtype)
        want[0].backward(torch.from_numpy(g))
        (mine,) = gradients(ours, [x], [g])
        np.testing.assert_allclose(mine, t.grad.numpy(), rtol=tolerance, atol=tolerance)


def sweep():
    for n, shapes in SHAPES.items():
        for (i, shape), (j, w) in itertools.product(enumerate(shapes), enumerate(WINDOWS)):
            for ceil in (False, True):
                if n < 3 or (j + ceil) % 3 == 0:
                    yield pytest.param(n, shape, w, ceil, id=f"{n}d-{i}-{j}-{'ceil' if ceil else 'floor'}")


@pytest.mark.parametrize("n, shape, window, ceil", list(sweep()))
def test_max_pool(n, shape, window, ceil):
    k, s, p, d = window
    name = f"max_pool{n}d"
    x = values(shape, 11 * k + n)
    check(
        lambda x: getattr(F, name)(x, k, s, p, d, ceil, True),
        lambda x: getattr(TF, name)(x, k, s, p, d, ceil, True), x,
    )  # fmt: skip
    check(lambda x: getattr(F, name)(x, k, s, p, d, ceil), lambda x: getattr(TF, name)(x, k, s, p, d, ceil), x)


@pytest.mark.parametrize("n, shape, window, ceil", [c for c in sweep() if c.values[2][3] == 1])
def test_avg_pool(n, shape, window, ceil):
    k, s, p, _ = window
    name = f"avg_pool{n}d"
    x = values(shape, 7 * k + n, special=False)
    for include, divisor in ((True, None), (False, None), (True, 5)):
        extra = (include,) if n == 1 else (include, divisor)
        if n == 1 and divisor:
            continue
        check(
            lambda x, e=extra: getattr(F, name)(x, k, s, p, ceil, *e),
            lambda x, e=extra: getattr(TF, name)(x, k, s, p, ceil, *e), x, 1e-12,
        )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, (3, 1), (None, 2), (2, 8)])
def test_adaptive(size):
    x = values((2, 3, 7, 8), 2)
    check(lambda x: F.adaptive_max_pool2d(x, size), lambda x: TF.adaptive_max_pool2d(x, size), x)
    check(lambda x: F.adaptive_max_pool2d(x, size, True), lambda x: TF.adaptive_max_pool2d(x, size, True), x)
    plain = values((2, 3, 7, 8), 2, special=False)
    check(lambda x: F.adaptive_avg_pool2d(x, size), lambda x: TF.adaptive_avg_pool2d(x, size), plain, 1e-12)


def test_adaptive_in_one_and_three_dims():
    x, y = values((2, 3, 10), 4, special=False), values((2, 3, 4, 5, 3), 4, special=False)
    for size in (1, 3, 5):
        check(lambda x, s=size: F.adaptive_avg_pool1d(x, s), lambda x, s=size: TF.adaptive_avg_pool1d(x, s), x, 1e-12)
        check(lambda x, s=size: F.adaptive_max_pool1d(x, s), lambda x, s=size: TF.adaptive_max_pool1d(x, s), x)
    for size in (1, 2, (2, 5, 1)):
        check(lambda x, s=size: F.adaptive_avg_pool3d(x, s), lambda x, s=size: TF.adaptive_avg_pool3d(x, s), y, 1e-12)
        check(lambda x, s=size: F.adaptive_max_pool3d(x, s), lambda x, s=size: TF.adaptive_max_pool3d(x, s), y)


@pytest.mark.parametrize("k, s, p", [((6, 7), None, 0), ((8, 7), (3, 2), (4, 3)), ((2, 30), 1, 0), (9, 9, 0)])
def test_large_windows(k, s, p):
    """One axis after the other, or as reductions."""
    x, plain = values((2, 2, 18, 36), 8), values((2, 2, 18, 36), 8, special=False)
    check(lambda x: F.max_pool2d(x, k, s, p), lambda x: TF.max_pool2d(x, k, s, p), x)
    check(lambda x: F.avg_pool2d(x, k, s, p), lambda x: TF.avg_pool2d(x, k, s, p), plain, 1e-12)
    check(
        lambda x: F.avg_pool2d(x, k, s, p, True, False), lambda x: TF.avg_pool2d(x, k, s, p, True, False), plain, 1e-12
    )  # fmt: skip


def test_ties_go_to_the_first_and_nan_to_the_last():
    nan = np.nan
    x = np.array([[[1.0, 1.0, nan, 2.0, nan, 3.0, -np.inf, -np.inf, 0.0, -0.0]]])
    t = duo.tensor(x, requires_grad=True)
    y, at = F.max_pool1d(t, 2, return_indices=True)
    np.testing.assert_array_equal(y.detach().numpy()[0, 0], [1.0, nan, nan, -np.inf, 0.0])
    assert at.tolist() == [[[0, 2, 4, 6, 8]]]
    assert not np.signbit(y.detach().numpy()[0, 0, 4])
    y.sum().backward()
    assert t.grad.tolist() == [[[1, 0, 1, 0, 1, 0, 1, 0, 1, 0]]]
    y, at = F.max_pool1d(duo.tensor([[[nan, nan, 5.0]]]), 3, return_indices=True)
    assert at.item() == 1 and np.isnan(y.item())


def test_where_all_is_minus_infinity_the_gradient_goes_to_the_input_not_to_padding():
    x = np.full((1, 1, 4, 4), -np.inf)
    check(lambda x: F.max_pool2d(x, 3, 2, 1, 1, False, True), lambda x: TF.max_pool2d(x, 3, 2, 1, 1, False, True), x)
    check(lambda x: F.max_pool2d(x, 2, 1, 1, 3, False, True), lambda x: TF.max_pool2d(x, 2, 1, 1, 3, False, True), x)


def test_integers_and_narrow_floats():
    x = rng.integers(-9, 9, (2, 3, 6, 6)).astype("i4")
    check(lambda x: F.max_pool2d(x, 3, 2, 1, 1, False, True), lambda x: TF.max_pool2d(x, 3, 2, 1, 1, False, True), x)
    x = duo.tensor(rng.standard_normal((2, 3, 6, 6))).to(duo.bfloat16)
    y = F.avg_pool2d(x, 3, 2, 1)
    assert y.dtype is duo.bfloat16
    want = F.avg_pool2d(x.to(duo.float32), 3, 2, 1).to(duo.bfloat16)
    assert (y == want).all().item()
    assert F.max_pool2d(x, 2).dtype is duo.bfloat16
    assert F.avg_pool1d(duo.ones(1, 1, 4, dtype=duo.int32), 2).dtype is duo.float32


def test_second_derivatives():
    """The gradient of a gradient: pooling is linear where nothing changes places."""
    x = torch.tensor(rng.standard_normal((1, 2, 6, 6)), requires_grad=True)
    m = duo.tensor(x.detach().numpy(), requires_grad=True)
    for ours, theirs in ((F.max_pool2d, TF.max_pool2d), (F.avg_pool2d, TF.avg_pool2d)):
        (g,) = torch.autograd.grad((theirs(x, 3, 2, 1) ** 3).sum(), x, create_graph=True)
        (want,) = torch.autograd.grad((g**2).sum(), x)
        (h,) = duo.autograd.grad((ours(m, 3, 2, 1) ** 3).sum(), m, create_graph=True)
        (got,) = duo.autograd.grad((h**2).sum(), m)
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-10)


def test_layers_say_what_they_are_and_do_what_the_functions_do():
    x = duo.tensor(rng.standard_normal((2, 3, 8, 8)))
    layers = [
        (nn.MaxPool2d(3, 2, 1), F.max_pool2d(x, 3, 2, 1), torch.nn.MaxPool2d(3, 2, 1)),
        (nn.MaxPool2d(2, ceil_mode=True), F.max_pool2d(x, 2), torch.nn.MaxPool2d(2, ceil_mode=True)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), F.avg_pool2d(x, 3, 2, 1, False, False), torch.nn.AvgPool2d(3, 2, 1)),
        (nn.AdaptiveAvgPool2d(1), F.adaptive_avg_pool2d(x, 1), torch.nn.AdaptiveAvgPool2d(1)),
        (nn.AdaptiveMaxPool2d((2, None)), F.adaptive_max_pool2d(x, (2, None)), torch.nn.AdaptiveMaxPool2d((2, None))),
    ]  # fmt: skip
    for layer, want, theirs in layers:
        assert (layer(x) == want).all().item()
        assert repr(layer) == repr(theirs)
    y = duo.tensor(rng.standard_normal((2, 3, 8)))
    for layer in (nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(4), nn.AdaptiveMaxPool1d(4)):
        assert layer(y).shape == (2, 3, 4)
    z = duo.ones(1, 2, 4, 4, 4)
    for layer in (nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool3d(2)):
        assert layer(z).shape == (1, 2, 2, 2, 2)
    pooled, at = nn.MaxPool2d(2, return_indices=True)(x)
    assert pooled.shape == at.shape == (2, 3, 4, 4) and at.dtype is duo.int64


def test_errors():
    x = duo.zeros(2, 3, 8, 8)
    with pytest.raises(ArgumentError, match=r"max_pool2d: padding 2 is more than half of a window over 3 elements"):
        F.max_pool2d(x, 3, 1, 2)
    with pytest.raises(ShapeError, match=r"avg_pool2d: a window over 9 elements does not fit into 8"):
        F.avg_pool2d(x, 9)
    with pytest.raises(
        ShapeError, match=r"max_pool1d: it takes \[batch, channels, spatial\.\.\.\] .* got f32\[2,3,8,8\]"
    ):
        F.max_pool1d(x, 2)
    with pytest.raises(ArgumentError, match=r"kernel_size is an int or 2 of them"):
        F.max_pool2d(x, (1, 2, 3))
    with pytest.raises(ArgumentError, match=r"stride is at least 1, not 0"):
        F.max_pool2d(x, 2, 0)
    with pytest.raises(ArgumentError, match=r"divisor_override is not 0"):
        F.avg_pool2d(x, 2, divisor_override=0)
    with pytest.raises(ShapeError, match=r"nothing to pool"):
        F.max_pool2d(duo.zeros(1, 1, 0, 4), 1)
    with pytest.raises(ArgumentError, match=r"output_size is at least 1"):
        F.adaptive_avg_pool2d(x, 0)
