"""What a graph holds: items, which run, the operations that name them, and the frame that ops are built in.

A graph (`graph.py`) keeps them in creation order; a run lowers those that it needs (`lowering.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from duo.eager.infer import user_location
from duo.graph.placement import Unnamed
from duo.graph.states import State
from duo_ir.core import Builder, Value
from duo_ir.opdef import OpDef

if TYPE_CHECKING:
    from duo.graph.graph import Graph


class Read:
    """The value of a state at this point of the program."""

    __slots__ = ("state", "value")

    def __init__(self, state: State, value: Value) -> None:
        self.state, self.value = state, value


class Assign:
    """The state has this value from here on."""

    __slots__ = ("state", "value")

    def __init__(self, state: State, value: Value) -> None:
        self.state, self.value = state, value


class Deferred:
    """Ops and assignments that are known when a run is prepared (the step of a duo.optim optimizer); see `train.py`."""

    def needs(self) -> Sequence[Value]:
        """Values it reads."""
        raise NotImplementedError

    def variant(self) -> tuple:
        """What its ops depend on now, hashable: a run whose variant was seen before reuses its program."""
        raise NotImplementedError

    def emit(self, variant: tuple, lowering: Any, values: Sequence[Value]) -> None:
        """Emits into the lowering (a `lowering.Lowering`)."""
        raise NotImplementedError

    def cancel(self, variant: tuple) -> None:
        """Called when a run failed: undoes what `variant` prepared."""


class Operation:
    """A node as TensorFlow names it: outputs, effects, and what it waits for."""

    _counts_as_tensor = False

    def __init__(
        self, graph: Graph, name: str, type: str, inputs: Iterable[Any] = (), control: Iterable[Operation] = ()
    ) -> None:
        self.graph, self.name, self.type = graph, name, type
        self.inputs = tuple(inputs)
        self.control_inputs = tuple(control)
        self.outputs: list[Any] = []
        self.effects: list[Any] = []
        self.device = ""  # where it is to run, as far as `tf.device` says
        self.loc = user_location()

    def run(self, feed_dict: Mapping | None = None, session: Any = None) -> None:
        """Runs it in the session given or the default one."""
        self.graph.session_for(session, self.name).run(self, feed_dict)

    def values(self) -> tuple[Any, ...]:
        """Its output tensors."""
        return tuple(self.outputs)

    def __repr__(self) -> str:
        return f"<duo.graph.Operation {self.name!r} type={self.type}>"


class Frame(Builder):
    """A Builder of the graph: the root, or a branch of control flow, whose `captured` outer values are parameters."""

    def __init__(self, graph: Graph, parent: Frame | None = None, name: str = "main") -> None:
        super().__init__(name)
        self.graph, self.parent = graph, parent
        self.own: set[Value] = set()
        self.captured: dict[Value, Value] = {}  # value of the parent frame -> parameter here
        self.current: dict[State, Value] = {}  # states assigned here

    def emit(self, definition: OpDef, operands: tuple[Value, ...], attrs: Mapping[str, Any]) -> tuple[Value, ...]:
        results = super().emit(definition, operands, attrs)
        if self.parent is None:
            self.graph._placed(self.ops[-1])
        else:
            self.own.update(results)
            if self.graph._devices:
                self.graph.place(None, Unnamed(definition.name))
        return results

    def resolve(self, value: Value) -> Value:
        """`value`, of this frame or one around it, as a value of this frame."""
        if self.parent is None or value in self.own:
            return value
        found = self.captured.get(value)
        if found is None:
            outer = self.parent.resolve(value)
            found = self.captured.get(outer)
            if found is None:
                found = self.parameter(outer.type)
                self.own.add(found)
            self.captured[outer] = self.captured[value] = found
        return found
