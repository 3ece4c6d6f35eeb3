"""Scaled dot-product attention: one op where nothing looks at the weights, else two matmuls around a softmax over the keys."""

from __future__ import annotations

import math
from typing import Any

from duo.dispatch import apply
from duo.functional._args import type_of
from duo.functional._ssa import float_dtype, max_kept, sum_kept, typed, wide
from duo.functional.movement import lower_triangle
from duo.functional.shape import _repeat_interleave, flatten, reshape, unsqueeze
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops.attention import attention
from duo_ir.types import DimLike, TensorType, bool_, broadcast_shapes


def _masked_softmax(x: Value) -> Value:
    """softmax along the last axis in which a row of -inf gives zeros (and a zero gradient), not NaN."""
    last = (x.type.rank - 1,)
    top = ew.stop_gradient(max_kept(x, last))
    top = nd.where(nd.eq(top, -math.inf), 0.0, top)
    e = ew.exp(x - top)
    total = sum_kept(e, last)
    return e / nd.where(nd.eq(total, 0.0), 1.0, total)


def _attention_weights(q: Value, k: Value, *arguments: Any) -> Value:
    """softmax(q k' * scale + mask) over the keys: [..., L, S]."""
    *tensors, masked, is_causal, scaled = arguments
    width: Any = q.type.shape[-1]
    scale = tensors.pop() if scaled else 1.0 / math.sqrt(width)
    scores = wide(nd.matmul(q, nd.swap_last(k)))
    scores = scores * (nd.cast_to(scale, scores.type.dtype) if scale.__class__ is Value else scale)
    if is_causal:
        scores = nd.where(lower_triangle(scores.type.shape[-2:], 0), scores, -math.inf)
    if masked:
        mask = tensors[0]
        if mask.type.dtype is bool_:
            scores = nd.where(mask, scores, -math.inf)
        else:
            scores = scores + nd.cast_to(mask, scores.type.dtype)
    return nd.cast_to(_masked_softmax(scores), float_dtype(q))


def _attention(q: Value, k: Value, v: Value, *arguments: Any) -> Value:
    """The op, on [..., T, H, D]: heads are the last of the leading axes, and a scale that is a tensor goes into the queries."""
    *tensors, masked, is_causal, scaled = arguments
    width: Any = q.type.shape[-1]
    value_width: Any = v.type.shape[-1]
    if not (isinstance(width, int) and isinstance(value_width, int) and width and value_width):
        return nd.matmul(_attention_weights(q, k, *arguments), v)
    compute = wide(q).type.dtype
    scale = 1.0 / math.sqrt(width)
    if scaled:
        q, scale = nd.cast_to(wide(q) * nd.cast_to(typed(tensors.pop(), compute), compute), q.type.dtype), 1.0
    lead = broadcast_shapes(*[x.type.shape[:-2] for x in (q, k, v)])
    grid = (q.type.shape[-2], k.type.shape[-2])
    mask = []
    if masked:
        given: Value = tensors[0]
        lead = broadcast_shapes(lead, given.type.shape[:-2])
        mask = [given if given.type.dtype is bool_ else nd.cast_to(given, compute)]
    full = lead or (1,)
    q, k, v = (_heads_second(nd.broadcast_to(x, (*full, *x.type.shape[-2:]))) for x in (q, k, v))
    mask = [nd.broadcast_to(m, (*full, *grid)) for m in mask]
    out, _ = attention(q, k, v, *mask, causal=is_causal, scale=scale)
    return nd.reshape(_heads_second(out), (*lead, grid[0], value_width))


def _heads_second(x: Value) -> Value:
    """[..., H, T, D] as [..., T, H, D], and back."""
    n = x.type.rank
    return nd.transpose(x, (*range(n - 3), n - 2, n - 3, n - 1))


def _grouped(x: Value, times: int) -> Value:
    return _repeat_interleave(x, times, x.type.rank - 3)


def attention_arguments(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: Any, enable_gqa: bool
) -> tuple[Any, Any, Any, tuple, tuple]:
    """q, k, v with equal numbers of heads, the other operands, and the static attributes."""
    q, k, v = (type_of(x) for x in (query, key, value))
    if min(q.rank, k.rank, v.rank) < 2 or _differ(q.shape[-1], k.shape[-1]) or _differ(k.shape[-2], v.shape[-2]):
        raise ShapeError(
            f"attention: query [..., L, E], key [..., S, E] and value [..., S, V] are needed, got {q}, {k}, {v}"
        )
    if not q.dtype.is_float:
        raise DTypeError(f"attention: it takes float tensors, not {q.dtype.name}")
    if is_causal and attn_mask is not None:
        raise ArgumentError("attention: give attn_mask or is_causal, not both")
    if scale is None and not isinstance(q.shape[-1], int):
        raise ArgumentError(f"attention: give scale; the width {q.shape[-1]} is not known")
    groups = _groups(q, k, enable_gqa)
    if groups > 1:
        key, value = apply(_grouped, (key,), (groups,)), apply(_grouped, (value,), (groups,))
    more = ((attn_mask,) if attn_mask is not None else ()) + ((scale,) if scale is not None else ())
    return query, key, value, more, (attn_mask is not None, bool(is_causal), scale is not None)


def _differ(a: DimLike, b: DimLike) -> bool:
    """Whether two sizes are known not to be one; what is unknown in a graph is settled by what is done with it."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _groups(q: TensorType, k: TensorType, enable_gqa: bool) -> int:
    """How many heads of the query share one of key and value."""
    if not enable_gqa or min(q.rank, k.rank) < 3 or q.shape[-3] == k.shape[-3]:
        return 1
    heads, shared = q.shape[-3], k.shape[-3]
    if not isinstance(heads, int) or not isinstance(shared, int) or not shared or heads % shared:
        raise ShapeError(f"attention: {heads} query heads do not share {shared} key heads evenly")
    return heads // shared


def _by_group(x: Any, heads: DimLike, groups: int) -> Any:
    """[..., heads, T, S] with the heads as [heads / groups, groups], or one axis of size 1 more where there is one head or none."""
    shape = () if x is None else type_of(x).shape
    if len(shape) < 3:
        return x
    if shape[-3] != heads:
        return unsqueeze(x, -3)
    return reshape(x, (*shape[:-3], -1, groups, *shape[-2:]))


def attention_weights(query: Any, key: Any, attn_mask: Any = None, is_causal: bool = False, scale: Any = None) -> Any:
    """What scaled_dot_product_attention multiplies the values with: [..., L, S]; each row sums to 1."""
    query, key, _, more, attrs = attention_arguments(query, key, key, attn_mask, is_causal, scale, False)
    return apply(_attention_weights, (query, key, *more), attrs)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query @ key' * scale + mask) @ value: [..., L, E], [..., S, E] and [..., S, V] to [..., L, V].

    attn_mask: bool (True takes part) or a float to add, broadcast to [..., L, S]; is_causal lets position i see keys 0..i;
    scale is 1/sqrt(E) unless given; enable_gqa repeats key and value heads to those of the query. A query that may see no key gives 0."""
    heads, groups = type_of(query).shape[:-2], _groups(type_of(query), type_of(key), enable_gqa)
    if groups > 1:  # heads that share are one more axis, along which key and value repeat: nothing is copied
        query, attn_mask = _by_group(query, heads[-1], groups), _by_group(attn_mask, heads[-1], groups)
        key, value = unsqueeze(key, -3), unsqueeze(value, -3)
    query, key, value, more, attrs = attention_arguments(query, key, value, attn_mask, is_causal, scale, False)
    out = apply(_attention, (query, key, value, *more), attrs)
    return out if groups == 1 else flatten(out, -4, -3)
