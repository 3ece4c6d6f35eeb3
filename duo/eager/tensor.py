"""The eager tensor: storage, views, in-place writes, leaves.

A tensor is (storage, view chain, version seen). Values are SSA and never change; what changes is which value a storage holds.
A tensor that was never viewed or written to has no Storage object, only its value. A write to a view computes
the new base through the chain's write rules and bumps the version; other views see the version and read again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from duo import runtime
from duo.devices import CPU, Device
from duo.dispatch import View, quick_for
from duo.eager.autograd import GradLeaf, Inner, check_device_of
from duo.eager.flush import flush
from duo.eager.gradients import backward
from duo.eager.hooks import RemovableHook
from duo.eager.keeping import is_state, note_state
from duo.eager.moving import bring, moved
from duo.eager.operators import quick_operator
from duo.eager.parts import read_part
from duo.eager.printing import format_tensor
from duo.eager.sharing import (
    Storage,
    is_shared,
    now,
    readable,
    share_memory,
    snapshot,
    still_shared,
    write_through,
)
from duo.eager.trace import Val, alias, aside, hooks, record, recorder, settle, state
from duo.eager.trie import Info
from duo.eager.values import as_leaf, conform, filled, material, overwrite
from duo.functional.indexing import getitem
from duo.tensor import Tensor
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, GradientError, HostError, ShapeError, TraceError
from duo_ir.ops import stop_gradient, straight_through
from duo_ir.types import TensorType, bool_, dtype

_new: Any = object.__new__
_record_one = recorder()  # of what a view reads: one value


def _detach_read(x: Value) -> Value:
    return stop_gradient(x)


def _detach_write(x: Value, new: Value) -> Value:
    return straight_through(new, x) if x.type.dtype.is_float else new  # other values, the same history


def _data_write(x: Value, new: Value) -> Value:
    return _detach_write(x, new)


DETACH = View(_detach_read, _detach_write)
DATA = View(_detach_read, _data_write)  # a write through `.data` is not seen by the check for overwritten values
_SAME_MEMORY = (DETACH, DATA)
DETACHED = ((DETACH, ()),)


def _through_data(chain: tuple) -> bool:
    if chain is not DETACHED:
        for view, _ in chain:  # a generator would take most of the time
            if view is DATA:
                return True
    return False


def _whole(chain: tuple) -> bool:
    """Whether a tensor with these views is all of its storage's memory, as it lies there."""
    return not chain or chain is DETACHED or all(view in _SAME_MEMORY for view, _ in chain)


def _without_history(view: View, val: Val) -> Val:
    """What DETACH or DATA read of a value that is there: the same buffer, and nothing to compute or record."""
    if view is DETACH and not val.info.requires_grad and val.extra is None and not val.overwritten:
        return val
    out = _new(Val)
    out.trace = out.node = out.scalars = out.extra = out.stamp = None
    out.index = -1
    out.info = Info(val.info.type, False, val.info.device) if val.info.requires_grad else val.info
    out.buf = val.buf
    return out


class EagerTensor(Tensor):
    """A tensor whose ops run when their results are looked at. See `duo.Tensor` for what it can do."""

    __slots__ = ("__weakref__", "_chain", "_kept", "_leaf", "_seen", "_storage", "_val")
    _priority = 0
    _apply: ClassVar[Callable[..., Any]]  # the recorder, below

    def __init__(self, val: Val) -> None:
        self._val = val
        self._storage: Storage | None = None
        self._chain: tuple[tuple[View, tuple], ...] = ()
        self._seen = 0
        self._leaf: GradLeaf | None = None

    # ------------------------------------------------------------------------------------------- ops and views
    @staticmethod
    def _view(view: View, tensor: EagerTensor, attrs: tuple) -> EagerTensor:
        storage = tensor._storage
        if storage is None:
            storage = tensor._storage = Storage(tensor._val, tensor._leaf, tensor)
            tensor._seen = 0
        chain = (*tensor._chain, (view, attrs))
        val = None
        if storage.shared is not None:
            if state.capture is None and readable(storage):
                val = read_now(storage, chain, most=False)
        elif view.part is not None and state.capture is None and tensor._seen == storage.version:
            val = read_part(view, tensor._val, attrs)
        if val is None and (quick := quick_for(tensor.__class__)) is not None:
            out = quick(view.read, (tensor,), attrs)
            val = out._val
        else:
            out = _new(EagerTensor)
            out._val = val = _record_one(view.read, (tensor,), attrs) if val is None else val
            out._leaf = None
        out._storage, out._chain, out._seen = storage, chain, storage.version
        if not _through_data(chain):
            alias(storage.val, val)
        return out

    def _same_memory(self, view: View) -> EagerTensor:
        """DETACH or DATA of this tensor. Of a value that is there, or has no history to lose, they take no recording."""
        storage = self._storage
        if storage is None:
            val = self._val
        else:
            val = storage.val if not self._chain else self._val
            if self._chain and (storage.shared is not None or self._seen != storage.version):
                return EagerTensor._view(view, self, ())
        if val.buf is not None:
            read = _without_history(view, val)
        else:
            read = val
            if view is not DETACH or val.info.requires_grad or val.extra is not None or val.overwritten:
                return EagerTensor._view(view, self, ())
        if state.capture is not None:
            return EagerTensor._view(view, self, ())
        if storage is None:
            storage = self._storage = Storage(val, self._leaf, self)
            self._seen = 0
        out = _new(EagerTensor)
        out._val = read
        out._storage = storage
        out._chain = chain = DETACHED if view is DETACH and not self._chain else (*self._chain, (view, ()))
        out._seen = storage.version
        out._leaf = None
        if read is not storage.val and not _through_data(chain):
            alias(storage.val, read)
        return out

    @staticmethod
    def _update(state: EagerTensor, new: EagerTensor) -> None:
        state._write(new._value())

    def _lift(self, array: Any) -> EagerTensor:
        return tensor_of(array, self._val.info.device)

    def _draw_(self, body: Any, parameters: tuple, generator: Any) -> Any:
        source = self._generator() if generator is None else generator
        bring(source.cell, self._val.info.device)
        return super()._draw_(body, parameters, source)

    def _value(self) -> Val:
        return self._val if self._storage is None else self._current()

    def _current(self) -> Val:
        """The value, read again through the chain when the storage has been written since."""
        storage = self._storage
        assert storage is not None
        if storage.shared is not None and still_shared(storage):
            if state.capture is None:
                return self._shared()
            found: Val | None = state.capture.read_shared(self)
            if found is not None:
                return found
        if self._seen != storage.version:
            version = storage.version
            self._val = self._read(storage.val)
            self._seen = version
        return self._val

    def _shared(self) -> Val:
        """What the tensor holds now, of memory that NumPy sees: a copy, of no more than the tensor's views read."""
        storage = self._storage
        assert storage is not None
        val = None
        if not _whole(self._chain) and readable(storage):
            val = read_now(storage, self._chain, most=False)
        if val is None:
            return self._read(snapshot(storage))
        val = self._as_mine(val)
        if not _through_data(self._chain):
            alias(storage.val, val)
        return val

    def _read(self, base: Val) -> Val:
        """`base`, the storage's value, seen through the chain of views."""
        val = base
        for view, attrs in self._chain:
            if view in _SAME_MEMORY and val.buf is not None and state.capture is None:
                val = _without_history(view, val)
            else:
                (val,) = record(view.read, (EagerTensor(val),), attrs)
        val = self._as_mine(val)
        if not _through_data(self._chain):
            alias(self._storage.val, val)  # type: ignore[union-attr]
        return val

    def _as_mine(self, val: Val) -> Val:
        """`val`, marked as this tensor's leaf if it is one and the value is not yet."""
        leaf = self._leaf
        return val if leaf is None or val.extra is leaf else as_leaf(val, leaf)

    # ------------------------------------------------------------------------------------------- in-place writes
    def _assign(self, new: Any) -> EagerTensor:
        """Writes `new` (a tensor or number, cast and broadcast to this tensor's type) in place."""
        type_ = self._type
        by = None if not isinstance(new, EagerTensor) else new._value()
        if not isinstance(new, EagerTensor):
            if isinstance(new, Tensor):
                raise TraceError(
                    f"a tensor {new._type} that has no value yet (of a function that is traced, or of a graph) is not written into an eager"
                    f" tensor {type_}; return it and write it after"
                )
            new = full_value(new, type_, self._val.info.device)
        elif new._val.info.device is not self._val.info.device:
            new = new._to_device(self._val.info.device)
            by = new._value()
        if new._type is not type_:
            if len(new._type.shape) > len(type_.shape):
                raise ShapeError(f"cannot write a tensor {new._type} in place into {type_}: it has more axes")
            new = EagerTensor._apply(conform, (new,), (type_.dtype, type_.shape))
        based = self._storage is not None and self._storage.leaf is not None
        if state.grad and self.requires_grad and (self._leaf is not None or based):
            what = "a leaf" if self._leaf is not None else "a view of a leaf"
            raise GradientError(
                f"an in-place op on {what} {type_} that requires grad; do it under duo.no_grad(), or on a clone()"
            )
        self._write(new._value(), by)
        return self

    def _write(self, val: Val, by: Val | None = None) -> None:
        """Stores `val`. `by`: what the in-place op computed from the old value."""
        if state.capture is not None:
            state.capture.write(self)
        storage = self._storage
        watched = not _through_data(self._chain)
        parents = [storage.val] if storage is not None else []
        for view, attrs in self._chain[:-1]:
            parents.append(record(view.read, (EagerTensor(parents[-1]),), attrs)[0])
            if watched:
                alias(parents[0], parents[-1])
        if watched:
            alone = storage is None or storage.val is self._val
            overwrite((self._val,) if alone else (self._val, storage.val), val if by is None else by)  # type: ignore[union-attr]
        if storage is None:
            self._val = self._as_mine(val)
            return
        base = val
        if self._chain:
            for parent, (view, attrs) in zip(reversed(parents), reversed(self._chain)):
                if view.write is None:
                    raise ShapeError(
                        "an in-place write to an expanded tensor, where several elements are one in memory; clone() it first"
                    )
                (base,) = record(view.write, (EagerTensor(parent), EagerTensor(base)), attrs)
        if storage.shared is not None and state.capture is not None:
            state.capture.export(storage)
        elif storage.shared is not None and storage.shared():
            base = write_through(storage, base)
        if storage.leaf is not None:
            base = as_leaf(base, storage.leaf)
        storage.val = base
        storage.version += 1
        if self._chain:
            self._current()
        else:
            self._val = self._as_mine(base)
            self._seen = storage.version

    def __getitem__(self, index: Any) -> EagerTensor:
        index, storage = _places(index), self._storage
        if self._val.info.device is not CPU:
            index = _index_on(index, self._val.info.device)
        if storage is not None and storage.shared is not None and not self._chain and _gathers(index):
            found = self._gathered(storage, index)
            if found is not None:
                return found
        return getitem(self, index)

    def _gathered(self, storage: Storage, index: Any) -> EagerTensor | None:
        """Rows of memory that NumPy sees, read at once, which copies no more than them; None where that is not possible."""
        if state.capture is not None or not still_shared(storage) or not readable(storage):
            return None
        views: list[bool] = []

        def read(val: Val) -> Val:
            base = EagerTensor(val)
            out = getitem(base, index)
            views.append(out is base or (out._storage is not None and out._storage is base._storage))
            return out._value()

        val = now(storage, read)
        return None if views[0] or val is None else EagerTensor(val)

    def __setitem__(self, index: Any, value: Any) -> None:
        spread = value._type.shape if isinstance(value, EagerTensor) else isinstance(value, (np.ndarray, list, tuple))
        if spread:
            index = _places(index)
        if self._val.info.device is not CPU:
            index = _index_on(index, self._val.info.device)
        super().__setitem__(index, value)

    # ------------------------------------------------------------------------------------------- what it is
    @property
    def _type(self) -> TensorType:
        return self._val.info.type

    @property
    def device(self) -> Device:
        return Device(self._val.info.device)

    @property
    def is_cuda(self) -> bool:
        return self._val.info.device is not CPU

    def get_device(self) -> int:
        """The number of the GPU that it is on, -1 for the CPU."""
        index = self.device.index
        return -1 if index is None else index

    def _to_device(self, device: Any) -> EagerTensor:
        name = runtime.check_device(device)
        val = self._value()
        return self if val.info.device is name else EagerTensor(moved(val, name))

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are recorded for it. Settable on leaves."""
        return self._value().info.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> EagerTensor:
        """Makes this tensor a leaf that collects its gradient in `.grad` (or one that does not)."""
        val = self._value()
        if requires_grad == val.info.requires_grad:
            return self
        if state.capture is not None:
            state.capture.rebind(self)
        if requires_grad:
            if not val.info.type.dtype.is_float:
                raise DTypeError(f"only floating-point tensors can require gradients, not {val.info.type}")
            self._leaf = GradLeaf(self)
            self._val = as_leaf(val, self._leaf)
            if self._storage is not None and not self._chain:
                self._storage.leaf = self._leaf
                if self._storage.shared is None:
                    self._storage.val = self._val
        else:
            if self._leaf is None:
                raise GradientError(
                    "requires_grad can be turned off on leaves only; detach() gives a tensor without history"
                )
            self._leaf = None
            (self._val,) = record(_detach_read, (self,))
            if self._storage is not None and not self._chain:
                self._forget_leaf()
        return self

    def _forget_leaf(self) -> None:
        """The storage's base is no leaf any more."""
        assert self._storage is not None
        self._storage.leaf = None
        if self._storage.shared is None:
            self._storage.val = self._val
        elif self._storage.val.info.requires_grad:
            self._storage.val = material(settle(self._storage.val), self._type)

    @property
    def is_leaf(self) -> bool:
        return self._leaf is not None or not self.requires_grad

    @property
    def grad(self) -> Any:
        """The gradient that backward passes have added up, or None."""
        if state.capture is not None:
            state.capture.read_grad(self)
        return self._leaf.grad if self._leaf is not None else getattr(self, "_kept", None)

    @grad.setter
    def grad(self, value: Any) -> None:
        if self._leaf is None:
            if value is None:
                return
            raise GradientError("only a leaf that requires grad has .grad; call requires_grad_() first")
        if value is not None and value._type is not self._type:
            raise ShapeError(f"the gradient of {self._type} cannot be {value._type}")
        if value is not None:
            check_device_of("a gradient is set", value, self)
        if state.capture is not None:
            state.capture.write_grad(self._leaf)
        self._leaf.grad = value

    @property
    def data(self) -> EagerTensor:
        """The same storage without history; a write through it is not seen by backward's check."""
        return self._same_memory(DATA)

    @data.setter
    def data(self, value: Any) -> None:
        if state.capture is not None:
            state.capture.rebind(self)
        if value._storage is None:
            value._storage = Storage(value._val)
        val = value._value()
        self._storage, self._chain, self._seen = value._storage, value._chain, value._seen
        if val.info.requires_grad:
            (val,) = record(_detach_read, (value,))
        self._val = as_leaf(val, self._leaf) if self._leaf is not None else val

    def _replace(self, value: EagerTensor) -> None:
        """Gets the value of a tensor that nobody else has, under an identity of its own: views of what it was stay views of that."""
        if state.capture is not None:
            state.capture.rebind(self)
        val = value._value()
        if val.info.requires_grad:
            (val,) = record(_detach_read, (value,))
        self._storage, self._chain, self._seen = None, (), 0
        self._val = as_leaf(val, self._leaf) if self._leaf is not None else val

    @property
    def _version(self) -> int:
        return self._storage.version if self._storage is not None else 0

    def detach(self) -> EagerTensor:
        """The same storage without history."""
        return self._same_memory(DETACH)

    def detach_(self) -> EagerTensor:
        """Forgets the history."""
        if state.capture is not None:
            state.capture.rebind(self)
        (self._val,) = record(_detach_read, (self,))
        self._leaf = None
        if self._storage is not None and not self._chain:
            self._forget_leaf()
        return self

    def __deepcopy__(self, memo: dict) -> EagerTensor:
        if not self.is_leaf:
            raise GradientError("only leaves can be deep-copied; detach() first")
        out = memo[id(self)] = self._fresh_copy()
        if is_state(self):
            note_state(out)
        return out

    def _fresh_copy(self) -> EagerTensor:
        buffer = runtime.from_numpy(self.detach()._array(share=False), device=self._val.info.device)
        out = EagerTensor(material(buffer, self._type))
        return out.requires_grad_() if self.requires_grad else out

    def __reduce__(self) -> Any:
        raise ArgumentError("tensors are not pickled; use duo.save and duo.load (safetensors)")

    # ------------------------------------------------------------------------------------------- looking at values
    def numpy(self) -> np.ndarray:
        """The values as a NumPy array that shares this tensor's memory (a view through indexing or transposition gives a copy)."""
        if self._val.info.device is not CPU:
            raise HostError(
                f"a tensor {self._val.info} has no .numpy(), which shares the memory of the CPU; use .cpu().numpy(), which copies it there"
            )
        storage = self._storage
        if storage is not None and self._chain is DETACHED and self._leaf is None and state.capture is None:
            return share_memory(self, storage)
        self._check_no_gradient(".numpy()", ".detach().numpy()")
        return self._array()

    def _check_no_gradient(self, what: str, way: str) -> None:
        if self._leaf is not None or self._has_history():
            raise GradientError(
                f"a tensor that requires grad has no {what}, which could not record a gradient; use {way}"
            )

    def _has_history(self) -> bool:
        """`requires_grad` of a tensor that is no leaf, read again only where that is not known otherwise."""
        storage = self._storage
        if storage is None:
            return self._val.info.requires_grad
        if self._chain:
            return not _whole(self._chain) and self.requires_grad
        return (self._val if self._seen == storage.version else storage.val).info.requires_grad

    def _array(self, share: bool = True) -> np.ndarray:
        if state.capture is not None:
            raise TraceError(state.capture.refusal(self._type))
        storage = self._storage
        if storage is None and share:
            storage = self._storage = Storage(self._val, self._leaf, self)
            self._seen = 0
            return share_memory(self, storage)
        if share and storage is not None and _whole(self._chain):
            return share_memory(self, storage)
        val = self._value()
        return runtime.to_numpy(settle(val), val.info.type, copy=True)

    def _exposed(self, make: Callable[[Any], Any]) -> Any:
        """`make(buffer)` of this tensor's memory, for another library to see as long as that lives; of a copy, where it is a view."""
        self._check_no_gradient("memory for others to share", ".detach()")
        if state.capture is not None:
            raise TraceError(state.capture.refusal(self._type))
        storage = self._storage
        if storage is None:
            storage = self._storage = Storage(self._val, None, self)
            self._seen = 0
        if _whole(self._chain):
            return share_memory(self, storage, make)
        val = self._value()
        return make(runtime.copied(settle(val), val.info.type))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if dtype is None and not copy:
            return self.numpy()
        array = self.numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def item(self) -> Any:
        """The only element as a Python number."""
        val = self._val if self._storage is None else self._current()
        type_ = val.info.type
        if type_.shape and type_.size != 1:
            raise ShapeError(f"item() needs exactly one element; this tensor is {type_}")
        if state.capture is not None:
            raise TraceError(state.capture.refusal(self._type))
        return runtime.read_number(val.buf or settle(val), type_)

    def tolist(self) -> Any:
        return self._array(share=False).tolist()

    def __repr__(self) -> str:
        return format_tensor(self)

    # ------------------------------------------------------------------------------------------- gradients
    def backward(
        self, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """Adds d(self)/d(leaf) (times `gradient`) to `.grad` of every leaf, or of `inputs` only."""
        backward(self, None if gradient is None else (gradient,), retain_graph, create_graph, inputs)

    def register_hook(self, hook: Callable[[Any], Any]) -> RemovableHook:
        """Calls hook(gradient) when the gradient of this tensor is known; what it returns, if anything, replaces the gradient."""
        if not self.requires_grad:
            raise GradientError("a hook on a tensor that does not require grad would never be called")
        if self._leaf is not None:
            return RemovableHook(self._leaf.hooks, hook)
        val = self._value()
        if val.extra is None:
            val.extra = Inner()
            if val.trace is not None:
                val.trace.hooked.append(val.index)
        return RemovableHook(val.extra.hooks, hook)

    def retain_grad(self) -> None:
        """Keeps the gradient of a tensor that is not a leaf in `.grad`."""
        if self._leaf is not None:
            return
        raise_for = weakref.ref(self)

        def keep(gradient: Any) -> None:
            tensor = raise_for()
            if tensor is not None:
                tensor._retained(gradient)

        self.register_hook(keep)

    def _retained(self, gradient: Any) -> None:
        kept = getattr(self, "_kept", None)
        self._kept = EagerTensor(gradient._value()) if kept is None else kept + gradient


EagerTensor._apply = staticmethod(recorder(EagerTensor))
OPERATORS = ("__add__", "__sub__", "__mul__", "__truediv__", "__matmul__")
for _name in OPERATORS:
    setattr(EagerTensor, _name, quick_operator(EagerTensor, _name))


def _places(index: Any) -> Any:
    """An index whose masks have become the places where they are true. That looks at their values."""
    if index.__class__ is not tuple:
        mask = _mask(index)
        return index if mask is None else tuple([tensor_of(i) for i in mask.nonzero()])
    if not any(_mask(i) is not None for i in index):
        return index
    out: list[Any] = []
    for item in index:
        mask = _mask(item)
        out.extend([item] if mask is None else [tensor_of(i) for i in mask.nonzero()])
    return tuple(out)


def _index_on(index: Any, device: str) -> Any:
    """An index whose tensors, where they are on the CPU, are copied to a device."""
    if index.__class__ is tuple:
        return tuple([_index_on(i, device) for i in index])
    return index._to_device(device) if isinstance(index, EagerTensor) and not index.is_cuda else index


def _gathers(index: Any) -> bool:
    """Whether elements are chosen one by one, so that the result is no view."""
    items = index if index.__class__ is tuple else (index,)
    return any(isinstance(i, (EagerTensor, np.ndarray, list)) for i in items) and not any(
        isinstance(i, Tensor) and not isinstance(i, EagerTensor) for i in items
    )


def _mask(item: Any) -> np.ndarray | None:
    """The values of an index that is a mask of one dim or more."""
    if isinstance(item, EagerTensor):
        return item._array(share=False) if item._type.dtype is bool_ and item._type.shape else None
    if isinstance(item, np.ndarray):
        return item if item.dtype == np.bool_ and item.ndim else None
    return np.asarray(item) if isinstance(item, list) and item and all(isinstance(v, bool) for v in item) else None


def read_now(storage: Storage, chain: tuple, most: bool = True) -> Val | None:
    """What views read of memory that NumPy sees, read at once (`now`)."""

    def read(val: Val) -> Val:
        for view, attrs in chain:
            if view not in _SAME_MEMORY:  # there is no history
                (val,) = record(view.read, (EagerTensor(val),), attrs)
        return val

    return now(storage, read, most)


def full_value(value: Any, type: TensorType, device: str = CPU) -> EagerTensor:
    """A tensor of that type filled with a Python number or NumPy scalar."""
    return EagerTensor(filled(value, type, device))


def tensor_of(array: np.ndarray, device: str = CPU) -> EagerTensor:
    """A tensor with a copy of the array."""
    array = np.asarray(array)
    buffer = aside(runtime.from_numpy, array, True, device)
    return EagerTensor(material(buffer, TensorType(dtype(array.dtype), array.shape)))


def from_numpy(array: np.ndarray) -> EagerTensor:
    """A tensor that shares the array's memory (a non-contiguous array is copied). Writes to either are seen by the other; results
    already asked for never change: while the array is alive, an op on the whole tensor copies it, slices and rows copy what they show,
    and a compiled function reads it where it is (do not write to it from another thread meanwhile)."""
    if not isinstance(array, np.ndarray):
        raise DTypeError(f"from_numpy takes a NumPy array, not {type(array).__name__}; use duo.tensor")
    kind = TensorType(dtype(array.dtype), array.shape)
    if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable) or array.size == 0:
        return EagerTensor(material(runtime.from_numpy(array), kind))
    out = EagerTensor(material(runtime.from_numpy(array, copy=False), kind))
    out._storage = Storage(out._val)
    out._storage.shared = is_shared(array)
    return out


hooks.tensor = EagerTensor

__all__ = ["EagerTensor", "Storage", "flush", "from_numpy", "material", "tensor_of"]
