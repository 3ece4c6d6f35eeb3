"""The parts of `tf.nn` that slide over images: convolutions, pooling, batch norm. `nn.py` gives them out.

Layouts are TensorFlow's: NHWC or NCHW, filters [height, width, in, out]. SAME pads so that the result has ceil(size / stride) elements,
the odd one behind; VALID pads nothing; explicit paddings are pairs, one per dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duo.functional._args import integer, need_rank
from duo.functional._ssa import elements, float_dtype, kept, mean_kept, sum_, wide
from duo.functional.pooling import Window, average_windows, max_windows
from duo.graph.errors import InvalidArgumentError
from duo.graph.tensor import convert_to_tensor, named
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import shape as movement
from duo_ir.ops.conv import conv
from duo_ir.types import DimLike, TensorType

Name = str | None
Ints = tuple[int, ...]
Pairs = tuple[tuple[DimLike, DimLike], ...]

_LAYOUTS = {1: ("NWC", "NCW"), 2: ("NHWC", "NCHW"), 3: ("NDHWC", "NCDHW")}


# --------------------------------------------------------------------------------------------------------- arguments
def channels_first(name: str, data_format: str | None, n: int) -> bool:
    last, first = _LAYOUTS[n]
    if data_format not in (None, last, first):
        raise InvalidArgumentError(f"{name}: data_format is {last!r} or {first!r}, not {data_format!r}")
    return data_format == first


def steps(name: str, what: str, value: Any, n: int, first: bool) -> Ints:
    """`value` per spatial dim: an int, n of them, or n + 2 in the order of the data format, those of batch and channels being 1."""
    values = [1] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    values = [integer(name, what, v) for v in values]
    if len(values) == 1:
        values = values * n
    if len(values) == n + 2:
        others = (values[0], values[1] if first else values[-1])
        if others != (1, 1):
            raise InvalidArgumentError(f"{name}: {what} of the batch and the channels are 1, not {value!r}")
        values = values[2:] if first else values[1:-1]
    if len(values) != n or min(values) < 1:
        raise InvalidArgumentError(f"{name}: {what} is a positive int, {n} or {n + 2} of them, not {value!r}")
    return tuple(values)


def spatial(t: TensorType, n: int, first: bool) -> tuple[DimLike, ...]:
    return t.shape[2:] if first else t.shape[1 : n + 1]


def paddings(
    name: str, padding: Any, sizes: Sequence[DimLike], kernel: Sequence[DimLike], stride: Ints, gaps: Ints, first: bool
) -> Pairs:
    """(low, high) of each spatial dim."""
    n = len(sizes)
    if isinstance(padding, str):
        if padding.upper() == "VALID":
            return ((0, 0),) * n
        if padding.upper() != "SAME":
            raise InvalidArgumentError(f"{name}: padding is 'SAME', 'VALID' or pairs of ints, not {padding!r}")
        out = []
        for d, k, s, g in zip(sizes, kernel, stride, gaps):
            total = _same(name, d, k, s, g)
            out.append((total // 2, total - total // 2))
        return tuple(out)
    pairs = [tuple([integer(name, "a padding", p) for p in pair]) for pair in padding]
    if len(pairs) != n + 2 or any(len(p) != 2 or min(p) < 0 for p in pairs):
        raise InvalidArgumentError(
            f"{name}: explicit paddings are {n + 2} pairs of ints of at least 0, not {padding!r}"
        )
    others = (pairs[0], pairs[1] if first else pairs[-1])
    if any(p != (0, 0) for p in others):
        raise InvalidArgumentError(f"{name}: the batch and the channels take no padding, got {padding!r}")
    return tuple(pairs[2:] if first else pairs[1:-1])  # type: ignore[arg-type]


def _same(name: str, size: DimLike, kernel: DimLike, step: int, gap: int) -> int:
    """The padding, of both ends together, with which ceil(size / step) windows fit."""
    if isinstance(kernel, int):
        if step == 1:
            return (kernel - 1) * gap
        if isinstance(size, int):
            return max((-(-size // step) - 1) * step + (kernel - 1) * gap + 1 - size, 0)
    raise ShapeError(f"{name}: SAME with stride {step} needs a known spatial size, not {size}")


def _one_of(name: str, what: str, *values: Any) -> Any:
    given = [v for v in values if v is not None]
    if len(given) != 1:
        raise InvalidArgumentError(f"{name}: give {what}, once")
    return given[0]


# ------------------------------------------------------------------------------------------------------- convolution
def _to_last(x: Value) -> Value:
    return nd.transpose(x, (0, *range(2, x.type.rank), 1))


def _to_first(x: Value) -> Value:
    return nd.transpose(x, (0, x.type.rank - 1, *range(1, x.type.rank - 1)))


def _convolved(
    x: Value, w: Value, stride: Ints, pads: Pairs, grown: Ints, gaps: Ints, groups: int, first: bool
) -> Value:
    """`grown`: the step between elements of x, dilated. In the layout of x."""
    x = _to_last(x) if first else x
    out = conv(x, w, strides=stride, padding=pads, x_dilation=grown, w_dilation=gaps, groups=groups)
    return _to_first(out) if first else out


def _conv(
    name: str, type: str, n: int, input: Any, filter: Any, strides: Any, padding: Any, data_format: Any, dilations: Any, depthwise: bool = False
) -> Any:  # fmt: skip
    x = convert_to_tensor(input)
    w = convert_to_tensor(filter, like=x)
    layout = _LAYOUTS[n][0]
    need_rank(type, f"the input, {layout},", x._type, n + 2)
    need_rank(type, "the filter", w._type, n + 2)
    first = channels_first(type, data_format, n)
    stride, gaps = steps(type, "strides", strides, n, first), steps(type, "dilations", dilations, n, first)
    pads = paddings(type, padding, spatial(x._type, n, first), w._type.shape[:n], stride, gaps, first)
    body = _depthwise if depthwise else _plain
    attrs = (stride, pads, gaps, first)
    return named(x.graph, type, name, lambda: x.graph.apply(body, (x, w), attrs), (x, w))


def _plain(x: Value, w: Value, stride: Ints, pads: Pairs, gaps: Ints, first: bool) -> Value:
    channels, per_group = x.type.shape[1 if first else -1], w.type.shape[-2]
    groups = 1
    if isinstance(channels, int) and isinstance(per_group, int) and per_group and channels % per_group == 0:
        groups = channels // per_group
    return _convolved(x, w, stride, pads, (1,) * len(stride), gaps, groups, first)


def _depthwise(x: Value, w: Value, stride: Ints, pads: Pairs, gaps: Ints, first: bool) -> Value:
    *kernel, channels, times = w.type.shape
    if not isinstance(channels, int):
        raise ShapeError(f"depthwise convolution needs a known number of channels, got the filter {w.type}")
    w = nd.reshape(w, (*kernel, 1, channels * times))
    return _convolved(x, w, stride, pads, (1,) * len(stride), gaps, channels, first)


def conv1d(
    value: Any = None, filters: Any = None, stride: Any = None, padding: Any = None, use_cudnn_on_gpu: Any = None,
    data_format: str | None = None, name: Name = None, input: Any = None, dilations: Any = None,
) -> Any:  # fmt: skip
    """Convolution of [batch, width, channels] (NCW: [batch, channels, width]) with filters [width, in, out]."""
    x = _one_of("conv1d", "value", value, input)
    return _conv(name, "conv1d", 1, x, filters, stride, padding, data_format, dilations)  # type: ignore[arg-type]


def conv2d(
    input: Any, filter: Any = None, strides: Any = None, padding: Any = None, use_cudnn_on_gpu: Any = True,
    data_format: str = "NHWC", dilations: Any = None, name: Name = None, filters: Any = None,
) -> Any:  # fmt: skip
    """Convolution of [batch, height, width, channels] (NCHW: channels second) with a filter [height, width, in, out].

    A filter with fewer channels than the input (a divisor) convolves in groups."""
    w = _one_of("conv2d", "filter", filter, filters)
    return _conv(name, "Conv2D", 2, input, w, strides, padding, data_format, dilations)  # type: ignore[arg-type]


def conv3d(
    input: Any, filter: Any = None, strides: Any = None, padding: Any = None, data_format: str = "NDHWC",
    dilations: Any = None, name: Name = None, filters: Any = None,
) -> Any:  # fmt: skip
    """Convolution of [batch, depth, height, width, channels] with a filter [depth, height, width, in, out]."""
    w = _one_of("conv3d", "filter", filter, filters)
    return _conv(name, "Conv3D", 3, input, w, strides, padding, data_format, dilations)  # type: ignore[arg-type]


def depthwise_conv2d(
    input: Any, filter: Any, strides: Any, padding: Any, rate: Any = None, name: Name = None,
    data_format: str | None = None, dilations: Any = None,
) -> Any:  # fmt: skip
    """Each channel convolved by itself, with a filter [height, width, in, times]: result channel c*times + t is that of channel c."""
    gaps = dilations if rate is None else rate
    return _conv(name, "depthwise", 2, input, filter, strides, padding, data_format, gaps, depthwise=True)  # type: ignore[arg-type]


depthwise_conv2d_native = depthwise_conv2d


def separable_conv2d(
    input: Any, depthwise_filter: Any, pointwise_filter: Any, strides: Any, padding: Any, rate: Any = None,
    name: Name = None, data_format: str | None = None, dilations: Any = None,
) -> Any:  # fmt: skip
    """depthwise_conv2d, then a 1 by 1 convolution with pointwise_filter [1, 1, in*times, out]."""
    x = convert_to_tensor(input)

    def make() -> Any:
        each = depthwise_conv2d(x, depthwise_filter, strides, padding, rate, None, data_format, dilations)
        return conv2d(each, pointwise_filter, 1, "VALID", data_format=data_format or "NHWC")

    return named(x.graph, "separable_conv2d", name, make, (x,))


def conv2d_transpose(
    value: Any = None, filter: Any = None, output_shape: Any = None, strides: Any = None, padding: Any = "SAME",
    data_format: str = "NHWC", name: Name = None, input: Any = None, filters: Any = None, dilations: Any = None,
) -> Any:  # fmt: skip
    """The gradient of conv2d for its input: filter [height, width, out, in], output_shape the 4 sizes of the result."""
    of = "conv2d_transpose"
    x = convert_to_tensor(_one_of(of, "value", value, input))
    w = convert_to_tensor(_one_of(of, "filter", filter, filters), like=x)
    need_rank(of, "the input", x._type, 4)
    need_rank(of, "the filter", w._type, 4)
    first = channels_first(of, data_format, 2)
    stride, gaps = steps(of, "strides", strides, 2, first), steps(of, "dilations", dilations, 2, first)
    wanted = _sizes_of(of, output_shape)
    sizes = wanted[2:] if first else wanted[1:3]
    kernel = w._type.shape[:2]
    around = paddings(of, padding, sizes, kernel, stride, gaps, first)
    pads = []
    for axis, (size, have, k, s, g, (low, high)) in enumerate(
        zip(sizes, spatial(x._type, 2, first), kernel, stride, gaps, around)
    ):
        reach = (k - 1) * g + 1
        if isinstance(size, int) and isinstance(have, int) and isinstance(reach, int):
            expected = (size + low + high - reach) // s + 1  # type: ignore[operator]
            if expected != have:
                raise ShapeError(
                    f"{of}: spatial dim {axis} of a result with {size} elements comes from {expected}, not {have}"
                )
        pads.append((reach - 1 - low, size - (have - 1) * s - 1 + low))
    attrs = (stride, tuple(pads), gaps, first)
    out = named(x.graph, of, name, lambda: x.graph.apply(_transposed, (x, w), attrs), (x, w))
    channels = wanted[1 if first else 3]
    if out._type.shape[1 if first else 3] != channels:
        raise ShapeError(f"{of}: the filter {w._type} makes {out._type}, output_shape says {channels} channels")
    return out


def _sizes_of(name: str, output_shape: Any) -> tuple[DimLike, ...]:
    known = getattr(output_shape, "known", None)
    given = known if isinstance(known, tuple) else output_shape
    if not isinstance(given, (list, tuple)) or len(given) != 4:
        raise InvalidArgumentError(
            f"{name}: output_shape is 4 sizes that are known when the graph is built, not {output_shape!r}"
        )
    return tuple([getattr(d, "known", None) or d for d in given])


def _transposed(x: Value, w: Value, stride: Ints, pads: Pairs, gaps: Ints, first: bool) -> Value:
    w = nd.transpose(movement.flip(w, axes=(0, 1)), (0, 1, 3, 2))
    return _convolved(x, w, (1, 1), pads, stride, gaps, 1, first)


# ----------------------------------------------------------------------------------------------------------- pooling
def _pool(type: str, n: int, value: Any, ksize: Any, strides: Any, padding: Any, data_format: Any, name: Name) -> Any:
    x = convert_to_tensor(value)
    need_rank(type, f"the input, {_LAYOUTS[n][0]},", x._type, n + 2)
    first = channels_first(type, data_format, n)
    kernel, stride = steps(type, "ksize", ksize, n, first), steps(type, "strides", strides, n, first)
    sizes = spatial(x._type, n, first)
    pads = paddings(type, padding, sizes, kernel, stride, (1,) * n, first)
    windows = []
    for d, k, s, (low, high) in zip(sizes, kernel, stride, pads):
        if not (isinstance(d, int) and isinstance(low, int) and isinstance(high, int)):
            raise ShapeError(f"{type}: spatial sizes must be known, got {x._type}; only the batch may be unknown")
        if d + low + high < k or d == 0:
            raise ShapeError(f"{type}: a window of {k} elements does not fit into {d + low + high}")
        windows.append(Window(d, k, s, low, 1, (d + low + high - k) // s + 1))
    if type.startswith("Max"):
        return named(x.graph, type, name, lambda: max_windows(x, tuple(windows), first), (x,))
    return named(x.graph, type, name, lambda: average_windows(x, tuple(windows), first, (0,) * n, False), (x,))


def _rank_of(value: Any) -> int:
    return convert_to_tensor(value).ndim - 2


def max_pool(
    value: Any = None, ksize: Any = None, strides: Any = None, padding: Any = None, data_format: str | None = None,
    name: Name = None, input: Any = None,
) -> Any:  # fmt: skip
    """The largest element of each window; padding never wins. Ties: the gradient goes to the first."""
    x = _one_of("max_pool", "value", value, input)
    return _pool("MaxPool", max(1, min(3, _rank_of(x))), x, ksize, strides, padding, data_format, name)


def max_pool1d(input: Any, ksize: Any, strides: Any, padding: Any, data_format: str = "NWC", name: Name = None) -> Any:
    """`max_pool` of [batch, width, channels]."""
    return _pool("MaxPool1d", 1, input, ksize, strides, padding, data_format, name)


def max_pool2d(input: Any, ksize: Any, strides: Any, padding: Any, data_format: str = "NHWC", name: Name = None) -> Any:
    """`max_pool` of [batch, height, width, channels]."""
    return _pool("MaxPool", 2, input, ksize, strides, padding, data_format, name)


def max_pool3d(
    input: Any, ksize: Any, strides: Any, padding: Any, data_format: str = "NDHWC", name: Name = None
) -> Any:
    """`max_pool` of [batch, depth, height, width, channels]."""
    return _pool("MaxPool3D", 3, input, ksize, strides, padding, data_format, name)


def avg_pool(
    value: Any = None, ksize: Any = None, strides: Any = None, padding: Any = None, data_format: str | None = None,
    name: Name = None, input: Any = None,
) -> Any:  # fmt: skip
    """The mean of each window, of what it holds of the input: padding does not count."""
    x = _one_of("avg_pool", "value", value, input)
    return _pool("AvgPool", max(1, min(3, _rank_of(x))), x, ksize, strides, padding, data_format, name)


def avg_pool1d(input: Any, ksize: Any, strides: Any, padding: Any, data_format: str = "NWC", name: Name = None) -> Any:
    """`avg_pool` of [batch, width, channels]."""
    return _pool("AvgPool1d", 1, input, ksize, strides, padding, data_format, name)


def avg_pool2d(input: Any, ksize: Any, strides: Any, padding: Any, data_format: str = "NHWC", name: Name = None) -> Any:
    """`avg_pool` of [batch, height, width, channels]."""
    return _pool("AvgPool", 2, input, ksize, strides, padding, data_format, name)


def avg_pool3d(
    input: Any, ksize: Any, strides: Any, padding: Any, data_format: str = "NDHWC", name: Name = None
) -> Any:
    """`avg_pool` of [batch, depth, height, width, channels]."""
    return _pool("AvgPool3D", 3, input, ksize, strides, padding, data_format, name)


# -------------------------------------------------------------------------------------------------------- batch norm
def fused_batch_norm(
    x: Any, scale: Any, offset: Any, mean: Any = None, variance: Any = None, epsilon: float = 1e-3, data_format: str = "NHWC",
    is_training: bool = True, name: Name = None, exponential_avg_factor: float = 1.0,
) -> Any:  # fmt: skip
    """(y, mean, variance): (x - mean) / sqrt(variance + epsilon) * scale + offset per channel.

    In training with x's own mean and biased variance, giving back the mean and the variance times n/(n-1); with an
    exponential_avg_factor below 1 mixed into `mean` and `variance`. Else with those given, which come back."""
    t = convert_to_tensor(x)
    axis = 1 if channels_first("fused_batch_norm", data_format, t.ndim - 2) else t.ndim - 1
    if not is_training and (mean is None or variance is None):
        raise ArgumentError("fused_batch_norm: without training it needs mean and variance")
    s, o = convert_to_tensor(scale, like=t), convert_to_tensor(offset, like=t)

    def make() -> Any:
        if not is_training:
            m, v = convert_to_tensor(mean), convert_to_tensor(variance)
            return t.graph.apply(normalized, (t, s, o, m, v), (axis, float(epsilon))), m, v
        y, m, v = t.graph.apply(normalized_by_itself, (t, s, o), (axis, float(epsilon), True))
        if exponential_avg_factor != 1.0:
            keep = 1.0 - exponential_avg_factor
            m, v = mean * keep + m * exponential_avg_factor, variance * keep + v * exponential_avg_factor
        return y, m, v

    return named(t.graph, "FusedBatchNorm", name, make, (t, s, o))


def _beside(v: Value, rank: int, axis: int) -> Value:
    """[channels] as it stands beside a tensor of that rank."""
    return nd.reshape(v, (v.type.size, *([1] * (rank - 1 - axis))))


def normalized(x: Value, scale: Value, offset: Value, mean: Value, variance: Value, axis: int, epsilon: float) -> Value:
    """(x - mean) / sqrt(variance + epsilon) * scale + offset along `axis`."""
    y, rank = wide(x), x.type.rank
    scale, offset, mean, variance = (
        _beside(nd.cast_to(v, y.type.dtype), rank, axis) for v in (scale, offset, mean, variance)
    )
    return nd.cast_to((y - mean) * ew.rsqrt(variance + epsilon) * scale + offset, float_dtype(x))


def normalized_by_itself(
    x: Value, scale: Value, offset: Value, axis: int, epsilon: float, unbiased: bool
) -> tuple[Value, Value, Value]:
    """(y, mean, variance), the statistics over all axes but `axis`, without a gradient."""
    y, rank = wide(x), x.type.rank
    axes = tuple([a for a in range(rank) if a != axis])
    mean = mean_kept(y, axes)
    centred = y - mean
    squares = sum_(centred * centred, axes)
    n = nd.size_of(elements(x.type.shape, axes), y.type.dtype)
    out = centred * ew.rsqrt(kept(squares / n, x.type.shape, axes) + epsilon)
    scale, offset = (_beside(nd.cast_to(v, y.type.dtype), rank, axis) for v in (scale, offset))
    by = nd.maximum(n - 1.0, 1.0) if unbiased else n
    out = nd.cast_to(out * scale + offset, float_dtype(x))
    return out, ew.stop_gradient(nd.reshape(mean, squares.type.shape)), ew.stop_gradient(squares / by)
