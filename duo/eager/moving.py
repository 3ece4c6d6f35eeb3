"""Values that go from one device to another.

A copy is made at once, as no program runs on two devices. What a backward pass finds where it came from is a Moved, which stands among the
segments of earlier flushes (segments.py) and takes a gradient back to where the original is.
"""

from __future__ import annotations

from typing import Any

from duo import runtime
from duo.eager.autograd import Cotangents, Engine, call_hooks
from duo.eager.segments import Origin, new_serial
from duo.eager.trace import Val, aside, hooks, settle, state
from duo.eager.trie import Info


class Moved:
    """A copy of a value on another device, as a backward pass sees it: `source` is the leaf or Origin that the value is of, `device` where that
    is. It saves nothing, so it is never freed."""

    def __init__(self, source: Any, device: str) -> None:
        self.serial = new_serial()
        self.source, self.device = source, device
        self.origin = Origin(self, 0, None)

    def walk(self, engine: Engine, seeds: Cotangents) -> None:
        """Takes the gradient of the copy to the original (`Segment.walk`)."""
        gradient = call_hooks(self.origin.hooks, seeds[0])
        for val in engine.wanted:
            if val.extra is self.origin:
                engine.found[val] = gradient
        back = engine.wrap(moved(gradient._value(), self.device))
        known = engine.cotangents.get(self.source)
        engine.cotangents[self.source] = back if known is None else known + back

    def note_overwritten(self, val: Val, by: Any) -> None:
        """Nothing is kept that could be overwritten (`Segment.note_overwritten`)."""


def _copy(val: Val, device: str, requires_grad: bool) -> Val:
    """The value on another device, without history."""
    out = Val(None, -1, None, Info(val.info.type, requires_grad, device))
    out.buf = aside(runtime.moved, settle(val), val.info.type, device)
    return out


def moved(val: Val, device: str) -> Val:
    """The value on a device, with its history; the very value if it is there."""
    if val.info.device is device:
        return val
    capture = state.capture
    if capture is not None and capture.outside_val(val):
        capture.impure(f"a tensor is moved from {val.info.device} to {device}")
    out = _copy(val, device, val.info.requires_grad and state.grad)
    if out.info.requires_grad:
        out.extra = Moved(val.extra, val.info.device).origin
    if capture is not None:
        capture.made.add(out)
    return out


def bring(cell: Any, device: str) -> None:
    """Moves the tensor itself, which holds state without history (a generator's). A compiled function finds it there as if it had always been."""
    val = cell._value()
    if val.info.device is device:
        return
    cell._val = there = _copy(val, device, False)
    if state.capture is not None:
        state.capture.holders.pop(val, None)
    storage = cell._storage
    if storage is not None:
        storage.val = there
        storage.version += 1
        cell._seen = storage.version


hooks.moved, hooks.bring = moved, bring
