"""Graph mode's devices: scopes and their names, what a Session makes of them, and programs on the (emulated) GPU with the bits of the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import runtime
from duo_backends.cuda import backend
from duo_ir.errors import DeviceError
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401

X = np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as made:
        yield made


# --------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "given, full",
    [
        ("/gpu:0", "/device:GPU:0"), ("/device:GPU:1", "/device:GPU:1"), ("GPU:0", "/device:GPU:0"), ("/cpu:0", "/device:CPU:0"),
        ("", ""), ("/job:localhost/replica:0/task:0/device:gpu:2", "/job:localhost/replica:0/task:0/device:GPU:2"), ("/gpu", "/device:GPU:*"),
        ("gpu:*", "/device:GPU:*"),
    ],
)  # fmt: skip
def test_names(given, full):
    with tf.device(given):
        x = tf.constant(X)
    assert x.device == x.op.device == full == tf.DeviceSpec.from_string(given).to_string()


@pytest.mark.parametrize("wrong", ["/tpu:0", "/gpu:x", "gpu0", "/job:worker/gpu:0", "/task:1", "/gpu:0garbage"])
def test_wrong_names(wrong):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"is no device|of another process"), tf.device(wrong):
        pass


def test_scopes_nest():
    with tf.device("/job:localhost"), tf.device("/gpu:1"):
        a = tf.constant(X)
        with tf.device("/cpu:0"):
            b = a + 1
            with tf.device(None):
                c = tf.identity(b)
            with tf.device(lambda op: "/gpu:3" if op.type == "matmul" else op.device):
                d, e = tf.matmul(a, tf.transpose(a)), a * 2
        f = a - 1
    assert a.device == f.device == "/job:localhost/device:GPU:1" and b.device == "/job:localhost/device:CPU:0"
    assert c.device == "" and e.device == "/job:localhost/device:CPU:0"
    assert d.device in ("/job:localhost/device:GPU:3", "/job:localhost/device:CPU:0") and (a * 2).device == ""


# ------------------------------------------------------------------------------------------------- where there is no GPU
def model():
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    with tf.device("/gpu:0"):
        w = tf.get_variable("w", [3, 2], initializer=tf.constant_initializer(0.5))
        h = tf.nn.relu(tf.matmul(x, w), name="hidden")
    loss = tf.reduce_mean(tf.square(h - 1.0))
    return x, w, loss


def test_a_gpu_that_is_not_there(monkeypatch):
    def no_driver(number):
        raise DeviceError("there is no driver")

    monkeypatch.setattr(backend, "PycudaDriver", no_driver)
    runtime.use_backend("cuda:0", None)
    x, w, loss = model()
    with tf.Session() as session, pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run(w.initializer)
    for part in ("'/device:GPU:0'", "cannot be used", "allow_soft_placement=True", "test_cuda_graph_mode.py:"):
        assert part in str(caught.value)
    with tf.Session(config=tf.ConfigProto(allow_soft_placement=True)) as session:
        session.run(tf.global_variables_initializer())
        assert session.run(loss, {x: X}) == pytest.approx(0.74, abs=0.2)
    with tf.Session() as session:
        assert session.run(tf.constant(2.0) * 3) == 6  # nothing of it is placed


def test_configurations_are_taken():
    config = tf.ConfigProto(
        allow_soft_placement=True, intra_op_parallelism_threads=2, inter_op_parallelism_threads=1, device_count={"GPU": 0},
        gpu_options=tf.GPUOptions(per_process_gpu_memory_fraction=0.4, allow_growth=True),
    )  # fmt: skip
    config.gpu_options.allow_growth = False
    config.log_device_placement = False
    x, _, loss = model()
    with tf.Session(config=config) as session:
        session.run(tf.global_variables_initializer())
        assert session.run(loss, {x: X}).dtype == np.float32
    with pytest.raises(TypeError):
        tf.ConfigProto(allow_soft_placements=True)


# ----------------------------------------------------------------------------------------------------------- on the GPU
def trained(config, steps=4):
    x, w, loss = model()
    step = tf.train.AdamOptimizer(0.1).minimize(loss)
    session = tf.Session(config=config)
    session.run(tf.global_variables_initializer())
    losses = [session.run([loss, step], {x: X + k})[0] for k in range(steps)]
    return session, w, losses


@needs_emulator
def test_training_has_the_bits_of_the_cpu(gpu, capsys):  # noqa: F811
    launched = gpu.runtime.launches
    session, w, losses = trained(tf.ConfigProto(log_device_placement=True))
    said = capsys.readouterr().err
    assert gpu.runtime.launches > launched and "hidden: /device:GPU:0 runs on cuda:0" in said
    assert session._values[w._state]._val.info.device == "cuda:0"
    values = session.run(w)
    assert isinstance(values, np.ndarray) and session._values[w._state]._val.info.device == "cuda:0"
    with tf.Graph().as_default():
        hidden = tf.ConfigProto(allow_soft_placement=True, device_count={"GPU": 0})
        other, w2, expected = trained(hidden)
        assert losses == expected and (other.run(w2) == values).all()
        assert other._values[w2._state]._val.info.device == "cpu"


@needs_emulator
def test_variables_are_overwritten_where_they_are(gpu):  # noqa: F811
    with tf.device("/gpu:0"):
        v = tf.Variable(np.zeros(1000, "f4"))
        old = v + 0
        step = tf.assign_add(v, np.ones(1000, "f4"))
    with tf.Session() as session:
        session.run(v.initializer)
        session.run(step.op)
        buffer = session._values[v._state]._val.buf
        session.run(step.op)
        assert session._values[v._state]._val.buf is buffer
        before, after = session.run([old, step])
        assert before[0] == 2 and after[0] == 3 and session.run(v)[0] == 3
        fetched = session.run(v)
        session.run(step.op)
        assert fetched[0] == 3


@needs_emulator
def test_variables_move_between_devices(gpu, tmp_path):  # noqa: F811
    v = tf.Variable(X)
    on_cpu = tf.assign(v, v * 2)
    with tf.device("/gpu:0"):
        on_gpu = tf.assign(v, v + 1)
    saver = tf.train.Saver()
    with tf.Session() as session:
        session.run(v.initializer)
        want = X
        for k in range(5):
            got = session.run(on_gpu if k % 2 else on_cpu)
            want = want + 1 if k % 2 else want * 2
            assert (got == want).all() and (session.run(v) == want).all()
        session.run(on_gpu)
        path = saver.save(session, tmp_path / "model")
        session.run(on_gpu)
        saver.restore(session, path)
        assert (session.run(on_gpu) == want + 2).all()
        v.load(X, session)
        assert (session.run(on_gpu) == X + 1).all() and session.is_initialized(v)


@needs_emulator
def test_control_flow_random_numbers_and_feeds(gpu):  # noqa: F811
    x = tf.placeholder(tf.float32, [3])
    flag = tf.placeholder(tf.bool, [])

    def branch():
        with tf.device("/gpu:0"):
            return x * 2

    chosen = tf.cond(flag, branch, lambda: x - 1)
    i, total = tf.while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t + chosen), [0, tf.zeros([3])])
    noise = tf.random_uniform([5])
    with tf.Session() as session:
        launched = gpu.runtime.launches
        values = np.arange(3, dtype="f4")
        for on, want in ((True, values * 6), (False, (values - 1) * 3)):
            assert (session.run(total, {x: values, flag: on}) == want).all()
        assert gpu.runtime.launches > launched
        assert session.run([i, chosen], {x: values, flag: False})[0] == 3
    draws = []
    for device in ("/gpu:0", "/cpu:0"):
        with tf.Graph().as_default(), tf.device(device):
            duo.manual_seed(7)
            noise = tf.random_normal([5])
            with tf.Session() as session:
                draws.append([session.run(noise).tolist() for _ in range(3)])
    assert draws[0] == draws[1] and draws[0][0] != draws[0][1]


@needs_emulator
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_modules_of_eager_mode_take_part(gpu, where):  # noqa: F811
    duo.manual_seed(1)
    layer = duo.nn.Linear(3, 2).to(where)
    x = tf.placeholder(tf.float32, [None, 3])
    with tf.device("/gpu:0"):
        loss = tf.reduce_sum(tf.square(layer(x)))
    step = duo.optim.SGD(layer.parameters(), lr=0.1).minimize(loss)
    with tf.Session() as session:
        losses = [session.run([loss, step], {x: X})[0] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert all(p.device.type == where for p in layer.parameters())
    assert layer(duo.tensor(X, device=where)).square().sum().item() < losses[2]


@needs_emulator
def test_an_index_out_of_range_is_an_error_of_the_run(gpu):  # noqa: F811
    table, at = tf.constant(X), tf.placeholder(tf.int32, [None])
    with tf.device("/gpu:0"):
        rows = tf.gather(table, at)
    with tf.Session() as session:
        assert (session.run(rows, {at: [3, 0]}) == X[[3, 0]]).all()
        with pytest.raises(IndexError, match="7"):
            session.run(rows, {at: [7]})
        assert (session.run(rows, {at: [1]}) == X[[1]]).all()


@needs_emulator
def test_fast_numerics_are_for_placed_programs(gpu):  # noqa: F811
    a, b = (np.random.default_rng(k).normal(size=(32, 32)).astype("f4") for k in (1, 2))
    plain = tf.matmul(tf.constant(a), tf.constant(b))
    with tf.device("/gpu:0"):
        placed = tf.matmul(tf.constant(a), tf.constant(b))
    with tf.Session() as session:
        strict = session.run(placed)
        with duo.numerics("fast"):
            fast = session.run(placed)
            assert (session.run(plain) == strict).all()
        assert not (fast == strict).all() and np.allclose(fast, strict, atol=0.05)
        assert (session.run(placed) == strict).all()


@needs_emulator
def test_what_there_is(gpu):  # noqa: F811
    assert tf.test.is_gpu_available() and tf.test.gpu_device_name() == "/device:GPU:0" and tf.test.is_built_with_cuda()
    assert tf.test.is_gpu_available(min_cuda_compute_capability=(9, 0))
    assert not tf.test.is_gpu_available(min_cuda_compute_capability=(10, 0))
    assert [d.name for d in tf.config.list_physical_devices("GPU")] == ["/physical_device:GPU:0"]
    assert [d.device_type for d in tf.config.experimental.list_physical_devices()] == ["CPU", "GPU"]
    tf.config.experimental.set_memory_growth(tf.config.list_physical_devices("GPU")[0], True)
    with tf.device("/gpu:0"):
        y = tf.constant(X) * 2
    visible = tf.ConfigProto(gpu_options=tf.GPUOptions(visible_device_list="0", per_process_gpu_memory_fraction=0.5))
    try:
        with tf.Session(config=visible) as session:
            assert (session.run(y) == X * 2).all()
        assert gpu.runtime.pool.limit == gpu.driver.properties.memory // 2
    finally:
        gpu.runtime.pool.limit = None
    listed = tf.GPUOptions(visible_device_list="x")
    for config, said in (
        (tf.ConfigProto(device_count={"GPU": 0}), "hides '/gpu:0'"),
        (tf.ConfigProto(gpu_options=listed), "numbers with commas"),
    ):
        with tf.Session(config=config) as session, pytest.raises(tf.errors.InvalidArgumentError, match=said):
            session.run(y)
