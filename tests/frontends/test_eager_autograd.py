"""Eager autograd against PyTorch, under every flush policy: leaves, hooks, several losses, orders of derivative, errors."""

import copy

import numpy as np
import pytest

from tests.frontends.eager_modes import agree, numbers

torch = pytest.importorskip("torch")


def leaf(T, *shape, seed=0, **kw):
    return T.tensor(numbers(*shape, seed=seed, **kw), requires_grad=True)


def const(T, *shape, seed=100, **kw):
    return T.tensor(numbers(*shape, seed=seed, **kw))


# ------------------------------------------------------------------------------------------------ leaves and .grad
def simple(T):
    w, x = leaf(T, 3, 4), const(T, 2, 4)
    y = (x @ w.T).tanh()
    z = y * 2
    loss = z.sum()
    loss.backward()
    return (
        loss,
        y,
        z,
        w.grad,
        x.grad,
        [w.is_leaf, x.is_leaf, y.is_leaf, w.requires_grad, y.requires_grad, x.requires_grad],
    )


def accumulates(T):
    w = leaf(T, 3)
    (w * 2).sum().backward()
    first = w.grad
    before = first.clone()
    (w * w).sum().backward()
    return before, first, w.grad, w.grad is first


def accumulates_across_looks(T):
    w = leaf(T, 3)
    out = []
    for k in range(4):
        ((w + k) ** 2).sum().backward()
        out.append(w.grad.clone().numpy())
    return out


def updated_between_two_uses(T):
    """The same leaf with two values in one graph: both uses count."""
    w = leaf(T, 3)
    one = (w * const(T, 3)).sum()
    with T.no_grad():
        w -= 1
    two = (w * const(T, 3, seed=3)).sum() + (w + 1).sum()
    with T.no_grad():
        w *= 2
    (one * 2 + two + (w * const(T, 3, seed=4)).sum() + w.sum()).backward()
    return w, w.grad


def shared_grad_alias(T):
    """A view of .grad sees what a later backward adds."""
    w = leaf(T, 4)
    w.sum().backward()
    view = w.grad[1:3]
    (w * 3).sum().backward()
    return view, w.grad


def zero_grad_both_ways(T):
    w = leaf(T, 3)
    opt = T.optim.SGD([w], lr=0.1)
    (w * w).sum().backward()
    g = w.grad
    opt.zero_grad(set_to_none=False)
    zeros = [g.clone(), w.grad is g]
    (w * w).sum().backward()
    opt.zero_grad()
    return zeros, w.grad, g


def one_leaf_many_uses(T):
    w = leaf(T, 3)
    y = w * w + w.exp() - w / (w * w + 1)
    y.sum().backward()
    return w.grad


def unused_leaf(T):
    w, v = leaf(T, 3), leaf(T, 2, seed=1)
    (w * 2).sum().backward()
    return w.grad, v.grad


def gradient_argument(T):
    w = leaf(T, 3)
    y = w * w
    y.backward(const(T, 3))
    return w.grad


def gradient_broadcasting(T):
    a, b, c = leaf(T, 3, 1), leaf(T, 1, 4, seed=1), leaf(T, seed=2)
    ((a + b) * c - b / (a * a + 2)).sum().backward()
    return a.grad, b.grad, c.grad


def frozen_and_thawed(T):
    w, v = leaf(T, 3), leaf(T, 3, seed=1)
    w.requires_grad_(False)
    (w * v).sum().backward()
    first = [w.grad, v.grad.clone()]
    w.requires_grad_(True)
    (w * v).sum().backward()
    return first, w.grad, v.grad


def thawed_after_use(T):
    w = const(T, 3)
    before = w * 2
    w.requires_grad_()
    ((w * w) + before).sum().backward()
    return w.grad, before.requires_grad, w.requires_grad


def backward_inputs(T):
    w, v = leaf(T, 3), leaf(T, 3, seed=1)
    (w * v).sum().backward(inputs=[w])
    return w.grad, v.grad


def float64_and_ints(T):
    w = leaf(T, 4, dtype=np.float64)
    index = T.tensor([0, 2, 2])
    (w[index] * T.tensor([1.0, 2.0, 3.0], dtype=T.float64)).sum().backward()
    return w.grad


def empty_and_0d(T):
    e, s = T.zeros(0, 3, requires_grad=True), T.tensor(2.0, requires_grad=True)
    loss = (e * s).sum() + s**3
    loss.backward()
    return loss, e.grad, s.grad


# ------------------------------------------------------------------------------------------- retain, several losses
def retained(T):
    w = leaf(T, 3)
    y = (w.tanh() * w).sum()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    return w.grad


def two_losses_one_trunk(T):
    w, a, b = leaf(T, 4, 4), leaf(T, 4, seed=1), leaf(T, 4, seed=2)
    trunk = (const(T, 5, 4) @ w).sigmoid()
    one, two = (trunk @ a).sum(), (trunk * b).pow(2).sum()
    one.backward(retain_graph=True)
    two.backward()
    return w.grad, a.grad, b.grad


def sum_of_losses(T):
    w = leaf(T, 4)
    losses = [(w * k).sin().sum() for k in range(5)]
    T.autograd.backward(losses)
    return w.grad


def backward_several_with_gradients(T):
    w = leaf(T, 4)
    one, two = w * w, w.exp()
    T.autograd.backward([one, two], [const(T, 4), const(T, 4, seed=3)])
    return w.grad


def same_root_twice(T):
    w = leaf(T, 4)
    y = w * w
    T.autograd.backward([y, y], [const(T, 4), const(T, 4, seed=3)])
    return w.grad


def after_printing(T):
    w = leaf(T, 4)
    h = (w * w).tanh()
    loss = h.sum()
    value = loss.item()
    str(h)
    loss.backward()
    return value, w.grad


def several_segments(T):
    w, v = leaf(T, 4, 4), leaf(T, 4, seed=1)
    h = const(T, 3, 4)
    seen = []
    for k in range(5):
        h = (h @ w + v * k).tanh()
        seen.append(float(h.sum()))
    loss = (h * h).mean()
    seen.append(loss.item())
    loss.backward()
    return seen, w.grad, v.grad


def skip_over_segments(T):
    """Values of an old segment are used again beside newer ones."""
    w = leaf(T, 4)
    a = w.exp()
    a.sum().item()
    b = (a * w).sin()
    b.sum().item()
    c = (a + b * a) / 3
    c.sum().item()
    (c * a * b).sum().backward()
    return w.grad


def trunk_in_a_segment_retained(T):
    w, a = leaf(T, 4), leaf(T, 4, seed=1)
    trunk = w.tanh() * w
    str(trunk)
    (trunk * a).sum().backward(retain_graph=True)
    (trunk * a).sum().backward()
    return w.grad, a.grad


def half_of_a_segment(T):
    """Two independent chains in one flush: going back through one leaves the other alone."""
    w, v = leaf(T, 3), leaf(T, 3, seed=1)
    one, two = w.tanh().sum(), v.tanh().sum()
    one.item()
    one.backward()
    two.backward()
    return w.grad, v.grad


def interleaved_traces(T):
    w = leaf(T, 3)
    kept = []
    for k in range(6):
        y = (w + k).tanh()
        if k % 2:
            y.sum().item()
        kept.append(y)
    total = sum((y * (i + 1)).sum() for i, y in enumerate(kept))
    total.backward()
    return w.grad


def grad_of_updated_parameter(T):
    """A graph recorded before a step goes back with the values of before where they do not matter (linear)."""
    w = leaf(T, 3)
    y = (w * const(T, 3)).sum()
    with T.no_grad():
        w -= 1.0
    y.backward()
    return w.grad, w


# --------------------------------------------------------------------------------------------------- autograd.grad
def grad_of_inner(T):
    w = leaf(T, 4)
    h = w.tanh()
    y = (h * h * w).sum()
    return T.autograd.grad(y, [h, w], retain_graph=True), T.autograd.grad(y, h), w.grad


def grad_of_inner_after_flush(T):
    w = leaf(T, 4)
    h = w.tanh()
    str(h)
    k = h * h
    str(k)
    y = (k * w).sum()
    return T.autograd.grad(y, [k, h, w], retain_graph=True), T.autograd.grad(y, [w, h])


def grad_unused(T):
    w, v = leaf(T, 3), leaf(T, 3, seed=1)
    return T.autograd.grad((w * w).sum(), [w, v], allow_unused=True)


def grad_outputs(T):
    w = leaf(T, 3)
    y = [w * w, w.exp()]
    return T.autograd.grad(y, w, grad_outputs=[const(T, 3), const(T, 3, seed=7)])


def grad_of_itself(T):
    w = leaf(T, 3)
    y = w * 2
    return T.autograd.grad(y.sum(), y, retain_graph=True), T.autograd.grad(y, y, const(T, 3))


def third_order(T):
    w = leaf(T, 3, dtype=np.float64)
    y = (w.sin() * w.exp()).sum()
    (g1,) = T.autograd.grad(y, w, create_graph=True)
    (g2,) = T.autograd.grad(g1.sum(), w, create_graph=True)
    (g3,) = T.autograd.grad(g2.sum(), w)
    return g1, g2, g3, [g1.requires_grad, g2.requires_grad, g3.requires_grad]


def third_order_with_looks(T):
    w = leaf(T, 3, dtype=np.float64)
    h = w.sin()
    str(h)
    y = (h * w.exp()).sum()
    y.item()
    (g1,) = T.autograd.grad(y, w, create_graph=True)
    str(g1)
    (g2,) = T.autograd.grad((g1 * w).sum(), w, create_graph=True)
    str(g2)
    (g3,) = T.autograd.grad(g2.sum(), w)
    return g1, g2, g3


def gradient_penalty(T):
    w, x = leaf(T, 4, 4), leaf(T, 3, 4, seed=1)
    y = (x @ w).tanh().sum()
    (gx,) = T.autograd.grad(y, x, create_graph=True)
    loss = y + ((gx.pow(2).sum(1) + 1e-3).sqrt() - 1).pow(2).mean()
    loss.backward()
    return loss, w.grad, x.grad


def create_graph_backward(T):
    w = leaf(T, 3)
    (w**3).sum().backward(create_graph=True)
    first = w.grad
    g = first.clone().detach()
    w.grad = None
    (first * first).sum().backward()
    return g, w.grad


def hessian_vector(T):
    w, v = leaf(T, 4), const(T, 4)
    y = (w.exp() * w.sum()).sum()
    (g,) = T.autograd.grad(y, w, create_graph=True)
    return T.autograd.grad(g, w, v)


# -------------------------------------------------------------------------------------------------------------- hooks
def hook_on_leaf(T):
    w, seen = leaf(T, 3), []
    w.register_hook(lambda g: seen.append(g.clone()))
    (w * w).sum().backward()
    (w * 2).sum().backward()
    return seen, w.grad


def hook_replaces_on_leaf(T):
    w = leaf(T, 3)
    w.register_hook(lambda g: g * 10)
    w.register_hook(lambda g: g + 1)
    (w * w).sum().backward()
    return w.grad


def hook_inside(T):
    w, seen = leaf(T, 3), []
    h = w.tanh()
    h.register_hook(lambda g: seen.append(g.clone()))
    (h * h).sum().backward()
    return seen, w.grad


def hook_inside_replaces(T):
    w, seen = leaf(T, 3), []
    h = w.tanh()
    h.register_hook(lambda g: (seen.append(g), g * 3)[1])
    k = h.exp()
    k.register_hook(lambda g: (seen.append(g), g - 1)[1])
    (k * h).sum().backward()
    return seen, w.grad


def hook_removed(T):
    w, seen = leaf(T, 3), []
    h = w.tanh()
    handle = h.register_hook(lambda g: g * 100)
    h.register_hook(lambda g: seen.append(g))
    handle.remove()
    h.sum().backward()
    return seen, w.grad


def hooked_tensor_gone(T):
    w, seen = leaf(T, 3), []

    def forward():
        h = w.tanh()
        h.register_hook(lambda g: (seen.append(g), g * 2)[1])
        return (h * w).sum()

    loss = forward()
    loss.backward()
    return seen, w.grad


def hooked_tensor_gone_and_flushed(T):
    w, seen = leaf(T, 3), []

    def forward():
        h = w.tanh()
        h.register_hook(lambda g: (seen.append(g), g * 2)[1])
        return (h * w).sum()

    loss = forward()
    loss.item()
    loss.backward()
    return seen, w.grad


def hook_after_flush(T):
    w, seen = leaf(T, 3), []
    h = w.tanh()
    str(h)
    h.register_hook(lambda g: (seen.append(g), g * 2)[1])
    (h * h).sum().backward()
    return seen, w.grad


def hook_looks_at_values(T):
    w, seen = leaf(T, 3), []
    h = w.tanh()
    h.register_hook(lambda g: seen.append(g.sum().item()))
    h.register_hook(lambda g: g * float(g.abs().max()))
    (h * h * w).sum().backward()
    return seen, w.grad


def hook_with_create_graph(T):
    w = leaf(T, 3, dtype=np.float64)
    h = w.sin()
    h.register_hook(lambda g: g * 2)
    (g,) = T.autograd.grad((h * h).sum(), w, create_graph=True)
    (g2,) = T.autograd.grad(g.sum(), w)
    return g, g2


def keeps_grad(T):
    w = leaf(T, 3)
    h = w.tanh()
    h.retain_grad()
    k = h * 2
    k.retain_grad()
    (k * k).sum().backward()
    return h.grad, k.grad, w.grad, [h.is_leaf, h.requires_grad]


def keeps_grad_after_flush(T):
    w = leaf(T, 3)
    h = w.tanh()
    h.retain_grad()
    str(h)
    (h * h).sum().backward()
    return h.grad, w.grad


# ------------------------------------------------------------------------------------------------------------- modes
def grad_modes(T):
    w = leaf(T, 3)
    with T.no_grad():
        a = w * 2
        with T.enable_grad():
            b = w * 3
        c = w * 4
    with T.inference_mode():
        d = w * 5

    @T.no_grad()
    def f(x):
        return x * 6

    @T.enable_grad()
    def g(x):
        return x * 7

    e = f(w)
    with T.no_grad():
        h = g(w)
    flags = [x.requires_grad for x in (a, b, c, d, e, h)]
    (w * a + b + c + e + h).sum().backward()
    return flags, w.grad, T.is_grad_enabled()


def set_grad(T):
    w = leaf(T, 3)
    with T.set_grad_enabled(False):
        a = w * 2
    T.set_grad_enabled(False)
    b = w * 2
    T.set_grad_enabled(True)
    c = w * 2
    return [a.requires_grad, b.requires_grad, c.requires_grad]


def no_grad_survives_errors(T):
    try:
        with T.no_grad():
            raise KeyError
    except KeyError:
        pass
    return T.is_grad_enabled()


def detached(T):
    w = leaf(T, 3)
    h = w * w
    d = h.detach()
    (h * d).sum().backward()
    return w.grad, d.requires_grad, d.is_leaf


def detach_in_place(T):
    w = leaf(T, 3)
    h = w * w
    h.detach_()
    k = (h * w).sum()
    k.backward()
    return w.grad, h.requires_grad, h.is_leaf


def constant_branch(T):
    w = leaf(T, 3)
    with T.no_grad():
        mean = w.mean()
    ((w - mean) ** 2).sum().backward()
    return w.grad


def ints_have_no_grad(T):
    w = leaf(T, 3)
    i = (w > 0).long()
    f = i.float()
    (f * w).sum().backward()
    return w.grad, i.requires_grad, f.requires_grad, w.argmax().requires_grad


# --------------------------------------------------------------------------------- in place, views, .data, training
def in_place_ops(T):
    w = leaf(T, 4)
    h = w * 2
    h += 1
    h *= w
    h.sub_(w).add_(3.0)
    h[1:3] = h[1:3] * 5
    h[0] = 7.0
    (h * h).sum().backward()
    return h, w.grad


def in_place_through_views(T):
    w = leaf(T, 3, 4)
    h = w * 1
    h.t()[0] += 5
    h[1].mul_(w[0])
    h.view(-1)[2:5] = w[2, :3]
    h.tanh().sum().backward()
    return h, w.grad


def view_of_written_base(T):
    w = leaf(T, 4)
    h = w * 1
    v = h[:2]
    h.mul_(3)
    (v * v).sum().backward()
    return v, w.grad


def write_a_result_into_a_constant(T):
    w = leaf(T, 3)
    buffer = T.zeros(3, 3)
    for k in range(3):
        buffer[k] = w * (k + 1)
    (buffer * buffer).sum().backward()
    return buffer, w.grad, buffer.requires_grad


def in_place_after_look(T):
    w = leaf(T, 4)
    h = w * 2
    str(h)
    h += w
    str(h)
    h *= 3
    (h * const(T, 4)).sum().backward()
    return h, w.grad


def in_place_twice_on_unsaved(T):
    w = leaf(T, 4)
    h = w + 1
    k = h + 2
    h.add_(1)
    (h * k).sum().backward()
    return w.grad


def data_write_bypasses(T):
    w = leaf(T, 3)
    y = (w + 0) * 2
    y.data.mul_(10)
    y.sum().backward()
    return y, w.grad


def data_of_parameter(T):
    w = leaf(T, 3)
    w.data.mul_(2)
    w.data[0] = 5
    w.data.copy_(w.data + 1)
    (w * w).sum().backward()
    first = w.grad.clone()
    w.data = const(T, 3)
    w.grad = None
    (w * w).sum().backward()
    return first, w, w.grad, [w.requires_grad, w.is_leaf, w.data.requires_grad]


def data_assigned_is_shared(T):
    w, t = leaf(T, 3), const(T, 3)
    w.data = t
    t += 1
    return w, t


def gradient_descent_by_hand(T):
    w, v = leaf(T, 4, 3), leaf(T, 3, seed=1)
    x, y = const(T, 8, 4), const(T, 8, 3, seed=5)
    losses = []
    for _ in range(6):
        loss = ((x @ w + v).tanh() - y).pow(2).mean()
        loss.backward()
        with T.no_grad():
            for p in (w, v):
                p -= 0.3 * p.grad
                p.grad = None
        losses.append(loss.item())
    return losses, w, v


def gradient_descent_zeroing(T):
    w = leaf(T, 4)
    for _ in range(5):
        ((w - 1) ** 4).sum().backward()
        with T.no_grad():
            w.sub_(w.grad, alpha=0.1) if False else w.sub_(w.grad * 0.1)
            w.grad.zero_()
    return w, w.grad


def tied_weights(T):
    w = leaf(T, 4, 3)
    tied = w
    h = const(T, 5, 4) @ w
    (h @ tied.t()).tanh().sum().backward()
    return w.grad


def cloned(T):
    w = leaf(T, 3)
    c = w.clone()
    c *= 2
    (c * w).sum().backward()
    return w, c, w.grad, c.is_leaf


def deep_copied(T):
    w = leaf(T, 3)
    (w * w).sum().backward()
    c = copy.deepcopy(w)
    with T.no_grad():
        c += 1
    (c * 2).sum().backward()
    return w, c, w.grad, [c.is_leaf, c.requires_grad]


def two_backwards_between_updates(T):
    """Accumulation over micro-batches, as losses and gradients live across several traces."""
    w = leaf(T, 4)
    opt = T.optim.SGD([w], lr=0.1, momentum=0.9)
    out = []
    for step in range(4):
        for micro in range(3):
            loss = (w * const(T, 4, seed=step * 3 + micro)).sin().sum() / 3
            loss.backward()
            if micro == 1:
                out.append(loss.item())
        opt.step()
        opt.zero_grad()
    return out, w


def clipped(T):
    w, v = leaf(T, 4), leaf(T, 2, 2, seed=1)
    for _ in range(3):
        w.grad = v.grad = None
        ((w * 5).exp().sum() + (v * 3).pow(4).sum()).backward()
        norm = T.nn.utils.clip_grad_norm_([w, v], 1.0)
        with T.no_grad():
            w -= w.grad * 0.1
            v -= v.grad * 0.1
    return norm, w, v, w.grad


def grads_assigned(T):
    w = leaf(T, 3)
    w.grad = const(T, 3)
    (w * w).sum().backward()
    return w.grad


def detach_shares_storage(T):
    w = leaf(T, 3)
    d = w.detach()
    with T.no_grad():
        w += 1
    d[0] = 9
    return w, d


PROGRAMS = [f for f in list(globals().values()) if callable(f) and getattr(f, "__module__", "") == __name__]
PROGRAMS = [f for f in PROGRAMS if f.__name__ not in ("leaf", "const")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_as_in_torch(program):
    agree(program, torch)
