"""Reading and writing at places given by integer operands, checked when the program runs.

With indices i1..ik of one shape I and `axes` of k axes of x, place p of I names x[..., i_j[p] on axes[j], ...], a window over the
axes not named (in their order). gather reads those windows, scatter writes them, one after another.
"""

from __future__ import annotations

from typing import TypeAlias

from duo_ir.core import Op, Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.opdef import Gather, OpDef, Scatter
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import reference
from duo_ir.types import Shape, TensorType, i64, product, shape_str

Ints: TypeAlias = tuple[int, ...]


def _window_shape(x: TensorType, indices: tuple[TensorType, ...], axes: Ints) -> Shape:
    """Shape of the windows: that of the indices, then the axes not indexed."""
    if not indices or not isinstance(axes, tuple) or len(axes) != len(indices):
        raise ArgumentError(
            f"axes {axes!r} must name one axis for each of the {len(indices)} index operands (at least one)"
        )
    if len(set(axes)) != len(axes) or [a for a in axes if isinstance(a, bool) or not 0 <= a < x.rank]:
        raise ArgumentError(f"axes {axes} must be distinct and within 0..{x.rank - 1}")
    for index in indices:
        if index.dtype is not i64:
            raise DTypeError(f"indices are i64, not {index.dtype.name}; cast them")
        if index.shape != indices[0].shape:
            raise ShapeError(f"indices need one shape, got {indices[0]} and {index}; broadcast one")
    return (*indices[0].shape, *[d for a, d in enumerate(x.shape) if a not in axes])


def _gather_type(x: TensorType, *indices: TensorType, axes: Ints) -> TensorType:
    return x.with_shape(_window_shape(x, indices, axes))


def _scatter_type(x: TensorType, updates: TensorType, *indices: TensorType, axes: Ints, mode: str) -> TensorType:
    if mode not in ("add", "set"):
        raise ArgumentError(f"mode is 'add' or 'set', not {mode!r}")
    if x.dtype is not updates.dtype:
        raise DTypeError(f"the updates' dtype is {updates.dtype.name}, not {x.dtype.name}; cast them")
    if mode == "add" and x.dtype.kind == "b":
        raise DTypeError("mode 'add' takes numbers, not bool; cast, or use mode 'set'")
    want = _window_shape(x, indices, axes)
    if updates.shape != want:
        raise ShapeError(
            f"the updates' shape is {shape_str(updates.shape)}, but indices and axes ask for {shape_str(want)}"
        )
    return x


def _gather_vjp(op: Op, g: Value) -> list[Value | None]:
    x, *indices = op.operands
    return [scatter(nd.zeros_like(x), g, *indices, axes=op.attrs["axes"], mode="add"), *[None] * len(indices)]


def _last_writer(op: Op) -> Value:
    """For each element of the updates, whether its place is not written again later."""
    x, updates, *indices = op.operands
    axes, places = op.attrs["axes"], indices[0].type.shape
    order = nd.reshape(nd.iota((product(places),), 0, i64), places)
    never = nd.full(tuple(x.type.shape[a] for a in axes), -1, i64)
    numbered = tuple(range(len(axes)))
    last = scatter(never, order, *indices, axes=numbered, mode="set")
    kept = ew.eq(gather(last, *indices, axes=numbered), order)
    window = updates.type.rank - len(places)
    return nd.broadcast_to(nd.reshape(kept, (*places, *(1,) * window)), updates.type.shape)


def _scatter_vjp(op: Op, g: Value) -> list[Value | None]:
    _, updates, *indices = op.operands
    axes = op.attrs["axes"]
    read = gather(g, *indices, axes=axes)
    none: list[Value | None] = [None] * len(indices)
    if op.attrs["mode"] == "add":
        return [g, read, *none]
    rest = scatter(g, nd.zeros_like(updates), *indices, axes=axes, mode="set")
    return [rest, ew.where(_last_writer(op), read, nd.zeros_like(read)), *none]


gather = OpDef(
    "gather", _gather_type, Gather(), reference=reference.gather, vjp=_gather_vjp, linear=(0,),
    doc="gather(x, i1..ik; axes): the windows of x at the places that the indices name.",
)  # fmt: skip
scatter = OpDef(
    "scatter", _scatter_type, Scatter(), reference=reference.scatter, vjp=_scatter_vjp, linear=(0, 1),
    doc="scatter(x, updates, i1..ik; axes, mode): x with the updates added to ('add') or put at ('set') those places, in"
    " row-major order of the indices; where places repeat, 'set' keeps the last.",
)  # fmt: skip
