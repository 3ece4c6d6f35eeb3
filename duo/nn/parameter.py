"""Parameter: a leaf tensor that a Module owns, shared by eager and graph mode."""

from __future__ import annotations

from typing import Any

from duo.eager.autograd import GradLeaf
from duo.eager.keeping import note_state
from duo.eager.tensor import EagerTensor
from duo.eager.trace import record
from duo.eager.values import as_leaf
from duo_ir.core import Value
from duo_ir.errors import DTypeError
from duo_ir.ops import stop_gradient


def _copy(x: Value) -> Value:
    return stop_gradient(x)


class Parameter(EagerTensor):
    """A tensor that is a Module's parameter when it is set as its attribute. It has the values of `data`."""

    __slots__ = ()

    def __init__(self, data: EagerTensor, requires_grad: bool = True) -> None:
        if requires_grad and not data._type.dtype.is_float:
            raise DTypeError(f"only floating-point tensors can require gradients, not {data._type}")
        (val,) = record(_copy, (data,))
        super().__init__(val)
        if requires_grad:
            self._leaf = GradLeaf(self)
            self._val = as_leaf(val, self._leaf)
        note_state(self)

    def _fresh_copy(self) -> EagerTensor:
        return Parameter(super()._fresh_copy().detach(), self.requires_grad)

    def __repr__(self) -> str:
        return f"Parameter containing:\n{super().__repr__()}"


class Buffer(EagerTensor):
    """A tensor that is part of a Module's state but not trained."""

    __slots__ = ()

    def __init__(self, data: Any) -> None:
        (val,) = record(_copy, (data,))
        super().__init__(val)
        note_state(self)
