"""Making eager tensors: from data, filled, ranges, random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from duo import devices, runtime
from duo.eager.exchange import from_foreign, is_foreign, is_on_gpu
from duo.eager.tensor import EagerTensor, from_numpy, material
from duo.eager.trace import aside, open_trace, record, state
from duo.eager.watch import changed
from duo.functional import creation as bodies
from duo.functional import random as samples
from duo.random import Generator, default_generator, draw
from duo.symbolic import Number, has_size
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.types import Dim, DimLike, DType, TensorType, bool_, f32, f64, i64
from duo_ir.types import dtype as as_dtype

_default = [f32]


def set_default_device(device: Any) -> None:
    """The device of tensors that are made without one, in every thread. Raises DeviceError where it cannot be used."""
    devices.set_default(runtime.check_device("cpu" if device is None else device))


devices.on_change(changed)


def set_default_dtype(dtype: Any) -> None:
    """The dtype of float tensors made without one."""
    wanted = as_dtype(dtype)
    if not wanted.is_float:
        raise DTypeError(f"the default dtype must be a float, not {wanted.name}")
    _default[0] = wanted
    changed()


def get_default_dtype() -> DType:
    return _default[0]


def _float(dtype: Any) -> DType:
    return _default[0] if dtype is None else as_dtype(dtype)


def _shape(size: tuple) -> tuple[DimLike, ...]:
    if len(size) == 1 and not isinstance(size[0], (int, np.integer, Dim)):
        size = tuple(size[0])
    try:
        shape = tuple(d if isinstance(d, Dim) else int(d.__index__()) for d in size)
    except AttributeError:
        raise ShapeError(f"a shape is made of ints, not {size}") from None
    if any(isinstance(d, int) and d < 0 for d in shape):
        raise ShapeError(f"a shape has no negative sizes: {list(shape)}")
    return shape


def _kind(number: Any) -> Any:
    return number.kind if isinstance(number, Number) else type(number)


def _finish(tensor: EagerTensor, requires_grad: bool) -> EagerTensor:
    return tensor.requires_grad_() if requires_grad else tensor


def _on(device: Any) -> str:
    """The device that a new tensor is for; a compiled function that asks for the default one depends on it."""
    if device is not None:
        return runtime.check_device(device)
    if state.capture is not None:
        state.capture.reads_default_device = True
    return runtime.check_device(devices.default())


def _made(body: Any, operands: tuple, attrs: tuple, device: Any) -> Any:
    if has_size(attrs) or any(isinstance(x, Number) for x in operands):
        return Number._apply(body, operands, attrs)  # it belongs to the program whose size that is
    name = _on(device)
    while True:
        if state.trace.device is not name:
            open_trace(name)
        (val,) = record(body, operands, attrs)
        if val.info.device is name:  # a signal handler may have worked on another device
            return EagerTensor(val)


# ------------------------------------------------------------------------------------------------------ from data
def tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> EagerTensor:
    """A tensor with a copy of `data`: numbers, nested lists, arrays of NumPy and other libraries, tensors. Python floats give the default dtype, ints
    int64. What is on a GPU stays there, unless a device is given."""
    if _holds_sizes(data):
        return _finish(_of_sizes(data, dtype), requires_grad)
    if is_on_gpu(data) and not isinstance(data, EagerTensor):
        data = from_foreign(data)
    if isinstance(data, EagerTensor):
        out = data.detach() if device is None else data.detach()._to_device(device)
        out = out.clone() if out._val.info.device is data._val.info.device else out
        out = out if dtype is None else out.to(as_dtype(dtype))
        return _finish(out, requires_grad)
    wanted = None if dtype is None else as_dtype(dtype)
    array = _array_of(data, wanted)
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    buffer = aside(runtime.from_numpy, array, True, _on(device))
    return _finish(EagerTensor(material(buffer, TensorType(as_dtype(array.dtype), array.shape))), requires_grad)


def _holds_sizes(data: Any) -> bool:
    """Whether `data` is a number that is known later, or a list with such in it."""
    return isinstance(data, Number) or (isinstance(data, (list, tuple)) and any(isinstance(v, Number) for v in data))


def _of_sizes(data: Any, dtype: Any) -> Any:
    several = isinstance(data, (list, tuple))
    numbers = tuple(data) if several else (data,)
    floats = any(_kind(n) is float for n in numbers)
    wanted = as_dtype(dtype) if dtype is not None else _default[0] if floats else i64
    return Number._apply(bodies._numbers, numbers, (several, wanted))


def _array_of(data: Any, wanted: DType | None) -> np.ndarray:
    if isinstance(data, (list, tuple)) and _holds_tensors(data):
        data = _as_lists(data)
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise ShapeError(f"the nested lists are ragged: {error}") from None
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if wanted is not None:
        return array.astype(wanted.numpy)
    if array.dtype == object:
        raise DTypeError(f"cannot make a tensor of {type(data).__name__} objects")
    if isinstance(data, (np.ndarray, np.generic)):
        return array.astype(as_dtype(array.dtype).numpy)
    if array.dtype.kind == "f":
        return array.astype(_default[0].numpy)
    if array.size == 0 and array.dtype == np.float64:
        return array.astype(_default[0].numpy)
    return array.astype({"i": i64, "u": i64, "b": bool_}[array.dtype.kind].numpy)


def _holds_tensors(data: Any) -> bool:
    return any(isinstance(x, EagerTensor) or (isinstance(x, (list, tuple)) and _holds_tensors(x)) for x in data)


def _as_lists(data: Any) -> Any:
    if isinstance(data, EagerTensor):
        return data.tolist()
    return [_as_lists(x) for x in data] if isinstance(data, (list, tuple)) else data


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> EagerTensor:
    """`data` as a tensor, sharing memory where it can (tensors and arrays of that dtype, on that device, of NumPy or of a library with DLPack
    or `__cuda_array_interface__`)."""
    wanted = None if dtype is None else as_dtype(dtype)
    if isinstance(data, EagerTensor):
        out = data if device is None else data._to_device(device)
        return out if wanted is None or wanted is out.dtype else out.to(wanted)
    if isinstance(data, np.ndarray) and (wanted is None or wanted.numpy == data.dtype) and _on(device) == devices.CPU:
        return from_numpy(data)
    if is_foreign(data) and not isinstance(data, np.ndarray):
        return as_tensor(from_foreign(data), dtype, device)
    return tensor(data, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------ filled
def full(
    size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> EagerTensor:
    """Every element `fill_value`; its kind decides the dtype unless one is given."""
    if isinstance(fill_value, EagerTensor):
        wanted = fill_value.dtype if dtype is None else as_dtype(dtype)
    else:
        implied = {bool: bool_, int: i64}.get(_kind(fill_value), _default[0])
        wanted = implied if dtype is None else as_dtype(dtype)
        fill_value = fill_value.item() if isinstance(fill_value, np.generic) else fill_value
    if isinstance(fill_value, EagerTensor):
        fill_value = fill_value._to_device(_on(device))
    shape = _shape((size,))
    return _finish(_made(bodies._fill, (fill_value,), (shape, wanted), device), requires_grad)


def zeros(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> EagerTensor:
    """Zeros: zeros(2, 3) or zeros((2, 3))."""
    return _finish(_made(bodies._zeros, (), (_shape(size), _float(dtype)), device), requires_grad)


def ones(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> EagerTensor:
    """Ones: ones(2, 3) or ones((2, 3))."""
    return _finish(_made(bodies._ones, (), (_shape(size), _float(dtype)), device), requires_grad)


def empty(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> EagerTensor:
    """A tensor whose values do not matter yet: zeros, so that no program depends on chance."""
    return zeros(*size, dtype=dtype, device=device, requires_grad=requires_grad)


def eye(
    n: int, m: int | None = None, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> EagerTensor:
    """The identity matrix [n, m]."""
    return _finish(_made(bodies._eye, (), (n, n if m is None else m, _float(dtype)), device), requires_grad)


def arange(
    start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> EagerTensor:
    """start, start + step, ... below end; int64 for ints, else the default dtype."""
    if end is None:
        start, end = 0, start
    if any(isinstance(x, Dim) for x in (start, end, step)):
        if isinstance(step, Dim) or step != 1:
            raise ArgumentError(
                "arange: with a size that is known later the step is 1; multiply by the step, or use slices"
            )
        wanted = i64 if dtype is None else as_dtype(dtype)
        return _finish(_made(bodies._arange_sized, (), (start, end - start, wanted), device), requires_grad)
    whole = all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in (start, end, step))
    wanted = as_dtype(dtype) if dtype is not None else (i64 if whole else _default[0])
    start, end, step = (int(x) if whole else float(x) for x in (start, end, step))
    return _finish(_made(bodies._arange, (), (start, end, step, wanted), device), requires_grad)


def linspace(
    start: float, end: float, steps: int, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> EagerTensor:
    """`steps` values from start to end, both included."""
    if isinstance(steps, Dim):
        attrs = (float(start), float(end), steps, _float(dtype))
        return _finish(_made(bodies._linspace_sized, (), attrs, device), requires_grad)
    return _finish(
        _made(bodies._linspace, (), (float(start), float(end), int(steps), _float(dtype)), device), requires_grad
    )


# ------------------------------------------------------------------------------------------------------ random
def _sampled(
    body: Any, tensors: tuple, size: Any, dtype: DType, generator: Generator | None, device: Any
) -> EagerTensor:
    shape = _shape(size)
    if has_size(shape):
        source = default_generator if generator is None else generator
        sample, source.state = Number._apply(body, (source.state, *tensors), (shape, dtype))
        return sample
    return draw(body, tensors, (shape, dtype), generator, _on(device))


def rand(
    *size: Any, generator: Generator | None = None, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> EagerTensor:
    """Uniform in [0, 1)."""
    return _finish(_sampled(samples._uniform, (), size, _float(dtype), generator, device), requires_grad)


def randn(
    *size: Any, generator: Generator | None = None, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> EagerTensor:
    """Standard normal."""
    return _finish(_sampled(samples._normal, (), size, _float(dtype), generator, device), requires_grad)


def randint(
    low: int,
    high: Any = None,
    size: Any = None,
    *,
    generator: Generator | None = None,
    dtype: Any = None,
    device: Any = None,
) -> EagerTensor:
    """Integers in [low, high): randint(high, size) or randint(low, high, size)."""
    if size is None:
        low, high, size = 0, low, high
    if high is None or not low < high:
        raise ArgumentError(f"randint needs low < high, got {low} and {high}")
    wanted = i64 if dtype is None else as_dtype(dtype)
    return _finish(_sampled(samples._randint, (int(low), int(high)), (size,), wanted, generator, device), False)


def normal(
    mean: Any = 0.0,
    std: Any = 1.0,
    size: Any = None,
    *,
    generator: Generator | None = None,
    dtype: Any = None,
    device: Any = None,
) -> EagerTensor:
    """Normal samples with that mean and deviation (numbers or tensors, whose device decides)."""
    if size is None:
        shapes: list[Any] = [t.shape for t in (mean, std) if isinstance(t, EagerTensor)]
        size = np.broadcast_shapes(*shapes)
    operands = tuple(t if isinstance(t, EagerTensor) else float(t) for t in (mean, std))
    if device is None and any(isinstance(t, EagerTensor) for t in operands):
        return draw(samples._normal_of, operands, (_shape((tuple(size),)), _float(dtype)), generator)
    return _sampled(samples._normal_of, operands, (tuple(size),), _float(dtype), generator, device)


def bernoulli(input: EagerTensor, *, generator: Generator | None = None) -> EagerTensor:
    """1 with the probability that `input` gives, else 0, in input's dtype."""
    return draw(samples._bernoulli, (input,), (tuple(input.shape), input.dtype), generator)


def multinomial(
    input: EagerTensor, num_samples: int, replacement: bool = False, *, generator: Generator | None = None
) -> EagerTensor:
    """Indices drawn in proportion to the weights of the last axis."""
    if not replacement and num_samples > 1:
        raise ArgumentError("multinomial draws with replacement; pass replacement=True (one sample needs none)")
    return draw(samples._multinomial, (input,), (num_samples,), generator)


def randperm(n: int, *, generator: Generator | None = None, dtype: Any = None, device: Any = None) -> EagerTensor:
    """A random order of 0..n-1: the order of n random keys (ties by position)."""
    keys = _sampled(samples._uniform, (), (n,), f64, generator, devices.CPU).numpy()
    order = np.argsort(keys, kind="stable").astype((i64 if dtype is None else as_dtype(dtype)).numpy)
    return tensor(order, device=device)


def rand_like(input: EagerTensor, *, dtype: Any = None, device: Any = None) -> EagerTensor:
    """Uniform in [0, 1), in input's shape and dtype, on its device."""
    return rand(tuple(input.shape), dtype=dtype or input.dtype, device=input.device if device is None else device)


def randn_like(input: EagerTensor, *, dtype: Any = None, device: Any = None) -> EagerTensor:
    """Standard normal, in input's shape and dtype, on its device."""
    return randn(tuple(input.shape), dtype=dtype or input.dtype, device=input.device if device is None else device)


__all__: Sequence[str] = [
    "arange", "as_tensor", "bernoulli", "empty", "eye", "from_numpy", "full", "get_default_dtype", "linspace", "multinomial",
    "normal", "ones", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "set_default_device", "set_default_dtype", "tensor", "zeros",
]  # fmt: skip
