"""tf.nn's convolutions and pooling, tf.layers: against PyTorch with TensorFlow's paddings worked out by hand; errors."""

import numpy as np
import pytest

import duo.graph as tf
from duo.graph.errors import InvalidArgumentError
from duo_ir.errors import ShapeError

torch = pytest.importorskip("torch")
TF = torch.nn.functional
rng = np.random.default_rng(6)


def f(*shape):
    return rng.standard_normal(shape).astype("f4")


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default():
        yield


def run(make, *arrays):
    """What make gives on placeholders of these arrays, and the gradients of the sum of its squares."""
    feeds = [tf.placeholder(tf.float32, a.shape) for a in arrays]
    y = make(*feeds)
    gradients = tf.gradients(tf.reduce_sum(y * y), feeds)
    with tf.Session() as session:
        return session.run([y, *gradients], dict(zip(feeds, arrays)))


def check(ours, theirs, *arrays):
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = theirs(*tensors)
    (y * y).sum().backward()
    want = [y.detach(), *[t.grad for t in tensors]]
    for a, b in zip(run(ours, *arrays), want, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a, b.numpy(), rtol=2e-4, atol=2e-4 * float(b.abs().max()))


def same(x, kernel, stride, dilation=1, value=0.0):
    """x [n, c, h, w] padded as SAME does it: ceil(size / stride) windows, the odd element behind."""
    pads = []
    for size in reversed(x.shape[2:]):
        total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return TF.pad(x, pads, value=value)


def last(fn):
    """A function of [n, c, h, w] as one of [n, h, w, c]; filters come as [h, w, in, out]."""

    def wrapped(x, *rest):
        rest = [r.permute(3, 2, 0, 1) if r.ndim == 4 else r for r in rest]
        return fn(x.permute(0, 3, 1, 2), *rest).permute(0, 2, 3, 1)

    return wrapped


@pytest.mark.parametrize("stride, kernel, dilation", [(1, 3, 1), (2, 3, 1), (2, 2, 1), (3, 2, 1), (1, 2, 3)])
def test_conv2d(stride, kernel, dilation):
    x, w = f(2, 7, 8, 4), f(kernel, kernel, 4, 3)
    check(
        lambda x, w: tf.nn.conv2d(x, w, stride, "VALID", dilations=dilation),
        last(lambda x, w: TF.conv2d(x, w, None, stride, 0, dilation)), x, w,
    )  # fmt: skip
    check(
        lambda x, w: tf.nn.conv2d(x, w, [1, stride, stride, 1], "SAME", dilations=[1, dilation, dilation, 1]),
        last(lambda x, w: TF.conv2d(same(x, kernel, stride, dilation), w, None, stride, 0, dilation)), x, w,
    )  # fmt: skip
    check(
        lambda x, w: tf.nn.conv2d(x, w, [1, 1, stride, stride], "SAME", data_format="NCHW", dilations=dilation),
        lambda x, w: TF.conv2d(same(x, kernel, stride, dilation), w.permute(3, 2, 0, 1), None, stride, 0, dilation),
        x.transpose(0, 3, 1, 2).copy(), w,
    )  # fmt: skip


def test_explicit_paddings_groups_and_other_ranks():
    x, w = f(2, 7, 8, 4), f(3, 3, 4, 3)
    check(
        lambda x, w: tf.nn.conv2d(x, filters=w, strides=2, padding=[[0, 0], [1, 2], [0, 1], [0, 0]]),
        last(lambda x, w: TF.conv2d(TF.pad(x, [0, 1, 1, 2]), w, None, 2)), x, w,
    )  # fmt: skip
    check(
        lambda x, w: tf.nn.conv2d(x, w, 1, "VALID"), last(lambda x, w: TF.conv2d(x, w, groups=2)), x, f(3, 3, 2, 6)
    )  # fmt: skip
    check(
        lambda x, w: tf.nn.conv1d(x, w, 2, "VALID"),
        lambda x, w: TF.conv1d(x.permute(0, 2, 1), w.permute(2, 1, 0), None, 2).permute(0, 2, 1), f(2, 9, 3), f(4, 3, 2),
    )  # fmt: skip
    check(
        lambda x, w: tf.nn.conv3d(x, w, [1, 1, 2, 1, 1], "VALID"),
        lambda x, w: TF.conv3d(x.permute(0, 4, 1, 2, 3), w.permute(4, 3, 0, 1, 2), None, (1, 2, 1)).permute(0, 2, 3, 4, 1),
        f(1, 4, 5, 6, 2), f(2, 3, 3, 2, 3),
    )  # fmt: skip


def test_depthwise_and_separable():
    def depthwise(x, w):
        h, v, c, times = w.shape
        return TF.conv2d(x.permute(0, 3, 1, 2), w.permute(2, 3, 0, 1).reshape(c * times, 1, h, v), groups=c).permute(
            0, 2, 3, 1
        )

    x, w, p = f(2, 6, 7, 3), f(3, 2, 3, 2), f(1, 1, 6, 4)
    check(lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "VALID"), depthwise, x, w)
    check(
        lambda x, w, p: tf.nn.separable_conv2d(x, w, p, [1, 1, 1, 1], "VALID"),
        lambda x, w, p: torch.einsum("nhwc,co->nhwo", depthwise(x, w), p[0, 0]), x, w, p,
    )  # fmt: skip


@pytest.mark.parametrize(
    "padding, size", [("SAME", (14, 16)), ("SAME", (13, 15)), ("VALID", (15, 17)), ("VALID", (16, 18))]
)
def test_conv2d_transpose_is_the_gradient_of_conv2d(padding, size):
    y, w = f(2, 7, 8, 4), f(3, 3, 3, 4)
    x = tf.placeholder(tf.float32, [2, *size, 3])
    weights = tf.placeholder(tf.float32, w.shape)
    forward = tf.nn.conv2d(x, weights, 2, padding)
    (gradient,) = tf.gradients(forward, [x], grad_ys=[tf.constant(y)])
    transposed = tf.nn.conv2d_transpose(tf.constant(y), weights, [2, *size, 3], [1, 2, 2, 1], padding)
    assert transposed.shape == (2, *size, 3)
    with tf.Session() as session:
        a, b = session.run([gradient, transposed], {x: np.zeros((2, *size, 3), "f4"), weights: w})
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel, stride", [(2, 2), (3, 2), (3, 1), (2, 3)])
def test_pooling(kernel, stride):
    x = f(2, 7, 8, 3)
    check(lambda x: tf.nn.max_pool2d(x, kernel, stride, "VALID"), last(lambda x: TF.max_pool2d(x, kernel, stride)), x)
    check(
        lambda x: tf.nn.max_pool(x, [1, kernel, kernel, 1], [1, stride, stride, 1], "SAME"),
        last(lambda x: TF.max_pool2d(same(x, kernel, stride, value=-np.inf), kernel, stride)), x,
    )  # fmt: skip
    check(
        lambda x: tf.nn.avg_pool(x, kernel, stride, "SAME"),
        last(
            lambda x: TF.avg_pool2d(same(x, kernel, stride), kernel, stride)
            / TF.avg_pool2d(same(torch.ones_like(x), kernel, stride), kernel, stride)
        ), x,
    )  # fmt: skip
    check(
        lambda x: tf.nn.avg_pool2d(x, [1, 1, kernel, kernel], stride, "VALID", data_format="NCHW"),
        lambda x: TF.avg_pool2d(x, kernel, stride), x.transpose(0, 3, 1, 2).copy(),
    )  # fmt: skip


def test_fused_batch_norm():
    x, s, o = f(2, 4, 5, 3), f(3), f(3)
    check(
        lambda x, s, o: tf.nn.fused_batch_norm(x, s, o, epsilon=1e-2)[0] ** 3,
        last(lambda x, s, o: TF.batch_norm(x, None, None, s, o, True, 0.1, 1e-2) ** 3), x, s, o,
    )  # fmt: skip
    y, mean, variance = tf.nn.fused_batch_norm(x, s, o)
    z, m, v = tf.nn.fused_batch_norm(x, s, o, f(3), np.abs(f(3)), is_training=False)
    _, mixed, _ = tf.nn.fused_batch_norm(x, s, o, tf.ones([3]), tf.ones([3]), exponential_avg_factor=0.25)
    with tf.Session() as session:
        y, mean, variance, z, m, v, mixed = session.run([y, mean, variance, z, m, v, mixed])
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, x.var((0, 1, 2), ddof=1), rtol=1e-4)
    np.testing.assert_allclose(z, (x - m) / np.sqrt(v + 1e-3) * s + o, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixed, 0.75 + 0.25 * mean, rtol=1e-5)


def test_layers_make_tensorflows_variables():
    x = tf.placeholder(tf.float32, [None, 8, 8, 3])
    y = tf.layers.conv2d(x, 4, 3, padding="same", activation=tf.nn.relu)
    y = tf.layers.batch_normalization(y, training=True)
    y = tf.layers.average_pooling2d(tf.layers.max_pooling2d(y, 2, 2), 2, 1)
    y = tf.layers.conv2d_transpose(tf.layers.conv2d(y, 5, (3, 2), use_bias=False, name="mine"), 2, 3, 2)
    z = tf.layers.conv1d(tf.placeholder(tf.float32, [None, 3, 9]), 2, 3, data_format="channels_first")
    assert y.shape.as_list() == [None, 3, 5, 2] and z.shape.as_list() == [None, 2, 7]
    assert {v.name: v.shape.as_list() for v in tf.global_variables()} == {
        "conv2d/kernel:0": [3, 3, 3, 4], "conv2d/bias:0": [4], "batch_normalization/gamma:0": [4],
        "batch_normalization/beta:0": [4], "batch_normalization/moving_mean:0": [4],
        "batch_normalization/moving_variance:0": [4], "mine/kernel:0": [3, 2, 4, 5], "conv2d_transpose/kernel:0": [3, 3, 2, 5],
        "conv2d_transpose/bias:0": [2], "conv1d/kernel:0": [3, 3, 2], "conv1d/bias:0": [2],
    }  # fmt: skip
    assert [v.name for v in tf.trainable_variables() if "moving" in v.name] == []
    assert len(tf.get_collection(tf.GraphKeys.UPDATE_OPS)) == 2


def test_batch_normalization_moves_its_statistics_with_its_update_ops():
    x, data = tf.placeholder(tf.float32, [None, 3]), f(16, 3) * 2 + 1
    training = tf.placeholder(tf.bool, [])
    y = tf.layers.batch_normalization(x, momentum=0.9, training=training, name="bn")
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    mean, variance = (v for v in tf.global_variables() if "moving" in v.name)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        session.run(y, {x: data, training: True})
        assert session.run(mean).tolist() == [0, 0, 0]
        normal, *_ = session.run([y, *updates], {x: data, training: True})
        np.testing.assert_allclose(normal, (data - data.mean(0)) / np.sqrt(data.var(0) + 1e-3), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(session.run(mean), 0.1 * data.mean(0), rtol=1e-5)
        np.testing.assert_allclose(session.run(variance), 0.9 + 0.1 * data.var(0), rtol=1e-5)
        before = session.run([mean, variance])
        tested, *_ = session.run([y, *updates], {x: data, training: False})
        assert all(np.array_equal(a, b) for a, b in zip(before, session.run([mean, variance])))
        np.testing.assert_allclose(tested, (data - before[0]) / np.sqrt(before[1] + 1e-3), rtol=1e-4, atol=1e-5)


def test_cross_entropy_by_position_is_labels_then_logits():
    labels, logits = tf.constant([2, 0]), tf.constant(f(2, 3))
    by_name = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    by_position = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    with tf.Session() as session:
        a, b = session.run([by_name, by_position])
    assert np.array_equal(a, b)
    with pytest.raises(InvalidArgumentError, match=r"labels=\.\.\. and logits=\.\.\., or the two in that order"):
        tf.nn.sparse_softmax_cross_entropy_with_logits(logits)


def test_errors():
    x = tf.placeholder(tf.float32, [None, 8, 8, 3])
    w = tf.ones([3, 3, 3, 4])
    with pytest.raises(InvalidArgumentError, match="Conv2D: data_format is 'NHWC' or 'NCHW', not 'CHWN'"):
        tf.nn.conv2d(x, w, 1, "SAME", data_format="CHWN")
    with pytest.raises(InvalidArgumentError, match="padding is 'SAME', 'VALID' or pairs"):
        tf.nn.conv2d(x, w, 1, "FULL")
    with pytest.raises(InvalidArgumentError, match="strides of the batch and the channels are 1"):
        tf.nn.conv2d(x, w, [2, 1, 1, 1], "SAME")
    with pytest.raises(InvalidArgumentError, match="the batch and the channels take no padding"):
        tf.nn.conv2d(x, w, 1, [[1, 0], [0, 0], [0, 0], [0, 0]])
    with pytest.raises(ShapeError, match="SAME with stride 2 needs a known spatial size"):
        tf.nn.conv2d(tf.placeholder(tf.float32, [1, None, 8, 3]), w, 2, "SAME")
    with pytest.raises(ShapeError, match=r"the kernel reads 3 channels, .*but the input has 5"):
        tf.nn.conv2d(tf.ones([1, 8, 8, 5]), w, 1, "SAME")
    with pytest.raises(ShapeError, match="spatial dim 0 of a result with 9 elements comes from 9, not 8"):
        tf.nn.conv2d_transpose(x, tf.ones([3, 3, 4, 3]), [2, 9, 8, 4], 1)
    with pytest.raises(ShapeError, match="a window of 9 elements does not fit into 8"):
        tf.nn.max_pool2d(x, 9, 1, "VALID")
    with pytest.raises(ShapeError, match="only the batch may be unknown"):
        tf.nn.max_pool2d(tf.placeholder(tf.float32, [1, None, 8, 3]), 2, 1, "VALID")
    with pytest.raises(ShapeError, match="known number of channels"):
        tf.layers.conv2d(tf.placeholder(tf.float32, [1, 8, 8, None]), 4, 3)
