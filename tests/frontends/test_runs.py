"""Layers recorded by native code (duo/nn/runs.py) give what their `forward` gives, and as soon as anything changes, what that gives then."""

from __future__ import annotations

import copy
import sys
import threading

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import dispatch, nn, runtime
from duo.eager import cells, native
from duo.eager.trace import hooks
from duo.nn.runs import Run
from duo_ir.errors import DuoError, ShapeError

TIMES = 4


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    duo.synchronize()
    runtime.clear_cache()
    monkeypatch.setattr(hooks, "repeated", lambda: None)
    native.install()
    if cells.layout() is None:
        pytest.skip("objects are not laid out as native code takes for granted")
    yield
    duo.synchronize()
    native.remove()


def image(*shape):
    return duo.tensor(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), [(2, 6), (6,), (3, 2, 6)]),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), [(2, 6)]),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), [(2, 3, 8), (3, 8)]),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, 2, 1, bias=False), [(2, 3, 8, 7), (3, 8, 7)]),
    "conv2d same": (lambda: nn.Conv2d(3, 6, (3, 2), padding="same", groups=3), [(1, 3, 5, 6)]),
    "conv2d reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), [(1, 3, 5, 6)]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), [(1, 2, 4, 4, 4)]),
    "batch norm": (lambda: nn.BatchNorm2d(3), [(4, 3, 5, 5)]),
    "batch norm 1d": (lambda: nn.BatchNorm1d(3), [(4, 3), (4, 3, 2)]),
    "batch norm untracked": (lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False), [(4, 3, 5, 5)]),
    "layer norm": (lambda: nn.LayerNorm(6), [(2, 6), (3, 2, 6)]),
    "rms norm": (lambda: nn.RMSNorm(6), [(2, 6)]),
    "relu in place": (lambda: nn.ReLU(inplace=True), [(2, 6)]),
    "prelu": (lambda: nn.PReLU(), [(2, 6)]),
    "leaky relu": (lambda: nn.LeakyReLU(0.3), [(2, 6)]),
    "softmax": (lambda: nn.Softmax(-1), [(2, 6), (3, 2, 6)]),
    "dropout": (lambda: nn.Dropout(0.5), [(2, 6)]),
    "identity": (lambda: nn.Identity(), [(2, 6)]),
    "max pool": (lambda: nn.MaxPool2d(2), [(1, 3, 6, 6), (3, 6, 6)]),
    "max pool with indices": (lambda: nn.MaxPool2d(2, return_indices=True), [(1, 3, 6, 6)]),
    "average pool": (lambda: nn.AvgPool2d(2), [(1, 3, 6, 6)]),
    "flatten": (lambda: nn.Flatten(), [(2, 3, 4)]),
    **{f"{a.__name__}": (a, [(2, 6)]) for a in (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Mish, nn.Softplus, nn.Hardtanh)},
}


def outputs(layer, shapes, training):
    """What a layer gives, of several types of inputs and in turns, with gradients of what it has."""
    layer.train(training)
    rows = []
    for k in range(3 * TIMES):
        x = image(*shapes[k % len(shapes)])
        with duo.set_grad_enabled(k % 2 == 0):
            out = layer(x * 1.0)
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad:
                out.sum().backward()
        rows.append(out.detach().numpy().copy())
    rows += [p.grad.numpy().copy() for p in layer.parameters() if p.grad is not None]
    return rows + [b.detach().numpy().copy() for b in layer.buffers()]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_what_forward_gives(name, training):
    make, shapes = LAYERS[name]
    rows = []
    for on in (True, False):
        native.install() if on else native.remove()
        assert (dispatch.chain is not None) == on
        duo.manual_seed(3)
        alone, inside = make(), nn.Sequential(nn.Identity(), make(), nn.Sequential(nn.Tanh()))
        inside[2] = nn.Flatten() if "indices" in name else inside[2]
        mine = outputs(alone, shapes, training)
        rows.append(mine if "indices" in name else mine + outputs(inside, shapes, training))
    assert same(*rows)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 5))
        self.last = nn.Linear(5, 5)

    def forward(self, x):
        return self.last(self.body(x)).softmax(-1)


def called(net, times=TIMES):
    with duo.inference_mode():
        return [net(image(2, 3, 6, 6)).numpy().copy() for _ in range(times)]


def a_hook(net):
    return net.body[2].register_forward_hook(lambda module, args, out: out * 2.0)


def a_hook_of_the_whole(net):
    return net.body.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def a_hook_for_a_while(net):
    handle = a_hook(net)
    called(net)
    handle.remove()


def another_stride(net):
    net.body[3].stride = 3
    net.body[6] = nn.Linear(16, 5)
    with duo.no_grad():
        net.body[6].weight.fill_(0.25)
        net.body[6].bias.zero_()


def another_parameter(net):
    net.last.weight = nn.Parameter(duo.ones(5, 5))


def no_bias(net):
    net.last.bias = None


def other_values(net):
    with duo.no_grad():
        net.last.weight.mul_(2.0)


def its_own_forward(net):
    net.body[2].forward = lambda x: x - 1.0


def another_layer(net):
    net.body[2] = nn.Tanh()


def one_more(net):
    net.body.append(nn.ReLU())


def training_and_back(net):
    net.train()
    called(net)
    net.eval()


def double(net):
    net.double()
    net.float()


@pytest.mark.parametrize(
    "change",
    [a_hook, a_hook_of_the_whole, a_hook_for_a_while, another_stride, another_parameter, no_bias, other_values, its_own_forward, another_layer,
     one_more, training_and_back, double],
)  # fmt: skip
def test_changes_are_seen_at_once(change):
    rows = []
    for on in (True, False):
        native.install() if on else native.remove()
        duo.manual_seed(7)
        net = Net().eval()
        mine = called(net)
        change(net)
        mine += called(net)
        rows.append(mine)
    assert same(*rows)


def test_a_class_that_is_patched(monkeypatch):
    net = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    x = image(2, 6)
    for _ in range(TIMES):
        plain = net(x).numpy().copy()
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, input: input * 3.0)
    for _ in range(TIMES):
        assert np.array_equal(net(x).numpy(), x.numpy() * np.float32(3) * np.float32(3))
    nn.ReLU()(x)
    monkeypatch.undo()
    assert np.array_equal(net(x).numpy(), plain)
    seen = []
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, input: seen.append(input) or input)
    other = nn.Sequential(nn.ReLU())
    for _ in range(TIMES):
        other(x)
    assert len(seen) == TIMES
    assert all(s is x for s in seen)


def test_subclasses_keep_their_forward():
    class Twice(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2.0

    layer = Twice(6, 5)
    x = image(2, 6)
    want = (nn.functional.linear(x, layer.weight, layer.bias) * 2.0).detach().numpy()
    for _ in range(TIMES):
        assert np.array_equal(layer(x).detach().numpy(), want)
        assert np.array_equal(nn.Sequential(layer)(x).detach().numpy(), want)


def test_errors_are_those_of_forward():
    norm, x = nn.BatchNorm2d(3).eval(), image(2, 3, 4, 4)
    free = nn.functional.batch_norm(image(2, 3), norm.running_mean, norm.running_var, norm.weight, norm.bias)
    free.detach().numpy()
    net = nn.Sequential(norm, nn.ReLU())
    for _ in range(TIMES):
        net(x)
        norm(x)
        for wrong in (net, norm):
            with pytest.raises(ShapeError, match="BatchNorm2d"):
                wrong(image(2, 3))
    with pytest.raises(DuoError, match="test_runs"):
        nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))(image(2, 6))


def test_what_is_not_an_eager_tensor():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    x = image(2, 6)
    for _ in range(TIMES):
        want = net(x).detach().numpy().copy()
    assert np.array_equal(net(nn.Parameter(x)).detach().numpy(), want)
    compiled = duo.compile(net)
    for _ in range(TIMES):
        assert np.array_equal(compiled(x).detach().numpy(), want)
    with tf.Graph().as_default():
        place = tf.placeholder(tf.float32, [None, 6])
        out = net(place)
        with tf.Session() as session:
            assert np.array_equal(session.run(out, {place: x.numpy()}), want)


def python_of_duo(program):
    """Names of the functions of duo.nn that the program runs in Python."""
    seen = []

    def profile(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("duo.nn."):
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        program()
    finally:
        sys.setprofile(None)
    return seen


def test_known_layers_run_no_forward():
    if hooks.policy is not None:
        pytest.skip("ops are recorded by Python")
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)).eval(), image(2, 6)
    for _ in range(2 * TIMES):
        net(x).detach().numpy()
    assert python_of_duo(lambda: net(x)) == ["__call__", "__call__"]
    net[1] = nn.Tanh()
    assert "forward" in python_of_duo(lambda: net(x))


def test_gradients_name_the_line_of_the_call():
    net, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), image(2, 6)
    for _ in range(2 * TIMES):
        net(x).sum().backward()
    out = net(x).sum()  # the line
    out.backward()
    with pytest.raises(DuoError, match="test_runs"):
        out.backward()


def test_views_share_what_others_hold():
    """Flatten gives a view: of what a hook or the caller holds, a write to either is seen by the other."""
    net = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Identity())
    first = nn.Sequential(nn.Flatten())
    for _ in range(TIMES):
        x = image(2, 3, 2) * 1.0
        seen = first(x)
        seen.add_(1.0)
        assert np.array_equal(x.numpy().reshape(2, 6), seen.numpy())
        out = net(x)
        want = np.maximum(x.numpy(), 0).reshape(2, 6)
        out.mul_(2.0)
        assert np.array_equal(out.numpy(), want * 2)
        assert net(x).numpy().flags.writeable
    held = []
    net[0].register_forward_hook(lambda module, args, out: held.append(out))
    for _ in range(TIMES):
        out = net(x)
        out.fill_(5.0)
        assert np.array_equal(held[-1].numpy(), np.full((2, 3, 2), 5, np.float32))
    with duo.enable_grad():
        leaf = nn.Parameter(image(2, 3, 2))
        deep = nn.Sequential(nn.Tanh(), nn.Flatten())
        for _ in range(TIMES):
            out = deep(leaf * 1.0)
            out.add_(1.0)
            with pytest.raises(DuoError, match="place"):
                out.sum().backward()


def test_copies_learn_for_themselves():
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), image(2, 6)
    for _ in range(TIMES):
        net(x)
    other = copy.deepcopy(net)
    with duo.no_grad():
        other[0].weight.mul_(2.0)
        other[0].bias.mul_(2.0)
    for _ in range(TIMES):
        assert np.array_equal(other(x).detach().numpy(), net(x).detach().numpy() * 2)


def test_many_types_of_inputs():
    layer = nn.ReLU()
    for n in range(1, 40):
        for _ in range(2):
            assert layer(image(n, 2)).shape == (n, 2)


def test_modules_that_change_at_every_call():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) * float(self.calls)

    net, x = Counting(), image(2, 6)
    first = net(x).detach().numpy().copy()
    for k in range(2, 8):
        assert np.array_equal(net(x).detach().numpy(), first * np.float32(k))
    assert isinstance(net.inner.__dict__["_run"], Run)


def test_threads_share_layers():
    net, x = Net().eval(), image(2, 3, 6, 6)
    with duo.inference_mode():
        want = net(x).numpy().copy()
    bad = []

    def work():
        for k in range(60):
            if k % 20 == 7:
                net.last.note = k  # a change that all see
            with duo.inference_mode():
                bad.append(not np.array_equal(net(x).numpy(), want))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(bad) == 180
    assert not any(bad)
