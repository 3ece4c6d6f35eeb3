"""What a body gives, found without running anything: result types, which operands gradients go back to, whether it can fail at run time.

Also the user's place in the source: the nearest frame outside duo.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from duo.symbolic import NeedsGraph, has_size
from duo_ir.core import Builder, Loc, Op, Value
from duo_ir.errors import DuoError
from duo_ir.opdef import Gather, Scatter
from duo_ir.types import DType, TensorType, bool_, f64, i64, promote_scalar


def explained(error: DuoError, body: Any, operands: tuple) -> DuoError:
    """The error of a body with what the user called, on what, and where."""
    name = getattr(body, "__name__", "op").strip("_")
    listed = ", ".join(o.__name__ if o.__class__ is type else str(o) for o in operands)
    location = user_location()
    at = f"\n  at {location.full()}" if location is not None else ""
    text = str(error)
    return type(error)(text + at if text.startswith(f"{name}(") else f"{name}({listed}): {text}{at}")


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


@dataclass(frozen=True, slots=True)
class Inferred:
    """types: of the results. reached: for each result the numbers of the operands that a gradient goes back to. checked: whether
    running it can find an index out of range. fresh: whether each result is a value that was not there before."""

    types: tuple[TensorType, ...]
    reached: tuple[frozenset[int], ...]
    checked: bool
    fresh: bool


def infer(body: Callable[..., Any], operands: tuple, attrs: tuple) -> Inferred:
    """What `body` gives for operands of these TensorTypes and number classes."""
    if has_size(attrs):
        raise NeedsGraph("an eager op takes no free size")
    builder = Builder()
    scalars = iter(scalar_types(operands))
    values = [builder.parameter(o if o.__class__ is TensorType else TensorType(next(scalars), ())) for o in operands]
    with builder:
        out = body(*values, *attrs)
    results = out if isinstance(out, (tuple, list)) else (out,)
    types = tuple([r.type for r in results])
    fresh = len({*values, *results}) == len(values) + len(results)
    return Inferred(types, _reached(values, builder.ops, results), any(map(_checked, builder.ops)), fresh)


def _checked(op: Op) -> bool:
    return isinstance(op.definition.kind, Gather | Scatter) or any(_checked(o) for r in op.regions for o in r.ops)


def _reached(operands: list[Value], ops: list[Op], results: Any) -> tuple[frozenset[int], ...]:
    """For each result the numbers of the operands that it depends on through float values, not looking behind ops that stop it."""
    none: frozenset[int] = frozenset()
    sources = {v: frozenset((k,)) for k, v in enumerate(operands) if v.type.dtype.is_float}
    for op in ops:
        if op.definition.stops:
            continue
        behind = none.union(*[sources.get(v, none) for v in op.operands])
        sources.update((r, behind) for r in op.results if behind and r.type.dtype.is_float)
    return tuple([sources.get(r, none) for r in results])


# ------------------------------------------------------------------------------------------------- the user's line
_INTERNAL = ("duo.", "duo_ir.", "duo_backends.")


def user_frame() -> Any:
    """The nearest frame outside duo."""
    return user_frame_from(sys._getframe(1))[0]


def user_frame_from(frame: Any) -> tuple[Any, int]:
    """The nearest frame outside duo from `frame` outwards, and how many calls lie between."""
    depth = 0
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != "duo" and not name.startswith(_INTERNAL):
            return frame, depth
        frame = frame.f_back
        depth += 1
    return None, depth


def user_location() -> Loc | None:
    frame = user_frame()
    if frame is None:
        return None
    code: CodeType = frame.f_code
    place = (code, frame.f_lasti)
    found = _locs.get(place)
    if found is None:
        if len(_locs) > MAX_LOCS:
            _locs.clear()
        found = _locs[place] = Loc(code, frame.f_lasti)
    return found


MAX_LOCS = 8192  # places in the user's source that are remembered
_locs: dict[tuple[CodeType, int], Loc] = {}
