"""The operators and methods that `duo.Tensor` adds to the functions, on eager tensors, against PyTorch."""

import numpy as np
import pytest

import duo
from duo_ir.errors import DuoError

torch = pytest.importorskip("torch")

X = np.arange(-6, 6, dtype=np.float32).reshape(3, 4) / 4 + 0.1


def same(ours, theirs):
    ours, theirs = np.asarray(ours.detach().numpy()), theirs.detach().numpy()
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


OPERATORS = {
    "numbers": lambda x: ((x + 1) * 2 - 0.5) / 3 % 0.7 // 0.1,
    "reflected": lambda x: 1 - x + 2 * (3 / (x + 9)) + 2.0**x + 7 % (x + 9) + 5 // (x + 9),
    "tensors": lambda x: x @ x.T + (x * x).sum(1) - x.mean(),
    "powers": lambda x: x**2 + x**3 + abs(x) ** 0.5 - +x + -x,
    "comparisons": lambda x: (x > 0) & (x <= 0.5) | (x == x) ^ (x != x) | (x < -1) & ~(x >= -2),
    "shifts": lambda x: (x.long() << 2) + (x.long() >> 1) + (1 << x.long().abs()),
    "numpy scalars": lambda x: x * np.float64(2.0) + np.float32(0.5) - np.int64(3),
    "slices": lambda x: x[1:, ::2] + x[-1, None, :2] * x[..., 0][0],
    "methods": lambda x: x.clamp(-0.5, max=0.5).exp().log1p().sum(dim=1, keepdim=True).expand(3, 2).reshape(-1, 3),
    "more methods": lambda x: x.softmax(-1).transpose(0, 1).flatten(1).reshape(2, -1).unsqueeze(0).squeeze(0).max(1)[0],
    "conversions": lambda x: x.double().float().int().type_as(x) + x.half().float() + x.bool().long(),
    "in place": lambda x: x.clone().add_(1).mul_(2.0).clamp_(min=0.3).sub_(x, alpha=2).masked_fill_(x > 0, 7.0).neg_(),
    "new": lambda x: x.new_zeros(2, 3) + x.new_ones((2, 3)) * x.new_full((3,), 2.5),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_like_torch(name):
    same(OPERATORS[name](duo.tensor(X)), OPERATORS[name](torch.tensor(X)))


def test_arrays_beside_tensors():
    x, a = duo.tensor(X), np.full((3, 4), 2.0, np.float32)
    np.testing.assert_array_equal((x + a).numpy(), X + a)
    np.testing.assert_array_equal((a * x).numpy(), a * X)
    np.testing.assert_array_equal((np.float32(3) - x).numpy(), 3 - X)
    assert isinstance(a - x, duo.Tensor)
    with pytest.raises(TypeError):
        x + "1"
    assert (x == None) is False  # noqa: E711


def assignments(x, lib):
    x[0] = 5.0
    x[1:, 1] = lib.tensor([7.0, 8.0])
    x[:, ::2] += 1
    x[2, 3] *= 3
    x[x < 0] = 0.25
    x[lib.tensor([0, 2]), lib.tensor([3, 0])] = lib.tensor([1.0, 2.0])
    x[[1, 2]] = 4.0
    x.T[3] -= 1
    x.view(-1)[5] = 9.0
    return x


def test_assignments():
    same(assignments(duo.tensor(X), duo), assignments(torch.tensor(X), torch))


def test_as_python_values():
    x = duo.tensor([[1.5]])
    assert float(x) == 1.5
    assert int(x) == 1
    assert bool(x)
    assert f"{duo.tensor(1.25):.1f}" == "1.2"
    assert [10, 20, 30][duo.tensor(1)] == 20
    assert len(duo.tensor(X)) == 3
    assert [r.shape for r in duo.tensor(X)] == [(4,)] * 3
    assert 5 in duo.tensor([1, 5])
    assert duo.tensor(X).tolist() == X.tolist()
    assert duo.tensor(X).size() == (3, 4)
    assert duo.tensor(X).size(-1) == 4
    assert (duo.tensor(X).dim(), duo.tensor(X).numel(), duo.tensor(X).ndim) == (2, 12, 2)
    for wrong in (
        lambda: bool(duo.tensor(X)),
        lambda: [1][duo.tensor(0.0)],
        lambda: len(duo.tensor(1)),
        lambda: iter(duo.tensor(1)),
    ):
        with pytest.raises((DuoError, TypeError)):
            wrong()


def test_random_in_place_is_reproducible():
    duo.manual_seed(3)
    a, b = duo.zeros(5).uniform_(-1, 1), duo.zeros(5).normal_(2.0, 0.1)
    duo.manual_seed(3)
    c, d = duo.zeros(5).uniform_(-1, 1), duo.zeros(5).normal_(2.0, 0.1)
    assert a.equal(c)
    assert b.equal(d)
    assert a.abs().max() <= 1
    assert (b - 2).abs().max() < 1


def test_batch_norm_moves_its_statistics():
    nnf, tnnf = duo.nn.functional, torch.nn.functional
    ours, theirs = [duo.zeros(4), duo.ones(4)], [torch.zeros(4), torch.ones(4)]
    for _ in range(2):
        same(
            nnf.batch_norm(duo.tensor(X), *ours, training=True),
            tnnf.batch_norm(torch.tensor(X), *theirs, training=True),
        )
    same(ours[0], theirs[0])
    same(ours[1], theirs[1])
    same(nnf.batch_norm(duo.tensor(X), *ours), tnnf.batch_norm(torch.tensor(X), *theirs))


def test_dropout_in_training_only():
    x = duo.ones(1000)
    assert duo.nn.functional.dropout(x, 0.5, training=False) is x
    y = duo.nn.functional.dropout(x, 0.5)
    assert set(y.tolist()) == {0.0, 2.0}
    q = duo.tensor(np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32))
    assert duo.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5).shape == (2, 3, 4)
