"""What a graph reads and writes across runs (states), and what else it takes from outside (sources).

A state is identity and type. The values of variables belong to a Session; eager tensors (parameters, buffers, slots of duo.optim, generators) are
shared cells: a run reads and writes the very tensor. Sources are constants, Python numbers and placeholders: none is part of the
program's text, they are parameters of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from duo import runtime
from duo.devices import CPU
from duo.eager.moving import bring
from duo.eager.tensor import material
from duo.eager.trace import Val, note_overwritten, settle
from duo.eager.trace import state as recording
from duo.eager.trie import Info
from duo_ir.core import Loc
from duo_ir.types import DType, TensorType, i64


class State:
    """Base. Compared by identity; a graph keeps one object per cell."""

    __slots__ = ("loc", "name", "type")

    def __init__(self, name: str, type: TensorType, loc: Loc | None = None) -> None:
        self.name, self.type, self.loc = name, type, loc


class VariableState(State):
    """The value of a `tf.Variable`: one per Session, missing until its initialiser runs."""

    __slots__ = ()


class SeededState(State):
    """A generator that a seed of the graph or of an op starts: i64[2], one per Session."""

    __slots__ = ("seed",)

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, TensorType(i64, (2,)))
        self.seed = seed

    def start(self) -> np.ndarray:
        """(seed modulo 2^64, counter 0)."""
        return np.array([self.seed % (1 << 64), 0], np.uint64).view(np.int64)


class SharedState(State):
    """An eager tensor, read and written where it is. `roams`: whether it moves to where it is used (a generator's state)."""

    __slots__ = ("_tensor", "roams")

    def __init__(self, name: str, tensor: Any, loc: Loc | None = None) -> None:
        super().__init__(name, tensor._type, loc)
        self._tensor = tensor
        self.roams = False

    @property
    def tensor(self) -> Any:
        return self._tensor

    def load(self, device: str = CPU) -> Any:
        """Its buffer; on another device than the tensor's, a copy there. A generator's state moves."""
        tensor = self.tensor
        if self.roams:
            bring(tensor, device)
        val = tensor._val if tensor._storage is None else tensor._current()
        buffer = val.buf if val.buf is not None else settle(val)
        return buffer if val.info.device is device else runtime.moved(buffer, self.type, device)

    def store(self, buffer: Any) -> None:
        """Makes `buffer` the tensor's value, as a write in place does."""
        tensor = self.tensor
        info = tensor._val.info
        if buffer.device is not info.device:
            buffer = runtime.moved(buffer, self.type, info.device)
        node = recording.trace.entries[-1].node
        if tensor._storage is not None or recording.capture is not None or node is None or node.tracked:
            tensor._write(material(buffer, self.type))
            return
        # What `_write` comes to when nothing recorded can have read the old value: a run writes dozens of cells.
        leaf = tensor._leaf
        if info.requires_grad is not (leaf is not None):
            info = Info(self.type, leaf is not None, info.device)
        val = Val(None, -1, None, info)
        val.buf, val.extra = buffer, leaf
        note_overwritten(tensor._val)
        tensor._val = val


class Source:
    """Base of what is not a state. `name` labels the parameter."""

    __slots__ = ("name",)

    def __init__(self, name: str = "") -> None:
        self.name = name


class Placeholder(Source):
    """Must be fed."""

    __slots__ = ("loc",)

    def __init__(self, name: str, loc: Loc | None) -> None:
        super().__init__(name)
        self.loc = loc


class Constant(Source):
    """An array captured when the graph was built (a copy)."""

    __slots__ = ("array", "buffer")

    def __init__(self, array: np.ndarray, name: str = "") -> None:
        super().__init__(name)
        self.array = array
        self.buffer: Any = runtime.from_numpy(array)


class Number(Source):
    """A Python number, given at run time in the dtype that it takes beside the tensors it meets."""

    __slots__ = ("value",)

    def __init__(self, value: float | int | bool) -> None:
        super().__init__()
        self.value = value


class Live(Source):
    """Number `index` of what `read()` gives at each run: hyperparameters that Python may change. Equal `owner` and index: the same number."""

    __slots__ = ("index", "owner", "read")

    def __init__(self, read: Callable[[], tuple], index: int, name: str = "", owner: Any = None) -> None:
        super().__init__(name)
        self.read, self.index, self.owner = read, index, owner


def number_of(value: float | int | bool, dtype: DType) -> float | int | bool:
    """`value` as the Python number that a parameter of that dtype takes."""
    return float(value) if dtype.is_float else value
