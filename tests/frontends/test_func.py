"""duo.func's derivatives: against backward() by bits, against torch.func and finite forms by tolerance; nesting, aux, errors."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn
from duo.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from duo_ir.errors import ArgumentError, DTypeError, ShapeError


def equal(a, b) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and a.dtype is b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def close(a, b) -> bool:
    return a.shape == tuple(b.shape) and np.allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-9, atol=1e-11)


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def both(*shape, seed=0):
    """One array for duo and for torch, in float64."""
    torch = pytest.importorskip("torch")
    array = data(*shape, seed=seed)
    return duo.tensor(array), torch.tensor(array)


def energy(x, w):
    return ((x @ w).tanh() * (x * x).sum()).sum()


def field(x):
    return (x.exp() * x.sum()).sin()


def test_grad_is_backward():
    x, w = duo.randn(3, requires_grad=True), duo.randn(3, 4, requires_grad=True)
    energy(x, w).backward()
    assert equal(grad(energy)(x, w), x.grad)
    dx, dw = grad(energy, argnums=(0, 1))(x, w)
    assert equal(dx, x.grad) and equal(dw, w.grad)
    assert equal(grad(energy, argnums=-1)(x, w), w.grad)
    found, value = grad_and_value(energy)(x, w)
    assert equal(found, x.grad) and equal(value, energy(x, w))
    with duo.no_grad():
        assert equal(grad(energy)(x, w), x.grad)
    assert equal(duo.compile(grad(energy))(x, w), x.grad)


def test_aux_and_structures():
    x = duo.tensor([1.0, 2.0])
    found, (value, aux) = grad_and_value(
        lambda p, k: (k * (p["a"] * p["b"][0]).sum(), {"p": p["a"], "n": 7}), has_aux=True
    )({"a": x, "b": [x + 1]}, 3.0)
    assert found["a"].tolist() == [6.0, 9.0] and found["b"][0].tolist() == [3.0, 6.0] and value.item() == 24.0
    assert aux["n"] == 7 and equal(aux["p"], x)
    assert grad(lambda p: (p.sum(), p * 2), has_aux=True)(x)[1].tolist() == [2.0, 4.0]
    assert grad(lambda p, q: (p * p).sum())(x, None).tolist() == [2.0, 4.0]
    assert grad(lambda p: duo.tensor(1.0))(x).tolist() == [0.0, 0.0]


def test_higher_orders_and_torch():
    torch = pytest.importorskip("torch")
    (x, tx), (w, tw) = both(3), both(3, 4, seed=1)
    assert close(grad(energy)(x, w), torch.func.grad(energy)(tx, tw))
    assert close(
        grad(lambda x: grad(energy)(x, w).square().sum())(x),
        torch.func.grad(lambda x: torch.func.grad(energy)(x, tw).square().sum())(tx),
    )
    assert close(hessian(energy)(x, w), torch.func.hessian(energy)(tx, tw))
    assert close(hessian(energy, argnums=1)(x, w), torch.func.hessian(energy, argnums=1)(tx, tw))
    for mine, theirs in ((jacrev, torch.func.jacrev), (jacfwd, torch.func.jacfwd)):
        assert close(mine(field)(x), theirs(field)(tx))
        two, torchs = (
            mine(lambda x, w: (x @ w).tanh(), argnums=(0, 1))(x, w),
            theirs(lambda x, w: (x @ w).tanh(), argnums=(0, 1))(tx, tw),
        )
        assert close(two[0], torchs[0]) and close(two[1], torchs[1])
        nest = mine(lambda x: {"a": x * x, "b": [x.sum()]})(x)
        torchs = theirs(lambda x: {"a": x * x, "b": [x.sum()]})(tx)
        assert close(nest["a"], torchs["a"]) and close(nest["b"][0], torchs["b"][0])
        assert close(vmap(mine(field))(w.T), torch.func.vmap(theirs(field))(tw.T))
    assert close(
        vmap(hessian(lambda x: (x * x).prod()))(w.T),
        torch.func.vmap(torch.func.hessian(lambda x: (x * x).prod()))(tw.T),
    )
    out, moved = jvp(energy, (x, w), (x * 2, w + 1))
    torchs = torch.func.jvp(energy, (tx, tw), (tx * 2, tw + 1))
    assert close(out, torchs[0]) and close(moved, torchs[1])
    out, pull = vjp(lambda x, w: ((x @ w).exp(), x * 2), x, w)
    touts, tpull = torch.func.vjp(lambda x, w: ((x @ w).exp(), x * 2), tx, tw)
    got, want = pull((out[0] * 2, x)), tpull((touts[0] * 2, tx))
    assert all(close(a, b) for a, b in zip(out, touts)) and all(close(a, b) for a, b in zip(got, want))
    assert close(vmap(lambda ct: pull((ct, x))[0])(w), torch.func.vmap(lambda ct: tpull((ct, tx))[0])(tw))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians(jacobian):
    x = duo.randn(2, 3)
    f = lambda x: (x @ x.T).tanh()  # noqa: E731
    want = jacobian(f)(x)
    assert want.shape == (2, 2, 2, 3)
    for chunk in (1, 4, 100):
        assert equal(jacobian(f, chunk_size=chunk)(x), want)
    if jacobian is jacrev:
        for i in range(2):
            for j in range(2):
                assert equal(want[i, j], grad(lambda x, i=i, j=j: f(x)[i, j])(x))
    assert jacobian(lambda x: x.sum())(x).shape == (2, 3)
    assert jacobian(lambda x: x * x)(duo.tensor(3.0)).item() == 6.0
    assert jacobian(lambda x: x[:0])(x).shape == (0, 3, 2, 3)
    assert jacobian(lambda x: duo.ones(2))(x).tolist() == duo.zeros(2, 2, 3).tolist()
    value, aux = jacobian(lambda x: (x * 2, x.sum()), has_aux=True)(duo.ones(1))
    assert value.tolist() == [[2.0]] and aux.item() == 1.0


def test_forward_and_reverse_agree():
    x = duo.tensor(data(4))
    assert close(jacfwd(field)(x), jacrev(field)(x))
    assert close(jacfwd(jacrev(lambda x: field(x).sum()))(x), jacrev(jacfwd(lambda x: field(x).sum()))(x))
    (loop,) = (lambda x: duo.while_loop(lambda v: v.sum() < 10, lambda v: (v * v + 1,), (x,)),)
    assert jacfwd(lambda x: loop(x)[0])(duo.ones(2)).shape == (2, 2)


def test_outer_gradients_flow():
    x = duo.randn(3, requires_grad=True)
    w = duo.randn(3, 4, requires_grad=True)
    (grad(energy)(x, w) ** 2).sum().backward()
    want = grad(lambda w: (grad(energy)(x, w) ** 2).sum())(w)
    assert equal(w.grad, want) and x.grad is not None
    _, pull = vjp(lambda x: (x @ w).exp(), x)
    (g,) = pull(duo.ones(4))
    (again,) = duo.autograd.grad(g.sum(), x)
    assert again.allclose(grad(lambda x: ((x @ w).exp().sum(-1) * 0 + (w * (x @ w).exp()).sum()).sum())(x), rtol=1e-4)


def test_pull_keeps_the_values_of_the_forward_pass():
    x, w = duo.randn(3), duo.randn(3, 4)
    want = grad(lambda x: ((x @ w) * (x @ w)).sum())(x)
    _, pull = vjp(lambda x: ((x @ w) * (x @ w)).sum(), x)
    with duo.no_grad():
        w.mul_(0)
        x.mul_(0)
    assert equal(pull(duo.tensor(1.0))[0], want)


def test_random_numbers_inside():
    x = duo.ones(4)
    duo.manual_seed(0)
    found = grad(lambda x: (nn.functional.dropout(x, 0.5) * duo.rand(4)).sum())(x)
    duo.manual_seed(0)
    y = duo.ones(4, requires_grad=True)
    (nn.functional.dropout(y, 0.5) * duo.rand(4)).sum().backward()
    assert equal(found, y.grad)
    duo.manual_seed(0)
    _, pull = vjp(lambda x: (nn.functional.dropout(x, 0.5) * duo.rand(4)).sum(), x)
    assert equal(pull(duo.tensor(1.0))[0], y.grad)
    after = duo.rand(2)
    duo.manual_seed(0)
    _, moved = jvp(lambda x: (nn.functional.dropout(x, 0.5) * duo.rand(4)).sum(), (x,), (x,))
    assert moved.allclose(y.grad.sum(), rtol=1e-6) and equal(duo.rand(2), after)


def test_module_and_graph():
    model = nn.Linear(3, 2)
    params, x = dict(model.named_parameters()), duo.randn(3)
    loss = lambda p: functional_call(model, p, x).square().sum()  # noqa: E731
    found = grad(loss)(params)
    model(x).square().sum().backward()
    assert all(equal(found[n], p.grad) for n, p in params.items())
    graph = tf.Graph()
    with graph.as_default():
        p = tf.placeholder(tf.float32, [3])
        out = grad(lambda x: energy(x, model.weight.detach().T))(p)
        with tf.Session() as session:
            got = session.run(out, {p: x.numpy()})
    assert got.tobytes() == grad(lambda x: energy(x, model.weight.detach().T))(x).detach().numpy().tobytes()


def test_functional_call():
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    x, w = duo.randn(3), duo.eye(3) * 2
    assert equal(functional_call(tied, {"0.weight": w}, x), x * 4)
    assert equal(tied(x), x @ tied[0].weight.T @ tied[0].weight.T)
    assert equal(functional_call(tied, ({"0.weight": duo.eye(3)}, {"0.weight": w}), (x,)), x * 4)
    with pytest.raises(ArgumentError, match=r"no parameter or buffer 'w'; it has 0\.weight"):
        functional_call(tied, {"w": w}, x)
    with pytest.raises(ShapeError, match="has type"):
        functional_call(tied, {"0.weight": x}, x)


def test_errors():
    x = duo.ones(3)
    with pytest.raises(ShapeError, match=r"scalar, not \(f32\[3\]\)"):
        grad(lambda x: x)(x)
    with pytest.raises(DTypeError, match="cast it"):
        grad(lambda x: x.sum())(duo.arange(3))
    with pytest.raises(DTypeError, match="not float"):
        grad(lambda x: x)(1.0)
    with pytest.raises(ArgumentError, match="argnums"):
        grad(lambda x: x.sum(), argnums=1)(x)
    with pytest.raises(ArgumentError, match="twice"):
        grad(lambda x, y: x.sum(), argnums=(0, -2))(x, x)
    with pytest.raises(ArgumentError, match="pair"):
        grad(lambda x: x.sum(), has_aux=True)(x)
    with pytest.raises(ArgumentError, match="returns tensors"):
        grad(lambda x: 1.0)(x)
    with pytest.raises(ShapeError, match="a tangent has its primal's type"):
        jvp(field, (x,), (x[:2],))
    with pytest.raises(ArgumentError, match="structure"):
        jvp(field, (x,), (x, x))
    with pytest.raises(ArgumentError, match="tuples"):
        jvp(field, x, x)
    _, pull = vjp(field, x)
    with pytest.raises(ShapeError, match="a cotangent has its output's type"):
        pull(x[:2])
    with pytest.raises(ArgumentError, match="structure"):
        pull((x, x))
    with pytest.raises(DTypeError, match="floating-point outputs"):
        jacrev(lambda x: x.argmax(0))(x)
    with pytest.raises(ArgumentError, match="chunk_size"):
        jacrev(field, chunk_size=0)
