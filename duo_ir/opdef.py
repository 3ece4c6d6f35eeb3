"""OpDef: the one place where a primitive is defined.

A definition holds the type rule, the derivative rules (written in the same ops, so every order of derivative is free), the NumPy
reference and the lowering `kind`, which is how passes and backends see it: no pass knows an op by name. The definitions
themselves are module-level names in `duo_ir/ops/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from duo_ir.core import Op, Value, current_builder
from duo_ir.errors import DTypeError, DuoError, ShapeError
from duo_ir.types import DimLike, DType, Shape, TensorType, f32


# ------------------------------------------------------------------------------------------------------------ kinds
@dataclass(frozen=True)
class Elementwise:
    """result[i] = recipe(s, x[i], y[i], ..., **attrs). All operands and results have one shape.

    f16 and bf16 operands are widened to f32 before the recipe and its result is rounded to the result dtype after it, unless
    `widen` is False (casts and selections, which must see the dtypes as they are)."""

    recipe: Callable[..., Any]
    widen: bool = True
    cheap: bool = True  # cheaper to compute again than to store and load


@dataclass(frozen=True)
class AxisMap:
    """Position on one operand axis: offset + sum(coefficient * index of result axis)."""

    offset: DimLike = 0
    terms: tuple[tuple[int, DimLike], ...] = ()  # (result axis, coefficient)


@dataclass(frozen=True)
class View:
    """How a movement op reads its first operand. `axes` has one AxisMap per operand axis. With `guards`, positions may fall outside:
    guards[k] = (bound, step) on axis k (None: always inside): inside iff 0 <= p < bound*step and p divisible by step, and the element is p // step;
    outside, the result is the second operand (0-d fill)."""

    axes: tuple[AxisMap, ...]
    guards: tuple[tuple[DimLike, int] | None, ...] = ()


@dataclass(frozen=True)
class Movement:
    """result[i] = x[view(i)]: transpose, broadcast, slice, flip, pad. view(x.shape, result.shape, **attrs) -> View."""

    view: Callable[..., View]


class Reshape:
    """Same elements in row-major order, another shape."""


class Concat:
    """Operands one after another along attribute `axis`."""


@dataclass(frozen=True)
class Reduction:
    """One operand reduced over attribute `axes` (sorted, dropped from the shape), in the contract's order. name as in kernel.Reduce."""

    name: str


class Contraction:
    """[batch..., m, k] x [batch..., k, n] -> [batch..., m, n]."""


@dataclass(frozen=True)
class Phase:
    """One spatial axis of a convolution: the result positions start + step*q, q < count, which all have the kernel positions
    tap_start + tap_step*j, j < taps. Tap j of position q reads element offset + stride*q + dilation*j of x, or +0.0 outside x."""

    start: int
    step: int
    count: DimLike
    tap_start: int
    tap_step: int
    taps: DimLike
    offset: DimLike
    stride: int
    dilation: int


@dataclass(frozen=True)
class Convolution:
    """x [n, spatial..., c], w [kernel..., c/groups, o] -> [n, spatial..., o], attribute `groups`; a contraction over (kernel..., c).
    phases(x.shape, w.shape, result.shape, **attrs): for each spatial axis, phases that partition the result's positions."""

    phases: Callable[..., tuple[tuple[Phase, ...], ...]]


@dataclass(frozen=True)
class Generate:
    """result[i] = recipe(s, indices, linear, *scalars, **attrs): from positions (i64 handles) and 0-d operands."""

    recipe: Callable[..., Any]
    position: bool = False  # an element is its position along attribute `axis`


class Gather:
    """gather(x, i1..ik; axes): result[I..., rest...] = x with axis axes[j] at i_j[I]. Checked at run time."""


class Scatter:
    """scatter(x, updates, i1..ik; axes, mode): x with updates[I..., rest...] added to ('add') or put at ('set') those places,
    in row-major order of I. Checked at run time."""


@dataclass(frozen=True)
class Cumulative:
    """A running fold along attribute `axis`, in ascending order. start(dtype): (dtype, number) of each part of the state; step(s, state,
    elements, position) -> the state after the elements, one of each operand, at that position (an i64 handle). Result k at a
    position is part k of the state after it. f16 and bf16 are widened to f32 before the step, and rounded where they are stored."""

    start: Callable[[DType], tuple[tuple[DType, float | int], ...]]
    step: Callable[..., tuple[Any, ...]]


class Sort:
    """sort(x; axis, descending, count): the first `count` elements of x in stable order along `axis`, and their positions, as `ops/order.py`
    has it."""


@dataclass(frozen=True)
class Attention:
    """Scaled dot-product attention over tiles of keys, or its gradient; operands, results and order are those of `ops/attention.py`."""

    backward: bool


@dataclass(frozen=True)
class Control:
    """name 'cond' or 'while': holds nested Functions; `plan.py` turns it into program items."""

    name: str


Kind: TypeAlias = (
    Elementwise
    | Movement
    | Reshape
    | Concat
    | Reduction
    | Contraction
    | Convolution
    | Generate
    | Gather
    | Scatter
    | Cumulative
    | Sort
    | Attention
    | Control
)

Arrays: TypeAlias = Sequence[np.ndarray]
MaybeValue: TypeAlias = Value | None


@dataclass(frozen=True, eq=False)
class OpDef:
    """One primitive.

    infer(*types, **attrs) -> TensorType or a tuple of them; raises ShapeError, DTypeError or ArgumentError.
    kind: how it is lowered.
    reference(*arrays, **attrs) -> array or tuple: the meaning, on NumPy arrays, to the bit. None for Elementwise, Generate and
      Cumulative, whose recipe is the meaning, and for Control, which the interpreter runs.
    derivative(op, i, g) -> Value | None: for elementwise ops: d result / d operand i, times g (None: no gradient). Gives both VJP and JVP.
    vjp(op, *cotangents) -> one Value or None per operand, for the rest. Cotangents are never None.
    jvp(op, tangents) -> tangent Value(s); tangents may be None. `linear` (operand numbers): the op is linear in those operands jointly and constant in the
      others, so its JVP is itself on the tangents (None there becomes zeros).
    canonicalize(op) -> replacement Values or None: bit-exact local simplification.
    batch(op, operands, batched, size) -> result Value(s), all with the samples' axis in front: the op on operands of which those marked
      `batched` have that axis, of `size`. None where the kind tells (transforms/batch.py).
    stops: no derivative passes, whatever the operands: history ends here, and what comes after does not count as depending on it.
    """

    name: str
    infer: Callable[..., TensorType | tuple[TensorType, ...]]
    kind: Kind
    reference: Callable[..., Any] | None = None
    derivative: Callable[[Op, int, Value], MaybeValue] | None = None
    vjp: Callable[..., Sequence[MaybeValue]] | None = None
    jvp: Callable[..., Any] | None = None
    linear: tuple[int, ...] = ()
    canonicalize: Callable[[Op], Sequence[Value] | None] | None = None
    commutative: bool = False
    stops: bool = False
    doc: str = ""
    batch: Callable[..., Any] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.name in REGISTRY:
            raise DuoError(f"op {self.name!r} is defined twice")
        REGISTRY[self.name] = self

    def __call__(self, *operands: Value, **attrs: Any) -> Any:
        """Emits the op into the current Builder; returns its Value, or a tuple when it has several results."""
        results = current_builder().emit(self, operands, attrs)
        return results[0] if len(results) == 1 else results

    def infer_types(self, operands: Sequence[Value], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
        """Result types, or an error that names the op and the operands' types."""
        types = [v.type for v in operands]
        try:
            out = self.infer(*types, **attrs)
        except DuoError as error:
            listed = ", ".join(map(str, types))
            raise type(error)(f"{self.name}({listed}): {error}") from None
        return (out,) if isinstance(out, TensorType) else out

    def __repr__(self) -> str:
        return f"<op {self.name}>"


REGISTRY: dict[str, OpDef] = {}


def compute_dtype(d: DType) -> DType:
    """The dtype an elementwise recipe sees for operands of dtype d."""
    return f32 if d.is_narrow_float else d


def same_type(name: str, *types: TensorType) -> TensorType:
    """The common type of operands that must agree; used by type rules."""
    first = types[0]
    for t in types[1:]:
        if t.dtype is not first.dtype:
            raise DTypeError(f"operands of {name} need one dtype, got {first.dtype.name} and {t.dtype.name}; cast one")
        if t.shape != first.shape:
            raise ShapeError(f"operands of {name} need one shape, got {first} and {t}; broadcast one")
    return first


__all__ = [
    "REGISTRY",
    "Attention",
    "AxisMap",
    "Concat",
    "Contraction",
    "Control",
    "Convolution",
    "Cumulative",
    "Elementwise",
    "Gather",
    "Generate",
    "Kind",
    "Movement",
    "OpDef",
    "Phase",
    "Reduction",
    "Reshape",
    "Scatter",
    "Shape",
    "Sort",
    "View",
    "compute_dtype",
    "same_type",
]
