"""Python functions as Functions of the IR: what `duo.cond`, `duo.while_loop` and `duo.func` share.

The function is called once, on `Traced` tensors that stand for its arguments; tensors that it uses from outside become operands, and so
does the state of a generator that it draws from, whose new value is a further result. What was traced is then called like an
op, on tensors of any kind, those of a surrounding trace among them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from duo.dispatch import View, apply
from duo.eager.infer import scalar_types, user_location
from duo.eager.tensor import EagerTensor, tensor_of
from duo.eager.trace import roaming
from duo.symbolic import Number, plain, symbolic
from duo.symbolic import value_of as number_value
from duo.tensor import Tensor
from duo_ir.core import Builder, Function, Value, current_builder
from duo_ir.errors import TraceError
from duo_ir.ops.broadcasting import cast_to
from duo_ir.transforms.rewrite import dce
from duo_ir.types import TensorType


class _Active(threading.local):
    def __init__(self) -> None:
        self.tracings: list[Tracing] = []


_active = _Active()


def innermost() -> Tracing | None:
    """The trace that this thread is in, if any."""
    tracings = _active.tracings
    return tracings[-1] if tracings else None


class Tracing:
    """One function being traced: its Builder, and what stands for tensors from outside. `where` names it in messages; `random`: why random ops
    are refused, or None. `device`: that of the tensors it is traced for, where they have one."""

    device: Any = None

    def __init__(self, types: Sequence[TensorType], name: str, where: str, random: str | None) -> None:
        self.builder, self.where, self.random = Builder(name), where, random
        self.depth, self.closed = len(_active.tracings), False
        self.given = [Traced(self, self.builder.parameter(t)) for t in types]
        self.captured: dict[int, tuple[Any, Value]] = {}
        self.states: dict[int, tuple[Any, Value, Value]] = {}  # a generator's state, its parameter, its value now

    def value_of(self, x: Any) -> Any:
        """The value that stands for a tensor here; a Python number as it is."""
        if isinstance(x, (float, int, bool)):
            return x
        if isinstance(x, Traced):
            if x.tracing is self:
                return x.value
            if x.tracing.closed:
                raise TraceError(
                    f"a tensor {x._type} made inside {x.tracing.where} is used after that ended; return it instead"
                )
        found = self.captured.get(id(x))
        if found is None:
            found = self.captured[id(x)] = (x, self.builder.parameter(x._type))
        return found[1]

    def state(self, state: Any) -> Traced:
        """What stands for a generator's state."""
        if self.random is not None:
            raise TraceError(self.random)
        found = self.states.get(id(state))
        if found is None:
            param = self.builder.parameter(state._type)
            found = self.states[id(state)] = (state, param, param)
        return Traced(self, found[2])

    def set_state(self, state: Any, new: Value) -> None:
        found = self.states.get(id(state))
        if found is None:
            raise TraceError(
                f"shared state {state._type} cannot be written inside {self.where}; return the new value and store it after"
            )
        self.states[id(state)] = (state, found[1], new)


class Traced(Tensor):
    """A tensor inside a function that is traced."""

    __slots__ = ("tracing", "value")
    _priority = 20
    _mutable = False

    def __init__(self, tracing: Tracing, value: Value) -> None:
        self.tracing, self.value = tracing, value

    @property
    def _type(self) -> TensorType:  # type: ignore[override]
        return self.value.type

    @property
    def shape(self) -> Any:
        """The sizes, as a tuple."""
        return tuple(map(symbolic, self.value.type.shape))

    @staticmethod
    def _apply(body: Callable, tensors: tuple, attrs: tuple) -> Any:
        tracing = max((t.tracing for t in tensors if isinstance(t, Traced)), key=lambda t: t.depth)
        if tracing.closed:
            raise TraceError(f"a tensor made inside {tracing.where} is used after that ended; return it instead")
        tracing.builder.loc = user_location()
        values = [t if isinstance(t, Number) else tracing.value_of(t) for t in tensors]
        with tracing.builder:
            out = body(*_sized(values), *plain(attrs))
        made = [Traced(tracing, v) for v in (out if isinstance(out, (tuple, list)) else (out,))]
        return tuple(made) if isinstance(out, (tuple, list)) else made[0]

    @staticmethod
    def _view(view: View, tensor: Any, attrs: tuple) -> Any:
        return Traced._apply(view.read, (tensor,), attrs)

    @staticmethod
    def _update(state: Any, new: Any) -> None:
        new.tracing.set_state(state, new.value)

    def _assign(self, new: Any) -> NoReturn:  # type: ignore[override]
        raise TraceError(
            f"a tensor {self._type} inside {self.tracing.where} is not written in place; use the op that returns a new tensor"
        )

    @staticmethod
    def _lift(array: np.ndarray) -> EagerTensor:
        out = tensor_of(array)
        roaming[id(out)] = out  # it goes where what is traced turns out to run
        return out

    @property
    def device(self) -> Any:
        """Where the function is called; None in a graph."""
        return self.tracing.device

    def item(self) -> NoReturn:  # type: ignore[override]
        raise TraceError(
            f"the value of a tensor {self._type} is not known inside {self.tracing.where}, where only types are; decide with duo.where or"
            " duo.cond"
        )

    def numpy(self) -> np.ndarray:  # type: ignore[override]
        return self.item()

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TraceError(f"backward() has no leaves to fill inside {self.tracing.where}; use duo.func.grad")

    def __repr__(self) -> str:
        return f"<tensor {self._type} inside {self.tracing.where}>"


def _sized(values: list[Any]) -> list[Any]:
    """Operands whose free sizes have become values, in the dtypes that they take beside the others."""
    if not any(isinstance(v, Number) for v in values):
        return values
    kinds = [v.type if v.__class__ is Value else v.kind if isinstance(v, Number) else v.__class__ for v in values]
    dtypes = iter(scalar_types(tuple(kinds)))
    taken = [None if v.__class__ is Value else next(dtypes) for v in values]
    return [
        cast_to(number_value(v, lambda d: d), d) if isinstance(v, Number) and d is not None else v
        for v, d in zip(values, taken)
    ]


def trace(
    function: Callable, types: Sequence[TensorType], name: str, where: str, random: str | None, tensors: Sequence[Any]
) -> tuple[Tracing, Any]:
    """The trace of `function` on arguments of these types, and what it returned. It will be called on `tensors`."""
    tracing = Tracing(types, name, where, random)
    tracing.device = next((t.device for t in tensors if isinstance(t, EagerTensor | Traced)), None)
    _active.tracings.append(tracing)
    try:
        return tracing, function(*tracing.given)
    except BaseException:
        tracing.closed = True
        raise
    finally:
        _active.tracings.pop()


def outside_of(*tracings: Tracing) -> list[Any]:
    """The tensors from outside that these traces use, each once."""
    found: dict[int, Any] = {}
    for tracing in tracings:
        found.update((k, x) for k, (x, _) in tracing.captured.items())
    return list(found.values())


def closed(tracing: Tracing, results: Iterable[Value], outside: Sequence[Any]) -> Function:
    """The traced Function; its parameters are the given ones, then one for each tensor of `outside`, then the generators' states,
    whose new values are its last results."""
    tracing.closed = True
    params = [t.value for t in tracing.given]
    for x in outside:
        found = tracing.captured.get(id(x))
        params.append(found[1] if found is not None else Value(x._type, None, 0))
    states = list(tracing.states.values())
    params += [param for _, param, _ in states]
    for number, param in enumerate(params):
        param.index = number
    results = [*results, *[new for _, _, new in states]]
    return interned(dce(Function(params, tracing.builder.ops, results, tracing.builder.name)))


_functions: dict[str, Function] = {}


def interned(function: Function) -> Function:
    """Equal Functions as one object, so that a program seen before is found again."""
    if len(_functions) > 4096:
        _functions.clear()
    return _functions.setdefault(function.hash, function)


def _call(*rest: Any) -> Any:
    *values, function = rest
    return current_builder().inline(function, values)


def call(function: Function, tensors: Sequence[Any], states: Sequence[Any] = ()) -> list[Any]:
    """The results of `function` on tensors, as one op. `states` are its last operands, and take its last results."""
    around = innermost()
    read = states if around is None else [around.state(s) for s in states]
    out = apply(_call, (*tensors, *read), (function,))
    results = list(out) if isinstance(out, tuple) else [out]
    kept = len(results) - len(states)
    for state, new in zip(states, results[kept:]):
        new._update(state, new)
    return results[:kept]
