"""`tf.layers`: layers that make their own variables, `name/kernel`, `name/bias`, `name/gamma`...; and those that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duo import functional as F
from duo.graph import arrays, convolution, math, nn
from duo.graph.control_flow import cond
from duo.graph.errors import InvalidArgumentError
from duo.graph.initializers import ones_initializer, zeros_initializer
from duo.graph.tensor import convert_to_tensor, named
from duo.graph.variables import GraphKeys, assign, get_variable, variable_scope
from duo_ir.errors import ShapeError


def dense(
    inputs: Any,
    units: int,
    activation: Callable[[Any], Any] | None = None,
    use_bias: bool = True,
    kernel_initializer: Any = None,
    bias_initializer: Any = None,
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
) -> Any:
    """activation(inputs @ kernel + bias): [..., n] -> [..., units], with a kernel [n, units]."""
    x = convert_to_tensor(inputs)
    n = x._type.shape[-1]
    if not isinstance(n, int):
        raise ShapeError(f"dense: the last size of {x.name!r} must be known, its shape is {x.shape!r}")
    with variable_scope(name, default_name="dense", reuse=reuse):
        kernel = get_variable("kernel", [n, units], x.dtype, kernel_initializer, kernel_regularizer, trainable)
        out = math.matmul(x, kernel) if x.ndim == 2 else named(x.graph, "Tensordot", None, lambda: F.matmul(x, kernel))
        if use_bias:
            bias = get_variable(
                "bias", [units], x.dtype, bias_initializer or zeros_initializer(), bias_regularizer, trainable
            )
            out = nn.bias_add(out, bias)
        return out if activation is None else activation(out)


def dropout(
    inputs: Any,
    rate: Any = 0.5,
    noise_shape: Any = None,
    seed: int | None = None,
    training: Any = False,
    name: str | None = None,
) -> Any:
    """Dropout while `training` (a Python bool or a bool tensor) holds."""
    x = convert_to_tensor(inputs)
    if isinstance(training, bool):
        return nn.dropout(x, rate=rate, seed=seed, name=name) if training else x
    return cond(training, lambda: nn.dropout(x, rate=rate, seed=seed), lambda: x, name=name or "dropout")


def flatten(inputs: Any, name: str | None = None) -> Any:
    """[batch, ...] -> [batch, everything else]."""
    x = convert_to_tensor(inputs)
    return named(x.graph, "flatten", name, lambda: F.flatten(x, 1) if x.ndim > 1 else F.unsqueeze(x, 1))


# ------------------------------------------------------------------------------------------------------------ images
_FORMATS = {"channels_last": ("NWC", "NHWC", "NDHWC"), "channels_first": ("NCW", "NCHW", "NCDHW")}


def _format(name: str, data_format: str, n: int) -> str:
    if data_format not in _FORMATS:
        raise InvalidArgumentError(f"{name}: data_format is 'channels_last' or 'channels_first', not {data_format!r}")
    return _FORMATS[data_format][n - 1]


def _channels(name: str, x: Any, layout: str) -> int:
    c = x._type.shape[layout.index("C")] if x.ndim == len(layout) else None
    if not isinstance(c, int):
        raise ShapeError(f"{name}: it takes {layout} with a known number of channels, got {x._type}")
    return c


def _convolution(name_of: str, n: int, apply: Callable, inputs: Any, filters: int, kernel_size: Any, **o: Any) -> Any:
    """What conv1d, conv2d and conv3d have in common; `apply` is tf.nn's function."""
    x = convert_to_tensor(inputs)
    layout = _format(name_of, o["data_format"], n)
    channels = _channels(name_of, x, layout)
    kernel = convolution.steps(name_of, "kernel_size", kernel_size, n, False)
    with variable_scope(o["name"], default_name=name_of, reuse=o["reuse"]):
        w = get_variable(
            "kernel", [*kernel, channels, filters], x.dtype, o["kernel_initializer"], o["kernel_regularizer"], o["trainable"]
        )  # fmt: skip
        out = apply(x, w, o["strides"], o["padding"].upper(), data_format=layout, dilations=o["dilation_rate"])
        return _finished(out, filters, layout, o)


def _finished(out: Any, filters: int, layout: str, o: dict[str, Any]) -> Any:
    """The bias and the activation of a convolution."""
    if o["use_bias"]:
        start = o["bias_initializer"] or zeros_initializer()
        bias = get_variable("bias", [filters], out.dtype, start, o["bias_regularizer"], o["trainable"])
        out = nn.bias_add(out, bias, layout)
    return out if o["activation"] is None else o["activation"](out)


def conv1d(
    inputs: Any, filters: int, kernel_size: Any, strides: Any = 1, padding: str = "valid", data_format: str = "channels_last",
    dilation_rate: Any = 1, activation: Callable[[Any], Any] | None = None, use_bias: bool = True, kernel_initializer: Any = None,
    bias_initializer: Any = None, kernel_regularizer: Any = None, bias_regularizer: Any = None, trainable: bool = True,
    name: str | None = None, reuse: Any = None,
) -> Any:  # fmt: skip
    """activation(conv1d(inputs) + bias) with a kernel [width, in, filters]."""
    return _convolution(
        "conv1d", 1, nn.conv1d, inputs, filters, kernel_size, strides=strides, padding=padding, data_format=data_format,
        dilation_rate=dilation_rate, activation=activation, use_bias=use_bias, kernel_initializer=kernel_initializer,
        bias_initializer=bias_initializer, kernel_regularizer=kernel_regularizer, bias_regularizer=bias_regularizer,
        trainable=trainable, name=name, reuse=reuse,
    )  # fmt: skip


def conv2d(
    inputs: Any, filters: int, kernel_size: Any, strides: Any = (1, 1), padding: str = "valid",
    data_format: str = "channels_last", dilation_rate: Any = (1, 1), activation: Callable[[Any], Any] | None = None,
    use_bias: bool = True, kernel_initializer: Any = None, bias_initializer: Any = None, kernel_regularizer: Any = None,
    bias_regularizer: Any = None, trainable: bool = True, name: str | None = None, reuse: Any = None,
) -> Any:  # fmt: skip
    """activation(conv2d(inputs) + bias) with a kernel [height, width, in, filters]."""
    return _convolution(
        "conv2d", 2, nn.conv2d, inputs, filters, kernel_size, strides=strides, padding=padding, data_format=data_format,
        dilation_rate=dilation_rate, activation=activation, use_bias=use_bias, kernel_initializer=kernel_initializer,
        bias_initializer=bias_initializer, kernel_regularizer=kernel_regularizer, bias_regularizer=bias_regularizer,
        trainable=trainable, name=name, reuse=reuse,
    )  # fmt: skip


def conv2d_transpose(
    inputs: Any, filters: int, kernel_size: Any, strides: Any = (1, 1), padding: str = "valid",
    data_format: str = "channels_last", activation: Callable[[Any], Any] | None = None, use_bias: bool = True,
    kernel_initializer: Any = None, bias_initializer: Any = None, kernel_regularizer: Any = None, bias_regularizer: Any = None,
    trainable: bool = True, name: str | None = None, reuse: Any = None,
) -> Any:  # fmt: skip
    """The transpose of conv2d, with a kernel [height, width, filters, in]. Sizes: d*stride (same), or d*stride + max(k - stride, 0)."""
    of = "conv2d_transpose"
    x = convert_to_tensor(inputs)
    layout = _format(of, data_format, 2)
    channels = _channels(of, x, layout)
    kernel, stride = (
        convolution.steps(of, w, v, 2, False) for w, v in (("kernel_size", kernel_size), ("strides", strides))
    )
    extra = [max(k - s, 0) if padding.lower() == "valid" else 0 for k, s in zip(kernel, stride)]
    size = iter([d * s + e for d, s, e in zip(convolution.spatial(x._type, 2, layout == "NCHW"), stride, extra)])
    shape = [x._type.shape[0] if a == "N" else filters if a == "C" else next(size) for a in layout]
    options = {
        "use_bias": use_bias, "bias_initializer": bias_initializer, "bias_regularizer": bias_regularizer,
        "trainable": trainable, "activation": activation,
    }  # fmt: skip
    with variable_scope(name, default_name=of, reuse=reuse):
        w = get_variable(
            "kernel", [*kernel, filters, channels], x.dtype, kernel_initializer, kernel_regularizer, trainable
        )
        out = nn.conv2d_transpose(x, w, shape, list(stride), padding.upper(), layout)
        return _finished(out, filters, layout, options)


def max_pooling1d(
    inputs: Any, pool_size: Any, strides: Any, padding: str = "valid", data_format: str = "channels_last", name: str | None = None
) -> Any:  # fmt: skip
    """The largest element of each window of [batch, length, channels]."""
    return nn.max_pool1d(inputs, pool_size, strides, padding.upper(), _format("max_pooling1d", data_format, 1), name)


def max_pooling2d(
    inputs: Any, pool_size: Any, strides: Any, padding: str = "valid", data_format: str = "channels_last", name: str | None = None
) -> Any:  # fmt: skip
    """The largest element of each window of [batch, height, width, channels]."""
    return nn.max_pool2d(inputs, pool_size, strides, padding.upper(), _format("max_pooling2d", data_format, 2), name)


def average_pooling1d(
    inputs: Any, pool_size: Any, strides: Any, padding: str = "valid", data_format: str = "channels_last", name: str | None = None
) -> Any:  # fmt: skip
    """The mean of each window of [batch, length, channels]."""
    layout = _format("average_pooling1d", data_format, 1)
    return nn.avg_pool1d(inputs, pool_size, strides, padding.upper(), layout, name)


def average_pooling2d(
    inputs: Any, pool_size: Any, strides: Any, padding: str = "valid", data_format: str = "channels_last", name: str | None = None
) -> Any:  # fmt: skip
    """The mean of each window of [batch, height, width, channels]."""
    layout = _format("average_pooling2d", data_format, 2)
    return nn.avg_pool2d(inputs, pool_size, strides, padding.upper(), layout, name)


def batch_normalization(
    inputs: Any, axis: int = -1, momentum: float = 0.99, epsilon: float = 1e-3, center: bool = True, scale: bool = True,
    beta_initializer: Any = None, gamma_initializer: Any = None, moving_mean_initializer: Any = None,
    moving_variance_initializer: Any = None, beta_regularizer: Any = None, gamma_regularizer: Any = None, training: Any = False,
    trainable: bool = True, name: str | None = None, reuse: Any = None, fused: bool | None = None,
) -> Any:  # fmt: skip
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta per element of `axis`.

    While `training` (a Python bool or a bool tensor) holds, with the batch's statistics; the operations that then move moving_mean and
    moving_variance, new = momentum * old + (1 - momentum) * batch's, are in the collection GraphKeys.UPDATE_OPS: run them with the training
    step. For images (fused: 4 dims, the channels second or last) the variance kept is that divided by n - 1."""
    of = "batch_normalization"
    x = convert_to_tensor(inputs)
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"{of}: {x._type} has no axis {axis}")
    at = axis % x.ndim
    n = x._type.shape[at]
    if not isinstance(n, int):
        raise ShapeError(f"{of}: the size of axis {axis} must be known, got {x._type}")
    unbiased = (x.ndim == 4 and at in (1, 3)) if fused is None else fused
    with variable_scope(name, default_name=of, reuse=reuse):
        ones, zeros = ones_initializer(), zeros_initializer()

        def state(called: str, given: Any, default: Any, regularizer: Any = None, trained: bool = trainable) -> Any:
            return get_variable(called, [n], x.dtype, given or default, regularizer, trained)

        gamma = state("gamma", gamma_initializer, ones, gamma_regularizer) if scale else arrays.ones([n], x.dtype)
        beta = state("beta", beta_initializer, zeros, beta_regularizer) if center else arrays.zeros([n], x.dtype)
        mean = state("moving_mean", moving_mean_initializer, zeros, None, False)
        variance = state("moving_variance", moving_variance_initializer, ones, None, False)

        def by_itself() -> tuple[Any, Any, Any]:
            body = convolution.normalized_by_itself
            return x.graph.apply(body, (x, gamma, beta), (at, float(epsilon), unbiased))

        def by_moving() -> tuple[Any, Any, Any]:
            body = convolution.normalized
            return x.graph.apply(body, (x, gamma, beta, mean, variance), (at, float(epsilon))), mean, variance

        if isinstance(training, bool):
            out, m, v = by_itself() if training else by_moving()
        else:
            out, m, v = cond(training, by_itself, by_moving)
        if training is not False:
            keep = momentum if training is True else arrays.where(training, momentum, 1.0)
            for ref, new in ((mean, m), (variance, v)):
                moved = assign(ref, ref * keep + new * (1.0 - keep), name="AssignMovingAvg")
                x.graph.add_to_collection(GraphKeys.UPDATE_OPS, moved.op)
        return named(x.graph, "batchnorm", None, lambda: out, (x,))
