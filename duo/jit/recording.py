"""From a finished capture to what a replay needs: where each input of the program is found again, and where each output goes.

`Recording.reasons` names what cannot be repeated by running the program alone; a recording without reasons can be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from duo import devices
from duo.eager.autograd import GradLeaf
from duo.eager.flush import FlushPlan, Program, flush
from duo.eager.sharing import still_shared
from duo.eager.tensor import EagerTensor, Storage
from duo.eager.trace import Val, state
from duo.eager.trie import Info, Node
from duo.jit import nests
from duo.jit.capture import Capture
from duo.jit.guards import IMMUTABLE
from duo.nn.parameter import Buffer, Parameter

_TENSORS = (EagerTensor, Parameter, Buffer)


@dataclass(frozen=True)
class Source:
    """Where a tensor is found: 'argument' (of that number), 'outside' (that very tensor), 'grad' (of that leaf)."""

    kind: str
    what: Any

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Source) and self.kind == other.kind and self.what is other.what
            if self.kind != "argument"
            else (isinstance(other, Source) and other.kind == "argument" and self.what == other.what)
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.what if self.kind == "argument" else id(self.what)))


@dataclass
class Made:
    """A tensor that the call makes: value `number`; `storage` numbers the recording's storages (-1: its own), `source` an aliased one."""

    number: int
    chain: tuple = ()
    storage: int = -1
    source: Source | None = None


@dataclass
class Recording:
    """One call. inputs: per parameter of the program a Source, ('number', x), ('hyper', group number, k) or ('constant', Val)."""

    node: Node
    program: Program | None
    inputs: list[Any] = field(default_factory=list)
    infos: dict[Source, Info] = field(default_factory=dict)  # of tensors that are read or written
    writes: dict[Source, tuple[int, bool]] = field(
        default_factory=dict
    )  # -> (number, whether the old value counts as overwritten)
    grads: list[tuple[Source, GradLeaf, str, Any]] = field(
        default_factory=list
    )  # (owner, leaf, 'none' | 'tensor' | 'any' before, after)
    made: list[Made] = field(default_factory=list)
    storages: list[int] = field(default_factory=list)  # number of the base value of each new storage
    groups: list[tuple[Any, Any, frozenset, tuple]] = field(
        default_factory=list
    )  # (optimizer, group, options, hyperparameters)
    leaves: list[tuple[GradLeaf, tuple]] = field(default_factory=list)  # leaves that were read, with their hooks
    no_leaf: list[EagerTensor] = field(default_factory=list)
    result: Any = None  # the returned nest; tensors are replaced by Made numbers or Sources
    default_device: str | None = None  # where tensors were made for which no device was given
    numerics: str | None = None  # of a program on another device than the CPU
    extras: dict[int, Any] = field(default_factory=dict)  # number -> leaf, of values that are leaves
    reasons: dict[str, None] = field(default_factory=dict)

    def signature(self) -> tuple:
        """What two recordings of the same program have in common."""
        return (
            id(self.node), [_comparable(x) for x in self.inputs], dict(self.writes),
            [(owner, before, after) for owner, _, before, after in self.grads], [m.number for m in self.made],
            repr(nests.key(self.result, _comparable)),
        )  # fmt: skip


def _comparable(x: Any) -> Any:
    if isinstance(x, tuple) and x and x[0] == "constant":
        return ("constant", x[1].info)
    if isinstance(x, tuple) and x and x[0] == "number":
        return ("number", x[1].__class__, x[1].hex() if isinstance(x[1], float) else x[1])
    if isinstance(x, Source):
        return (x.kind, x.what if x.kind == "argument" else id(x.what))
    return x if not isinstance(x, float) else x.hex()


class Fresh:
    """Stands for a new tensor (by its number in `Recording.made`) in the returned nest."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"made {self.number}"


class Same:
    """Stands for a tensor that was there before in the returned nest."""

    __slots__ = ("source",)

    def __init__(self, source: Source) -> None:
        self.source = source

    def __repr__(self) -> str:
        return repr(_comparable(self.source))


def run(capture: Capture) -> tuple[list[Val], dict[int, Val]]:
    """Runs the capture's program as a whole; gives its entries and, by number, the outside values that entered.
    Raises the program's error after taking everything back."""
    trace = state.trace
    entries, numbers = trace.entries, {number: val for val, number in trace.leaves.items()}
    node = entries[-1].node
    if node is not None and node.parent is not None:
        if node.memo is None:
            node.memo = FlushPlan(node)
        node.memo.visits = max(node.memo.visits, 1)  # not one op at a time
    flush(trace)
    for val in entries:
        if val.buf is None and isinstance(val.extra, BaseException):
            capture.undo()
            raise val.extra
    return entries, numbers


def analyse(capture: Capture, entries: list[Val], numbers: dict[int, Val], result: Any, trace: Any) -> Recording:
    """What the capture did, once it has run."""
    return _Analysis(capture, entries, numbers, trace).run(result)


class _Analysis:
    def __init__(self, capture: Capture, entries: list[Val], numbers: dict[int, Val], trace: Any) -> None:
        self.capture, self.entries, self.numbers = capture, entries, numbers
        node = entries[-2].node if len(entries) > 1 else entries[0].node
        assert node is not None
        self.r = Recording(node, trace.program, reasons=dict(capture.reasons))
        if node.device is not devices.CPU:
            self.r.numerics = node.numerics
        if capture.reads_default_device:
            self.r.default_device = devices.default()
        self.sources: dict[int, Source] = {}  # id of a tensor that was there before -> where it is found
        self.tensors: dict[int, EagerTensor] = {}
        self.initial: dict[int, Val] = {}
        self.new: dict[int, int] = {}  # id of a new tensor -> its number in `made`

    def reason(self, text: str) -> None:
        self.r.reasons[text] = None

    def run(self, result: Any) -> Recording:
        r, capture = self.r, self.capture
        self._find_tensors()
        if r.node.memo is not None and r.program is not None:
            for e, k in r.node.memo.inputs:
                r.inputs.append(self._leaf(e) if k is None else self._scalar(e, k))
        self._writes()
        self._grads()
        r.no_leaf = capture.plain
        r.result = self._nest(result)
        self._storages()
        for leaf in {id(v.extra): v.extra for v in self.numbers.values() if isinstance(v.extra, GradLeaf)}.values():
            r.leaves.append((leaf, tuple(leaf.hooks)))
        if r.program is not None and r.program.alive:
            for val in self.entries[:-1]:
                if isinstance(val.extra, GradLeaf) and val.index not in self.numbers:
                    r.extras[val.index] = val.extra
                    if not any(isinstance(v.extra, GradLeaf) and v.extra is val.extra for v in self.numbers.values()):
                        self.reason(
                            "a leaf that requires grad is made inside, and its gradient may be asked for outside"
                        )
        return r

    # ---------------------------------------------------------------------------------------------- what was there
    def _know(self, tensor: EagerTensor, source: Source, initial: Val) -> None:
        if id(tensor) not in self.sources:
            self.sources[id(tensor)] = source
            self.tensors[id(tensor)] = tensor
            self.initial[id(tensor)] = initial
            self.r.infos[source] = initial.info
            if tensor.__class__ not in _TENSORS:
                self.reason(f"a tensor of class {tensor.__class__.__qualname__}")

    def _find_tensors(self) -> None:
        c = self.capture
        for i, before in enumerate(c.given):
            if id(before.tensor) not in self.sources and c.arguments[before.val] != i:
                self.reason("two arguments share one value")
            self._know(before.tensor, Source("argument", i), before.val)
        for leaf, (grad, _) in c.grads.items():
            if grad is not None:
                first = c.written[id(grad)].val if id(grad) in c.written else grad._val
                self._know(grad, Source("grad", leaf), first)
        for val, ref in c.holders.items():
            tensor = ref()
            if tensor is not None and c.outside_val(val) and val not in c.arguments:
                self._know(tensor, Source("outside", tensor), c.originals.get(val, val))
            elif tensor is not None and val in c.arguments and id(tensor) not in self.sources:
                self.reason("an argument shares its value with another tensor")
        for before in c.written.values():
            if c.outside_val(before.val) and not self._is_entry(before.val):
                self._know(before.tensor, Source("outside", before.tensor), before.val)
        seen: dict[int, Any] = {}
        for key, tensor in self.tensors.items():
            storage = tensor._storage
            if storage is None:
                continue
            written = tensor._val is not self.initial[key]
            if written and still_shared(storage):
                self.reason("a tensor whose memory NumPy shares is written in place")
            if written and tensor._chain:
                self.reason("a view of a tensor from outside is written in place")
            other = seen.setdefault(id(storage), (tensor, written))
            if other[0] is not tensor and (written or other[1]):
                self.reason("a tensor that is written in place shares its storage with another")
        for before in c.written.values():
            storage = before.tensor._storage
            if storage is not None and before.tensor._chain and not any(
                t._storage is storage and not t._chain for t in self.tensors.values()
            ):  # fmt: skip
                self.reason("a view is written in place whose base cannot be found again")

    def _is_entry(self, val: Val) -> bool:
        return 0 <= val.index < len(self.entries) and self.entries[val.index] is val

    def _leaf(self, number: int) -> Any:
        val = self.numbers[number]
        c = self.capture
        if val in c.arguments:
            return Source("argument", c.arguments[val])
        if val in c.made:
            return ("constant", val)
        ref = c.holders.get(val)
        tensor = ref() if ref is not None else None
        source = self.sources.get(id(tensor)) if tensor is not None else None
        if source is None or self.initial[id(tensor)] is not c.originals.get(val, val):
            self.reason(f"a tensor {val.info.type} is read that cannot be found again")
            return ("constant", val)
        return source

    def _scalar(self, number: int, k: int) -> Any:
        found = self.capture.hyper.get(number)
        if found is None:
            scalars = self.entries[number].scalars
            assert scalars is not None
            return ("number", scalars[k])
        for i, (_, group, *_) in enumerate(self.r.groups):
            if group is found[1]:
                return ("hyper", i, k)
        optimizer, group = found
        self.r.groups.append((optimizer, group, optimizer.options(group), optimizer.hyper(group)))
        return ("hyper", len(self.r.groups) - 1, k)

    # ------------------------------------------------------------------------------------------------------- effects
    def _writes(self) -> None:
        for key, tensor in self.tensors.items():
            before, after = self.initial[key], tensor._val
            if after is before:
                continue
            if not self._is_entry(after):
                self.reason("a tensor from outside is set to a constant")
                continue
            self.r.writes[self.sources[key]] = (after.index, before.overwritten)

    def _owner(self, leaf: GradLeaf) -> Source | None:
        tensor = leaf.tensor()
        if tensor is None:
            return None
        found = self.sources.get(id(tensor))
        if found is None and self.capture.outside(tensor):
            self._know(tensor, Source("outside", tensor), tensor._val)
            found = self.sources[id(tensor)]
        return found

    def _grads(self) -> None:
        for leaf, (before, read) in list(self.capture.grads.items()):
            owner = self._owner(leaf)
            if owner is None:
                continue  # of a tensor made inside
            after = leaf.grad
            state_before = "any" if not read else "none" if before is None else "tensor"
            if after is None:
                self.r.grads.append((owner, leaf, state_before, None))
            elif after is before:
                if not read:
                    self.reason("a gradient is set to what it was")
                self.r.grads.append((owner, leaf, state_before, "kept"))
            elif id(after) in self.sources:
                self.reason("a gradient is set to a tensor from outside")
            else:
                self.r.grads.append((owner, leaf, state_before, self._make(after)))

    # ------------------------------------------------------------------------------------------------------- results
    def _make(self, tensor: EagerTensor) -> int:
        if id(tensor) in self.new:
            return self.new[id(tensor)]
        number = len(self.r.made)
        self.new[id(tensor)] = number
        self.tensors[id(tensor)] = tensor
        val = tensor._val
        if tensor.__class__ is not EagerTensor or tensor._leaf is not None:
            self.reason(f"a {tensor.__class__.__name__} that requires grad is made inside and outlives the call")
        elif not self._is_entry(val) or val.index in self.numbers:
            self.reason("a tensor made of Python data is returned")
        self.r.made.append(Made(val.index, tensor._chain))
        return number

    def _nest(self, value: Any) -> Any:
        cls = value.__class__
        if cls is list:
            return [self._nest(x) for x in value]
        if isinstance(value, tuple):
            if cls is not tuple and not hasattr(cls, "_fields"):
                self.reason(f"a {cls.__qualname__} is returned")
                return ()
            items = [self._nest(x) for x in value]
            return tuple(items) if cls is tuple else cls(*items)
        if cls is dict:
            return {k: self._nest(x) for k, x in value.items()}
        if isinstance(value, EagerTensor):
            found = self.sources.get(id(value))
            if found is not None:
                return Same(found)
            if not self._is_entry(value._val) and self.capture.outside(value):
                self._know(value, Source("outside", value), value._val)
                return Same(self.sources[id(value)])
            return Fresh(self._make(value))
        if not isinstance(value, IMMUTABLE):
            self.reason(f"a {cls.__qualname__} is returned")
            return None
        return value

    def _storages(self) -> None:
        """Which new tensors alias each other or what was there before."""
        bases = {
            id(t._storage): self.sources[k]
            for k, t in self.tensors.items()
            if t._storage is not None and k in self.sources
        }
        rows: dict[int, list[tuple[Made, Storage]]] = {}
        for key, number in self.new.items():
            storage = self.tensors[key]._storage
            if storage is not None:
                rows.setdefault(id(storage), []).append((self.r.made[number], storage))
                if still_shared(storage):
                    self.reason("a result whose memory NumPy shares")
        for key, members in rows.items():
            storage = members[0][1]
            if key in bases:
                for made, _ in members:
                    made.source = bases[key]
                continue
            if not self.capture.outside_val(storage.val) or self._is_entry(storage.val):
                writable = all(view.write is not None for made, _ in members for view, _ in made.chain)
                if len(members) == 1 and writable:
                    members[0][0].chain = ()
                    continue
                if not self._is_entry(storage.val):
                    self.reason("views of a tensor made of Python data are returned")
                for made, _ in members:
                    made.storage = len(self.r.storages)
                self.r.storages.append(storage.val.index)
            else:
                self.reason("a view is returned whose base cannot be found again")
