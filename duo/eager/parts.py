"""Slices at places that change: the minibatches `x[i : i + n]` of data that is there.

Each place is a step of its own in the trie, so all that follows is a path and a program of its own. Where some have been recorded from one node, further
ones are read at once: their elements are copied, and what follows starts from a value from outside, on one path for all places.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

from duo import runtime
from duo.devices import CPU
from duo.dispatch import View
from duo.eager.trace import END, Val, open_trace
from duo.eager.trie import LEAF, Info, Node
from duo_ir.types import TensorType

_MANY = 4  # places of one view from one node

_known: WeakKeyDictionary[Node, tuple[int, set[Any]]] = WeakKeyDictionary()  # node: how many steps it had, the views with many places


def read_part(view: View, val: Val, attrs: tuple) -> Val | None:
    """What the view has of a value that is there, in memory of its own; None where it is better recorded."""
    info = val.info
    if view.part is None or val.buf is None or info.requires_grad or val.extra is not None or info.device is not CPU:
        return None
    trace = open_trace()
    last: Any = trace.entries[-1]
    node = last.node
    if val not in trace.leaves and node is not None:
        node = node.next.get((LEAF, info, -1))
    if node is None or last is END or len(node.next) <= _MANY or not _moves(node, view):
        return None
    whole = info.type.static_shape()
    found = view.part(whole, *attrs)
    if found is None:
        return None
    (first, shape), size = found, info.type.dtype.itemsize
    nbytes = math.prod(shape) * size
    if nbytes == 0 or 2 * nbytes > val.buf.nbytes:
        return None
    out = Val(None, -1, None, Info(TensorType(info.type.dtype, shape), False, CPU))
    out.buf = runtime.copied_part(val.buf, first * size, nbytes)
    return out


def _moves(node: Node, view: View) -> bool:
    """Whether the view has been recorded from the node at many places."""
    count = len(node.next)
    known = _known.get(node)
    if known is None or known[0] != count:
        places: dict[Any, int] = {}
        for key in list(node.next):
            places[key[0]] = places.get(key[0], 0) + 1
        known = _known[node] = (count, {op for op, n in places.items() if n > _MANY})
    return view.read in known[1]
