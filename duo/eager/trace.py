"""Recording: the trace, the trie, and what a recorded value is.

Each thread has a Trace, a list of entries. An entry is a `Val`, one SSA value of the program that is being recorded; its number
is its position. A trace is a path in a trie: a `Node` maps (body, operand numbers, attributes) to the next node and keeps the inferred
types, so recording an op seen before is one dict look-up, and the node reached at a flush is the key of the executable.

An op reads the last entry, makes its own and commits by appending while the last entry is still the one it read; nothing else
advances, so a signal handler, a finaliser or another thread in between cannot corrupt a trace. Closing a trace appends END likewise.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

from duo.runtime import Buffer
from duo_ir.core import Builder, Loc, Op, Value
from duo_ir.errors import DuoError
from duo_ir.ops import stop_gradient
from duo_ir.types import DType, TensorType, bool_, evaluate, f64, i64, promote_scalar

MAX_ENTRIES = 4096
MAX_BYTES = 256 << 20
MAX_NODES = 200_000


class Info:
    """What is known of a value without running anything. Interned."""

    __slots__ = ("requires_grad", "type")
    _all: dict[tuple[TensorType, bool], Info] = {}
    type: TensorType
    requires_grad: bool

    def __new__(cls, type: TensorType, requires_grad: bool = False) -> Info:
        found = cls._all.get((type, requires_grad))
        if found is None:
            found = object.__new__(cls)
            found.type, found.requires_grad = type, requires_grad
            cls._all[type, requires_grad] = found
        return found

    def __repr__(self) -> str:
        return f"{self.type}{' grad' if self.requires_grad else ''}"


class Node:
    """One step of a path. `infos` describes the values that the step made."""

    __slots__ = (
        "__weakref__", "attrs", "extra", "first", "grad", "info", "infos", "key", "loc", "memo", "next", "parent", "size", "stop",
        "tracked",
    )  # fmt: skip

    def __init__(
        self, parent: Node | None, key: tuple, infos: tuple[Info, ...], grad: bool, loc: Loc | None, attrs: tuple = ()
    ) -> None:
        self.parent, self.key, self.infos, self.grad, self.loc, self.attrs = parent, key, infos, grad, loc, attrs
        self.info = infos[0]
        self.next: dict[tuple, Node] = {}
        self.memo: Any = None  # what a flush here needs to know (flush.py)
        self.extra: Any = None
        self.first: int = parent.first + len(parent.infos) if parent is not None else 0  # number of its first value
        held: int = parent.size if parent is not None else 0
        self.size: int = held + sum(evaluate(i.type.nbytes, {}) for i in infos)
        self.stop = self.size > MAX_BYTES
        self.tracked: bool = any(i.requires_grad for i in infos) or (parent is not None and parent.tracked)

    @property
    def refs(self) -> tuple:
        """Operands of a body's step: numbers of values, and the classes of Python numbers."""
        return self.key[1:-2] if self.attrs else self.key[1:]

    def info_of(self, number: int) -> Info:
        """What is known of value `number` on this path."""
        node: Node | None = self
        while node is not None and node.first > number:
            node = node.parent
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


class Val:
    """One value: pending (an entry of `trace`), or there (`buf`), or failed (`buf` None and `trace` None: `extra` is the error).

    `extra` is what gradients need to know of it: a GradLeaf, an Origin (output of an earlier segment), or None.
    `stamp` says of which version of a storage it is (None as long as nobody asked)."""

    __slots__ = ("buf", "extra", "index", "info", "node", "scalars", "stamp", "trace")

    def __init__(self, trace: Trace | None, index: int, node: Node | None, info: Info) -> None:
        self.trace = trace
        self.index = index
        self.node = node
        self.info = info
        self.buf: Buffer | None = None
        self.scalars: tuple | None = None
        self.extra: Any = None
        self.stamp: Stamp | None = None

    @property
    def overwritten(self) -> bool:
        """Whether an in-place op has since written to the storage that it was read from."""
        return self.stamp is not None and self.stamp.overwritten

    @overwritten.setter
    def overwritten(self, value: bool) -> None:
        if self.stamp is None or self.stamp is OVERWRITTEN:
            self.stamp = OVERWRITTEN if value else None
        else:
            self.stamp.overwritten = value


class Stamp:
    """One version of a storage, shared by its value and those that views have read from it: a write overwrites them all.
    numbers: those of views in `trace`, the latest that read some."""

    __slots__ = ("numbers", "overwritten", "trace")

    def __init__(self, overwritten: bool = False) -> None:
        self.overwritten = overwritten
        self.trace: Trace | None = None
        self.numbers: list[int] = []

    def add(self, trace: Trace, number: int) -> None:
        if self.trace is trace:
            self.numbers.append(number)
        else:
            self.numbers, self.trace = [number], trace


OVERWRITTEN = Stamp(True)  # of values that nobody else was read with


def alias(base: Val, val: Val) -> None:
    """`val` was read from the storage whose value is `base`: a write to the storage overwrites it."""
    stamp = base.stamp
    if stamp is None:
        stamp = base.stamp = Stamp()
    if stamp.overwritten or val is base:
        return
    val.stamp = stamp
    if val.trace is not None:
        stamp.add(val.trace, val.index)


class Macro:
    """An entry that is not the application of a body: it infers and builds itself. Instances are keys of the trie."""

    name = "macro"

    def infer(self, parent: Node, key: tuple) -> tuple[tuple[Info, ...], Any]:
        """What the values that it makes are, and anything the node should keep (`Node.extra`)."""
        raise NotImplementedError

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        """Emits into the current Builder; gives one Value per info (None where there is none)."""
        raise NotImplementedError

    def updates(self, node: Node) -> dict[int, int]:
        """Number of a value that it makes -> of the one that it is the new state of."""
        return {}


class Leaf(Macro):
    """A value from outside enters the trace: key (LEAF, type, requires_grad, number of an earlier entry of the same leaf or -1)."""

    name = "leaf"

    def infer(self, parent: Node, key: tuple) -> tuple[tuple[Info, ...], Any]:
        return (Info(key[1], key[2]),), None

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        return (construction.leaf(node.key[1]),)


class Mark(Macro):
    """A pending value becomes a leaf of its own: key (MARK, number)."""

    name = "mark"

    def infer(self, parent: Node, key: tuple) -> tuple[tuple[Info, ...], Any]:
        return (Info(parent.info_of(key[1]).type, True),), None

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        return (construction.cut(node.key[1]),)


class Note(Macro):
    """A fact about the path that makes no value of the program. Keys: (GRAD_MODE, enabled); (OVERWRITE, number of the value that an in-place
    op has replaced, number of the value that the op computed for it or -1)."""

    name = "note"

    def __init__(self, name: str) -> None:
        self.name = name

    def infer(self, parent: Node, key: tuple) -> tuple[tuple[Info, ...], Any]:
        return (NOTHING,), None

    def build(self, construction: Any, node: Node) -> tuple[Any, ...]:
        if self is OVERWRITE:
            construction.overwritten.setdefault(node.key[1], node.key[2])
        return (None,)


NOTHING = Info(TensorType(bool_, (0,)))
LEAF, MARK, GRAD_MODE, OVERWRITE = Leaf(), Mark(), Note("grad_mode"), Note("overwrite")

_ROOTS = {grad: Node(None, ("root", grad), (NOTHING,), grad, None) for grad in (True, False)}
_END_NODE = Node(None, ("end",), (NOTHING,), False, None)
END = Val(None, -1, _END_NODE, NOTHING)


class Trace:
    """A program under recording. Entry 0 stands for the root."""

    __slots__ = (
        "__weakref__",
        "call",
        "done",
        "entries",
        "hooked",
        "leaf_numbers",
        "leaves",
        "links",
        "lock",
        "node",
        "program",
    )

    def __init__(self, grad: bool) -> None:
        self.entries: list[Val] = [Val(self, 0, _ROOTS[grad], NOTHING)]
        self.leaves: dict[Val, int] = {}  # a value from outside -> its number here
        self.leaf_numbers: dict[Any, int] = {}  # a GradLeaf -> number of its latest entry
        self.links: dict[int, int] = {}  # an entry of a leaf that was here before -> number of the entry before
        self.hooked: list[int] = []  # values with hooks, other than leaves
        self.lock = threading.RLock()
        self.node: Node | None = None  # set when closed
        self.done = False
        self.program: Any = None  # what a flush ran for it
        self.call: Any = None  # of a flush that overwrites inputs (flush.py)

    def enter(self, val: Val, tensor: Any = None) -> int:
        """The number of a value from outside, which `tensor` holds; -1 when this trace has been closed meanwhile."""
        number = self.leaves.get(val)
        if number is not None:
            return number
        if val.buf is None:
            settle(val)
        info = val.info
        leaf = val.extra if info.requires_grad else None
        earlier = self.leaf_numbers.get(leaf, -1) if leaf is not None else -1
        vals = commit(self, (LEAF, info.type, info.requires_grad, earlier), source=val)
        if vals is None:
            return -1
        proxy = vals[0]
        self.leaves[val] = proxy.index
        if val.stamp is not None and not val.stamp.overwritten:
            val.stamp.add(self, proxy.index)
        if leaf is not None:
            self.link(leaf, proxy.index)
        return proxy.index

    def link(self, leaf: Any, number: int) -> None:
        """Entry `number` is the leaf's from now on."""
        earlier = self.leaf_numbers.get(leaf)
        if earlier is not None:
            self.links[number] = earlier
        self.leaf_numbers[leaf] = number


class _State(threading.local):
    """Per thread: the open trace and the grad mode."""

    def __init__(self) -> None:
        self.grad = True
        self.trace = Trace(True)
        self.capture: Any = None  # a compiled function being traced forbids looking at values


state = _State()
_infer_memo: dict[tuple, Any] = {}  # of `infer`
_node_count = [0]


class Hooks:
    """What flush.py, a room above this one, plugs in: `flush` closes and runs a trace; `policy`, when set, is asked after every op whether to
    flush now and whether to raise errors here (DUO_SYNC, DUO_FLUSH)."""

    flush: Callable[[Trace], None]
    policy: Callable[[], tuple[bool, bool]] | None = None


hooks = Hooks()


def open_trace() -> Trace:
    """This thread's trace, a new one if it has been closed."""
    trace = state.trace
    if trace.entries[-1] is END:
        if _node_count[0] > MAX_NODES:
            forget()
        trace = state.trace = Trace(state.grad)
    return trace


def forget() -> None:
    """Drops the trie (executables stay in their own cache)."""
    _node_count[0] = 0
    for root in _ROOTS.values():
        root.next = {}


def settle(val: Val) -> Buffer:
    """Makes sure that `val` has its buffer: flushes the trace it is pending in. Raises the error of a failed value."""
    if val.buf is None:
        trace = val.trace
        if trace is not None:
            hooks.flush(trace)
        if val.buf is None:
            raise val.extra if isinstance(val.extra, BaseException) else RuntimeError("a value was lost")
    return val.buf


def note_overwritten(val: Val) -> None:
    """An in-place op has replaced `val` in its tensor; who saved it, or a view of it, will refuse to go back through it."""
    stamp = val.stamp
    if stamp is None:
        val.stamp = OVERWRITTEN
        return
    stamp.overwritten = True
    if stamp.numbers and stamp.trace is state.trace:
        for number in stamp.numbers:
            note_overwritten_here(stamp.trace, number, -1)
        stamp.numbers = []


def commit(trace: Trace, key: tuple, scalars: tuple | None = None, source: Val | None = None) -> list[Val] | None:
    """Appends a macro's entry, whose key holds whatever came before it; None if the trace is closed. `source`: the value that a leaf stands for."""
    while True:
        last = trace.entries[-1]
        node = last.node.next.get(key)  # type: ignore[union-attr]
        if node is None:
            if last is END:
                return None
            node = _miss(last, key, ())
        if len(node.infos) == 1:
            val = Val(trace, last.index + 1, node, node.info)
            val.scalars = scalars
            if source is not None:
                val.buf, val.extra = source.buf, source.extra
            if trace.entries[-1] is last:
                trace.entries.append(val)
                return [val]
            continue
        vals = [Val(trace, last.index + 1 + k, node, info) for k, info in enumerate(node.infos)]
        vals[0].scalars = scalars
        if trace.entries[-1] is last:
            trace.entries.extend(vals)
            return vals


def note_overwritten_here(trace: Trace, number: int, by: int) -> None:
    """Adds the fact that an in-place op, whose result is `by` (or -1), has replaced value `number`."""
    commit(trace, (OVERWRITE, number, by))


class Operand:
    """What a tensor holds now. Reading a tensor again may record and flush (a view, memory that NumPy shares): a retry must not."""

    __slots__ = ("_storage", "_val")

    def __init__(self, tensor: Any) -> None:
        self._val: Val = tensor._val if tensor._storage is None else tensor._current()
        self._storage = None


def record(body: Any, operands: tuple, attrs: tuple = ()) -> list[Val]:
    """Records `body(*operands, *attrs)`; operands are eager tensors and Python numbers. Gives its result Vals."""
    while True:
        trace = state.trace
        refs: list[Any] = [body]
        scalars: tuple | None = None
        for t in operands:
            cls = t.__class__
            if cls is float or cls is int or cls is bool:
                refs.append(cls)
                scalars = (t,) if scalars is None else (*scalars, t)
                continue
            val = t._val if t._storage is None else t._current()
            refs.append(val.index if val.trace is trace else trace.enter(val, t))
        last = trace.entries[-1]
        if attrs:
            refs.append(attrs)
            refs.append(attr_classes(attrs))
        key = tuple(refs)
        node = last.node.next.get(key)  # type: ignore[union-attr]
        if node is None:
            if last is END:
                operands = tuple([t if t.__class__ in (float, int, bool) else Operand(t) for t in operands])
                open_trace()
                continue
            node = _miss(last, key, attrs)
        vals = [Val(trace, last.index + 1 + k, node, info) for k, info in enumerate(node.infos)]
        vals[0].scalars = scalars
        if trace.entries[-1] is last:
            trace.entries.extend(vals)
            if node.stop or last.index > MAX_ENTRIES or hooks.policy is not None:
                _stop(trace, *vals)
            return vals


def record_pair(body: Any, a: Any, b: Any) -> Val:
    """`record` for what programs do most: one result from a tensor and a tensor or Python number, no attributes."""
    while True:
        trace = state.trace
        val = a._val if a._storage is None else a._current()
        first = val.index if val.trace is trace else trace.enter(val, a)
        cls = b.__class__
        if cls is float or cls is int:
            key: tuple = (body, first, cls)
            scalars = (b,)
        else:
            val = b._val if b._storage is None else b._current()
            key = (body, first, val.index if val.trace is trace else trace.enter(val, b))
            scalars = None
        last = trace.entries[-1]
        node = last.node.next.get(key)  # type: ignore[union-attr]
        if node is None:
            if last is END:
                a, b = Operand(a), b if cls is float or cls is int else Operand(b)
                open_trace()
                continue
            node = _miss(last, key, ())
        # Written out rather than called: a constructor's call would be a third of the time of an op.
        made = _new(Val)
        made.trace = trace
        made.index = last.index + 1
        made.node = node
        made.info = node.info
        made.buf = None
        made.scalars = scalars
        made.extra = None
        made.stamp = None
        if trace.entries[-1] is last:
            trace.entries.append(made)
            if node.stop or last.index > MAX_ENTRIES or hooks.policy is not None:
                _stop(trace, made)
            return made


_new: Any = object.__new__


def _stop(trace: Trace, *vals: Val) -> None:
    if state.capture is not None:
        return
    flush, raising = hooks.policy() if hooks.policy is not None else (True, False)
    if flush:
        hooks.flush(trace)
        if raising:
            for val in vals:
                settle(val)


def _miss(last: Val, key: tuple, attrs: tuple) -> Node:
    """Infers the step's types and adds it to the trie. Errors (shapes, dtypes) are raised here, at the user's line."""
    body = key[0]
    parent = last.node
    assert parent is not None
    extra = None
    if isinstance(body, Macro):
        infos, extra = body.infer(parent, key)
        grad = key[1] if body is GRAD_MODE else parent.grad
    else:
        refs = key[1:-2] if attrs else key[1:]
        operand_infos = [parent.info_of(r) if r.__class__ is int else r for r in refs]
        operands = tuple([i if i.__class__ is type else i.type for i in operand_infos])
        try:
            types, reached = infer(body, operands, attrs)
        except DuoError as error:
            raise explained(error, body, operands) from None
        grad = parent.grad
        tracked = {k for k, i in enumerate(operand_infos) if grad and i.__class__ is Info and i.requires_grad}
        infos = tuple(Info(t, not tracked.isdisjoint(r)) for t, r in zip(types, reached))
    node = Node(parent, key, infos, grad, user_location(), attrs)
    node.extra = extra
    _node_count[0] += 1
    return parent.next.setdefault(key, node)


def explained(error: DuoError, body: Any, operands: tuple) -> DuoError:
    """The error of a body with what the user called, on what, and where."""
    name = getattr(body, "__name__", "op").strip("_")
    listed = ", ".join(o.__name__ if o.__class__ is type else str(o) for o in operands)
    location = user_location()
    at = f"\n  at {location.full()}" if location is not None else ""
    text = str(error)
    return type(error)(text + at if text.startswith(f"{name}(") else f"{name}({listed}): {text}{at}")


def attr_classes(attrs: tuple) -> tuple:
    """Tells apart attributes that compare equal but are not the same: 1, 1.0 and True; 0.0 and -0.0."""
    return tuple([a.hex() if a.__class__ is float else a.__class__ for a in attrs])


_ALONE = {float: f64, int: i64, bool: bool_}


def scalar_types(operands: tuple) -> tuple[DType, ...]:
    """The dtype that each Python number among operands (TensorTypes and number classes) takes beside the tensors."""
    tensors = [t.dtype for t in operands if t.__class__ is TensorType]
    out = []
    for o in operands:
        if o.__class__ is TensorType:
            continue
        if not tensors:  # a number alone keeps all its precision; the body casts it
            out.append(_ALONE[o])
            continue
        dtype = tensors[0]
        for other in tensors[1:]:
            if other.is_float and not dtype.is_float:
                dtype = other
        out.append(promote_scalar(dtype, o))
    return tuple(out)


Inferred = tuple[tuple[TensorType, ...], tuple[frozenset[int], ...]]


def infer(body: Callable[..., Any], operands: tuple, attrs: tuple) -> Inferred:
    """What `body` gives for operands of these TensorTypes and number classes: its result types, and for each result the numbers
    of the operands that a gradient goes back to."""
    memo_key = (body, operands, attrs)
    found = _infer_memo.get(memo_key)
    if found is None:
        builder = Builder()
        scalars = iter(scalar_types(operands))
        values = [
            builder.parameter(o if o.__class__ is TensorType else TensorType(next(scalars), ())) for o in operands
        ]
        with builder:
            out = body(*values, *attrs)
        results = out if isinstance(out, (tuple, list)) else (out,)
        found = tuple([r.type for r in results]), _reached(values, builder.ops, results)
        if len(_infer_memo) > 50_000:
            _infer_memo.clear()
        _infer_memo[memo_key] = found
    return found


def _reached(operands: list[Value], ops: list[Op], results: Any) -> tuple[frozenset[int], ...]:
    """For each result the numbers of the operands that it depends on through float values, not looking behind stop_gradient."""
    none: frozenset[int] = frozenset()
    sources = {v: frozenset((k,)) for k, v in enumerate(operands) if v.type.dtype.is_float}
    for op in ops:
        if op.definition is stop_gradient:
            continue
        behind = none.union(*[sources.get(v, none) for v in op.operands])
        sources.update((r, behind) for r in op.results if behind and r.type.dtype.is_float)
    return tuple([sources.get(r, none) for r in results])


# ------------------------------------------------------------------------------------------------- the user's line
_INTERNAL = ("duo.", "duo_ir.", "duo_backends.")


def user_frame() -> Any:
    """The nearest frame outside duo."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != "duo" and not name.startswith(_INTERNAL):
            return frame
        frame = frame.f_back
    return None


def user_location() -> Loc | None:
    frame = user_frame()
    if frame is None:
        return None
    code: CodeType = frame.f_code
    return Loc(code, frame.f_lasti)
