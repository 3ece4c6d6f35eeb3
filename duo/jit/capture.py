"""A capture: one run of a Python function recorded as one program, and everything it did to tensors that were there before.

While it is on (`state.capture`), looking at a value raises TraceError, nothing flushes, and the eager frontend reports what tells a
program's state: in-place writes, gradients set, hyperparameters used, leaves made of Python data. `undo` puts all of that back.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from duo.eager.autograd import GradLeaf
from duo.eager.flush import flush
from duo.eager.infer import user_frame
from duo.eager.sharing import readable, snapshot, still_shared
from duo.eager.tensor import EagerTensor, material, read_now
from duo.eager.trace import END, Operand, Trace, Val, settle, state
from duo.eager.trie import LEAF
from duo.eager.watch import Epoch
from duo.jit import nests
from duo.jit.hooks import Hooks, unwatched
from duo.optim.optimizer import Optimizer
from duo.runtime import overwrite, to_numpy
from duo_ir.core import Loc
from duo_ir.errors import DeviceError, TraceError


class CaptureTrace(Trace):
    """A trace that remembers which tensor held each value from outside."""

    __slots__ = ("holders",)

    def __init__(self, grad: bool, device: str) -> None:
        super().__init__(grad, device)
        self.holders: dict[Val, Any] = state.capture.holders
        state.capture.trace = self

    def enter(self, val: Val, tensor: Any = None) -> int:
        if tensor is not None and tensor.__class__ is not Operand:  # which was looked at before
            self.holders.setdefault(val, weakref.ref(tensor))
        return super().enter(val, tensor)


class Before:
    """A tensor as it was when the capture first met a change of it."""

    __slots__ = ("attributes", "overwritten", "storage", "tensor")

    def __init__(self, tensor: EagerTensor) -> None:
        self.tensor = tensor
        self.attributes = (tensor._val, tensor._storage, tensor._chain, tensor._seen, tensor._leaf)
        self.overwritten = tensor._val.overwritten
        s = tensor._storage
        self.storage = None if s is None else (s, s.val, s.version, s.val.overwritten, s.leaf)

    @property
    def val(self) -> Val:
        return self.attributes[0]

    def restore(self) -> None:
        t = self.tensor
        t._val, t._storage, t._chain, t._seen, t._leaf = self.attributes
        t._val.overwritten = self.overwritten
        if self.storage is not None:
            s, val, version, overwritten, leaf = self.storage
            s.val, s.version, s.leaf = val, version, leaf
            val.overwritten = overwritten


class Capture:
    """Recording of one call. tensors: the eager tensors among its arguments, in order."""

    def __init__(self, name: str, tensors: list[EagerTensor]) -> None:
        self.name = name
        self.tensors = tensors
        for t in tensors:
            if t._storage is None or not still_shared(t._storage):
                t._value()  # views that are behind are read again before anything is recorded
        if len(state.trace.entries) > 1:
            flush()
        self.arguments: dict[Val, int] = {}
        for i, t in enumerate(tensors):
            self.arguments.setdefault(t._val, i)
        self.number_of = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
        self.given = [Before(t) for t in tensors]
        self.holders: dict[Val, Any] = {}  # weak references: a tensor made here must not seem alive
        self.made: set[Val] = set()
        self.written: dict[int, Before] = {}
        self.begun: dict[
            int, tuple[Any, Val]
        ] = {}  # tensors made here of Python data and written then, with their first value
        self.grads: dict[
            GradLeaf, tuple[Any, bool]
        ] = {}  # leaf -> its gradient before, whether it was read before it was set
        self.plain: list[EagerTensor] = []  # tensors without a leaf whose .grad was read
        self.hyper: dict[int, tuple[Optimizer, dict]] = {}  # entry -> where its scalars come from
        self.optimizers: dict[int, tuple[Optimizer, Any]] = {}
        self.reasons: dict[str, None] = {}
        self.shared: dict[Any, Val] = {}  # what was read of memory that NumPy shares, by storage or tensor with views
        self.originals: dict[Val, Val] = {}  # that -> the value that the tensor had
        self.reads_default_device = False
        self.exports: dict[Any, Val] = {}  # storages that NumPy shares and that were written, with their first value
        self.epoch = Epoch.count
        self.grad_mode = state.grad
        self.trace: Any = None
        self.observer: Hooks | None = None  # while it watches

    # --------------------------------------------------------------------------------------------------- on and off
    def __enter__(self) -> Capture:
        # What a garbage collection calls (finalisers, other libraries' callbacks) is not what the function does.
        self._collecting = gc.isenabled()
        gc.disable()
        state.capture = self
        devices = [t._val.info.device for t in self.tensors] or [state.trace.device]
        state.trace = CaptureTrace(state.grad, devices[0])
        return self

    def __exit__(self, *exc: object) -> None:
        state.capture = None
        if self._collecting:
            gc.enable()

    @property
    def whole(self) -> bool:
        """Whether everything was recorded in one trace, which is still open."""
        return state.trace.__class__ is CaptureTrace and state.trace.entries[-1] is not END

    # ------------------------------------------------------------------------------------- reports of the eager frontend
    def refusal(self, type: Any = None) -> str:
        """What to say to someone who looks at a value."""
        where = _at_user_line()
        what = f"of a tensor {type} " if type is not None else ""
        return (
            f"the value {what}is needed{where}, but {self.name} is being compiled, where only types are known; "
            "use duo.where or duo.cond, return it, or move it out of the compiled function"
        )

    def leave(self, trace: Trace, device: str) -> None:
        """An op on another device than the trace's is about to be recorded. Raises DeviceError where something was recorded already."""
        if not _has_ops(trace):
            return
        where = _at_user_line()
        raise DeviceError(
            f"{self.name} is being compiled as one program on one device, which has begun on {trace.device} and goes on on {device}{where}; "
            "move tensors outside of it, make new ones with device=, or compile the parts"
        )

    def keep_numerics(self, trace: Trace, numerics: str) -> None:
        """The numerics are about to change. Raises TraceError where something was recorded already."""
        if not _has_ops(trace):
            return
        where = _at_user_line()
        raise TraceError(
            f"{self.name} is being compiled as one program in one mode, {numerics} numerics, which change{where}; set them outside of it, or "
            "by duo.compile(numerics=), or compile the parts"
        )

    def aside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(*arguments)`, which runs no code but duo's."""
        return work(*arguments) if self.observer is None else self.observer.aside(work, *arguments)

    def impure(self, what: str) -> None:
        """Something that a replay could not repeat."""
        frame = user_frame()
        where = f" ({Loc(frame.f_code, frame.f_lasti)})" if frame is not None else ""
        self.reasons[what + where] = None

    def outside(self, tensor: EagerTensor) -> bool:
        """Whether the tensor was there before the capture."""
        if id(tensor) in self.written:
            return self.outside_val(self.written[id(tensor)].val)
        return self.outside_val(tensor._val)

    def outside_val(self, val: Val) -> bool:
        return val.trace is not state.trace and val not in self.made

    def write(self, tensor: EagerTensor) -> None:
        """`tensor` is about to be written in place."""
        if id(tensor) in self.written:
            return
        storage = tensor._storage
        if self.outside_val(tensor._val) or (storage is not None and self.outside_val(storage.val)):
            self.written[id(tensor)] = Before(tensor)
        elif tensor._val in self.made and id(tensor) not in self.begun:
            self.begun[id(tensor)] = (weakref.ref(tensor), tensor._val)

    def read_shared(self, tensor: EagerTensor) -> Val | None:
        """What a tensor holds whose memory NumPy shares; None when the storage's value is to be used, which this capture has written.

        The recorded call computes with a copy made now: the function may write to the array later. A replay, in which no Python runs, reads the
        memory itself; that the array did not change here between one reading and the next is looked at.
        """
        storage = tensor._storage
        assert storage is not None
        if storage in self.exports:
            self.impure("a tensor shares its memory with NumPy and is written in place")
            return None
        if tensor._leaf is not None or not readable(storage) or not self.outside_val(storage.val):
            self.impure("a tensor that requires grad, or is made inside, shares its memory with NumPy")
            return tensor._read(snapshot(storage))
        if tensor._chain and not self.outside(tensor):  # a view made inside, of what was read
            read = [key for key in self.shared if key is storage or getattr(key, "_storage", None) is storage]
            if all(map(self._unchanged, read)):
                return tensor._val
            return tensor._read(snapshot(storage))
        key = tensor if tensor._chain else storage
        if key not in self.shared or not self._unchanged(key):
            val = self.shared[key] = _read_memory(key)
            self.originals[val] = tensor._val
            number = self.number_of.get(id(tensor))
            if number is not None:
                self.arguments[val] = number
        return self.shared[key]

    def _unchanged(self, key: Any) -> bool:
        """Whether memory that NumPy shares still holds what was read of it."""
        before, after = (to_numpy(settle(v), v.info.type) for v in (self.shared[key], _read_memory(key)))
        if before.tobytes() == after.tobytes():
            return True
        self.impure("an array that shares its memory with a tensor is written")
        return False

    def export(self, storage: Any) -> None:
        """Memory that NumPy may share is about to be written; NumPy sees the new value when the program has run."""
        self.exports.setdefault(storage, storage.val)

    def finish_exports(self) -> None:
        """Copies what was written into memory that NumPy shares."""
        for storage, first in self.exports.items():
            if storage.shared is None or not storage.shared():
                continue
            self.impure("a tensor shares its memory with NumPy")
            last, memory = storage.val, settle(first)
            overwrite(memory, settle(last), last.info.type)
            val = material(memory, last.info.type, last.info.requires_grad)
            val.extra = last.extra
            storage.val = val
            storage.version += 1

    def rebind(self, tensor: EagerTensor) -> None:
        """`tensor` is about to get another storage, or to become or stop being a leaf."""
        if self.outside(tensor):
            self.impure("a tensor from outside gets other data, or starts or stops to require grad")
        self.write(tensor)

    def read_grad(self, tensor: EagerTensor) -> None:
        if tensor._leaf is not None:
            self.read_leaf(tensor._leaf)
        elif self.outside(tensor):
            self.plain.append(tensor)

    def read_leaf(self, leaf: GradLeaf) -> None:
        self.grads.setdefault(leaf, (leaf.grad, True))

    def write_grad(self, leaf: GradLeaf) -> None:
        self.grads.setdefault(leaf, (leaf.grad, False))

    def touch_optimizer(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self.optimizers:
            saved = {p: dict(slots) for p, slots in optimizer.state.items()}, dict(optimizer._sharing)
            self.optimizers[id(optimizer)] = (optimizer, saved)

    # ------------------------------------------------------------------------------------------------------------ undo
    def undo(self) -> None:
        """Takes back what the recorded function did to tensors, gradients and optimisers."""
        for before in reversed([*self.given, *self.written.values()]):
            before.restore()
        for leaf, (grad, _) in self.grads.items():
            leaf.grad = grad
        for optimizer, (slots, sharing) in self.optimizers.values():
            optimizer.state.clear()
            for p, mine in slots.items():
                optimizer.state[p].update(mine)
            optimizer._sharing = sharing

    def refresh(self) -> None:
        """Brings tensors from outside up to date with their storages, while still recording."""
        held = [ref() for ref in self.holders.values()]
        for t in [*self.tensors, *held, *[b.tensor for b in self.written.values()]]:
            if t is not None and t._storage is not None:
                t._value()


def _read_memory(key: Any) -> Val:
    """What memory holds that NumPy shares: all of a storage's, or what a tensor with views shows of it."""
    with unwatched():
        if not isinstance(key, EagerTensor):
            return snapshot(key)
        assert key._storage is not None
        val = read_now(key._storage, key._chain)
        assert val is not None
        return val


def tensors_in(value: Any) -> list[EagerTensor]:
    """The eager tensors in nested lists, tuples and dicts, in order."""
    return [x for x in nests.leaves(value) if isinstance(x, EagerTensor)]


def _has_ops(trace: Trace) -> bool:
    """Whether more than values from outside was recorded."""
    return any(val.node.key[0] is not LEAF for val in trace.entries[1:] if val.node is not None)


def _at_user_line() -> str:
    """ " at file.py:12" of the user's code; nothing where it is not known."""
    frame = user_frame()
    return f" at {Loc(frame.f_code, frame.f_lasti).full()}" if frame is not None else ""
