"""One op surface, several kinds of tensor.

Every user-facing function normalises its arguments and calls `apply(body, tensors, attrs)`. A *body* is a plain function over SSA
values, `body(*values, *attrs)`, written once. What `apply` does with it is up to the kind of tensor it is given: on SSA values it
runs the body on the spot; an eager tensor records it in the trace; a graph tensor inlines it into its graph. Python numbers among
`tensors` are weak scalars: run-time arguments, never baked into the program.

A kind of tensor is any class with `_priority` (the highest among the operands decides: a Parameter meeting a placeholder becomes
part of the graph) and the static methods `_apply`, `_view` and `_update(state, new)`, which writes shared state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from duo.symbolic import NeedsGraph, Number
from duo_ir.core import Value
from duo_ir.errors import DTypeError
from duo_ir.ops import straight_through


class View(NamedTuple):
    """A function whose result shares storage with its operand: `read(x, *attrs)`, and `write(x, new, *attrs)`, which is x with the
    viewed part replaced by `new` (None: writing through this view is refused, as two of its elements are one in memory).
    `part(shape, *attrs)`: (first element, shape of the result) where that is a row of elements as they lie in memory, else None."""

    read: Callable[..., Value]
    write: Callable[..., Value] | None
    part: Callable[..., tuple[int, tuple[int, ...]] | None] | None = None


def kind_of(tensors: tuple[Any, ...]) -> Any:
    """The class that decides what an op on these tensors does; None when they are SSA values or numbers."""
    best = None
    for t in tensors:
        cls = t.__class__
        if cls is float or cls is int or cls is bool or cls is Value:
            continue
        priority = getattr(cls, "_priority", None)
        if priority is None:
            raise DTypeError(f"expected tensors and numbers, got {cls.__name__}")
        if best is None or priority > best._priority:
            best = cls
    return best


def distinct(out: Any, operands: Sequence[Value]) -> Any:
    """What a body gives, as values of their own. One that gives an operand back (`clone`, a reshape to the same shape) would make two
    tensors one in the program, and a gradient or a hook of the one would see what is due to the other."""
    if isinstance(out, (tuple, list)):
        return tuple([distinct(v, operands) for v in out])
    return straight_through(out, out) if out.type.dtype.is_float and any(out is v for v in operands) else out


def beside(tensor: Any, *others: Any) -> tuple[Any, ...]:
    """`others` (tensors or None) as the kind of tensor that decides where they meet `tensor`: what is computed of parameters alone, before
    they meet a graph's tensor, is part of that graph then."""
    return tuple([t if t is None or kind_of((tensor, t)) is t.__class__ else apply(_first, (t, tensor)) for t in others])


def _first(x: Value, y: Value) -> Value:
    return x


_views: dict[Any, Any] = {}  # class of a tensor -> its `_view`
_applies: dict[Any, Any] = {}  # class of the operand, or classes of several -> `_apply` of the class that decides
_quick: Any = None  # a class of tensors, and how it applies a body if nothing but it and numbers is there
_quick_apply: Any = None
chain: Any = None  # of `use_quick`, or None


def use_quick(kind: Any, quick: Any, together: Any = None) -> None:
    """`quick(body, tensors, attrs)` is asked first where a tensor of exactly this class comes first; it may call `apply_generally`.
    `together(tensor, steps)` applies several bodies, steps (body, tensors, attrs, whether it is a view's), each to the result of the one before
    and those tensors. It gives the last result; or (how many steps it has taken, what the next takes) where the rest is for `apply`."""
    global _quick, _quick_apply, chain
    _quick, _quick_apply, chain = kind, quick, together


def quick_for(kind: Any) -> Any:
    """What `use_quick` was given for tensors of exactly this class, or None."""
    return _quick_apply if kind is _quick else None


def apply(body: Callable[..., Any], tensors: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
    """The result(s) of `body` on tensors of any one kind, Python numbers among them. `attrs` are static and hashable."""
    try:
        if tensors[0].__class__ is _quick:
            return _quick_apply(body, tensors, attrs)
        return apply_generally(body, tensors, attrs)
    except NeedsGraph:  # eager tensors, and the size of a program under construction
        return Number._apply(body, tensors, attrs)


def apply_generally(body: Callable[..., Any], tensors: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> Any:
    """`apply` to whatever kinds of tensors are there."""
    found = _applies.get(tensors[0].__class__ if len(tensors) == 1 else tuple(map(type, tensors)))
    if found is not None:
        return found(body, tensors, attrs)
    try:
        kind = kind_of(tensors)
    except DTypeError:
        tensors = tuple([_plain(t) for t in tensors])
        kind = kind_of(tensors)
    if kind is None:
        return body(*tensors, *attrs)
    if len(_applies) < 4096:
        _applies[tensors[0].__class__ if len(tensors) == 1 else tuple(map(type, tensors))] = kind._apply
    return kind._apply(body, tensors, attrs)


def _plain(x: Any) -> Any:
    """NumPy's scalars and subclasses of int and float as Python numbers; anything else as it is."""
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, (int, float)) and x.__class__ is not bool:
        return float(x) if isinstance(x, float) else int(x)
    return x


def apply_view(view: View, tensor: Any, attrs: tuple[Any, ...] = ()) -> Any:
    """A view of `tensor`."""
    cls = tensor.__class__
    if cls is Value:
        return view.read(tensor, *attrs)
    found = _views.get(cls)
    if found is None:
        found = kind_of((tensor,))._view
        if len(_views) < 256:
            _views[cls] = found
    try:
        return found(view, tensor, attrs)
    except NeedsGraph:
        return Number._apply(view.read, (tensor,), attrs)
