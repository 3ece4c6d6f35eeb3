"""Rules of duo.functional beside plain values: writes through views, symbolic sizes, dtypes, errors, random numbers."""

import numpy as np
import pytest

from duo import functional as F
from duo.functional import random as rng
from duo.functional.indexing import INDEX, getitem, parse, setitem
from duo.functional.shape import EXPAND, FLATTEN, NARROW, PERMUTE, RESHAPE, SELECT
from duo_ir.core import function_of
from duo_ir.errors import DuoError, IndexOutOfRange
from duo_ir.interpret import interpret
from duo_ir.types import Dim, TensorType, bf16, bool_, f16, f32, f64, i32, i64
from tests.frontends.functional_support import b, f, gradients, run, types_of

torch = pytest.importorskip("torch")
TF = torch.nn.functional
_SDPA = TF.scaled_dot_product_attention


# ---------------------------------------------------------------------------------------------- views and their writes
VIEWS = [
    (RESHAPE, ((6, -1),), lambda x: x.view(6, -1)),
    (FLATTEN, (1, 2), lambda x: x.flatten(1, 2)),
    (PERMUTE, ((2, 0, 1),), lambda x: x.permute(2, 0, 1)),
    (NARROW, (1, 1, 2), lambda x: x.narrow(1, 1, 2)),
    (NARROW, (2, -3, 2), lambda x: x.narrow(2, -3, 2)),
    (SELECT, (1, -1), lambda x: x.select(1, -1)),
]
BASIC = [
    0, -1, (slice(None), 2), slice(1, 1), (Ellipsis, slice(None, None, 2)), (slice(1, None), None, slice(1, 3), slice(0, 5, 3)), None, Ellipsis,
    (1, slice(None), slice(-2, None)), (0, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(VIEWS) + len(BASIC)))
def test_views_write_through(case):
    x = f(2, 3, 4)
    base = torch.tensor(x)
    if case < len(VIEWS):
        view, attributes, of_torch = VIEWS[case]
    else:
        index = BASIC[case - len(VIEWS)]
        view, of_torch = INDEX, lambda x: x[index]
        attributes = (parse(function_of(lambda v: v, *types_of([x])).params[0], index)[0],)
    seen = of_torch(base)
    (read,) = run(lambda v: view.read(v, *attributes), x)
    np.testing.assert_array_equal(read, seen.numpy())
    new = f(*seen.shape)
    (written,) = run(lambda v, n: view.write(v, n, *attributes), x, new)
    seen.copy_(torch.tensor(new))
    np.testing.assert_array_equal(written, base.numpy())


def test_expand_takes_no_writes():
    assert EXPAND.write is None


SETS = [
    (lambda j, k: j, (5, 5, 6)), (lambda j, k: (slice(1, 3), j), (2, 5, 6)), (lambda j, k: (j, slice(None), k), (5, 5)),
    (lambda j, k: (slice(None), j, k), (4, 5)), (lambda j, k: (0, j), (6,)), (lambda j, k: (j, k % 5), (1, 6)), (lambda j, k: (Ellipsis, k), ()),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SETS)))
def test_assignment_at_index_tensors(number):
    index, shape = SETS[number]
    x, value = f(4, 5, 6), f(*shape)
    j, k = np.array([3, 0, -2, 1, 2])[:5] % 4, np.array([0, 5, 3, 1, 2])
    (got,) = run(lambda v, n, a, c: setitem(v, index(a, c), n), x, value, j, k)
    want = torch.tensor(x)
    want[index(torch.tensor(j), torch.tensor(k))] = torch.tensor(value)
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize(("mask", "value"), [((4, 5), ()), ((4,), (5,)), ((4, 5), (1,)), ((4,), ())])
def test_assignment_at_a_mask(mask, value):
    x, m, v = f(4, 5), b(*mask), f(*value)
    (got,) = run(lambda x, m, v: setitem(x, m, v), x, m, v)
    want = torch.tensor(x)
    want[torch.tensor(m)] = torch.tensor(v)
    np.testing.assert_array_equal(got, want.numpy())


# ------------------------------------------------------------------------------------------------------ symbolic sizes
B, T = Dim.symbol("b"), Dim.symbol("t")
SYMBOLIC = [
    ("reshape", lambda x: F.reshape(x, -1, 4), lambda x: x.reshape(-1, 4), (B, T, 4)),
    ("reshape back", lambda x: F.reshape(F.flatten(x, 0, 1), -1, x.type.shape[1], 4), lambda x: x, (B, T, 4)),
    ("unflatten", lambda x: F.unflatten(x, 1, (-1, 2)), lambda x: x.reshape(x.shape[0], -1, 2), (B, 8)),
    ("flatten", lambda x: F.flatten(x, 1), lambda x: x.reshape(x.shape[0], -1), (B, T, 4)),
    ("softmax", lambda x: F.softmax(x, 1), lambda x: torch.softmax(torch.tensor(x), 1).numpy(), (B, T)),
    ("mean", lambda x: F.mean(x), lambda x: x.mean(), (B, T)),
    ("var", lambda x: F.var(x, 0), lambda x: x.var(0, ddof=1), (B, 4)),
    ("last", lambda x: getitem(x, (slice(None), -1)), lambda x: x[:, -1], (B, T)),
    ("shift", lambda x: getitem(x, slice(1, None)) - getitem(x, slice(None, -1)), lambda x: x[1:] - x[:-1], (B, 4)),
    ("first two", lambda x: getitem(x, slice(2)), lambda x: x[:2], (B, 4)),
    ("roll", lambda x: F.roll(x, 1, 0), lambda x: np.roll(x, 1, 0), (B, 4)),
    ("flip", lambda x: F.flip(x, 0), lambda x: x[::-1], (B, 4)),
    ("tril", F.tril, np.tril, (B, T)),
    ("pad", lambda x: F.pad(x, (1, 2, 0, 1)), lambda x: np.pad(x, ((0, 1), (1, 2))), (B, T)),
    ("repeat", lambda x: F.repeat(x, 2, 3), lambda x: np.tile(x, (2, 3)), (B, T)),
    ("chunk", lambda x: F.cat(F.chunk(F.cat([x, x]), 2)[::-1]), lambda x: np.concatenate([x, x]), (B, 4)),
    ("matmul", lambda x: F.matmul(x, F.transpose(x, 1, 2)), lambda x: x @ x.transpose(0, 2, 1), (B, T, 4)),
    ("layer_norm", lambda x: F.layer_norm(x, (4,)), lambda x: TF.layer_norm(torch.tensor(x), (4,)).numpy(), (B, T, 4)),
    ("attention", lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
     lambda x: _SDPA(*[torch.tensor(x)] * 3, is_causal=True).numpy(), (B, T, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "shape"), [pytest.param(*row[1:], id=row[0]) for row in SYMBOLIC])
def test_symbolic_sizes(ours, theirs, shape):
    function = function_of(ours, TensorType(f64, shape))
    for sizes in ({"b": 3, "t": 2}, {"b": 5, "t": 7}):
        x = f(*TensorType(f64, shape).static_shape(sizes))
        (got,) = interpret(function, x)
        np.testing.assert_allclose(got, theirs(x), rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- narrow floats
@pytest.mark.parametrize("d", [f16, bf16])
def test_narrow_floats_compute_in_float32(d):
    x = (f(3, 64) * 3).astype(d.numpy)
    wide = x.astype(np.float32)
    for fn in (
        lambda v: F.softmax(v, 1),
        lambda v: F.layer_norm(v, (64,)),
        F.gelu,
        F.mean,
        lambda v: F.var(v, 1),
        F.silu,
    ):
        (got,), (want,) = run(fn, x), run(fn, wide)
        assert got.dtype == d.numpy
        np.testing.assert_array_equal(got, want.astype(d.numpy))


def test_mean_of_f16_does_not_overflow():
    (got,) = run(F.mean, np.full(4096, 60000, np.float16))
    assert got == np.float16(60000)


@pytest.mark.parametrize(("ours", "wants"), [
    (lambda x: x.type.dtype, i32), (lambda x: F.add(x, 1).type.dtype, i32), (lambda x: F.add(x, 1.5).type.dtype, f32),
    (lambda x: F.div(x, 2).type.dtype, f32), (lambda x: F.exp(x).type.dtype, f32), (lambda x: F.sum(x).type.dtype, i64),
    (lambda x: F.eq(x, 0).type.dtype, bool_), (lambda x: F.cast(x, "bf16").type.dtype, bf16), (lambda x: F.sum(x, dtype=f64).type.dtype, f64),
    (lambda x: F.where(F.gt(x, 0), 1.0, 0.0).type.dtype, f32), (lambda x: F.zeros_like(x, dtype=f16).type.dtype, f16),
    (lambda x: F.sub(F.gt(x, 0), F.lt(x, 0)).type.dtype, i64),
])  # fmt: skip
def test_result_dtypes(ours, wants):
    found = []
    function_of(lambda x: found.append(ours(x)) or x, TensorType(i32, (2, 3)))
    assert found == [wants]


# -------------------------------------------------------------------------------------------------------------- errors
ERRORS = [
    (lambda x: F.sum(x, 2), IndexError, "dim 2 is out of range"), (lambda x: F.sum(x, (0, -2)), ValueError, "twice"),
    (lambda x: F.sum(x, 1.5), ValueError, "an int"), (lambda x: F.reshape(x, 3, -1), ValueError, "not a multiple"),
    (lambda x: F.reshape(x, -1, -1), ValueError, "one -1"), (lambda x: F.reshape(x, 7), ValueError, "reshape"),
    (lambda x: F.permute(x, 0, 0), ValueError, "each of the 2 dims"), (lambda x: getitem(x, 3), IndexError, "out of range"),
    (lambda x: getitem(x, (0, 0, 0)), IndexError, "3 indices"), (lambda x: getitem(x, slice(None, None, -1)), ValueError, "flip"),
    (lambda x: getitem(x, F.gt(x, 0.0)), ValueError, "where"), (lambda x: getitem(x, x), TypeError, "integers"),
    (lambda x: F.masked_select(x, F.gt(x, 0.0)), ValueError, "where"), (lambda x: F.where(x, 1.0, 0.0), TypeError, "bool"),
    (lambda x: F.where(F.gt(x, 0.0)), ValueError, "where"), (lambda x: F.mean(F.cast(x, i32)), TypeError, "dtype="),
    (lambda x: F.pow(F.cast(x, i32), -1), ValueError, "negative power"), (lambda x: F.cat([x, F.flatten(x)]), ValueError, "concat"),
    (lambda x: F.stack([]), ValueError, "at least one"),
    (lambda x: F.linear(x, F.transpose(x, 0, 1)), ValueError, "linear"), (lambda x: F.einsum("ij,jk", x), ValueError, "operands"),
    (lambda x: F.einsum("ijk->i", x), ValueError, "einsum"), (lambda x: F.cross_entropy(x, x, reduction="avg"), ValueError, "reduction"),
    (lambda x: F.cross_entropy(x, F.argmax(x, 0)), ValueError, "labels of shape"), (lambda x: F.layer_norm(x, (3,)), ValueError, "ends in"),
    (lambda x: F.one_hot(F.argmax(x, 1)), ValueError, "num_classes"), (lambda x: F.clamp(x), ValueError, "min, max"),
    (lambda x: F.expand(x, 3, 4), ValueError, "broadcast"), (lambda x: F.split(x, [1, 2], 1), ValueError, "add up"),
    (lambda x: F.gelu(x, approximate="fast"), ValueError, "'none', 'tanh'"), (lambda x: F.add(x, "1"), TypeError, "str"),
    (lambda x: F.pad(x, (5, 0), "reflect"), ValueError, "cannot give"), (lambda x: F.softmax([1.0]), TypeError, "tensor"),
    (lambda x: F.matmul(x, x), ValueError, "matmul"), (lambda x: F.dropout_with(x, x, 1.5), ValueError, "probability"),
    (lambda x: F.group_norm(x, 3), ValueError, "groups"), (lambda x: F.scatter(x, 0, F.argmax(x, 1), x), ValueError, "dims"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors(number):
    fn, kind, words = ERRORS[number]
    with pytest.raises(kind, match=words) as caught:
        function_of(fn, TensorType(f32, (2, 5)))
    assert isinstance(caught.value, DuoError)


@pytest.mark.parametrize(("fn", "arrays"), [
    (lambda x, j: getitem(x, j), (f(4, 5), np.array([0, 4]))), (lambda x, j: getitem(x, j), (f(4, 5), np.array([-5]))),
    (lambda x, j: F.embedding(j, x), (f(4, 5), np.array([-1]))), (F.cross_entropy, (f(2, 5), np.array([0, 5]))),
    (F.cross_entropy, (f(2, 5), np.array([0, -1]))), (F.nll_loss, (f(2, 5), np.array([0, 7]))),
    (lambda x, j: F.gather(x, 0, j), (f(2, 5), np.array([[2]]))),
])  # fmt: skip
def test_indices_are_checked_at_run_time(fn, arrays):
    with pytest.raises(IndexOutOfRange):
        run(fn, *arrays)


# -------------------------------------------------------------------------------------------------------------- random
N = 20_000


def draw(body, *attributes, state=(42, 0), operands=()):
    sample, after = run(lambda s, *v: body(s, *v, *attributes), np.array(state, np.int64), *operands)
    return sample, after


@pytest.mark.parametrize(("d", "words"), [(f32, 1), (f64, 2), (f16, 1), (bf16, 1)])
def test_uniform(d, words):
    u, after = draw(rng._uniform, (N,), d)
    assert u.dtype == d.numpy
    assert after.tolist() == [42, -(-N * words // 4)]
    u = u.astype(np.float64)
    assert (u >= 0).all()
    assert (u < 1).all()
    assert abs(u.mean() - 0.5) < 0.02
    assert abs(u.var() - 1 / 12) < 0.01


@pytest.mark.parametrize("d", [f32, f64])
def test_normal(d):
    z, _ = draw(rng._normal, (N,), d)
    assert np.isfinite(z).all()
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03
    assert abs((z < 1).mean() - 0.8413) < 0.01


def test_draws_are_disjoint_and_consecutive():
    first, after = draw(rng._uniform, (8,), f32)
    second, _ = draw(rng._uniform, (8,), f32, state=after)
    together, _ = draw(rng._uniform, (16,), f32)
    np.testing.assert_array_equal(np.concatenate([first, second]), together)


def test_integers_in_range():
    v, after = draw(rng._randint, -3, 5, (N,), i64)
    assert after[1] == N // 2
    counts = np.bincount(v + 3, minlength=8)
    assert len(counts) == 8
    assert (abs(counts / N - 1 / 8) < 0.01).all()


def test_bernoulli_truncated_categorical():
    hits, _ = draw(rng._bernoulli, 0.3, (N,), f32)
    assert set(np.unique(hits)) == {0.0, 1.0}
    assert abs(hits.mean() - 0.3) < 0.02
    z, _ = draw(rng._truncated_normal, 1.0, 2.0, -1.0, 0.5, (N,), f64)
    assert z.min() >= -1
    assert z.max() <= 2
    weights = np.array([[1.0, 3.0, 0.0, 4.0]])
    picks, _ = draw(lambda s, w: rng._multinomial(s, w, N), operands=(weights,))
    assert picks.shape == (1, N)
    assert (abs(np.bincount(picks[0], minlength=4) / N - weights[0] / 8) < 0.02).all()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropout(rate):
    x = np.ones((100, 50), np.float32)
    y, after = draw(lambda s, v: rng._dropout(s, v, rate), operands=(x,))
    assert after[1] == x.size // 4
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1) / (np.float32(1) - np.float32(rate)) if rate < 1 else 0.0}
    assert abs((y == 0).mean() - rate) < 0.03
    (g,) = gradients(lambda s, v: rng._dropout(s, v, rate)[0], [np.array([42, 0]), x], [x])
    np.testing.assert_array_equal(g, y)


def test_channels_drop_together():
    y, after = draw(lambda s, v: rng._dropout_shared(s, v, 0.5, (2, 3)), operands=(np.ones((4, 8, 3, 3), np.float32),))
    assert after[1] == 8
    assert ((y == y[:, :, :1, :1]).all()) and 0 < (y == 0).mean() < 1
