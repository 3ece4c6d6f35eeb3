"""Backward through values that were overwritten since: refused where PyTorch refuses, right everywhere else, under every flush policy."""

import random

import pytest

import duo
from tests.frontends.eager_modes import POLICIES, flush_policy, numbers

torch = pytest.importorskip("torch")


def leaf(T, *shape, seed=0):
    return T.tensor(numbers(*shape, seed=seed), requires_grad=True)


def a_view_then_its_base(T, w, v):
    x = w * 1
    y = (x[1:] * x[1:]).sum()
    x.add_(1)
    y.backward()


def a_view_of_constants_then_its_base(T, w, v):
    x = T.tensor(numbers(3))
    y = (x[1:] * w[1:]).sum()
    x[0] = 5
    y.backward()


def a_view_then_another_view(T, w, v):
    x = T.tensor(numbers(3))
    one, other = x[1:], x[:1]
    y = (one * w[1:]).sum()
    other.add_(1)
    y.backward()


def a_view_looked_at_then_its_base(T, w, v):
    x = T.tensor(numbers(3))
    view = x.view(3, 1)[:2]
    y = (view.t() * w[:2]).sum()
    y.item()
    x.mul_(2)
    y.backward()


def a_view_used_in_two_traces(T, w, v):
    x = T.tensor(numbers(3))
    view = x[:2]
    (view * w[:2]).sum().item()
    y = (view * w[:2]).sum()
    x.mul_(2)
    y.backward()


def a_view_read_again(T, w, v):
    x = T.tensor(numbers(3))
    view = x[:2]
    x.add_(1)
    y = (view * w[:2]).sum()
    x.add_(1)
    y.backward()


def a_view_read_after_the_write(T, w, v):
    x = T.tensor(numbers(3))
    view = x[:2]
    x.add_(1)
    (view * w[:2]).sum().backward()


def a_view_that_nothing_saved(T, w, v):
    x = w * 1
    y = (x[1:] + 1).sum()
    x.add_(1)
    y.backward()


def a_detached_alias(T, w, v):
    d = w.detach()
    y = (d * v).sum()
    with T.no_grad():
        w.add_(1)
    y.backward()


def data_is_not_watched(T, w, v):
    y = (w.data.clone() * v).sum()
    w.data.add_(1)
    y.backward()


def a_parameter_by_a_step(T, w, v):
    opt = T.optim.SGD([w], lr=0.1)
    y = (w * w).sum()
    y.backward(retain_graph=True)
    opt.step()
    y.backward()


def a_view_of_a_parameter_by_a_step(T, w, v):
    opt = T.optim.SGD([w], lr=0.1)
    y = (w[1:] * w[1:] * v[1:]).sum()
    y.backward(retain_graph=True)
    opt.step()
    y.backward()


def a_detached_view_of_a_parameter_by_a_step(T, w, v):
    opt = T.optim.SGD([w], lr=0.1)
    (w * w).sum().backward()
    z = (w.detach()[1:] * v[1:]).sum()
    opt.step()
    z.backward()


def an_optimizers_momentum_by_a_step(T, w, v):
    opt = T.optim.SGD([w], lr=0.1, momentum=0.9)
    (w * w).sum().backward()
    opt.step()
    z = (opt.state[w]["momentum_buffer"] * v).sum()
    opt.step()
    z.backward()


def adams_average_by_a_step(T, w, v):
    opt = T.optim.Adam([w], lr=0.1)
    (w * w).sum().backward()
    opt.step()
    z = (opt.state[w]["exp_avg"][1:] * v[1:]).sum()
    opt.step()
    z.backward()


def a_gradient_of_a_gradient_by_a_step(T, w, v):
    opt = T.optim.SGD([w], lr=0.1)
    (g,) = T.autograd.grad((w**3).sum(), [w], create_graph=True)
    w.grad = g.detach().clone()
    opt.step()
    (g * v).sum().backward()


def a_gradient_by_accumulation(T, w, v):
    y = (w**3).sum()
    y.backward(retain_graph=True)
    z = (w.grad * v).sum()
    y.backward()
    z.backward()


def a_weight_by_a_step(T, w, v):
    opt = T.optim.SGD([w], lr=0.1)
    y = T.nn.functional.linear(v.view(1, 3), w.view(1, 3)).sum() * 2
    y.backward(retain_graph=True)
    opt.step()
    y.backward()


def a_weight_looked_at_by_a_step(T, w, v):
    weight = T.tensor(numbers(2, 3), requires_grad=True)
    opt = T.optim.SGD([weight], lr=0.1)
    y = T.nn.functional.linear(w.view(1, 3), weight).sum()
    y.item()
    y.backward(retain_graph=True)
    opt.step()
    y.backward()


def a_weight_in_place(T, w, v):
    weight = T.tensor(numbers(2, 3))
    y = T.nn.functional.linear(w.view(1, 3), weight).sum()
    weight.mul_(2)
    y.backward()


def a_copy_of_a_weight(T, w, v):
    weight = T.tensor(numbers(2, 3))
    y = T.nn.functional.linear(w.view(1, 3), weight.flip(0)).sum()
    weight.mul_(2)
    y.backward()


PROGRAMS = [f for f in list(globals().values()) if getattr(f, "__module__", "") == __name__ and f is not leaf]


def outcome(T, program):
    """'refused', or the gradients."""
    w, v = leaf(T, 3), leaf(T, 3, seed=1)
    try:
        program(T, w, v)
    except RuntimeError as error:
        assert T is torch or isinstance(error, duo.DuoError), error
        return "refused"
    return [None if t.grad is None else [round(g, 4) for g in t.grad.tolist()] for t in (w, v)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_as_in_torch(program):
    expected = outcome(torch, program)
    for name in POLICIES:
        with flush_policy(name):
            assert [outcome(duo, program) for _ in range(3)] == [expected] * 3, name


def random_program(T, seed):
    """Views, writes, steps and backward passes in a random order; what each backward pass gives."""
    rng = random.Random(seed)
    w, v = leaf(T, 4), leaf(T, 4, seed=1)
    opt = T.optim.SGD([w], lr=0.125)
    x = T.tensor(numbers(4, seed=2))
    views, losses, out = [x], [(w * v).sum()], []
    for _ in range(14):
        kind = rng.choice(["view", "write", "loss", "loss", "parameters", "step", "look", "backward", "backward"])
        which = rng.randrange(8)
        t = views[which % len(views)]
        if kind == "view" and t.shape[0] > 1:
            views.append(t[1:] if which % 2 else t.view(-1)[:-1])
        elif kind == "write":
            t.add_(1)
        elif kind == "loss":
            losses.append((t * w[: t.shape[0]]).sum())
        elif kind == "parameters":
            losses.append((w[1:] * v[1:]).sum() if which % 2 else (w * v).sum())
        elif kind == "step":
            opt.step()
        elif kind == "look":
            losses[which % len(losses)].item()
        elif kind == "backward":
            try:
                losses[which % len(losses)].backward(retain_graph=True)
                out.append([None if p.grad is None else [round(g, 3) for g in p.grad.tolist()] for p in (w, v)])
            except RuntimeError:
                out.append("refused")
    return out


def test_random_programs():
    refused = given = 0
    for seed in range(50):
        expected = random_program(torch, seed)
        refused += expected.count("refused")
        given += len(expected) - expected.count("refused")
        for name in POLICIES:
            with flush_policy(name):
                assert random_program(duo, seed) == expected, (seed, name)
    assert refused > 20 and given > 50


def test_views_that_a_replay_makes():
    """A compiled function gives views of a tensor; a write to the tensor is seen by what saved them."""
    x, w = duo.tensor(numbers(4)), leaf(duo, 3)
    views = duo.compile(lambda t: (t[1:], t[:3] * 1))
    for _ in range(4):
        view, copy = views(x)
        y, z = (view * w).sum(), (copy * w).sum()
        x.add_(1)
        z.backward()
        with pytest.raises(duo.DuoError, match="overwritten"):
            y.backward()
    made = duo.compile(lambda t: (lambda base: (base, base[1:]))(t * 2))
    for _ in range(4):
        base, view = made(x)
        y = (view * w).sum()
        base.zero_()
        with pytest.raises(duo.DuoError, match="overwritten"):
            y.backward()
