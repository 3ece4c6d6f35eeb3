"""Batch, instance and group norm layers against PyTorch: outputs, gradients, running statistics; one program in every mode."""

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn, optim
from duo_ir.errors import ArgumentError, ShapeError

torch = pytest.importorskip("torch")
rng = np.random.default_rng(1)


def pair(name, *args, **kw):
    """duo's layer and PyTorch's with the same weights, away from 1 and 0."""
    ours, theirs = getattr(nn, name)(*args, **kw), getattr(torch.nn, name)(*args, **kw)
    for p in theirs.parameters():
        p.data = torch.from_numpy(rng.standard_normal(p.shape).astype("f4"))
    ours.load_state_dict({k: duo.tensor(v.numpy()) for k, v in theirs.state_dict().items()})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    return ours, theirs


def same(a, b, tolerance=1e-5):
    a, b = (np.asarray(v.detach()) for v in (a, b))
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def step(ours, theirs, x):
    """Forward and backward; everything that changes compared."""
    a, b = duo.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, z = ours(a), theirs(b)
    same(y, z)
    g = rng.standard_normal(x.shape).astype("f4")
    (y * duo.tensor(g)).sum().backward()
    (z * torch.tensor(g)).sum().backward()
    same(a.grad, b.grad, 3e-5)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        same(p.grad, q.grad, 3e-5)
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values()):
        same(p, q)
        assert not p.requires_grad, name


SHAPES = {1: [(6, 3), (4, 3, 5)], 2: [(4, 3, 5, 2)], 3: [(2, 3, 2, 3, 4)]}


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_batch_norm(dims, momentum):
    for shape in SHAPES[dims]:
        ours, theirs = pair(f"BatchNorm{dims}d", 3, momentum=momentum)
        for _ in range(3):
            step(ours, theirs, (rng.standard_normal(shape) * 2 + 1).astype("f4"))
        ours.eval(), theirs.eval()
        step(ours, theirs, rng.standard_normal(shape).astype("f4"))
        assert ours.num_batches_tracked.item() == 3


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
def test_batch_norm_options(options):
    ours, theirs = pair("BatchNorm2d", 3, **options)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        step(ours, theirs, rng.standard_normal((4, 3, 5, 2)).astype("f4"))


def test_instance_and_group_norm():
    step(*pair("InstanceNorm2d", 3, affine=True), rng.standard_normal((2, 3, 4, 5)).astype("f4"))
    step(*pair("InstanceNorm1d", 3), rng.standard_normal((2, 3, 9)).astype("f4"))
    step(*pair("GroupNorm", 2, 6), rng.standard_normal((2, 6, 4, 5)).astype("f4"))
    step(*pair("GroupNorm", 3, 6, affine=False), rng.standard_normal((2, 6)).astype("f4"))


def test_resetting_and_freezing_statistics():
    layer = nn.BatchNorm1d(2)
    layer(duo.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert layer.running_mean.tolist() == pytest.approx([0.2, 0.4])
    before = layer.running_mean.tolist()
    layer.eval()(duo.ones(4, 2))
    assert layer.running_mean.tolist() == before and layer.num_batches_tracked.item() == 1
    layer.reset_running_stats()
    assert layer.running_mean.tolist() == [0, 0] and layer.running_var.tolist() == [1, 1]


def test_half_precision_statistics_stay_in_float32():
    layer = nn.BatchNorm2d(3)
    x = duo.tensor(rng.standard_normal((2, 3, 4, 4)).astype("f4")).to(duo.bfloat16)
    y = layer(x)
    assert y.dtype is duo.bfloat16 and layer.running_mean.dtype is duo.float32
    want = nn.BatchNorm2d(3)(x.to(duo.float32)).to(duo.bfloat16)
    assert (y == want).all().item()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(2), nn.BatchNorm1d(8, momentum=None)
        self.full, self.out = nn.Linear(18, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.norm1(x)), 2)
        return self.out(nn.functional.relu(self.norm2(self.full(x.flatten(1)))))


def batch():
    r = np.random.default_rng(9)
    return r.standard_normal((8, 2, 6, 6)).astype("f4"), r.integers(0, 3, 8)


def train(mode, steps=6):
    """The losses and the state after `steps` of SGD with momentum."""
    duo.manual_seed(0)
    model, (x, y) = Model(), batch()
    optimizer, losses = optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    if mode == "graph":
        with tf.Graph().as_default() as graph:
            inputs, target = tf.placeholder(tf.float32, [None, 2, 6, 6]), tf.placeholder(tf.int64, [None])
            loss = nn.functional.cross_entropy(model(inputs), target)
            minimize = optimizer.minimize(loss)
        session = tf.Session(graph=graph)
        losses = [session.run([loss, minimize], {inputs: x, target: y})[0] for _ in range(steps)]
    else:

        def step(x, y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        run = duo.compile(step) if mode == "compile" else step
        losses = [run(duo.tensor(x), duo.tensor(y)).item() for _ in range(steps)]
    return [np.float32(v) for v in losses], {k: v.numpy().copy() for k, v in model.state_dict().items()}


def test_every_mode_trains_to_the_same_bits():
    losses, state = train("eager")
    assert losses[-1] < losses[0]
    assert state["norm1.num_batches_tracked"] == state["norm2.num_batches_tracked"] == 6
    for mode in ("compile", "graph"):
        again, other = train(mode)
        assert again == losses, mode
        for name, value in state.items():
            assert value.dtype == other[name].dtype and np.array_equal(value, other[name]), (mode, name)


def test_a_graph_evaluates_with_the_statistics_it_trained():
    model, (x, _) = Model(), batch()
    with tf.Graph().as_default() as graph:
        inputs = tf.placeholder(tf.float32, [None, 2, 6, 6])
        trained = model(inputs)
        tested = model.eval()(inputs)
    with tf.Session(graph=graph) as session:
        session.run(trained, {inputs: x})
        one = session.run(tested, {inputs: x})
        assert model.norm1.num_batches_tracked.item() == 1
        assert np.array_equal(one, session.run(tested, {inputs: x}))
        assert np.array_equal(one, model(duo.tensor(x)).detach().numpy())


def test_channel_dropout_and_upsampling():
    x = duo.ones(4, 8, 3, 3)
    y = nn.Dropout2d(0.5)(x)
    per_channel = y.reshape(4, 8, 9)
    assert (per_channel == per_channel[:, :, :1]).all().item() and set(np.unique(y.numpy())) == {0.0, 2.0}
    assert (nn.Dropout2d(0.5).eval()(x) == x).all().item()
    z = rng.standard_normal((2, 3, 4, 5)).astype("f4")
    for options in ({"scale_factor": 2}, {"size": (8, 15)}, {"size": 7}, {"scale_factor": 0.5}, {"scale_factor": 1.6}):
        a, b = duo.tensor(z, requires_grad=True), torch.tensor(z, requires_grad=True)
        u, v = nn.Upsample(**options)(a), torch.nn.Upsample(**options)(b)
        same(u, v, 0)
        (u * u).sum().backward(), (v * v).sum().backward()
        same(a.grad, b.grad)
    assert repr(nn.Upsample(scale_factor=2)) == repr(torch.nn.Upsample(scale_factor=2))


def test_errors():
    with pytest.raises(ShapeError, match=r"BatchNorm2d: the input needs 4 dimensions, got f32\[2,3\]"):
        nn.BatchNorm2d(3)(duo.ones(2, 3))
    with pytest.raises(ShapeError, match=r"one number per channel, shape \[4\], is needed, got f32\[3\]"):
        nn.BatchNorm2d(3)(duo.ones(2, 4, 5, 5))
    with pytest.raises(ShapeError, match="more than one value per channel"):
        nn.BatchNorm1d(3)(duo.ones(1, 3))
    with pytest.raises(ArgumentError, match="5 channels do not make 2 groups"):
        nn.GroupNorm(2, 5)
    with pytest.raises(ArgumentError, match="running statistics"):
        nn.InstanceNorm2d(3, track_running_stats=True)
    with pytest.raises(ArgumentError, match="the mode is 'nearest'"):
        nn.functional.interpolate(duo.ones(1, 1, 2, 2), scale_factor=2, mode="bilinear")
