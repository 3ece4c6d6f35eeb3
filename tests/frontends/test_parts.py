"""Slices at places that change are read at once after some: the bits of NumPy's, one path for all places, views as ever."""

from __future__ import annotations

import numpy as np
import pytest

import duo
from duo import nn, runtime
from duo.eager import parts
from duo.functional.indexing import INDEX
from duo.functional.shape import NARROW, SELECT
from duo_ir.errors import GradientError, IndexOutOfRange, ShapeError

F = nn.functional


@pytest.fixture(autouse=True)
def of_its_own():
    duo.synchronize()
    runtime.clear_cache()
    yield
    duo.synchronize()


def data(n: int = 40):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 3, 5)).astype("f4"), rng.integers(0, 3, n)


def there(array):
    """A tensor of memory that nobody else sees, its value there."""
    x = duo.tensor(array) * 1
    x.sum().item()
    return x


def read_at_once(monkeypatch):
    """Counts what is read at once."""
    seen = []

    def read(view, val, attrs):
        out = parts.read_part(view, val, attrs)
        seen.append(out is not None)
        return out

    monkeypatch.setattr("duo.eager.tensor.read_part", read)
    return seen


SLICES = {
    "rows": lambda x, k: x[k : k + 4],
    "rows to a place": lambda x, k: x[k : -36 + k],
    "one row": lambda x, k: x[k],
    "inner rows": lambda x, k: x[k, 1:],
    "row of one": lambda x, k: x[k : k + 1, None, 2],
    "number": lambda x, k: x[k, 1, 2],
    "narrow": lambda x, k: x.narrow(0, k, 5),
    "select": lambda x, k: x.select(0, k),
    "columns": lambda x, k: x[:, :, k % 5],
    "steps": lambda x, k: x[k : k + 8 : 2],
    "nothing": lambda x, k: x[k:k],
    "most": lambda x, k: x[k % 7 :],
}


@pytest.mark.parametrize("name", SLICES)
def test_bits(name, monkeypatch):
    seen = read_at_once(monkeypatch)
    array, _ = data()
    x = there(array)
    by_hand = {"narrow": lambda x, k: x[k : k + 5], "select": lambda x, k: x[k]}.get(name, SLICES[name])
    for k in [*range(30), *range(30)]:
        part = SLICES[name](x, k)
        assert np.array_equal((part * 2).numpy(), by_hand(array, k) * 2), k
    assert any(seen) == (name not in ("columns", "steps", "nothing", "most"))


def test_where_parts_begin():
    for view, attrs, want in (
        (INDEX, ((("at", 2), ("slice", 1, 3, 1), ("slice", None, None, 1)),), (35, (2, 5))),
        (INDEX, ((("slice", 2, 4, 1), ("new",), ("slice", 0, 3, 1), ("slice", 0, 4, 1)),), None),
        (NARROW, (0, -2, 1), (30, (1, 3, 5))), (NARROW, (1, 1, 2), None), (SELECT, (0, 3), (45, (3, 5))), (SELECT, (2, 0), None),
    ):  # fmt: skip
        assert view.part((4, 3, 5), *attrs) == want
    assert NARROW.part((1, 3, 5), 1, 1, 2) == (5, (1, 2, 5))


@pytest.mark.parametrize(
    "of",
    [
        lambda x, k: x.narrow(0, k, 5),
        lambda x, k: x.narrow(0, 0, 2 - k),
        lambda x, k: x.select(0, k),
        lambda x, k: x.select(0, -k),
        lambda x, k: x[k],
    ],
)
def test_places_beyond_the_end_are_refused_as_ever(of):
    x = there(data()[0])
    for k in range(20):
        (x.narrow(0, k, 3) * 2).numpy()
        (x.select(0, k) * 2).numpy()
        (x[k] * 2).numpy()
    with pytest.raises((ShapeError, IndexOutOfRange)):
        of(x, 77)


def test_an_epoch_has_one_path():
    """Training on minibatches, in order and shuffled: what is compiled does not grow with their number, and losses are those of copies."""
    array, labels = data(400)
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.ReLU(), nn.Linear(8, 3))
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def train(batches):
        model.load_state_dict(start)
        optimizer, losses = duo.optim.SGD(model.parameters(), lr=0.1), []
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    want = train((duo.tensor(array[k : k + 8]), duo.tensor(labels[k : k + 8])) for _ in range(2) for k in range(0, 400, 8))
    x, y = there(array), duo.tensor(labels) + 0
    before = duo.debug.statistics().compiled
    assert train((x[k : k + 8], y[k : k + 8]) for _ in range(2) for k in range(0, 400, 8)) == want
    grown = duo.debug.statistics().compiled - before
    assert grown < 60

    order = np.random.default_rng(1).permutation(400)
    want = train((duo.tensor(array[order[k : k + 8]]), duo.tensor(labels[order[k : k + 8]])) for k in range(0, 400, 8))
    places = duo.tensor(order) + 0
    assert train((x[places[k : k + 8]], y[places[k : k + 8]]) for k in range(0, 400, 8)) == want


def test_they_are_views(monkeypatch):
    seen = read_at_once(monkeypatch)
    array, _ = data()
    x = there(array)
    for k in range(20):
        part = x[k : k + 2]
        (part + 1).numpy()
    assert seen[-1]
    part[0] = 7.0  # a write goes to the base
    array[19] = 7.0
    assert np.array_equal(x.numpy(), array) and np.array_equal(part.numpy(), array[19:21])

    x = there(array)
    for k in range(20):
        part = x[k : k + 2]
        (part + 1).numpy()
    x.mul_(2.0)  # and a write to the base to the view
    assert np.array_equal(part.numpy(), array[19:21] * 2) and np.array_equal(x[19:21].numpy(), array[19:21] * 2)
    for k in range(20):
        x[k : k + 2].add_(1.0)
        array[k : k + 2] = array[k : k + 2] + 0.5
    assert np.array_equal(x.numpy(), array * 2)


def test_what_requires_grad_is_recorded(monkeypatch):
    seen = read_at_once(monkeypatch)
    array, _ = data()
    w = duo.tensor(array, requires_grad=True)
    total = np.zeros_like(array)
    for k in range(20):
        (w[k : k + 3] * (k + 1)).sum().backward()
        total[k : k + 3] += k + 1
    assert np.array_equal(w.grad.numpy(), total) and not any(seen)
    x = there(array)
    for k in range(20):
        part = x[k : k + 3].requires_grad_()
        (part * part).sum().backward()
        assert np.array_equal(part.grad.numpy(), 2 * array[k : k + 3])
    assert seen[-1]


def test_a_version_that_a_gradient_needs():
    """A part that a gradient has saved is not what the base is after a write; the backward pass says so, as with any view."""
    array, _ = data()
    x, w = there(array), duo.ones(3, 5, requires_grad=True)
    for k in range(20):
        (x[k] * w).sum().backward()
    out = (x[25] * w).sum()
    out.item()
    x.mul_(0.0)
    with pytest.raises(GradientError, match="written"):
        out.backward()
