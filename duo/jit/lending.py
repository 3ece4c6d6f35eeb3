"""What the code of a replay calls for tensors that others may look at: what a program reads of them, and how it puts their new values back."""

from __future__ import annotations

from duo.eager.flush import flush
from duo.eager.sharing import readable, snapshot, still_shared
from duo.eager.tensor import EagerTensor, Storage, read_now
from duo.eager.trace import END, Trace, Val, state


def stale(tensor: EagerTensor) -> bool:
    """Whether a tensor with a storage must be read (or written) by recorded ops."""
    storage = tensor._storage
    assert storage is not None
    if still_shared(storage):
        if tensor._leaf is not None or not readable(storage):
            return True
        if tensor._seen != storage.version and not tensor._chain:
            tensor._val = tensor._read(storage.val)
            tensor._seen = storage.version
        return False  # `lent` says what is read
    if tensor._seen != storage.version:
        if tensor._chain:
            return True
        tensor._value()
    return False


def lent(tensor: EagerTensor, apart: bool) -> Val:
    """The value of a tensor that is not stale, for a program to read. No Python runs before it has been read, so of memory that NumPy shares it
    is that memory itself, except for what views show, and for what is to be `apart`: kept after the run, or looked at twice."""
    storage = tensor._storage
    if storage is None or storage.shared is None or not still_shared(storage):
        return tensor._value()
    if tensor._chain:
        val = read_now(storage, tensor._chain)
        assert val is not None
        return val
    return snapshot(storage) if apart else tensor._val


def holder(tensor: EagerTensor, apart: bool) -> EagerTensor:
    """A tensor whose value is what is `lent`: this one, if that is the value it has."""
    val = lent(tensor, apart)
    return tensor if val is tensor._val else EagerTensor(val)


def shares(tensor: EagerTensor) -> bool:
    """Whether NumPy sees the tensor's memory."""
    return tensor._storage is not None and still_shared(tensor._storage)


def aliased(tensors: tuple, written: tuple) -> bool:
    """Whether a tensor that is written shares its storage with another one of these."""
    storages = [t._storage for t in tensors if t._storage is not None]
    return len(set(map(id, storages))) != len(storages) and any(
        sum(s is t._storage for s in storages) > 1 or t._chain for t in written if t._storage is not None
    )


def put(tensor: EagerTensor, val: Val) -> None:
    """Makes `val` the value of a tensor that has a storage of its own."""
    storage = tensor._storage
    assert storage is not None
    storage.val = tensor._val = val
    storage.version += 1
    tensor._seen = storage.version


def close_open_trace() -> None:
    """What is recorded and not yet run goes first, and a fresh trace begins."""
    flush()
    if state.trace.entries[-1] is END:
        state.trace = Trace(state.grad, state.trace.device)


def storage_of(tensor: EagerTensor) -> Storage:
    """The tensor's storage, made now if nothing aliased it so far."""
    if tensor._storage is None:
        tensor._storage = Storage(tensor._val, tensor._leaf, tensor)
        tensor._seen = 0
    return tensor._storage
