"""Gradients of eager programs: the walk from results back to leaves.

The tape is the path: no tensor refers to its parents. While the forward pass is still in the open trace, a backward pass is one entry,
the macro BACKWARD, whose meaning is the IR's reverse mode over the entries before it. What an earlier flush has already run is a
`Segment` (segments.py); its backward is an entry as well. Segments are walked newest first and cotangents add one by one in
reverse program order whatever the segments, so where a flush came cannot change a bit. Where Python must look at a gradient on
the way (a hook on a value that is not a leaf) the walk stops at that value, asks, and goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from duo.eager.build import Construction, Watch
from duo.eager.path import Checks, Path
from duo.eager.steps import Unable
from duo.eager.trace import Trace, Val, commit, hooks, open_trace, places, settle, state
from duo.eager.trie import NOTHING, Info, Macro, Node
from duo_ir.core import Value
from duo_ir.errors import DeviceError, DuoError, GradientError
from duo_ir.ops import add, stop_gradient
from duo_ir.ops.broadcasting import ones_like


class GradLeaf:
    """What makes a tensor a leaf: where its gradient accumulates, and its hooks."""

    __slots__ = ("__weakref__", "grad", "hooks", "tensor")

    def __init__(self, tensor: Any) -> None:
        self.tensor = weakref.ref(tensor)
        self.grad: Any = None
        self.hooks: list[Callable] = []


class Inner:
    """Hooks of a value that is not a leaf. `Val.extra` of a pending one; an Origin (segments.py) once it has run."""

    __slots__ = ("hooks",)

    def __init__(self) -> None:
        self.hooks: list[Callable] = []


class Backward(Macro):
    """Key (BACKWARD, low, seeds, wanted, retain, create), seeds = ((value number, cotangent number or -1 for ones), ...).

    Its values are gradients; `Node.extra` numbers what they are gradients of."""

    name = "backward"

    def infer(self, parent: Node, key: tuple, trace: Trace | None = None) -> tuple[tuple[Info, ...], Any]:
        _, low, seeds, wanted, _, create = key
        if not create:
            try:
                path = Path.to(parent)
                walk = path.reverse(low, [n for n, _ in seeds], wanted, Checks(path.freed, path.stale({})))
                path.ahead = key, walk
                return tuple([Info(path.type(n), False, parent.device) for n in walk.numbers]) or (
                    NOTHING,
                ), walk.numbers
            except (Unable, DuoError):
                pass  # if it is an error, the Construction finds it at the user's line
        construction = Construction(parent, places(trace))
        numbers, gradients = self._run(
            construction, key, Watch(construction.freed, construction.stale(), construction.free(), construction.moved)
        )
        return tuple(Info(g.type, key[5], parent.device) for g in gradients) or (NOTHING,), numbers

    def build(self, construction: Construction, node: Node) -> tuple[Any, ...]:
        watch = Watch(free=construction.free())
        _, gradients = self._run(construction, node.key, watch)
        if not node.key[4]:
            construction.freed.update(watch.touched)
        if node.key[5]:
            return gradients or (None,)
        return tuple(stop_gradient(g) for g in gradients) or (None,)

    def enter(self, path: Path, node: Node) -> None:
        _, low, seeds, wanted, retain, create = node.key
        if create:
            raise Unable
        if path.ahead is not None and path.ahead[0] is node.key:
            walk = path.ahead[1]
        else:
            walk = path.reverse(low, [n for n, _ in seeds], wanted)
        path.walks[node.first] = walk
        if not retain:
            for entry, ops in walk.touched.items():
                path.freed[entry] = path.freed.get(entry, 0) | ops

    def _run(self, construction: Construction, key: tuple, watch: Watch) -> tuple[tuple[int, ...], tuple[Value, ...]]:
        _, low, seeds, wanted, _, _ = key
        with construction.builder:
            start: dict[Value, Value] = {}
            for number, cotangent in seeds:
                value = construction.value(number)
                seed = construction.value(cotangent) if cotangent >= 0 else ones_like(value)
                start[value] = add(start[value], seed) if value in start else seed
            return construction.backward(low, start, wanted, watch)


BACKWARD = Backward()


def backward_at_once(val: Val, retain: bool) -> list[tuple[Any, Val]] | None:
    """What most backward passes are, one entry: from a single value of the open trace, with ones and with nothing to ask on the way. Gives
    (GradLeaf or Origin, gradient) pairs; None where it takes an Engine."""
    trace = state.trace
    if val.trace is not trace or not val.info.requires_grad or trace.hooked or trace.links:
        return None
    entries = trace.entries
    vals = commit(trace, (BACKWARD, 0, ((val.index, -1),), (), retain, False))
    if vals is None:
        return None
    numbers = vals[0].node.extra  # type: ignore[union-attr]
    return [(entries[n].extra, v) for n, v in zip(numbers, vals)]


Cotangents = dict[Any, Any]  # value number (in a segment also a Position) -> eager Tensor, or None for ones


def walk_back(
    seeds: Cotangents,
    hooked: Iterable[int],
    wanted: Sequence[int],
    extra_of: Callable[[int], Any],
    stage: Callable[[int, Cotangents, Sequence[int]], Cotangents],
    links: Mapping[int, int],
    time: Callable[[Any], float] = float,
) -> tuple[Cotangents, Cotangents]:
    """(cotangents of leaves, gradients of wanted values) of one path. `stage(low, seeds, wanted)` differentiates the entries after `low`;
    the values `hooked` are where Python looks at the gradient. `links`: entry of a leaf -> the leaf's entry before, which takes the sum over.
    `time` orders what seeds are keyed by."""
    found: Cotangents = {}
    pending = dict(seeds)
    for low in [*sorted({*hooked, *links}, reverse=True), 0]:
        if any(time(n) > low for n in pending):
            inner = {p: g for p, g in pending.items() if p.__class__ is tuple and time(p) <= low}
            results = stage(low, {p: g for p, g in pending.items() if p not in inner}, wanted)
            pending = inner
            for n, gradient in results.items():
                if n in wanted and n > low:
                    found[n] = gradient
                extra = extra_of(n)
                if n <= low or (extra is not None and not isinstance(extra, Inner)) or n not in wanted:
                    pending[n] = gradient
        if low in pending and low in links:
            gradient, before = pending.pop(low), links[low]
            pending[before] = gradient + pending[before] if before in pending else gradient
        elif low in pending:
            pending[low] = call_hooks(extra_of(low).hooks, pending[low])
            if low in wanted:
                found[low] = pending[low]
    return pending, found


def call_hooks(hooks: Sequence[Callable], gradient: Any) -> Any:
    """The gradient after each hook has seen it and perhaps replaced it."""
    for hook in list(hooks):
        new = hook(gradient)
        if new is not None:
            check_device_of("a hook gave a gradient", new, gradient)
            gradient = new
    return gradient


def check_device_of(what: str, gradient: Any, tensor: Any) -> None:
    """Raises DeviceError for a gradient that is not on the device of the tensor that it is for."""
    mine, wanted = gradient._val.info.device, tensor._val.info.device
    if mine is not wanted:
        raise DeviceError(f"{what} on {mine} for a tensor on {wanted}; move it there by .to({wanted!r})")


class Engine:
    """One call of backward or grad. cotangents: GradLeaf or Origin -> eager Tensor."""

    def __init__(self, wrap: Callable[[Val], Any], wanted: Sequence[Val], retain: bool, create: bool) -> None:
        self.wrap, self.wanted, self.retain, self.create = wrap, wanted, retain, create
        self.cotangents: dict[Any, Any] = {}
        self.found: dict[Val, Any] = {}  # gradients of wanted values that are not leaves

    def run(self, roots: Sequence[tuple[Any, Any]], ones: Callable[[Any], Any]) -> None:
        """roots: (tensor, its cotangent or None for ones)."""
        while not self._start(roots, ones):
            self.cotangents.clear()
        self.go_on()

    def go_on(self) -> None:
        """Takes what cotangents there are of earlier segments' outputs back through those segments."""
        while True:
            origins = [k for k in self.cotangents if not isinstance(k, GradLeaf)]
            if not origins:
                return
            if state.capture is not None:
                state.capture.impure("backward goes on through values that were computed outside")
            for origin in origins:
                if origin.error is not None:
                    raise origin.error
            segment = max((k.segment for k in origins), key=lambda s: s.serial)
            segment.walk(self, {k.number: self.cotangents.pop(k) for k in origins if k.segment is segment})

    def _start(self, roots: Sequence[tuple[Any, Any]], ones: Callable[[Any], Any]) -> bool:
        """Takes the cotangents of the roots through what is recorded in the open trace; False if the trace was closed meanwhile."""
        trace = open_trace()
        if (trace.hooked or trace.links) and state.capture is None:
            # A hook may look at values, which would close the trace in the middle of the walk, as an addition between two
            # stages may; a segment stays as it is.
            hooks.flush(trace)
            trace = open_trace()
        seeds: Cotangents = {}
        for tensor, gradient in roots:
            val = tensor._value()
            if not val.info.requires_grad:
                raise GradientError(
                    f"a tensor {val.info.type} that does not require grad has no gradient; it was made under no_grad, from "
                    "detached values, or from tensors without requires_grad_()"
                )
            if val.trace is not trace:
                settle(val)
            key: Any = val.index if val.trace is trace else val.extra
            into: dict = seeds if val.trace is trace else self.cotangents
            if val.trace is not trace or key in into:
                gradient = ones(tensor) if gradient is None else gradient
            if key in into:
                first = into[key] if into[key] is not None else ones(tensor)
                gradient = first + gradient
            into[key] = gradient
        try:
            if seeds:
                self._walk_trace(trace, seeds)
        except _Closed:
            return False
        return True

    def _walk_trace(self, trace: Trace, seeds: Cotangents) -> None:
        """Through what is recorded in the open trace."""
        entries = trace.entries
        for extra, gradient in list(self.cotangents.items()):
            number = trace.leaf_numbers.get(extra)
            if number is not None:
                seeds[number] = gradient
        wanted = [v.index for v in self.wanted if v.trace is trace]
        hooked = trace.hooked

        def stage(low: int, given: Cotangents, wanted: Sequence[int]) -> Cotangents:
            refs = tuple((n, -1 if t is None else number_in(trace, t._value(), t)) for n, t in given.items())
            vals = commit(trace, (BACKWARD, low, refs, tuple(sorted(set(wanted))), self.retain, self.create))
            if vals is None or vals[0].node is None:
                raise _Closed
            return {n: self.wrap(v) for n, v in zip(vals[0].node.extra, vals)}

        leaves, found = walk_back(seeds, hooked, wanted, lambda n: entries[n].extra, stage, trace.links)
        self.found.update((entries[n], g) for n, g in found.items())
        self.cotangents.update((entries[n].extra, g) for n, g in leaves.items() if entries[n].extra is not None)


class _Closed(Exception):
    """The trace was closed (another thread has looked at one of its values) before its backward pass was recorded."""


def number_in(trace: Trace, val: Val, tensor: Any = None) -> int:
    """The number of a value, which `tensor` holds, in this trace; -1 when the trace has been closed meanwhile."""
    return val.index if val.trace is trace else trace.leaves.get(val) or trace.enter(val, tensor)
