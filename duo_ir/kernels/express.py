"""Values to expressions: the body that computes a value at an index, out of the values that have memory.

Elementwise ops run their recipe, movement ops transform the index, gathers become indexed loads. Rounding to f16 and bf16 happens after each
op here, so inlining changes no bit. Where an index map cannot be expressed, NeedMemory names the value that must have memory first.
"""

from __future__ import annotations

from typing import Any

from duo_ir.core import Function, Op, Value
from duo_ir.errors import DuoError
from duo_ir.kernels.access import (
    Bounds,
    Index,
    NeedSplit,
    Position,
    combine,
    divide,
    linear,
    nonnegative,
    strides_of,
    through,
    unravel,
)
from duo_ir.kernels.body import BodyBuilder
from duo_ir.kernels.draft import Axes, Ref, base
from duo_ir.opdef import (
    Concat,
    Elementwise,
    Gather,
    Generate,
    Movement,
    Reshape,
    View,
    compute_dtype,
)  # fmt: skip
from duo_ir.types import DimLike, DType, bool_, i64

LONG_PART = 32  # elements from which a part of a concatenation has a loop of its own


class NeedMemory(DuoError):
    """`value` is read in a way that no index map of an expression can express."""

    def __init__(self, value: Value) -> None:
        super().__init__(f"{value!r} needs memory of its own")
        self.value = value


class Memory:
    """Which values of a Function have memory, and the views of its movement ops."""

    def __init__(self, function: Function) -> None:
        self.anchors: set[Value] = set(function.params)
        self._views: dict[Op, View] = {}

    def view(self, op: Op) -> View:
        found = self._views.get(op)
        if found is None:
            kind = op.definition.kind
            assert isinstance(kind, Movement)
            found = kind.view(op.operands[0].type.shape, op.result.type.shape, **op.attrs)
            self._views[op] = found
        return found

    def storage(self, value: Value) -> Value | None:
        """The anchor whose memory holds `value` in row-major order (through reshapes), or None."""
        value = base(value)
        return value if value in self.anchors else None


class Emitter:
    """Emits expressions into one body over the loops `axes`."""

    def __init__(self, memory: Memory, axes: Axes) -> None:
        self.memory, self.axes, self.n = memory, axes, len(axes)
        self.builder = BodyBuilder()
        self.inlined: set[Value] = set()
        self._known: dict[tuple[Value, int, tuple[Bounds, ...]], int] = {}
        self._interned: dict[Index, Index] = {}  # also keeps indices alive, so that their ids stay theirs

    def intern(self, index: Index) -> Index:
        return self._interned.setdefault(index, index)

    def value(self, v: Value, index: Index, guards: tuple[Bounds, ...] = ()) -> int:
        """`v` at `index`: a load where it has memory, else its expression. Under guards the result is free where one fails."""
        if v in self.memory.anchors:
            return self.load(v, linear(index, v.type.shape, self.n), guards)
        return self.expand(v, index, guards)

    def expand(self, v: Value, index: Index, guards: tuple[Bounds, ...] = ()) -> int:
        index = self.intern(index)
        key = (v, id(index), guards)
        found = self._known.get(key)
        if found is not None:
            return found
        op = v.op
        assert op is not None
        self.inlined.add(v)
        kind = op.definition.kind
        if isinstance(kind, Elementwise):
            handles = self._elementwise(op, kind, index, guards)
            for result, handle in zip(op.results, handles):
                self._known[(result, id(index), guards)] = handle
            return self._known[key]
        handle = self._other(v, op, kind, index, guards)
        self._known[key] = handle
        return handle

    def _other(self, v: Value, op: Op, kind: Any, index: Index, guards: tuple[Bounds, ...]) -> int:
        if isinstance(kind, Movement):
            return self._movement(op, index, guards)
        if isinstance(kind, Generate):
            return self._generate(op, kind, index, guards)
        if isinstance(kind, Reshape):
            return self._reshape(v, op, index, guards)
        if isinstance(kind, Gather):
            return self._gather(v, op, index, guards)
        if isinstance(kind, Concat):
            return self._concat(op, index, guards)
        raise NeedMemory(v)

    def load(
        self, v: Value, position: Position, guards: tuple[Bounds, ...], indices: tuple[int, ...] = (),
        strides: tuple[DimLike, ...] = (), fill: int | None = None,
    ) -> int:  # fmt: skip
        dtype = v.type.dtype
        if guards:
            indices = (*indices, self.zero(dtype) if fill is None else fill)
        return self.builder.load(Ref(v, position, guards, strides), dtype, indices)

    def zero(self, dtype: DType) -> int:
        return self.builder.const(False if dtype is bool_ else 0, dtype)

    def widened(self, handle: int) -> int:
        """f16 and bf16 as f32."""
        b = self.builder
        return b.convert(handle, compute_dtype(b.dtype_of(handle)))

    def position(self, p: Position) -> int:
        offset, strides = p
        return self.builder.dim(offset) if not any(s != 0 for s in strides) else self.builder.index(p)

    # ---------------------------------------------------------------------------------------------------- the kinds
    def _elementwise(self, op: Op, kind: Elementwise, index: Index, guards: tuple[Bounds, ...]) -> list[int]:
        b = self.builder
        handles = [self.value(x, index, guards) for x in op.operands]
        if kind.widen:
            handles = [self.widened(h) for h in handles]
        out = kind.recipe(b, *handles, **op.attrs)
        results = list(out) if isinstance(out, tuple) else [out]
        for n, r in enumerate(op.results):
            if r.type.dtype.is_narrow_float:
                results[n] = b.convert(results[n], r.type.dtype)
        return results

    def _movement(self, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        x = op.operands[0]
        inner, bounds = through(self.memory.view(op), index, self.n)
        bounds = tuple([self._by_parts(bound) for bound in bounds if not self._always(bound)])
        if not bounds:
            return self.value(x, self.intern(inner), guards)
        fill = self.value(op.operands[1], (), guards)
        storage = self.memory.storage(x)
        if storage is not None:
            return self._guarded_load(storage, x, inner, guards, bounds, fill)
        if any(step != 1 for _, _, step in bounds):
            raise NeedMemory(x)
        handle = self.value(x, self.intern(inner), (*guards, *bounds))
        b, inside = self.builder, self.builder.const(True, bool_)
        for p, bound, _ in bounds:
            at = self.position(p)
            inside = b.and_(inside, b.and_(b.ge(at, b.const(0, i64)), b.lt(at, b.dim(bound))))
        return b.select(inside, handle, fill)

    def _by_parts(self, bounds: Bounds) -> Bounds:
        """Bounds that whole stretches of the innermost steps are inside of or outside (parts of a concatenation), as bounds on the loops around
        them, so that no element asks by itself."""
        (offset, strides), bound, step = bounds
        unit = [k for k, s in enumerate(strides) if s == 1]
        if step != 1 or len(unit) != 1 or not isinstance(bound, int) or bound < LONG_PART:
            return bounds
        size, rest = self.axes[unit[0]], [s for s in strides if s != 1]
        if not isinstance(size, int) or any(not isinstance(d, int) or d % bound for d in (size, offset, *rest)):
            return bounds
        if size > bound:
            raise NeedSplit(unit[0], bound)
        outer = tuple([0 if k == unit[0] else divide(s, bound) or 0 for k, s in enumerate(strides)])
        return (divide(offset, bound) or 0, outer), 1, 1

    def _always(self, bounds: Bounds) -> bool:
        """Whether the bounds hold for every turn of the loops."""
        (offset, strides), bound, step = bounds
        if step != 1:
            return False
        low = high = offset
        for stride, size in zip(strides, self.axes):
            if stride == 0:
                continue
            if nonnegative(stride, self.axes):
                high = high + stride * (size - 1)
            else:
                low = low + stride * (size - 1)
        return nonnegative(low, self.axes) and nonnegative(bound - 1 - high, self.axes)

    def _guarded_load(
        self, storage: Value, x: Value, index: Index, guards: tuple[Bounds, ...], bounds: tuple[Bounds, ...], fill: int
    ) -> int:
        # Interior padding reads element p / step, which is no affine position: it goes through an index operand.
        steps = {p: step for p, _, step in bounds if step != 1}
        b, strides = self.builder, strides_of(x.type.shape)
        terms, indices, index_strides = [], [], []
        for stride, p in zip(strides, index):
            if p in steps:
                indices.append(b.idiv(self.position(p), b.const(steps[p], i64)))
                index_strides.append(stride)
            else:
                terms.append((stride, p))
        at = combine(0, terms, self.n)
        return self.load(storage, at, (*guards, *bounds), tuple(indices), tuple(index_strides), fill)

    def _reshape(self, v: Value, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        position = linear(index, v.type.shape, self.n)
        storage = self.memory.storage(v)
        if storage is not None:
            return self.load(storage, position, guards)
        x = op.operands[0]
        if guards:
            raise NeedMemory(x)
        inner = unravel(position, x.type.shape, self.axes)
        if inner is None:
            raise NeedMemory(x)
        return self.value(x, self.intern(inner), guards)

    def _generate(self, op: Op, kind: Generate, index: Index, guards: tuple[Bounds, ...]) -> int:
        scalars = [self.value(x, (), guards) for x in op.operands]
        indices = [self.position(p) for p in index]
        return int(
            kind.recipe(
                self.builder, indices, self.position(linear(index, op.result.type.shape, self.n)), *scalars, **op.attrs
            )
        )

    def places(
        self, op: Op, indices: list[Value], index: Index, axes: tuple[int, ...], shape: tuple[DimLike, ...]
    ) -> list[int]:
        """Checked i64 positions along `axes` of a tensor of that shape, one per index operand."""
        b, out = self.builder, []
        where = f" at {op.loc}" if op.loc is not None else ""
        index = self.intern(index)
        for i, axis in zip(indices, axes):
            text = f"{op.definition.name}{where}: index {{index}} is out of range for axis {axis}, which has {shape[axis]} elements"
            out.append(b.check(b.convert(self.value(i, index), i64), shape[axis], text))
        return out

    def _gather(self, v: Value, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        x, *indices = op.operands
        axes, count = op.attrs["axes"], indices[0].type.rank
        storage = self.memory.storage(x)
        if storage is None:
            raise NeedMemory(x)
        if guards:  # a check must not run where the element is not wanted
            raise NeedMemory(v)
        places = self.places(op, indices, index[:count], axes, x.type.shape)
        steps = strides_of(x.type.shape)
        rest = [a for a in range(x.type.rank) if a not in axes]
        terms = [(steps[a], p) for a, p in zip(rest, index[count:])]
        handles, strides = [], []
        for a, place in zip(axes, places):
            known = self._affine(place, x.type.shape[a])
            if known is None:
                handles.append(place)
                strides.append(steps[a])
            else:  # an index that is a loop's own, and in range whatever the sizes: no check, no index operand
                terms.append((steps[a], known))
        return self.load(storage, combine(0, terms, self.n), (), tuple(handles), tuple(strides))

    def _affine(self, place: int, bound: DimLike) -> Position | None:
        """The affine position that a checked index is known to be, when it is always in range."""
        (index,) = self.builder.rows[place][1]
        op, _, _, attr = self.builder.rows[index]
        if op not in ("index", "const"):
            return None
        position: Position = attr if op == "index" else (attr, (0,) * self.n)
        return position if self._always((position, bound, 1)) else None

    def _concat(self, op: Op, index: Index, guards: tuple[Bounds, ...]) -> int:
        axis = op.attrs["axis"]
        offset: DimLike = 0
        parts: list[tuple[DimLike, int]] = []
        for x in op.operands:
            size = x.type.shape[axis]
            if x.type.size != 0:
                start, strides = index[axis]
                at: Position = (start - offset, strides)
                inner = self.intern((*index[:axis], at, *index[axis + 1 :]))
                bounds: Bounds = (at, size, 1)
                inside = () if self._always(bounds) else (bounds,)
                parts.append((offset + size, self.value(x, inner, (*guards, *inside))))
            offset = offset + size
        if not parts:
            return self.zero(op.result.type.dtype)
        b = self.builder
        here = self.position(index[axis])
        handle = parts[-1][1]
        for end, part in reversed(parts[:-1]):
            handle = b.select(b.lt(here, b.dim(end)), part, handle)
        return handle
