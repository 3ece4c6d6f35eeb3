"""Layers whose `forward` records one op each, recorded without running their Python code again.

A layer of duo.nn that says so (`Module._one_op`) is run once on a Probe, which tells what it records for an input of that type: body, tensors,
attributes. As long as no module changes (`Epoch`), the same is recorded by native code (`dispatch.chain`), for layers one after the other in a
Sequential in one go. What native code does not take up, a step that was not seen before above all, is left to the layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from duo.dispatch import View
from duo.eager.infer import infer
from duo.eager.tensor import EagerTensor
from duo.eager.watch import Epoch
from duo_ir.errors import DuoError
from duo_ir.types import TensorType

MAX_TYPES = 16  # of inputs that are remembered of a layer
_NUMBERS = (float, int, bool)
Step = tuple[Callable[..., Any], tuple, tuple, bool]  # body, what it takes after the result of the step before, attributes, whether a view's
Known = tuple[tuple[Step, ...], list[int]]  # steps; of k steps that are done, and at last of all, the layer that comes next


class Unknown(DuoError):
    """The layer does more, or other things, than record one op."""


class Probe:
    """Stands for a tensor of a type. `step`: what was recorded to make it; None: the input."""

    __slots__ = ("_type", "step")
    _priority = 100

    def __init__(self, type: TensorType, step: Step | None = None) -> None:
        self._type, self.step = type, step

    @staticmethod
    def _apply(body: Callable[..., Any], tensors: tuple, attrs: tuple) -> Probe:
        return Probe._made(body, tensors, attrs, False)

    @staticmethod
    def _view(view: View, tensor: Probe, attrs: tuple) -> Probe:
        return Probe._made(view.read, (tensor,), attrs, True)

    @staticmethod
    def _made(body: Callable[..., Any], tensors: tuple, attrs: tuple, view: bool) -> Probe:
        first, *rest = tensors
        plain = all(isinstance(t, EagerTensor) or t.__class__ in _NUMBERS for t in rest)
        if first.__class__ is not Probe or first.step is not None or not plain:
            raise Unknown("more than one op")
        found = infer(body, tuple([t.__class__ if t.__class__ in _NUMBERS else t._type for t in tensors]), attrs)
        if len(found.types) != 1:
            raise Unknown("more than one result")
        return Probe(found.types[0], (body, tuple(rest), attrs, view))

    @staticmethod
    def _update(state: Any, new: Any) -> None:
        raise Unknown("a write")


class Run:
    """What is known of a layer, or of a Sequential's. It is looked at when no module has changed between two calls, and again after a change."""

    __slots__ = ("_classes", "_epoch", "_layers", "_seen", "_tables")

    def __init__(self) -> None:
        self._epoch = self._seen = -1
        self._classes: tuple[tuple[Any, Any], ...] = ()  # and their `forward`
        self._layers: Sequence[Any] = ()
        self._tables: list[dict[TensorType, Known]] = []  # of each layer, what can be recorded in one go from there on, by its input's type

    def __deepcopy__(self, memo: dict) -> Run:
        return Run()

    def __call__(self, chain: Callable[[Any, tuple], Any], owner: Any, input: Any) -> Any:
        """What `owner`, whose Run it is, makes of a tensor."""
        if self._epoch != Epoch.count and not self._look(owner):
            return owner._plainly(input)
        for cls, forward in self._classes:
            if cls.forward is not forward:
                return owner._plainly(input)
        layers, at = self._layers, 0
        while at < len(layers):
            if input.__class__ is EagerTensor:
                type = input._val.info.type
                steps, places = self._tables[at].get(type) or self._learn(at, type)
                if steps:
                    made = chain(input, steps)
                    if made.__class__ is not tuple:
                        input, at = made, places[-1]
                        continue
                    done, input = made
                    at = places[done]
            layer = layers[at]
            input = layer._plainly(input) if layer is owner else layer(input)
            at += 1
        return input

    def _look(self, owner: Any) -> bool:
        if self._seen != Epoch.count:  # modules that change all the time are not worth it
            self._seen = Epoch.count
            return False
        if owner._forward_hooks or owner._forward_pre_hooks or "forward" in owner.__dict__:
            return False
        self._layers = tuple(owner._layers())
        classes: list[Any] = [m.__class__ for m in (owner, *self._layers)]
        self._classes = tuple({cls: cls.forward for cls in classes}.items())
        self._tables = [{} for _ in self._layers]
        self._epoch = Epoch.count
        return True

    def _learn(self, at: int, type: TensorType) -> Known:
        steps: list[Step] = []
        places = [at]
        end, current = at, type
        for layer in self._layers[at:]:
            found = probed(layer, current)
            if found is None:
                break
            end += 1
            if found.step is not None:
                steps.append(found.step)
                places.append(end)
            current = found._type
        table = self._tables[at]
        if len(table) >= MAX_TYPES:
            table.clear()
        known = table[type] = tuple(steps), [*places, end]
        return known


def probed(layer: Any, type: TensorType) -> Probe | None:
    """What a layer makes of a tensor of that type; None where that is not one op, or it may do other things."""
    if not layer._one_op or not of_duo(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    own = getattr(layer.__class__.forward, "__globals__", {}).get("__name__", "")  # not of a function that a user has put there
    if "forward" in layer.__dict__ or not own.startswith("duo.nn."):
        return None
    try:
        out = layer.forward(Probe(type))
    except Exception:  # the layer itself will say what is wrong, if it is called
        return None
    return out if out.__class__ is Probe else None


def of_duo(module: Any) -> bool:
    """Whether its class is one of duo.nn's own."""
    return module.__class__.__module__.startswith("duo.nn.")
