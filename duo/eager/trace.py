"""Recording: the trace, and what a recorded value is.

Each thread has a Trace, a list of entries. An entry is a `Val`, one SSA value of the program that is being recorded; its number
is its position. A trace is a path in a trie (trie.py), so recording an op seen before is one dict look-up. All of a trace runs on one
device: an op on another one closes it and begins a trace there (`open_trace`).

An op reads the last entry, makes its own and commits by appending while the last entry is still the one it read; nothing else
advances, so a signal handler, a finaliser or another thread in between cannot corrupt a trace. Closing a trace appends END likewise.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from duo import numeric_mode, runtime
from duo.devices import CPU
from duo.eager.infer import explained, user_frame_from, user_location
from duo.eager.policy import Hooks
from duo.eager.trie import COLD, GRAD_MODE, LEAF, NOTHING, OVERWRITE, Applied, Info, Macro, Node
from duo.runtime import Buffer
from duo_ir.core import Loc
from duo_ir.errors import DeviceError, DuoError

MAX_NODES = 100_000  # of half a kilobyte
MAX_APPLIED = 8192  # bodies with kinds of operands that are remembered


class Val:
    """One value: pending (an entry of `trace`), or there (`buf`), or failed (`buf` None and `trace` None: `extra` is the error).

    `extra` is what gradients need to know of it: a GradLeaf, an Origin (output of an earlier segment), or None.
    `stamp` says of which version of a storage it is (None as long as nobody asked)."""

    __slots__ = ("buf", "extra", "index", "info", "kept", "loc", "node", "scalars", "stamp", "trace")
    loc: Loc  # where it was recorded; unset where that is what its node says
    kept: dict[Any, Any]  # what programs have made of it (keeping.py); unset where none has

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


class _Roots(dict):
    """(grad mode, device), with fast numerics (grad mode, device, 'fast') -> root of the trie."""

    def __missing__(self, key: tuple) -> Node:
        grad, device, *fast = key
        root = Node(None, ("root", *key), (NOTHING,), grad, None, (), device, "fast" if fast else "strict")
        return self.setdefault(key, root)  # type: ignore[no-any-return]


ROOTS = _Roots()
_END_NODE = Node(None, ("end",), (NOTHING,), False, None)
END = Val(None, -1, _END_NODE, NOTHING)


forks = [0]  # how often this process was forked from one that had loaded duo


def _forked() -> None:
    forks[0] += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

_new: Any = object.__new__
_getframe = sys._getframe
_RLock: Any = type(threading.RLock())  # its class: `threading.RLock` is a function around it


class Trace:
    """A program under recording. Entry 0 stands for the root."""

    __slots__ = (
        "__weakref__",
        "born",
        "call",
        "device",
        "done",
        "entries",
        "hooked",
        "leaf_numbers",
        "leaves",
        "links",
        "lock",
        "node",
        "placed",
        "program",
    )

    def __init__(self, grad: bool, device: str = CPU) -> None:
        root = _new(Val)
        root.trace = self
        root.index = 0
        fast = device is not CPU and numeric_mode.current() == "fast"
        root.node = ROOTS[grad, device, "fast"] if fast else ROOTS[grad, device]
        root.info = NOTHING
        root.buf = root.scalars = root.extra = root.stamp = None
        self.device = device
        self.entries: list[Val] = [root]
        self.leaves: dict[Val, int] = {}  # a value from outside -> its number here
        self.leaf_numbers: dict[Any, int] = {}  # a GradLeaf -> number of its latest entry
        self.links: dict[int, int] = {}  # an entry of a leaf that was here before -> number of the entry before
        self.hooked: list[int] = []  # values with hooks, other than leaves
        self.lock = _RLock()
        self.born = forks[0]
        self.node: Node | None = None  # set when closed
        self.done = False
        self.placed = False  # whether an entry has a line of its own
        self.program: Any = None  # what a flush ran for it
        self.call: Any = None  # of a flush that overwrites inputs (flush.py)

    def enter(self, val: Val, tensor: Any = None) -> int:
        """The number of a value from outside that is not here yet (`leaves`) and which `tensor` holds; -1 when this trace has been closed
        meanwhile, or is of another device."""
        if val.buf is None:
            settle(val)
        info = val.info
        leaf = val.extra if info.requires_grad else None
        before = -1 if leaf is None else self.leaf_numbers.get(leaf, -1)
        entries = self.entries
        while True:
            last: Any = entries[-1]
            node = last.node.hot
            if node.op is not LEAF or node.left is not info or node.right != before:
                key = (LEAF, info, before)
                node = last.node.next.get(key)
                if node is None:
                    if last is END or info.device is not self.device:
                        return -1
                    node = _miss(last, key, ())
                last.node.hot = node
            made = _new(Val)
            made.trace = self
            made.index = number = last.index + 1
            made.node = node
            made.info = info
            made.buf = val.buf
            made.scalars = None
            made.extra = val.extra
            made.stamp = None
            if entries[-1] is last:
                entries.append(made)
                break
        self.leaves[val] = number
        if val.stamp is not None and not val.stamp.overwritten:
            val.stamp.add(self, number)
        if leaf is not None:
            if before >= 0:
                self.links[number] = before
            self.leaf_numbers[leaf] = number
        return number

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
        self.spare: Trace | None = None  # an empty one of the other grad mode (mode.py)
        self.capture: Any = None  # a compiled function being traced forbids looking at values


state = _State()
_applied: dict[tuple, Applied] = {}
node_count = [0]
full = [False]  # whether the trie is as large as it may grow


hooks = Hooks()


def open_trace(device: str | None = None) -> Trace:
    """This thread's trace, a new one if it has been closed; on `device`, or where the last one was. A trace of another device is run first."""
    trace = state.trace
    if trace.entries[-1] is END:
        if full[0]:
            forget()
        trace = state.trace = Trace(state.grad, trace.device if device is None else device)
    elif device is not None and device is not trace.device:
        if state.capture is not None:
            state.capture.leave(trace, device)
        elif len(trace.entries) > 1:
            hooks.flush(trace)
        trace = state.trace = type(trace)(state.grad, device)
    return trace


def _numerics_changed() -> None:
    """What this thread has recorded in other numerics is run first; on the CPU there is only one kind."""
    trace = state.trace
    if trace.device is CPU or trace.entries[-1] is END:
        return
    before = trace.entries[0].node.numerics  # type: ignore[union-attr]
    if before == numeric_mode.current():
        return
    if state.capture is not None:
        state.capture.keep_numerics(trace, before)
    elif len(trace.entries) > 1:
        hooks.flush(trace)
    state.trace = type(trace)(state.grad, trace.device)


numeric_mode.on_change(_numerics_changed)


def forget() -> None:
    """Drops the trie (executables stay in their own cache)."""
    node_count[0] = 0
    full[0] = False
    _applied.clear()
    for root in ROOTS.values():
        nodes, root.next, root.hot = [root.next], {}, COLD
        while (
            nodes
        ):  # a node and its parent refer to each other: without this only the garbage collector would free them
            for node in list(nodes.pop().values()):
                nodes.append(node.next)
                node.next, node.hot = {}, COLD


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


def commit(trace: Trace, key: tuple, scalars: tuple | None = None) -> list[Val] | None:
    """Appends a macro's entry, whose key holds whatever came before it; None if the trace is closed."""
    entries = trace.entries
    while True:
        last: Any = entries[-1]
        node = last.node.hot
        if node.key != key:
            node = last.node.next.get(key)
            if node is None:
                if last is END:
                    return None
                node = _miss(last, key, ())
            last.node.hot = node
        vals = []
        index = last.index
        for info in node.infos:
            made = _new(Val)
            made.trace = trace
            made.index = index = index + 1
            made.node = node
            made.info = info
            made.buf = None
            made.scalars = scalars
            made.extra = None
            made.stamp = None
            vals.append(made)
        if entries[-1] is last:
            entries.extend(vals)
            return vals


def note_overwritten_here(trace: Trace, number: int, by: int) -> None:
    """Adds the fact that an in-place op, whose result is `by` (or -1), has replaced value `number`."""
    commit(trace, (OVERWRITE, number, by))


# Tensors that go to the device where they are used (states of generators, arrays in functions that are traced), by id.
roaming: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Operand:
    """What a tensor holds now. Reading a tensor again may record and flush (a view, memory that NumPy shares): a retry must not. `cell`: the
    tensor, if it is one that goes to the device where it is used."""

    __slots__ = ("_storage", "_val", "cell")

    def __init__(self, tensor: Any) -> None:
        self._val: Val = tensor._val if tensor._storage is None else tensor._current()
        self._storage = None
        self.cell = roaming.get(id(tensor))


def _again(body: Any, operands: tuple) -> tuple:
    """The operands for another try at recording `body`, after the trace was closed or turned out to be of another device: a trace is open where
    they are. Beside tensors of a GPU, 0-d tensors of the CPU are copied there, and a generator's state moves. Raises DeviceError."""
    operands = tuple([t if t.__class__ in (float, int, bool) else Operand(t) for t in operands])
    held = [t for t in operands if t.__class__ is Operand]
    devices = {t._val.info.device for t in held}
    if len(devices) > 1:
        staying = [t for t in held if t.cell is None]
        wanted = {t._val.info.device for t in staying if t._val.info.device is not CPU or t._val.info.type.shape}
        if len(wanted) > 1:
            name, location = getattr(body, "__name__", "op").strip("_"), user_location()
            at = f"\n  at {location.full()}" if location is not None else ""
            raise DeviceError(
                f"{name}({', '.join([o.__name__ if o.__class__ is type else str(o._val.info) for o in _kinds(operands)])}): operands on "
                f"{' and '.join(sorted(wanted))}; one op runs on one device: move one there by .to({max(wanted)!r}){at}"
            )
        devices = wanted or {CPU}
        (device,) = devices
        for t in held:
            if t._val.info.device is device:
                continue
            if t.cell is not None:
                hooks.bring(t.cell, device)
            else:
                t._val = hooks.moved(t._val, device)
        operands = tuple([t.cell if t.__class__ is Operand and t.cell is not None else t for t in operands])
    open_trace(*devices)
    return operands


def _kinds(operands: tuple) -> list[Any]:
    return [t if t.__class__ is Operand else t.__class__ for t in operands]


def record(body: Any, operands: tuple, attrs: tuple = ()) -> list[Val]:
    """Records `body(*operands, *attrs)`; operands are eager tensors and Python numbers. Gives its result Vals."""
    found = _record(body, operands, attrs)
    return found if found.__class__ is list else [found]  # type: ignore[list-item,return-value]


def recorder(kind: Any = None) -> Callable[..., Any]:
    """`record` as a function that gives the result's Val (a list of several), or with `kind`, the class of eager tensors, a tensor (a tuple)."""

    def record_op(body: Any, operands: tuple, attrs: tuple = ()) -> Any:
        while True:
            trace = state.trace
            entries = trace.entries
            if entries[-1] is END:
                trace = open_trace()
                entries = trace.entries
            scalars: tuple | None = None
            t = operands[0] if len(operands) == 1 else None
            if t is not None and t.__class__ is not float and t.__class__ is not int and t.__class__ is not bool:
                val = t._val if t._storage is None else t._current()
                index = val.index if val.trace is trace else trace.leaves.get(val) or trace.enter(val, t)
                if not attrs:
                    key: tuple = (body, index)
                else:
                    key = entries[-1].node.hot.key  # type: ignore[union-attr]
                    if len(key) != 4 or key[2] is not attrs or key[1] != index or key[0] is not body:
                        key = (body, index, attrs, attr_classes(attrs))
            else:
                refs: list[Any] = [body]
                for t in operands:
                    cls = t.__class__
                    if cls is float or cls is int or cls is bool:
                        refs.append(cls)
                        scalars = (t,) if scalars is None else (*scalars, t)
                        continue
                    val = t._val if t._storage is None else t._current()
                    refs.append(val.index if val.trace is trace else trace.leaves.get(val) or trace.enter(val, t))
                if attrs:
                    refs.append(attrs)
                    refs.append(attr_classes(attrs))
                key = tuple(refs)
            last: Any = entries[-1]
            node = last.node.hot
            if node.key != key:
                node = last.node.next.get(key)
                if node is None:
                    if last is END or -1 in key:
                        operands = _again(body, operands)
                        continue
                    node = _miss(last, key, attrs)
                last.node.hot = node
            # Written out rather than called: a constructor's call would be a large part of the time of an op.
            made = _new(Val)
            made.trace = trace
            made.index = last.index + 1
            made.node = node
            made.info = node.info
            made.buf = None
            made.scalars = scalars
            made.extra = None
            made.stamp = None
            if len(node.infos) != 1:
                vals = [made, *[Val(trace, last.index + 2 + k, node, info) for k, info in enumerate(node.infos[1:])]]
                if entries[-1] is not last:
                    continue
                entries.extend(vals)
                if node.special or hooks.busy:
                    recorded(trace, node, vals, _getframe())
                return vals if kind is None else tuple(map(kind, vals))
            if entries[-1] is not last:
                continue
            entries.append(made)
            if node.special or hooks.busy:
                try:
                    frame = _getframe(node.depth)
                except ValueError:  # fewer calls than that
                    frame = _getframe()
                if frame.f_lasti != node.lasti or frame.f_code is not node.code or node.stop or hooks.busy:
                    recorded(trace, node, [made], _getframe(), frame)
            if kind is None:
                return made
            out = _new(kind)
            out._val = made
            out._storage = None
            out._chain = ()
            out._seen = 0
            out._leaf = None
            return out

    return record_op


_record = recorder()


def recorded(trace: Trace, node: Node, vals: list[Val], frame: Any, near: Any = None, within: int = 0) -> None:
    """What comes after the entry of a special node, or of any while `hooks.busy`: its line is kept, and it may be time to flush.
    frame: that which recorded it; near: the one that the user's was found at, the last time; within: as in `place`."""
    if node.placed or hooks.placing:
        other = node.other
        if other is not None and near is not None and near.f_lasti == other.lasti and near.f_code is other.code:
            vals[0].loc = other
            trace.placed = True
        else:
            place(trace, node, vals[0], frame, within)
    if node.stop or hooks.policy is not None:
        _stop(trace, *vals)


def recorded_elsewhere(trace: Trace, node: Node, val: Val, frame: Any, near: Any) -> None:
    """`recorded` of what native code, which has no frame, recorded in `frame`."""
    recorded(trace, node, [val], frame, near, 1)


def place(trace: Trace, node: Node, val: Val, frame: Any, within: int = 0) -> None:
    """Keeps the user's line of an entry where it is another than that of its node. within: calls from `frame` to what recorded it."""
    frame, depth = user_frame_from(frame)
    if frame is None:
        return
    node.depth = depth + within  # where to look for it first the next time
    if frame.f_lasti == node.lasti and frame.f_code is node.code:
        return
    val.loc = node.other = Loc(frame.f_code, frame.f_lasti)
    trace.placed = True


def places(trace: Any) -> dict[int, Loc]:
    """Entries of a trace -> where they were recorded, of those that were recorded elsewhere than their nodes."""
    if trace is None or not trace.placed:
        return {}
    return {val.index: val.loc for val in trace.entries if hasattr(val, "loc")}


def _stop(trace: Trace, *vals: Val) -> None:
    if state.capture is not None:
        return
    flush, raising = hooks.policy() if hooks.policy is not None else (True, False)
    if flush:
        hooks.flush(trace)
        if raising:
            for val in vals:
                settle(val)
            if trace.device is not CPU:
                runtime.synchronize()


def _miss(last: Val, key: tuple, attrs: tuple) -> Node:
    """Infers the step's types and adds it to the trie. Errors (shapes, dtypes) are raised here, at the user's line."""
    capture = state.capture
    # Had it been seen before, nothing would run: so there is nothing to watch.
    return _add(last, key, attrs) if capture is None else capture.aside(_add, last, key, attrs)  # type: ignore[no-any-return]


def aside(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)`, which goes to a device: a function that is being compiled is not watched meanwhile."""
    capture = state.capture
    return work(*arguments) if capture is None else capture.aside(work, *arguments)


def _add(last: Val, key: tuple, attrs: tuple) -> Node:
    body = key[0]
    parent = last.node
    assert parent is not None
    extra, checked = None, False
    if isinstance(body, Macro):
        infos, extra = body.infer(parent, key, last.trace)
        grad = key[1] if body is GRAD_MODE else parent.grad
    else:
        refs = key[1:-2] if attrs else key[1:]
        trace = last.trace
        entries = trace.entries if trace is not None else ()
        count = len(entries)  # short when another thread has just run the trace
        operands = tuple([
            r if r.__class__ is not int else entries[r].info if r < count else parent.info_of(r) for r in refs
        ])  # fmt: skip
        grad = parent.grad
        memo_key = (body, operands, attrs, key[-1] if attrs else None, grad, parent.device)
        extra = _applied.get(memo_key)
        if extra is None:
            try:
                extra = Applied(body, operands, attrs, grad, parent.device)
            except DuoError as error:
                types = tuple([i if i.__class__ is type else i.type for i in operands])
                raise explained(error, body, types) from None
            if len(_applied) > MAX_APPLIED:
                _applied.clear()
            _applied[memo_key] = extra
        infos = extra.infos
        checked = extra.checked
    node = Node(parent, key, infos, grad, user_location(), attrs)
    node.extra = extra
    if checked:
        node.placed = node.special = True
    node_count[0] += 1
    full[0] = node_count[0] > MAX_NODES
    return parent.next.setdefault(key, node)


def attr_classes(attrs: tuple) -> tuple:
    """Tells apart attributes that compare equal but are not the same: 1, 1.0 and True; 0.0 and -0.0."""
    classes = tuple(map(type, attrs))
    if float not in classes:
        return classes
    return tuple([a.hex() if a.__class__ is float else a.__class__ for a in attrs])
