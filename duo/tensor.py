"""`Tensor`: the operators, methods and properties that every kind of tensor has.

A kind of tensor (eager, graph) subclasses it and supplies `_priority`, `_type`, `_apply` and `_view` (see `duo/dispatch.py`), and:
`_assign(new)` stores a tensor in this one's place (cast to its dtype, broadcast to its shape) and returns it, or refuses; `_lift(array)` makes
a tensor of this kind from a NumPy array; `_generator()` is the default random generator, whose `.state` is read and written; `item()`
and `numpy()` read the value. With `_mutable` False, `x += y` rebinds instead of writing.
Methods are the functions of `duo.functional` themselves, so their signatures and docstrings are there.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from duo import functional as F
from duo.devices import CPU, canonical, names_device
from duo.dispatch import apply, apply_view
from duo.functional import elementwise as elem
from duo.functional import random as rng
from duo.functional._args import is_tensor, one_axis, size_args
from duo.functional.creation import _new_full
from duo.functional.indexing import INDEX, getitem, is_basic, parse, setitem
from duo.functional.linalg import _matmul
from duo.functional.shape import DETACH, matrix_transpose, reverse_dims
from duo.functional.unary import _abs, _neg
from duo_ir import types
from duo_ir.errors import DeviceError, DTypeError, ShapeError
from duo_ir.types import DimLike, DType, TensorType, product


def _foreign(self: Any, other: Any) -> Any:
    """What an operator does with an operand that is neither tensor nor number: an array is lifted, anything else is not ours."""
    if isinstance(other, np.ndarray):
        return self._lift(other)
    return None if is_tensor(other) or isinstance(other, (builtins.int, builtins.float, np.generic)) else NotImplemented


def _operator(body: Callable[..., Any], name: str) -> Any:
    def operator(self: Any, other: Any) -> Any:
        try:
            return apply(body, (self, other))
        except DTypeError:
            other = _foreign(self, other)
            if other is None:
                raise
        return other if other is NotImplemented else apply(body, (self, other))

    operator.__name__ = operator.__qualname__ = name
    operator.body = body  # type: ignore[attr-defined]
    return operator


def _reflected(body: Callable[..., Any], name: str) -> Any:
    def operator(self: Any, other: Any) -> Any:
        try:
            return apply(body, (other, self))
        except DTypeError:
            other = _foreign(self, other)
            if other is None:
                raise
        return other if other is NotImplemented else apply(body, (other, self))

    operator.__name__ = operator.__qualname__ = name
    return operator


def _kept_kind(self: Any, new: Any, name: str) -> Any:
    """`new`, if an in-place op may store it in `self`: a float result does not fit integers, nor an integer one bools."""
    mine, theirs = self._type.dtype, new._type.dtype
    if (theirs.is_float and not mine.is_float) or (mine is types.bool_ and theirs is not types.bool_):
        raise DTypeError(
            f"{name}: the result {new._type} does not fit in place into {self._type}; use the op that returns a new tensor"
        )
    return new


def _augmented(name: str, operator: Any) -> Any:
    def augmented(self: Any, other: Any) -> Any:
        if not self._mutable:
            return NotImplemented
        new = operator(self, other)
        return new if new is NotImplemented else self._assign(_kept_kind(self, new, name))

    augmented.__name__ = augmented.__qualname__ = name
    return augmented


def _in_place(function: Callable[..., Any]) -> Any:
    """The method that stores `function`'s result in the tensor itself."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._assign(_kept_kind(self, function(self, *args, **kwargs), function.__name__ + "_"))

    method.__name__ = method.__qualname__ = function.__name__ + "_"
    method.__doc__ = f"In place: {function.__doc__}"
    method.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return method


class Tensor:
    """An array of one dtype. Base of the eager and the graph tensor."""

    __slots__ = ()
    __array_priority__ = 1000
    __array_ufunc__ = None  # NumPy's operators defer to ours
    _mutable = True
    _assign: Callable[[Any], Any]
    _lift: Callable[[np.ndarray], Any]
    _generator: Callable[[], Any]
    item: Callable[[], Any]
    numpy: Callable[[], np.ndarray]

    # ---------------------------------------------------------------------------------------------------------- type
    @property
    def _type(self) -> TensorType:
        raise TypeError(f"{type(self).__name__} does not say what its type is")

    @property
    def shape(self) -> types.Shape:
        """The sizes, as a tuple."""
        return self._type.shape

    @property
    def dtype(self) -> DType:
        return self._type.dtype

    @property
    def ndim(self) -> builtins.int:
        """The number of dims."""
        return len(self._type.shape)

    def dim(self) -> builtins.int:
        """The number of dims."""
        return len(self._type.shape)

    ndimension = dim

    def size(self, dim: builtins.int | None = None) -> Any:
        """The shape, or the size of one dim."""
        shape = self.shape
        return shape if dim is None else shape[one_axis("size", dim, len(shape))]

    def numel(self) -> DimLike:
        """The number of elements."""
        return product(self.shape)

    nelement = numel

    def element_size(self) -> builtins.int:
        """Bytes per element."""
        return self._type.dtype.itemsize

    @property
    def nbytes(self) -> DimLike:
        return self._type.nbytes

    @property
    def itemsize(self) -> builtins.int:
        return self._type.dtype.itemsize

    def is_floating_point(self) -> builtins.bool:
        return self._type.dtype.is_float

    def is_contiguous(self, memory_format: Any = None) -> builtins.bool:
        return True

    def contiguous(self, memory_format: Any = None) -> Any:
        """The tensor itself: layout is not the user's concern."""
        return self

    # ---------------------------------------------------------------------------------------------------- conversion
    def to(
        self, *args: Any, dtype: Any = None, device: Any = None, copy: builtins.bool = False, memory_format: Any = None
    ) -> Any:
        """to(dtype), to(device), to(device, dtype) or to(other tensor). A memory_format changes nothing: layout is the compiler's matter."""
        for a in args:
            if is_tensor(a):
                dtype, device = a.dtype, getattr(a, "device", None)
            elif isinstance(a, builtins.bool):
                continue  # PyTorch's non_blocking
            elif names_device(a):
                device = a
            else:
                dtype = a
        out = self if device is None else self._to_device(device)
        if dtype is not None:
            out = F.cast(out, dtype)
        return F.clone(out) if copy and out is self else out

    def _to_device(self, device: Any) -> Any:
        """On another device. A tensor that has no memory of its own, only a place in a program, does not move."""
        if canonical(device) != CPU:
            raise DeviceError(f"to: this tensor cannot move to {device!r}; move what it is computed from")
        return self

    def cpu(self) -> Any:
        """On the CPU."""
        return self._to_device("cpu")

    def cuda(self, device: Any = None) -> Any:
        """On a GPU: the current one, or that of the number or name."""
        return self._to_device("cuda" if device is None else device)

    def type_as(self, other: Any) -> Any:
        """In other's dtype."""
        return F.cast(self, other.dtype)

    def float(self) -> Any:
        """As float32."""
        return F.cast(self, types.f32)

    def double(self) -> Any:
        """As float64."""
        return F.cast(self, types.f64)

    def half(self) -> Any:
        """As float16."""
        return F.cast(self, types.f16)

    def bfloat16(self) -> Any:
        """As bfloat16."""
        return F.cast(self, types.bf16)

    def int(self) -> Any:
        """As int32."""
        return F.cast(self, types.i32)

    def long(self) -> Any:
        """As int64."""
        return F.cast(self, types.i64)

    def short(self) -> Any:
        """As int16."""
        return F.cast(self, types.i16)

    def char(self) -> Any:
        """As int8."""
        return F.cast(self, types.i8)

    def byte(self) -> Any:
        """As uint8."""
        return F.cast(self, types.u8)

    def bool(self) -> Any:
        """As bool: not equal to zero."""
        return F.cast(self, types.bool_)

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.numpy().tolist()

    def __array__(self, dtype: Any = None, copy: builtins.bool | None = None) -> np.ndarray:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def _only(self, wanted: str) -> Any:
        if product(self._type.shape) != 1:
            raise ShapeError(
                f"{wanted} of a tensor {self._type}: only one element has one; use any(), all() or tolist()"
            )
        return self.item()

    def __bool__(self) -> builtins.bool:
        return builtins.bool(self._only("the truth value"))

    def __float__(self) -> builtins.float:
        return builtins.float(self._only("the float"))

    def __int__(self) -> builtins.int:
        return builtins.int(self._only("the int"))

    def __index__(self) -> builtins.int:
        if self._type.dtype.is_float or self._type.dtype is types.bool_:
            raise DTypeError(f"a tensor {self._type} is no index; an index holds one integer")
        return builtins.int(self._only("the index"))

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and not self._type.shape else format(str(self), spec)

    # ---------------------------------------------------------------------------------------------------- a sequence
    def __len__(self) -> builtins.int:
        shape = self._type.shape
        if not shape:
            raise DTypeError("len() of a 0-d tensor")
        if not isinstance(shape[0], builtins.int):
            raise ShapeError(f"len() of {self._type}: the size is known only at run time; use .shape[0]")
        return shape[0]

    def __iter__(self) -> Iterator[Any]:
        if not self._type.shape:
            raise DTypeError("a 0-d tensor cannot be iterated over")
        return iter(F.unbind(self, 0))

    def __reversed__(self) -> Any:
        return F.flip(self, 0) if self._type.shape else self

    def __contains__(self, value: Any) -> builtins.bool:
        return builtins.bool(F.any(F.eq(self, value)))

    __hash__ = object.__hash__
    __getitem__ = getitem

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, (np.ndarray, list, tuple)):
            value = self._lift(np.asarray(value))
        if is_basic(index):
            place = apply_view(INDEX, self, (parse(self, index)[0],))
            place._assign(value if is_tensor(value) else F.full_like(place, value))
        else:
            self._assign(setitem(self, index, value))

    # ------------------------------------------------------------------------------------------------------ operators
    __add__ = _operator(elem._add, "__add__")
    __radd__ = _reflected(elem._add, "__radd__")
    __sub__ = _operator(elem._sub, "__sub__")
    __rsub__ = _reflected(elem._sub, "__rsub__")
    __mul__ = _operator(elem._mul, "__mul__")
    __rmul__ = _reflected(elem._mul, "__rmul__")
    __truediv__ = _operator(elem._div, "__truediv__")
    __rtruediv__ = _reflected(elem._div, "__rtruediv__")
    __floordiv__ = _operator(elem._floor_divide, "__floordiv__")
    __rfloordiv__ = _reflected(elem._floor_divide, "__rfloordiv__")
    __mod__ = _operator(elem._remainder, "__mod__")
    __rmod__ = _reflected(elem._remainder, "__rmod__")
    __rpow__ = _reflected(elem._pow, "__rpow__")
    __and__ = _operator(elem._bitwise_and, "__and__")
    __rand__ = _reflected(elem._bitwise_and, "__rand__")
    __or__ = _operator(elem._bitwise_or, "__or__")
    __ror__ = _reflected(elem._bitwise_or, "__ror__")
    __xor__ = _operator(elem._bitwise_xor, "__xor__")
    __rxor__ = _reflected(elem._bitwise_xor, "__rxor__")
    __lshift__ = _operator(elem._left_shift, "__lshift__")
    __rlshift__ = _reflected(elem._left_shift, "__rlshift__")
    __rshift__ = _operator(elem._right_shift, "__rshift__")
    __rrshift__ = _reflected(elem._right_shift, "__rrshift__")
    __matmul__ = _operator(_matmul, "__matmul__")
    __rmatmul__ = _reflected(_matmul, "__rmatmul__")
    __eq__ = _operator(elem._eq, "__eq__")
    __ne__ = _operator(elem._ne, "__ne__")
    __lt__ = _operator(elem._lt, "__lt__")
    __le__ = _operator(elem._le, "__le__")
    __gt__ = _operator(elem._gt, "__gt__")
    __ge__ = _operator(elem._ge, "__ge__")

    def __pow__(self, exponent: Any) -> Any:
        return F.pow(self, self._lift(exponent) if isinstance(exponent, np.ndarray) else exponent)

    def __neg__(self) -> Any:
        return apply(_neg, (self,))

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return apply(_abs, (self,))

    def __invert__(self) -> Any:
        return F.bitwise_not(self)

    __iadd__ = _augmented("__iadd__", __add__)
    __isub__ = _augmented("__isub__", __sub__)
    __imul__ = _augmented("__imul__", __mul__)
    __itruediv__ = _augmented("__itruediv__", __truediv__)
    __ifloordiv__ = _augmented("__ifloordiv__", __floordiv__)
    __imod__ = _augmented("__imod__", __mod__)
    __ipow__ = _augmented("__ipow__", __pow__)
    __iand__ = _augmented("__iand__", __and__)
    __ior__ = _augmented("__ior__", __or__)
    __ixor__ = _augmented("__ixor__", __xor__)
    __ilshift__ = _augmented("__ilshift__", __lshift__)
    __irshift__ = _augmented("__irshift__", __rshift__)

    # ----------------------------------------------------------------------------------- arithmetic, functions, logic
    add, sub, mul, div, true_divide = F.add, F.sub, F.mul, F.div, F.true_divide
    subtract, multiply, divide = F.sub, F.mul, F.div
    floor_divide, remainder, fmod, pow = F.floor_divide, F.remainder, F.fmod, F.pow
    neg, negative, abs, absolute, sign, square, reciprocal = F.neg, F.neg, F.abs, F.abs, F.sign, F.square, F.reciprocal
    exp, exp2, expm1, log, log1p, log2, log10 = F.exp, F.exp2, F.expm1, F.log, F.log1p, F.log2, F.log10
    sqrt, rsqrt = F.sqrt, F.rsqrt
    sin, cos, tan, asin, acos, atan = F.sin, F.cos, F.tan, F.asin, F.acos, F.atan
    arcsin, arccos, arctan = F.asin, F.acos, F.atan
    sinh, cosh, tanh, sigmoid = F.sinh, F.cosh, F.tanh, F.sigmoid
    erf, erfc, erfinv = F.erf, F.erfc, F.erfinv
    floor, ceil, trunc, fix, round, frac = F.floor, F.ceil, F.trunc, F.trunc, F.round, F.frac
    clamp, clip, clamp_min, clamp_max = F.clamp, F.clip, F.clamp_min, F.clamp_max
    maximum, minimum, lerp, addcmul, addcdiv = F.maximum, F.minimum, F.lerp, F.addcmul, F.addcdiv
    eq, ne, lt, le, gt, ge = F.eq, F.ne, F.lt, F.le, F.gt, F.ge
    not_equal, less, less_equal, greater, greater_equal = F.ne, F.lt, F.le, F.gt, F.ge
    logical_and, logical_or, logical_xor, logical_not = F.logical_and, F.logical_or, F.logical_xor, F.logical_not
    bitwise_and, bitwise_or, bitwise_xor, bitwise_not = F.bitwise_and, F.bitwise_or, F.bitwise_xor, F.bitwise_not
    bitwise_left_shift, bitwise_right_shift = F.bitwise_left_shift, F.bitwise_right_shift
    isnan, isinf, isfinite, nan_to_num = F.isnan, F.isinf, F.isfinite, F.nan_to_num
    isclose, allclose, equal, masked_fill = F.isclose, F.allclose, F.equal, F.masked_fill
    clone, bitcast = F.clone, F.bitcast
    relu, softplus, softsign = F.relu, F.softplus, F.softsign

    def detach(self) -> Any:
        """The same storage, cut off from differentiation. A view."""
        return apply_view(DETACH, self)

    def where(self, condition: Any, other: Any) -> Any:
        """The tensor where the bool `condition`, else other."""
        return F.where(condition, self, other)

    # ---------------------------------------------------------------------------------------------------- reductions
    sum, mean, prod, var, std, norm = F.sum, F.mean, F.prod, F.var, F.std, F.norm
    amax, amin, aminmax, max, min, argmax, argmin = F.amax, F.amin, F.aminmax, F.max, F.min, F.argmax, F.argmin
    any, all, count_nonzero = F.any, F.all, F.count_nonzero
    cumsum, cumprod, cummax, cummin, logcumsumexp = F.cumsum, F.cumprod, F.cummax, F.cummin, F.logcumsumexp
    softmax, log_softmax, logsumexp = F.softmax, F.log_softmax, F.logsumexp

    # -------------------------------------------------------------------------------------------- sorting and counting
    sort, argsort, msort, topk, kthvalue = F.sort, F.argsort, F.msort, F.topk, F.kthvalue
    median, nanmedian, quantile, nanquantile, mode = F.median, F.nanmedian, F.quantile, F.nanquantile, F.mode
    unique, unique_consecutive, isin, bucketize = F.unique, F.unique_consecutive, F.isin, F.bucketize
    bincount, histc = F.bincount, F.histc

    # --------------------------------------------------------------------------------------------------------- shapes
    reshape, view, view_as, reshape_as = F.reshape, F.view, F.view_as, F.reshape_as
    flatten, ravel, unflatten, squeeze, unsqueeze = F.flatten, F.ravel, F.unflatten, F.squeeze, F.unsqueeze
    permute, transpose, swapaxes, swapdims, t = F.permute, F.transpose, F.swapaxes, F.swapdims, F.t
    movedim, moveaxis, expand, expand_as, broadcast_to = F.movedim, F.moveaxis, F.expand, F.expand_as, F.broadcast_to
    narrow, select, split, chunk, tensor_split, unbind = F.narrow, F.select, F.split, F.chunk, F.tensor_split, F.unbind
    repeat, tile, repeat_interleave = F.repeat, F.tile, F.repeat_interleave
    flip, fliplr, flipud, roll = F.flip, F.fliplr, F.flipud, F.roll
    tril, triu, diagonal, diag, trace = F.tril, F.triu, F.diagonal, F.diag, F.trace
    T = property(reverse_dims, doc="All dims in reverse order. A view.")
    mT = property(matrix_transpose, doc="The last two dims exchanged. A view.")

    # ------------------------------------------------------------------------------------------ indexing and products
    gather, scatter, scatter_add, take, take_along_dim = F.gather, F.scatter, F.scatter_add, F.take, F.take_along_dim
    index_select, index_add, index_copy = F.index_select, F.index_add, F.index_copy
    index_fill, index_put, masked_select = F.index_fill, F.index_put, F.masked_select
    matmul, mm, bmm, mv, dot, outer = F.matmul, F.mm, F.bmm, F.mv, F.dot, F.outer
    addmm, addmv, baddbmm = F.addmm, F.addmv, F.baddbmm

    # ------------------------------------------------------------------------------------------------------ new tensors
    def new_full(self, size: Any, fill_value: Any, *, dtype: Any = None) -> Any:
        """A tensor of that shape filled with a number, in this one's dtype unless told."""
        d = self._type.dtype if dtype is None else types.dtype(dtype)
        return apply(_new_full, (self,), (size_args("new_full", (size,)), fill_value, d))

    def new_zeros(self, *size: Any, dtype: Any = None) -> Any:
        """Zeros of that shape, in this one's dtype unless told."""
        return self.new_full(size_args("new_zeros", size), 0, dtype=dtype)

    def new_ones(self, *size: Any, dtype: Any = None) -> Any:
        """Ones of that shape, in this one's dtype unless told."""
        return self.new_full(size_args("new_ones", size), 1, dtype=dtype)

    # --------------------------------------------------------------------------------------------------------- in place
    def zero_(self) -> Any:
        """Fills with 0."""
        return self._assign(F.zeros_like(self))

    def fill_(self, value: Any) -> Any:
        """Fills with a number or a 0-d tensor."""
        return self._assign(F.full_like(self, value))

    def copy_(self, src: Any) -> Any:
        """Takes the values of `src` (a tensor or an array), which broadcasts."""
        return self._assign(src if is_tensor(src) else self._lift(np.asarray(src)))

    add_, sub_, mul_, div_ = _in_place(F.add), _in_place(F.sub), _in_place(F.mul), _in_place(F.div)
    floor_divide_, remainder_, fmod_, pow_ = map(_in_place, (F.floor_divide, F.remainder, F.fmod, F.pow))
    addcmul_, addcdiv_, lerp_ = _in_place(F.addcmul), _in_place(F.addcdiv), _in_place(F.lerp)
    neg_, abs_, sign_, square_, reciprocal_ = map(_in_place, (F.neg, F.abs, F.sign, F.square, F.reciprocal))
    exp_, expm1_, log_, log1p_, sqrt_, rsqrt_ = map(_in_place, (F.exp, F.expm1, F.log, F.log1p, F.sqrt, F.rsqrt))
    sin_, cos_, tanh_, sigmoid_, relu_ = map(_in_place, (F.sin, F.cos, F.tanh, F.sigmoid, F.relu))
    erf_, erfinv_ = _in_place(F.erf), _in_place(F.erfinv)
    floor_, ceil_, trunc_, round_ = map(_in_place, (F.floor, F.ceil, F.trunc, F.round))
    clamp_, clip_, clamp_min_, clamp_max_ = map(_in_place, (F.clamp, F.clip, F.clamp_min, F.clamp_max))
    nan_to_num_, masked_fill_ = _in_place(F.nan_to_num), _in_place(F.masked_fill)
    scatter_, scatter_add_ = _in_place(F.scatter), _in_place(F.scatter_add)
    index_add_, index_copy_ = _in_place(F.index_add), _in_place(F.index_copy)
    index_fill_, index_put_ = _in_place(F.index_fill), _in_place(F.index_put)
    addmm_, baddbmm_ = _in_place(F.addmm), _in_place(F.baddbmm)
    tril_, triu_ = _in_place(F.tril), _in_place(F.triu)
    cumsum_, cumprod_ = _in_place(F.cumsum), _in_place(F.cumprod)
    logical_and_, logical_or_ = _in_place(F.logical_and), _in_place(F.logical_or)
    logical_not_ = _in_place(F.logical_not)

    def _draw_(self, body: Any, parameters: tuple, generator: Any) -> Any:
        """Stores a sample of the random `body` here and the generator's new state there."""
        source = self._generator() if generator is None else generator
        sample, source.state = apply(body, (source.state, *parameters), (self._type.shape, self._type.dtype))
        return self._assign(sample)

    def uniform_(self, from_: Any = 0.0, to: Any = 1.0, *, generator: Any = None) -> Any:
        """Fills with numbers drawn evenly from [from_, to)."""
        return self._draw_(rng._uniform_between, (from_, to), generator)

    def normal_(self, mean: Any = 0.0, std: Any = 1.0, *, generator: Any = None) -> Any:
        """Fills with numbers drawn from a normal distribution."""
        return self._draw_(rng._normal_of, (mean, std), generator)

    def bernoulli_(self, p: Any = 0.5, *, generator: Any = None) -> Any:
        """Fills with 1 with probability p, else 0."""
        return self._draw_(rng._bernoulli, (rng.check_probability("bernoulli_", p),), generator)

    def exponential_(self, *, generator: Any = None) -> Any:
        """Fills with numbers drawn from the exponential distribution of rate 1."""
        return self._draw_(rng._exponential, (), generator)
