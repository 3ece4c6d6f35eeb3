"""The trie of recorded programs: what is known of each step without running anything.

A trace (trace.py) is a path here. A `Node` maps (body, operand numbers, attributes) to the next node and keeps the inferred types, so
recording a step seen before is one dict look-up, and the node reached at a flush is the key of the executable. A step is the application
of a body to operands (`Applied`) or a `Macro`, which infers and builds itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from duo.devices import CPU
from duo.eager.infer import infer
from duo_ir.core import Loc
from duo_ir.types import TensorType, bool_, evaluate

MAX_ENTRIES = 4096
MAX_BYTES = 1 << 30  # of values from outside, which a trace keeps alive
_RUN = 64  # values between two steps that `Node.far` names


class Info:
    """What is known of a value without running anything. Interned, and so are names of devices. `array`, `shape`: NumPy's dtype and shape of it, for
    native code."""

    __slots__ = ("array", "device", "nbytes", "requires_grad", "shape", "type")
    _all: dict[tuple[TensorType, bool, str], Info] = {}
    type: TensorType
    requires_grad: bool
    device: str
    nbytes: int
    array: Any
    shape: Any

    def __new__(cls, type: TensorType, requires_grad: bool = False, device: str = CPU) -> Info:
        found = cls._all.get((type, requires_grad, device))
        if found is None:
            found = object.__new__(cls)
            found.type, found.requires_grad, found.device = type, requires_grad, sys.intern(device)
            found.array, found.shape = type.dtype.numpy, type.shape
            found.nbytes = evaluate(type.nbytes, {})
            cls._all[type, requires_grad, device] = found
        return found

    def __repr__(self) -> str:
        return f"{self}{' grad' if self.requires_grad else ''}"

    def __str__(self) -> str:
        return str(self.type) if self.device is CPU else f"{self.type} on {self.device}"


class _Cold:
    """`Node.hot` before anything came next: the key of no step."""

    key: tuple = ()
    op = left = right = None


COLD = _Cold()


class Node:
    """One step of a path. `infos` describes the values that the step made.

    `loc` is where the step was recorded first, `placed` whether every entry says so for itself: those that a gradient can go back through
    or that can fail at run time, whose errors name the line. `device` is where the whole path runs, `numerics` in which mode. `other` is where it was recorded last, if elsewhere. `hot` is the step that came next
    the last time, which is likely to come again."""

    __slots__ = (
        "__weakref__", "attrs", "code", "depth", "device", "extra", "far", "first", "grad", "hot", "info", "infos", "key", "lasti", "left", "loc", "memo", "next",
        "numerics", "op", "other", "parent", "placed", "right", "size", "special", "stop", "tracked",
    )  # fmt: skip

    def __init__(
        self,
        parent: Node | None,
        key: tuple,
        infos: tuple[Info, ...],
        grad: bool,
        loc: Loc | None,
        attrs: tuple = (),
        device: str = CPU,
        numerics: str = "strict",
    ) -> None:
        self.parent, self.key, self.infos, self.grad, self.loc, self.attrs = parent, key, infos, grad, loc, attrs
        self.info = infos[0]
        self.next: dict[tuple, Node] = {}
        self.memo: Any = None  # what a flush here needs to know (flush.py)
        self.extra: Any = None  # of a body's step its Applied, of a macro's what `infer` gave
        self.first: int = 0  # number of its first value
        self.size: int = 0  # bytes of the values from outside up to here
        self.device: str = device if parent is None else parent.device
        self.numerics: str = numerics if parent is None else parent.numerics
        self.tracked = False  # whether any value up to here requires grad
        self.far: Node | None = None  # a step far back, the same for a run of steps; see `info_of`
        if parent is not None:
            self.first = parent.first + len(parent.infos)
            self.size, self.tracked = parent.size, parent.tracked
            self.far = parent if self.first // _RUN != parent.first // _RUN else parent.far
        if key[0] is LEAF:
            self.size += self.info.nbytes
        for info in infos:
            self.tracked = self.tracked or info.requires_grad
        self.stop = self.size > MAX_BYTES or self.first > MAX_ENTRIES
        self.placed = self.info.requires_grad
        self.special = self.stop or self.placed  # whether recording it takes more than appending
        self.code, self.lasti = (None, -1) if loc is None else (loc.code, loc.lasti)
        self.other: Loc | None = None
        self.depth = 1  # how many calls out from the recorder the user's code was
        self.hot: Any = COLD
        pair = len(key) == 3 and not attrs
        self.op, self.left, self.right = key if pair else (None, None, None)  # the key of an op with two operands

    @property
    def refs(self) -> tuple:
        """Operands of a body's step: numbers of values, and the classes of Python numbers."""
        return self.key[1:-2] if self.attrs else self.key[1:]

    def info_of(self, number: int) -> Info:
        """What is known of value `number` on this path."""
        node: Node | None = self
        while node is not None and node.first > number:
            far = node.far  # run by run, then step by step
            node = far if far is not None and far.first > number else node.parent
        assert node is not None
        return node.infos[number - node.first]

    def path(self) -> list[Node]:
        """The nodes from the root's first child to this one."""
        out: list[Node] = []
        node: Node = self
        while node.parent is not None:
            out.append(node)
            node = node.parent
        out.reverse()
        return out


class Applied:
    """A body applied to operands of these Infos and number classes, in one grad mode on one device: what it gives. `step` is how steps.py runs it alone."""

    __slots__ = ("attrs", "body", "checked", "fresh", "grad", "infos", "operands", "step")

    def __init__(self, body: Any, operands: tuple, attrs: tuple, grad: bool, device: str) -> None:
        self.body, self.operands, self.attrs, self.grad = body, operands, attrs, grad
        found = infer(body, tuple([i if i.__class__ is type else i.type for i in operands]), attrs)
        tracked = {k for k, i in enumerate(operands) if grad and i.__class__ is Info and i.requires_grad}
        self.infos = tuple([Info(t, not tracked.isdisjoint(r), device) for t, r in zip(found.types, found.reached)])
        self.checked, self.fresh = found.checked, found.fresh
        self.step: Any = None


class Macro:
    """An entry that is not the application of a body: it infers and builds itself. Instances are keys of the trie."""

    name = "macro"

    def infer(self, parent: Node, key: tuple, trace: Any = None) -> tuple[tuple[Info, ...], Any]:
        """What the values that it makes are, and anything the node should keep (`Node.extra`)."""
        raise NotImplementedError

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        """Emits into the current Builder; gives one Value per info (None where there is none)."""
        raise NotImplementedError

    def updates(self, node: Node) -> dict[int, int]:
        """Number of a value that it makes -> of the one that it is the new state of."""
        return {}

    def enter(self, path: Any, node: Node) -> None:
        """Tells a Path (path.py) what the entry means for gradients."""

    def alone(self, node: Node, type_of: Callable[[int], TensorType]) -> tuple[Sequence[int], Callable[..., Any]]:
        """How to run the entry alone: the numbers of the values it takes (its Python numbers follow), and a program."""
        raise NotImplementedError


class Leaf(Macro):
    """A value from outside enters the trace: key (LEAF, its Info, number of an earlier entry of the same leaf or -1)."""

    name = "leaf"

    def infer(self, parent: Node, key: tuple, trace: Any = None) -> tuple[tuple[Info, ...], Any]:
        return (key[1],), None

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        return (construction.leaf(node.info.type),)


class Mark(Macro):
    """A pending value becomes a leaf of its own: key (MARK, number)."""

    name = "mark"

    def alone(self, node: Node, type_of: Callable[[int], TensorType]) -> tuple[Sequence[int], Callable[..., Any]]:
        return (node.key[1],), list

    def infer(self, parent: Node, key: tuple, trace: Any = None) -> tuple[tuple[Info, ...], Any]:
        return (Info(parent.info_of(key[1]).type, True, parent.device),), None

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        return (construction.cut(node.key[1]),)


class Note(Macro):
    """A fact about the path that makes no value of the program. Keys: (GRAD_MODE, enabled); (OVERWRITE, number of the value that an in-place
    op has replaced, number of the value that the op computed for it or -1)."""

    name = "note"

    def __init__(self, name: str) -> None:
        self.name = name

    def infer(self, parent: Node, key: tuple, trace: Any = None) -> tuple[tuple[Info, ...], Any]:
        return (NOTHING,), None

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        self.enter(construction, node)
        return (None,)

    def enter(self, path: Any, node: Node) -> None:
        if self is OVERWRITE:
            path.overwritten.setdefault(node.key[1], node.key[2])


NOTHING = Info(TensorType(bool_, (0,)))
LEAF, MARK, GRAD_MODE, OVERWRITE = Leaf(), Mark(), Note("grad_mode"), Note("overwrite")
