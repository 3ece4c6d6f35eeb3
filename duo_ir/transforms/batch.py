"""Batching (vmap): a Function over one sample becomes the Function over many, each value with the samples' axis in front.

The rule of an op follows from its kind; where the kind leaves a meaning of attributes open (movements, random bits), the op's definition
has it (`OpDef.batch`). What depends on no batched parameter is computed once, as before. Row i of a result has the bits of the
original Function on slice i: reduced axes and the axis K of contractions keep their elements and their order, and a single output column,
which has an order of its own, stays single.

A `cond` whose predicate differs between samples computes both branches and selects; a `while` whose test does goes on until no
sample does, and finished samples keep their values. Places that are read or written for a sample that takes no part (the branch not
taken, a finished loop) are replaced by place 0, so they raise nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from duo_ir.core import Builder, Function, Op, Value, current_builder
from duo_ir.errors import DuoError, ShapeError
from duo_ir.opdef import (
    Attention,
    Concat,
    Contraction,
    Control,
    Convolution,
    Cumulative,
    Elementwise,
    Gather,
    Reduction,
    Reshape,
    Scatter,
    Sort,
)
from duo_ir.ops import and_, iota, not_, where
from duo_ir.ops import any as any_
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.rewrite import dce
from duo_ir.types import DimLike, TensorType, exact_div, i64

_COND = Control("cond")


class Batched(NamedTuple):
    """A batched Function, and which of its results have the samples' axis; the others are the same for all samples."""

    function: Function
    results: tuple[bool, ...]


class Lane(NamedTuple):
    """A value of the new Function, and whether it has the samples' axis (axis 0)."""

    value: Value
    batched: bool


def batch(function: Function, batched: Sequence[bool], size: DimLike) -> Batched:
    """`function` for `size` samples: each parameter that `batched` marks has one more axis in front, of that size.

    Raises DuoError where an op has no batching rule, ShapeError where a rule needs a size that is a number.
    """
    made, flags = _Walk(size).region(function, batched)
    return Batched(dce(made), tuple(flags))


class _Walk:
    """Goes over ops with the size of the batch and, inside a branch or loop that not all samples take, which do (bool[size])."""

    def __init__(self, size: DimLike, mask: Value | None = None) -> None:
        self.size, self.mask = size, mask

    # ------------------------------------------------------------------------------------------------- functions
    def region(
        self, function: Function, batched: Sequence[bool], force: Sequence[bool] = ()
    ) -> tuple[Function, list[bool]]:
        """The batched Function, the mask (where there is one) its last parameter, and which results are batched; those of `force` are."""
        builder = Builder(function.name)
        with builder:
            lanes = self.parameters(builder, function, batched)
            walk = _Walk(self.size, None if self.mask is None else builder.parameter(self.mask.type))
            out = walk.run(function, lanes)
            out = [walk.all_samples(r) if f else r for r, f in zip(out, force or (False,) * len(out))]
        return builder.build([r.value for r in out]), [r.batched for r in out]

    def parameters(self, builder: Builder, function: Function, batched: Sequence[bool]) -> list[Lane]:
        return [
            Lane(builder.parameter(self.type_of(p.type) if b else p.type, name), bool(b))
            for p, name, b in zip(function.params, function.names, batched, strict=True)
        ]

    def run(self, function: Function, arguments: Sequence[Lane]) -> list[Lane]:
        """Emits the batched ops of `function`."""
        env = dict(zip(function.params, arguments))
        builder = current_builder()
        loc = builder.loc
        for op in function.ops:
            builder.loc = op.loc or loc
            env.update(zip(op.results, self.op(op, [env[v] for v in op.operands]), strict=True))
        builder.loc = loc
        return [env[r] for r in function.results]

    def op(self, op: Op, operands: list[Lane]) -> Sequence[Lane]:
        definition = op.definition
        kind = definition.kind
        if isinstance(kind, Control):
            return self.cond(op, operands) if kind == _COND else self.loop(op, operands)
        if self.mask is not None and isinstance(kind, (Gather, Scatter)):
            first = 1 if isinstance(kind, Gather) else 2
            operands = [*operands[:first], *[self.taken(index) for index in operands[first:]]]
        if not any(x.batched for x in operands):
            return [Lane(r, False) for r in _listed(definition(*[x.value for x in operands], **op.attrs))]
        if definition.batch is not None:
            made = definition.batch(op, [x.value for x in operands], [x.batched for x in operands], self.size)
        else:
            rule = _RULES.get(type(kind))
            if rule is None:
                at = f" (at {op.loc.full()})" if op.loc is not None else ""
                raise DuoError(f"{definition.name}{at} has no batching rule; compute it outside vmap")
            made = rule(self, op, operands)
        return [Lane(r, True) for r in _listed(made)]

    # ---------------------------------------------------------------------------------------------------- values
    def type_of(self, type: TensorType) -> TensorType:
        return type.with_shape((self.size, *type.shape))

    def full(self, lane: Lane) -> Value:
        """The value with the samples' axis, repeated along it if it had none."""
        value = lane.value
        return value if lane.batched else nd.broadcast_to(value, (self.size, *value.type.shape))

    def all_samples(self, lane: Lane) -> Lane:
        return Lane(self.full(lane), True)

    def along(self, mask: Value, like: Value) -> Value:
        """A bool per sample, repeated to the shape of `like`."""
        column = nd.reshape(mask, (self.size, *(1,) * (like.type.rank - 1)))
        return nd.broadcast_to(column, like.type.shape)

    def select(self, mask: Value, x: Lane, y: Lane) -> Lane:
        """x for the samples of the mask, else y."""
        if x.value is y.value:
            return x
        a = self.full(x)
        return Lane(where(self.along(mask, a), a, self.full(y)), True)

    def taken(self, index: Lane) -> Lane:
        """An index operand with 0 for the samples that take no part."""
        assert self.mask is not None
        value = index.value
        if index.batched:
            return Lane(where(self.along(self.mask, value), value, nd.zeros_like(value)), True)
        some = nd.broadcast_to(any_(self.mask, axes=(0,)), value.type.shape)
        return Lane(where(some, value, nd.zeros_like(value)), False)

    def also(self, mask: Value) -> Value:
        """The samples of `mask` that take part here."""
        return mask if self.mask is None else and_(self.mask, mask)

    # ---------------------------------------------------------------------------------------------- control flow
    def cond(self, op: Op, operands: list[Lane]) -> list[Lane]:
        predicate, *given = operands
        branches = [op.attrs["then"], op.attrs["orelse"]]
        if predicate.batched:
            masks = (self.also(predicate.value), self.also(not_(predicate.value)))
            then, orelse = (_Walk(self.size, m).run(f, given) for m, f in zip(masks, branches))
            return [self.select(predicate.value, x, y) for x, y in zip(then, orelse)]
        flags = [x.batched for x in given]
        both = [any(pair) for pair in zip(*[self.region(f, flags)[1] for f in branches])]
        then_, orelse_ = (self.region(f, flags, both)[0] for f in branches)
        out = op.definition(
            predicate.value, *[x.value for x in given], *self.extra(), then=then_, orelse=orelse_
        )  # fmt: skip
        return [Lane(v, b) for v, b in zip(_listed(out), both)]

    def extra(self) -> list[Value]:
        """What a `region` takes after the operands."""
        return [] if self.mask is None else [self.mask]

    def loop(self, op: Op, operands: list[Lane]) -> list[Lane]:
        test, body, count = op.attrs["test"], op.attrs["body"], op.attrs["carried"]
        flags = [x.batched for x in operands]
        while True:  # a carried value is batched if it starts so or becomes so in the body
            after = [a or b for a, b in zip(flags, self.region(body, flags)[1])]
            if after == flags[:count]:
                break
            flags[:count] = after
        if self.region(test, flags)[1][0]:
            return self.masked_loop(op, operands)
        step, _ = self.region(body, flags, flags[:count])
        again, _ = self.region(test, flags)
        if self.mask is not None:
            again = self.while_some(again)
        given = [self.full(x) if b else x.value for x, b in zip(operands, flags)]
        out = op.definition(*given, *self.extra(), test=again, body=step, carried=count)
        return [Lane(v, b) for v, b in zip(_listed(out), flags)]

    def while_some(self, test: Function) -> Function:
        """`test`, whose last parameter is the mask, and that the mask has a sample at all."""
        builder = Builder(test.name)
        with builder:
            params = [builder.parameter(p.type) for p in test.params]
            (proceed,) = builder.inline(test, params)
            return builder.build([and_(any_(params[-1], axes=(0,)), proceed)])

    def masked_loop(self, op: Op, operands: list[Lane]) -> list[Lane]:
        """Carries which samples go on beside the values, which change for those alone."""
        test, body, count = op.attrs["test"], op.attrs["body"], op.attrs["carried"]
        start, constants = [self.all_samples(x) for x in operands[:count]], operands[count:]
        flags = [True] * count + [x.batched for x in constants]
        active = self.also(self.full(self.run(test, [*start, *constants])[0]))

        def region(name: str) -> tuple[Builder, Value, list[Lane]]:
            builder = Builder(name)
            first = builder.parameter(active.type)
            return builder, first, self.parameters(builder, body, flags)

        builder, going, lanes = region(body.name)
        with builder:
            walk = _Walk(self.size, going)
            kept = [walk.select(going, new, old) for new, old in zip(walk.run(body, lanes), lanes)]
            proceed = and_(going, walk.full(walk.run(test, [*kept, *lanes[count:]])[0]))
        step = builder.build([proceed, *[walk.full(x) for x in kept]])
        builder, going, _ = region(test.name)
        with builder:
            some = any_(going, axes=(0,))
        out = op.definition(
            active, *[x.value for x in start], *[x.value for x in constants],
            test=builder.build([some]), body=step, carried=count + 1,
        )  # fmt: skip
        return [Lane(v, True) for v in _listed(out)[1:]]


def _listed(out: Any) -> Sequence[Value]:
    return out if isinstance(out, (tuple, list)) else (out,)


# ------------------------------------------------------------------------------------------------------ rules by kind
def _all_full(walk: _Walk, op: Op, operands: list[Lane]) -> Any:
    """Ops to which one more axis in front of all operands is nothing new."""
    return op.definition(*[walk.full(x) for x in operands], **op.attrs)


def _reshape(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    return nd.reshape(operands[0].value, (walk.size, *op.result.type.shape))


def _along_axis(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    out: Value = op.definition(*[walk.full(x) for x in operands], **{**op.attrs, "axis": op.attrs["axis"] + 1})
    return out


def _reduction(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    axes = tuple([a + 1 for a in op.attrs["axes"]])
    out: Value = op.definition(operands[0].value, **{**op.attrs, "axes": axes})
    return out


def _contraction(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    """One more batch axis. Samples that share one right matrix are rows of one product; shared left matrices are not made columns, as the
    number of columns decides the order."""
    left, right = operands
    if left.batched and not right.batched and right.value.type.rank == 2:
        size, m, k = left.value.type.shape
        rows = op.definition(nd.reshape(left.value, (size * m, k)), right.value, **op.attrs)
        return nd.reshape(rows, (size, m, right.value.type.shape[1]))
    out: Value = op.definition(walk.full(left), walk.full(right), **op.attrs)
    return out


def _convolution(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    """Samples of x are more images; samples of w are more output channels of each group, and more groups where x has samples too."""
    x, w = operands
    size, groups = walk.size, op.attrs["groups"]
    result = op.result.type.shape
    n, out_channels = result[0], result[-1]
    if not w.batched:
        images = nd.reshape(x.value, (size * n, *x.value.type.shape[2:]))
        return nd.reshape(op.definition(images, w.value, **op.attrs), (size, *result))
    if size == 0:
        return nd.full((0, *result), 0, op.result.type.dtype)
    rank = w.value.type.rank - 1
    if not x.batched:
        each = exact_div(out_channels, groups)
        assert each is not None  # by the type rule
        kernel, per_group = w.value.type.shape[1 : rank - 1], w.value.type.shape[rank - 1]
        grouped = nd.reshape(w.value, (size, *kernel, per_group, groups, each))
        grouped = nd.transpose(grouped, (*range(1, rank), rank, 0, rank + 1))
        merged = nd.reshape(grouped, (*kernel, per_group, groups * size * each))
        out = nd.reshape(op.definition(x.value, merged, **op.attrs), (*result[:-1], groups, size, each))
        last = len(result)
        return nd.reshape(nd.transpose(out, (last, *range(last), last + 1)), (size, *result))
    if not isinstance(size, int):
        raise ShapeError(
            f"a convolution in which inputs and kernels both differ between {size} samples needs that number when it is compiled; give a"
            " known batch size"
        )
    images = _channels_last(x.value)
    out = op.definition(images, _channels_last(w.value), **{**op.attrs, "groups": groups * size})
    last = len(result) - 1
    split = nd.reshape(out, (*result[:-1], size, out_channels))
    return nd.transpose(split, (last, *range(last), last + 1))


def _channels_last(x: Value) -> Value:
    """[size, ..., c] to [..., size * c]."""
    rank = x.type.rank
    moved = nd.transpose(x, (*range(1, rank - 1), 0, rank - 1))
    return nd.reshape(moved, (*x.type.shape[1:-1], x.type.shape[0] * x.type.shape[-1]))


def _indices(walk: _Walk, indices: Sequence[Lane]) -> tuple[Value, list[Value]]:
    """(the number of the sample, the indices) for each place, all with the samples' axis."""
    full = [walk.full(i) for i in indices]
    return iota(shape=full[0].type.shape, axis=0, dtype=i64), full


def _to_axis(x: Value, axis: int) -> Value:
    """Axis 0 moved to `axis`."""
    return nd.transpose(x, (*range(1, axis + 1), 0, *range(axis + 1, x.type.rank)))


def _to_front(x: Value, axis: int) -> Value:
    return nd.transpose(x, (axis, *[a for a in range(x.type.rank) if a != axis]))


def _gather(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    x, *indices = operands
    axes = op.attrs["axes"]
    behind = tuple([a + 1 for a in axes])
    out: Value
    if not any(i.batched for i in indices):  # the samples' axis is the first of the windows'
        out = op.definition(x.value, *[i.value for i in indices], **{**op.attrs, "axes": behind})
        return _to_front(out, indices[0].value.type.rank)
    if not x.batched:
        out = op.definition(x.value, *[walk.full(i) for i in indices], **op.attrs)
        return out
    sample, full = _indices(walk, indices)
    out = op.definition(x.value, sample, *full, **{**op.attrs, "axes": (0, *behind)})
    return out


def _scatter(walk: _Walk, op: Op, operands: list[Lane]) -> Value:
    """Per sample the places come in the same order, whether samples are part of the window or the outermost of the places."""
    x, updates, *indices = operands
    behind = tuple([a + 1 for a in op.attrs["axes"]])
    out: Value
    if not any(i.batched for i in indices):
        moved = _to_axis(walk.full(updates), indices[0].value.type.rank)
        out = op.definition(walk.full(x), moved, *[i.value for i in indices], **{**op.attrs, "axes": behind})
        return out
    sample, full = _indices(walk, indices)
    out = op.definition(walk.full(x), walk.full(updates), sample, *full, **{**op.attrs, "axes": (0, *behind)})
    return out


_RULES: dict[type, Callable[[_Walk, Op, list[Lane]], Any]] = {
    Elementwise: _all_full,
    Attention: _all_full,
    Reshape: _reshape,
    Concat: _along_axis,
    Cumulative: _along_axis,
    Sort: _along_axis,
    Reduction: _reduction,
    Contraction: _contraction,
    Convolution: _convolution,
    Gather: _gather,
    Scatter: _scatter,
}

__all__ = ["Batched", "batch"]
