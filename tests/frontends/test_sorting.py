"""Sorting, order statistics, running folds, searching and counting against PyTorch and NumPy, and in every mode."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo_ir.errors import ArgumentError, DTypeError, DuoError, ShapeError

torch = pytest.importorskip("torch")


def numbers(seed: int = 0) -> np.ndarray:
    """NaN, ties, zeros of both signs, an infinity."""
    x = np.random.default_rng(seed).normal(size=(4, 9)).astype(np.float32)
    x[0, 3] = np.nan
    x[1, 2] = x[1, 5]
    x[2] = [0.0, -0.0, 0.0, -0.0, 1.0, -0.0, 0.0, -1.0, 0.0]
    x[3, 4], x[3, 0] = np.inf, -np.inf
    return x


X = numbers()
FINITE = np.where(np.isinf(X), np.float32(7), X)  # PyTorch makes NaN of the difference of an infinity and itself
DISTINCT = np.random.default_rng(1).permutation(36).reshape(4, 9).astype(np.float32) / 4
INTS = np.random.default_rng(2).integers(0, 4, (5, 11))
ROWS = np.sort(np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32), 1)


def flat(out) -> list[np.ndarray]:
    parts = out if isinstance(out, (tuple, list)) else (out,)
    return [p.detach().numpy() for p in parts]


def agree(ours, theirs, tol: float = 1e-5) -> None:
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, tol, tol, equal_nan=True)


def both(of, *arrays):
    """of(library, *tensors), by duo and by torch."""
    return of(duo, *map(duo.tensor, arrays)), of(torch, *map(torch.tensor, arrays))


CASES = {
    **{f"sort {kw}": (lambda m, x, kw=kw: m.sort(x, stable=True, **kw), X) for kw in ({}, {"dim": 0}, {"descending": True})},
    "sort down": (lambda m, x: m.sort(x, dim=0, descending=True, stable=True), X),
    "argsort": (lambda m, x: m.argsort(x, dim=0, stable=True), X),
    "sort ints": (lambda m, x: m.sort(x, stable=True, descending=True), INTS),
    "sort bools": (lambda m, x: m.sort(x > 1, stable=True), INTS),
    "sort 0-d": (lambda m, x: m.sort(x), np.float32(3)),
    "sort nothing": (lambda m, x: m.sort(x, dim=0), np.zeros((0, 3), np.float32)),
    "msort": (lambda m, x: m.msort(x), X),
    **{f"topk {k} {up}": (lambda m, x, k=k, up=up: m.topk(x, k, largest=up), DISTINCT) for k in (0, 1, 4, 9) for up in (True, False)},
    "topk dim 0": (lambda m, x: x.topk(2, dim=0), DISTINCT),
    "kthvalue": (lambda m, x: m.kthvalue(x, 4), DISTINCT),
    "kthvalue keepdim": (lambda m, x: x.kthvalue(2, 0, True), DISTINCT),
    **{f"{n} of all": (lambda m, x, n=n: getattr(m, n)(x), X) for n in ("median", "nanmedian")},
    **{f"{n} along": (lambda m, x, n=n: getattr(m, n)(x, 1).values, X) for n in ("median", "nanmedian")},
    "median places": (lambda m, x: m.median(x, 0, True), DISTINCT),
    "median ints": (lambda m, x: m.median(x, 1).values, INTS),
    **{
        f"{n} {how}": (lambda m, x, n=n, how=how: [getattr(m, n)(x, q, *a, interpolation=how) for q in (0.0, 0.3, 0.5, 1.0) for a in ((), (1,), (0, True))], FINITE)
        for n in ("quantile", "nanquantile") for how in ("linear", "lower", "higher", "nearest", "midpoint")
    },
    "quantile vector": (lambda m, x, q: m.quantile(x, q, 1), DISTINCT, np.array([0.1, 0.65], np.float32)),
    "mode": (lambda m, x: [m.mode(x, d).values for d in (0, 1)], INTS),
    **{n: (lambda m, x, n=n: [getattr(m, n)(x, d) for d in (0, 1)], X) for n in ("cumprod", "logcumsumexp")},
    "cumprod ints": (lambda m, x: m.cumprod(x, 1), INTS - 2),
    **{n: (lambda m, x, n=n: [*getattr(m, n)(x, 0), *getattr(x, n)(1)], X) for n in ("cummax", "cummin")},
    "cummax ints": (lambda m, x: m.cummax(x, 1), INTS),
    "unique": (lambda m, x: m.unique(x, return_inverse=True, return_counts=True), INTS),
    "unique alone": (lambda m, x: x.unique(), INTS),
    "unique of nothing": (lambda m, x: m.unique(x, return_counts=True), np.zeros(0, np.float32)),
    "unique with NaN": (lambda m, x: m.unique(x), X),
    "unique_consecutive": (lambda m, x: m.unique_consecutive(x, return_inverse=True, return_counts=True), INTS),
    **{f"bucketize {r}": (lambda m, x, b, r=r: m.bucketize(x, b, right=r), X, np.array([-1, 0, 0, 0.5, 2], np.float32)) for r in (True, False)},
    **{f"searchsorted {r}": (lambda m, x, v, r=r: m.searchsorted(x, v, right=r), ROWS, X) for r in (True, False)},
    "searchsorted side": (lambda m, x, v: m.searchsorted(x, v, side="right", out_int32=True), ROWS[0], ROWS),
    "bincount": (lambda m, x: m.bincount(x.reshape(-1)), INTS),
    "bincount weights": (lambda m, x, w: m.bincount(x, w, 7), INTS.ravel(), np.linspace(0, 1, 55, dtype=np.float32)),
    "bincount of nothing": (lambda m, x: m.bincount(x, minlength=3), np.zeros(0, np.int64)),
    "histc": (lambda m, x: [m.histc(x, 7, 1, 6), m.histc(x, 5), m.histc(x)], DISTINCT),
    "histc outside": (lambda m, x: m.histc(x, 4, -1, 1), np.nan_to_num(X, posinf=9, neginf=-9)),
    "isin": (lambda m, x, t: [m.isin(x, t), m.isin(x, t, invert=True), m.isin(x, t[:0])], INTS, np.array([3, 1, 9])),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_as_torch(name):
    of, *arrays = CASES[name]
    agree(*both(of, *arrays))


def test_zeros_keep_their_signs_in_order():
    values, indices = duo.sort(duo.tensor(X[2]))
    order = np.argsort(X[2], kind="stable")
    assert (indices.numpy() == order).all()
    assert (np.signbit(values.numpy()) == np.signbit(X[2][order])).all()
    assert (np.signbit(duo.msort(duo.tensor(X[2])).numpy()) == np.signbit(X[2][order])).all()


@pytest.mark.parametrize("n", [255, 5000, 40_000])
def test_long_rows(n):
    x = np.random.default_rng(n).normal(size=(2, n)).astype(np.float32).round(2)
    agree(*both(lambda m, x: [*m.sort(x, stable=True), *m.sort(x, stable=True, descending=True)], x))
    values, indices = duo.topk(duo.tensor(x), 11)
    order = n - 1 - np.argsort(x[:, ::-1], 1, kind="stable")[:, ::-1][:, :11]
    assert (indices.numpy() == order).all() and (values.numpy() == np.take_along_axis(x, order, 1)).all()


PICKS = {
    "sort": lambda x: x.sort(1)[0], "topk": lambda x: x.topk(3, 1)[0], "kthvalue": lambda x: x.kthvalue(3, 1)[0],
    "median": lambda x: x.median(1)[0], "quantile": lambda x: x.quantile(0.3, 1), "cumprod": lambda x: x.cumprod(1),
    "cummax": lambda x: x.cummax(1)[0], "cummin": lambda x: x.cummin(0)[0], "logcumsumexp": lambda x: x.logcumsumexp(1),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKS)
def test_gradients_to_order_two(name):
    x = DISTINCT.astype(np.float64) * 0.3 - 1.0
    x[1, 4] = 0.0 if name == "cumprod" else x[1, 4]
    found = []
    for m in (duo, torch):
        v = m.tensor(x, requires_grad=True)
        out = PICKS[name](v)
        c = m.tensor(np.random.default_rng(5).normal(size=tuple(out.shape)))
        (g,) = m.autograd.grad((out * out.sin() * c).sum(), (v,), create_graph=True)
        (gg,) = m.autograd.grad((g * g).sum(), (v,))
        found.append([g, gg])
    agree(*found, 1e-9)


def program(x):
    values, indices = duo.sort(x, 1)
    top, where = duo.functional.topk(x, 3, 1)
    return (
        values, indices, top, where, x.cumprod(1), x.cummax(0).values, x.logcumsumexp(1), x.nanmedian(1).values, x.quantile(0.3, 0), x.mode(1).values,
        duo.searchsorted(values, x), x.histc(5, -1, 1), duo.isin(x, x[0]),
    )  # fmt: skip


def bits(x) -> bytes:
    """What says whether two results are the same: their bits, every NaN alike."""
    x = np.asarray(x)
    return (np.where(np.isnan(x), x.dtype.type(np.nan), x) if x.dtype.kind == "f" else x).tobytes()


def test_every_mode_gives_the_same_bits():
    wanted = flat(program(duo.tensor(X)))
    for threads in (1, 2):
        duo.set_num_threads(threads)
        compiled = flat(duo.compile(program)(duo.tensor(X)))
        with tf.Graph().as_default(), tf.Session() as session:
            x = tf.placeholder(tf.float32, [None, 9])
            graph = session.run(list(program(x)), {x: X})
        for a, b, c in zip(wanted, compiled, graph, strict=True):
            assert bits(a) == bits(b) == bits(c)


def test_unknown_lengths():
    """Along a dim whose size comes with the run."""

    def along(x):
        order = duo.functional.sort(x, 0).values
        return [order, x.cumsum(0), x.kthvalue(2, 0).values, *[duo.searchsorted(order[:, 0], x[:, 1], right=r) for r in (True, False)]]

    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, 9])
        fetches = along(x)
        for n in (2, 5, 3000):
            array = np.random.default_rng(n).normal(size=(n, 9)).astype(np.float32).round(1)
            for a, b in zip(session.run(fetches, {x: array}), flat(along(duo.tensor(array)))):
                assert a.tobytes() == b.tobytes()


def test_vmap_of_a_sort():
    x = duo.tensor(X)
    for f in (lambda r: duo.sort(r)[0], lambda r: r.topk(3)[1], lambda r: r.cumprod(0), lambda r: r.median()):
        whole, rows = duo.vmap(f)(x), [f(x[k]) for k in range(4)]
        assert bits(whole.numpy()) == bits(np.stack([r.numpy() for r in rows]))


def test_errors_name_the_way_out():
    x = duo.tensor(X)
    with pytest.raises(DuoError, match=r"unique.*depend on values.*eager tensors"):
        duo.compile(lambda x: duo.unique(x))(x)
    with pytest.raises(DuoError, match=r"bincount.*depend on values.*scatter_add"):
        duo.vmap(lambda r: duo.bincount(r))(duo.tensor(INTS))
    with tf.Graph().as_default():
        with pytest.raises(ShapeError, match=r"topk: k=5 may be more than"):
            duo.topk(tf.placeholder(tf.float32, [None, 3]), 5, 0)
        p = tf.placeholder(tf.float32, [3])
        with pytest.raises(DuoError, match="depend on values"):
            duo.unique(p)
        with pytest.raises(ShapeError, match="depend on values"):
            tf.unique(p)
        with pytest.raises(ShapeError, match="maxlength"):
            tf.math.bincount(tf.cast(p, tf.int32), minlength=3)
    with pytest.raises(ArgumentError, match=r"k is 0 to 9.*not 10"):
        x.topk(10)
    with pytest.raises(ArgumentError, match="k is 1 to 9"):
        x.kthvalue(0)
    with pytest.raises(IndexError, match="dim 2"):
        x.sort(2)
    with pytest.raises(ShapeError, match="no elements"):
        duo.zeros(0).median()
    with pytest.raises(DTypeError, match="floats"):
        duo.tensor(INTS).quantile(0.5)
    with pytest.raises(ArgumentError, match="0 to 1"):
        x.quantile(1.5)
    with pytest.raises(ShapeError, match="leading dims"):
        duo.searchsorted(duo.tensor(ROWS), x[:2])
    with pytest.raises(ArgumentError, match="non-negative"):
        duo.bincount(duo.tensor([1, -2]))


def test_names_of_tensorflow():
    with tf.Graph().as_default(), tf.Session() as session:
        a = tf.constant(DISTINCT)
        top = tf.nn.top_k(a, 3)
        fetches = {
            "sort": tf.sort(a, 0, "DESCENDING"), "argsort": tf.argsort(a), "values": top.values, "indices": tf.math.top_k(a, 3).indices,
            "cumprod": tf.math.cumprod(a, 1, exclusive=True), "reverse": tf.cumprod(a, 0, reverse=True),
            "logs": tf.math.cumulative_logsumexp(a, 1), "search": tf.searchsorted(tf.constant(ROWS), a, side="right"),
            "count": tf.math.bincount(tf.constant(INTS), minlength=3, maxlength=3), "hist": tf.histogram_fixed_width(a, [1.0, 6.0], 5),
        }  # fmt: skip
        got = session.run(fetches)
    order = np.argsort(-DISTINCT, 1, kind="stable")[:, :3]
    shifted = np.concatenate([np.ones((4, 1), np.float32), np.cumprod(DISTINCT, 1)[:, :-1]], 1)
    wanted = {
        "sort": -np.sort(-DISTINCT, 0), "argsort": np.argsort(DISTINCT, 1).astype(np.int32), "values": np.take_along_axis(DISTINCT, order, 1),
        "indices": order.astype(np.int32), "cumprod": shifted, "reverse": np.cumprod(DISTINCT[::-1], 0)[::-1],
        "logs": np.logaddexp.accumulate(DISTINCT, 1),
        "search": np.stack([np.searchsorted(r, v, "right") for r, v in zip(ROWS, DISTINCT)]).astype(np.int32),
        "count": np.bincount(INTS.ravel(), minlength=4)[:3].astype(np.int32),
        "hist": np.histogram(np.clip(DISTINCT, 1, 6), 5, (1, 6))[0].astype(np.int32),
    }  # fmt: skip
    for name, want in wanted.items():
        assert got[name].dtype == want.dtype and got[name].shape == want.shape, name
        np.testing.assert_allclose(got[name], want, 1e-5, 1e-6, err_msg=name)
