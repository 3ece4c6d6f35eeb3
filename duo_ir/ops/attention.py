"""Scaled dot-product attention and its gradient, each an op of its own with its own fixed order (not a rewrite of softmax(QK')V).

Layout: query [..., T, H, D], key [..., S, H, D], value [..., S, H, E], mask [..., H, T, S], result [..., T, H, E]. One (..., H) entry:

Forward, for each query i alone, in the compute dtype c (f32 for f16 and bf16, which widen exactly; the result rounds once at the end):
keys come in blocks of 64 in ascending order; with `causal`, keys from 32 * (i // 32 + 1) on take no part. From
m = -inf, l = +0, o[e] = +0, a block does, with b[d] = q[i, d] * scale rounded once:

    s[j]   = fma(b[d], k[j, d], .) over ascending d from +0;  + mask[i, j], or -inf where a bool mask is False;  -inf where causal and j > i
    m'     = max(m, s[j] ...), NaN passed over;  n = m' or 0 where m' is -inf;  a = exp(m - n)
    p[j]   = exp(s[j] - n)
    l      = l * a + (p[j] added in ascending j from +0)
    o[e]   = o[e] * a + (fma(p[j], v[j, e], .) over ascending j from +0)
    m      = m'

and at the end r = (o[e] * (1 / l)) and lse = n + log(l); where l is 0 (no key may be seen) r = o[e] and lse = +inf, so that the query's
result is 0 and its gradient too. Multiply and add round separately except in fma. exp and log are the contract's.

Backward, given g, the lse, and delta[i] = sum(g * r): with s as above, p = exp(s - lse[i]), dp = fma(g[i, e], v[j, e], .) over ascending e
from +0, ds = p * (dp - delta[i]). Sums over queries and over keys run in blocks of 64, each by fma in ascending order from +0, and the blocks
are added in ascending order from +0 (with `causal`, the pairs that forward leaves out are left out):

    dv[j, e] = sum over i of p * g[i, e];   dk[j, d] = sum over i of ds * b[i, d];   dq[i, d] = (sum over j of ds * k[j, d]) * scale

So a result depends on its own rows alone: not on batch, tiles, threads or vector width. The online softmax is that of Milakov and
Gimelshein (2018), its tiling over keys FlashAttention's (Dao et al., 2022). Derivatives of the gradient are ordinary ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from duo_ir.core import Op, Value
from duo_ir.errors import DTypeError, ShapeError
from duo_ir.opdef import Attention, OpDef, compute_dtype
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import elementwise as ew
from duo_ir.ops import linalg, reduce
from duo_ir.ops.reference import narrow, widen
from duo_ir.scalar import explog
from duo_ir.scalar.numpy_eval import NumpyScalar, fma
from duo_ir.types import DimLike, TensorType, bool_, i64

Array = np.ndarray
BLOCK = 64  # queries and keys that are taken together
HALF = BLOCK // 2  # with `causal`, keys take part in so many at a time


# ------------------------------------------------------------------------------------------------------------- types
def _check(q: TensorType, k: TensorType, v: TensorType, mask: Sequence[TensorType]) -> None:
    if not q.dtype.is_float or k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise DTypeError(
            f"query, key and value have one float dtype, not {q.dtype.name}, {k.dtype.name}, {v.dtype.name}"
        )
    if q.rank < 3 or k.rank != q.rank or v.rank != q.rank:
        raise ShapeError(
            f"query [..., T, H, D], key [..., S, H, D] and value [..., S, H, E] are needed, got {q}, {k}, {v}"
        )
    *lead, t, heads, width = q.shape
    *key_lead, s, _, _ = k.shape
    if key_lead != lead or k.shape[-2:] != (heads, width) or v.shape[:-1] != k.shape[:-1]:
        raise ShapeError(f"query [..., T, H, D], key [..., S, H, D] and value [..., S, H, E] do not fit: {q}, {k}, {v}")
    for d in (width, v.shape[-1]):
        if not isinstance(d, int) or d < 1:
            raise ShapeError(f"the width of a head is a known number of at least 1, not {d}")
    for m in mask:
        if m.dtype is not bool_ and m.dtype is not compute_dtype(q.dtype):
            raise DTypeError(f"a mask is bool or {compute_dtype(q.dtype).name} here, not {m.dtype.name}; cast it")
        if m.shape != (*lead, heads, t, s):
            raise ShapeError(f"the mask of {q} and {k} has shape [..., H, T, S], not {m}; broadcast it")


def _rows(q: TensorType) -> TensorType:
    """The type of one number of the compute dtype for each query and head: [..., T, H]."""
    return TensorType(compute_dtype(q.dtype), q.shape[:-1])


def _attention_type(
    q: TensorType, k: TensorType, v: TensorType, *mask: TensorType, causal: bool, scale: float
) -> tuple[TensorType, TensorType]:
    _check(q, k, v, mask)
    return q.with_shape((*q.shape[:-1], v.shape[-1])), _rows(q)


def _gradient_type(
    q: TensorType, k: TensorType, v: TensorType, lse: TensorType, delta: TensorType, g: TensorType, *mask: TensorType, causal: bool,
    scale: float,
) -> tuple[TensorType, TensorType, TensorType]:  # fmt: skip
    _check(q, k, v, mask)
    if lse != _rows(q) or delta != _rows(q) or g != q.with_shape((*q.shape[:-1], v.shape[-1])):
        raise ShapeError(f"lse, delta and cotangent of {q} and {v} do not fit: {lse}, {delta}, {g}")
    return q, k, v


# --------------------------------------------------------------------------------------------------------- reference
def _of(recipe: Any, x: Array) -> Array:
    return np.asarray(recipe(NumpyScalar(), x))


def _dot(a: Array, b: Array, axis: int) -> Array:
    """fma(a, b, .) from +0 along an axis, ascending; the axis is dropped."""
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    total = np.zeros(np.broadcast_shapes(a.shape[1:], b.shape[1:]), a.dtype)
    for x, y in zip(a, b):
        total = np.asarray(fma(x, y, total))
    return total


def _scores(b: Array, k: Array, mask: Array | None, causal: bool, i0: int, j0: int) -> Array:
    """s of a run of queries (scaled) from number i0 on and a block of keys from j0 on: [..., i, j]."""
    s = _dot(b[..., :, None, :], k[..., None, :, :], -1)
    if mask is not None:
        s = np.where(mask, s, s.dtype.type(-np.inf)) if mask.dtype == np.bool_ else s + mask
    if causal:
        i, j = np.arange(s.shape[-2])[:, None] + i0, np.arange(s.shape[-1]) + j0
        s = np.where(j <= i, s, s.dtype.type(-np.inf))
    return np.asarray(s)


def _part(mask: Array | None, i: slice, j: slice) -> Array | None:
    return None if mask is None else mask[..., i, j]


def _shares(j0: int, causal: bool) -> list[tuple[slice, slice]]:
    """(queries, keys) for the block of keys from j0 on: which queries it takes part in, and with which of its keys."""
    block = slice(j0, j0 + BLOCK)
    if not causal:
        return [(slice(0, None), block)]
    return [(slice(j0, j0 + HALF), slice(j0, j0 + HALF)), (slice(j0 + HALF, None), block)]


@np.errstate(all="ignore")
def forward_rows(q: Array, k: Array, v: Array, mask: Array | None, causal: bool, scale: float) -> tuple[Array, Array]:
    """The definition above on [..., T, D], [..., S, D], [..., S, E] and [..., T, S]: (result, lse)."""
    wide_k, wide_v = widen(k), widen(v)
    b = widen(q) * wide_k.dtype.type(scale)
    shape, one, zero = b.shape[:-1], b.dtype.type(1), b.dtype.type(0)
    m, total = np.full(shape, -np.inf, b.dtype), np.zeros(shape, b.dtype)
    o = np.zeros((*shape, v.shape[-1]), b.dtype)
    for j0 in range(0, k.shape[-2], BLOCK):
        for seen, block in _shares(j0, causal):
            if seen.start >= shape[-1]:
                continue
            s = _scores(b[..., seen, :], wide_k[..., block, :], _part(mask, seen, block), causal, seen.start, j0)
            old = m[..., seen]
            new = np.fmax(np.fmax.reduce(s, axis=-1), old)
            safe = np.where(new == -np.inf, zero, new)
            a = _of(explog.exp, old - safe)
            p = _of(explog.exp, s - safe[..., None])
            added = np.zeros(old.shape, b.dtype)
            for j in range(p.shape[-1]):
                added = added + p[..., j]
            total[..., seen] = total[..., seen] * a + added
            o[..., seen, :] = o[..., seen, :] * a[..., None] + _dot(p[..., :, :, None], wide_v[..., None, block, :], -2)
            m[..., seen] = new
    safe, none = np.where(m == -np.inf, zero, m), total == 0
    lse = np.where(none, b.dtype.type(np.inf), safe + _of(explog.log, np.where(none, one, total)))
    return narrow(o * (one / np.where(none, one, total))[..., None], q.dtype), lse


@np.errstate(all="ignore")
def backward_rows(
    q: Array, k: Array, v: Array, lse: Array, delta: Array, g: Array, mask: Array | None, causal: bool, scale: float
) -> tuple[Array, Array, Array]:
    """The definition above on [..., T, D], [..., S, D], [..., S, E], [..., T], [..., T], [..., T, E] and [..., T, S]: (dq, dk, dv)."""
    wide_k, wide_v, wide_g = widen(k), widen(v), widen(g)
    factor = wide_k.dtype.type(scale)
    b = widen(q) * factor
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (b, wide_k, wide_v))
    for j0 in range(0, k.shape[-2], BLOCK):
        block = slice(j0, j0 + BLOCK)
        for i0 in range(j0 if causal else 0, q.shape[-2], BLOCK):
            seen = slice(i0, i0 + BLOCK)
            s = _scores(b[..., seen, :], wide_k[..., block, :], _part(mask, seen, block), causal, i0, j0)
            p = _of(explog.exp, s - lse[..., seen, None])
            dp = _dot(wide_g[..., seen, None, :], wide_v[..., None, block, :], -1)
            ds = p * (dp - delta[..., seen, None])
            # the pairs that take part: for each run of keys their queries, for each run of queries their keys
            first, last, whole = slice(0, HALF), slice(HALF, BLOCK), slice(0, BLOCK)
            diagonal = causal and i0 == j0
            for keys, queries in ((first, whole), (last, last)) if diagonal else ((whole, whole),):
                to = slice(j0 + keys.start, j0 + keys.stop)
                of = slice(i0 + queries.start, i0 + queries.stop)
                dv[..., to, :] += _dot(p[..., queries, keys, None], wide_g[..., of, None, :], -3)
                dk[..., to, :] += _dot(ds[..., queries, keys, None], b[..., of, None, :], -3)
            for queries, keys in ((first, first), (last, whole)) if diagonal else ((whole, whole),):
                to = slice(i0 + queries.start, i0 + queries.stop)
                of = slice(j0 + keys.start, j0 + keys.stop)
                dq[..., to, :] += _dot(ds[..., queries, keys, None], wide_k[..., None, of, :], -2)
    return narrow(dq * factor, q.dtype), narrow(dk, k.dtype), narrow(dv, v.dtype)


def _heads_first(x: Array) -> Array:
    return np.swapaxes(x, -2, -3)


def _attention_reference(q: Array, k: Array, v: Array, *mask: Array, causal: bool, scale: float) -> tuple[Array, Array]:
    q, k, v = (_heads_first(x) for x in (q, k, v))
    out, lse = forward_rows(q, k, v, mask[0] if mask else None, causal, scale)
    return np.ascontiguousarray(_heads_first(out)), np.ascontiguousarray(np.swapaxes(lse, -1, -2))


def _gradient_reference(
    q: Array, k: Array, v: Array, lse: Array, delta: Array, g: Array, *mask: Array, causal: bool, scale: float
) -> tuple[Array, ...]:
    q, k, v, g = (_heads_first(x) for x in (q, k, v, g))
    lse, delta = (np.swapaxes(x, -1, -2) for x in (lse, delta))
    grads = backward_rows(q, k, v, lse, delta, g, mask[0] if mask else None, causal, scale)
    return tuple([np.ascontiguousarray(_heads_first(x)) for x in grads])


# ------------------------------------------------------------------------------------- derivatives, as ordinary ops
def _turned(x: Value) -> Value:
    """Heads before rows, or back: [..., T, H, D] and [..., H, T, D]."""
    n = x.type.rank
    return nd.transpose(x, (*range(n - 3), n - 2, n - 3, n - 1))


def _wide(x: Value) -> Value:
    return _turned(nd.cast_to(x, compute_dtype(x.type.dtype)))


def _per_row(x: Value) -> Value:
    """[..., T, H] as [..., H, T, 1]."""
    return nd.expand_dims(nd.swap_last(x), -1)


def _times(a: Value, b: Value) -> Value:
    """a b', over the last axes."""
    return linalg.matmul(a, nd.swap_last(b))


class _Composed:
    """The operands with heads first, in the compute dtype, and what both rules need of them: p = exp(s - lse)."""

    def __init__(self, op: Op, lse: Value, mask: Sequence[Value]) -> None:
        self.op, self.scale, self.causal = op, op.attrs["scale"], op.attrs["causal"]
        self.mask = mask[0] if mask else None
        self.q, self.k, self.v = (_wide(x) for x in op.operands[:3])
        s = _times(self.q, self.k) * self.scale
        if self.mask is not None:
            s = nd.where(self.mask, s, -np.inf) if self.mask.type.dtype is bool_ else s + self.mask
        if self.causal:
            rows, columns = (nd.iota(s.type.shape, s.type.rank - n, i64) for n in (2, 1))
            s = nd.where(nd.le(columns, rows), s, -np.inf)
        self.p = ew.exp(s - _per_row(lse))

    def back(self, x: Value, operand: int) -> Value:
        """A gradient or tangent as the operand (or result) of that number is laid out."""
        return nd.cast_to(_turned(x), self.op.operands[operand].type.dtype)

    def moved_scores(self, dq: Value | None, dk: Value | None, mask: Value | None) -> Value:
        """The tangent of s."""
        total = nd.zeros_like(self.p)
        if dq is not None:
            total = total + _times(_wide(dq), self.k) * self.scale
        if dk is not None:
            total = total + _times(self.q, _wide(dk)) * self.scale
        return total if mask is None else total + mask


def _rows_to_columns(x: Value) -> Value:
    """[..., H, T] as [..., T, H]."""
    return nd.swap_last(x)


def _attention_vjp(op: Op, g: Value, g_lse: Value) -> tuple[Value | None, ...]:
    q, k, v, *mask = op.operands
    out, lse = op.results
    wide = [nd.cast_to(x, compute_dtype(x.type.dtype)) for x in (g, out)]
    delta = reduce.sum(wide[0] * wide[1], axes=(g.type.rank - 1,)) - g_lse
    grads = attention_gradient(q, k, v, lse, delta, g, *mask, **op.attrs)
    if not mask:
        return grads
    if mask[0].type.dtype is bool_:
        return (*grads, None)
    c = _Composed(op, lse, mask)
    return (*grads, c.p * (_times(_wide(g), c.v) - _per_row(delta)))


def _attention_jvp(op: Op, tangents: Sequence[Value | None]) -> tuple[Value, Value]:
    dq, dk, dv, *dmask = tangents
    c = _Composed(op, op.results[1], op.operands[3:])
    moved = c.moved_scores(dq, dk, dmask[0] if dmask else None)
    lse = reduce.sum(c.p * moved, axes=(moved.type.rank - 1,))
    out = linalg.matmul(c.p * (moved - nd.expand_dims(lse, -1)), c.v)
    if dv is not None:
        out = out + linalg.matmul(c.p, _wide(dv))
    return c.back(out, 0), _rows_to_columns(lse)


def _gradient_vjp(op: Op, a: Value, b: Value, c: Value) -> tuple[Value | None, ...]:
    """By hand from dq = scale ds k, dk = scale ds' q, dv = p' g, with ds = p (g v' - delta)."""
    _, _, _, lse, delta, g, *mask = op.operands
    x = _Composed(op, lse, mask)
    a, b, c, g = (_wide(y) for y in (a, b, c, g))
    slope = _times(g, x.v) - _per_row(delta)
    ds = x.p * slope
    to_ds = (_times(a, x.k) + _times(x.q, b)) * x.scale
    to_dp = to_ds * x.p
    to_s = (_times(g, c) + to_ds * slope) * x.p
    last = (to_s.type.rank - 1,)
    grads: list[Value | None] = [
        x.back((linalg.matmul(to_s, x.k) + linalg.matmul(ds, b)) * x.scale, 0),
        x.back((linalg.matmul(nd.swap_last(to_s), x.q) + linalg.matmul(nd.swap_last(ds), a)) * x.scale, 1),
        x.back(linalg.matmul(nd.swap_last(to_dp), g), 2),
        _rows_to_columns(-reduce.sum(to_s, axes=last)),
        _rows_to_columns(-reduce.sum(to_dp, axes=last)),
        x.back(linalg.matmul(x.p, c) + linalg.matmul(to_dp, x.v), 5),
    ]
    if mask:
        grads.append(None if mask[0].type.dtype is bool_ else to_s)
    return tuple(grads)


def _gradient_jvp(op: Op, tangents: Sequence[Value | None]) -> tuple[Value, Value, Value]:
    dq, dk, dv, dlse, ddelta, dg, *dmask = tangents
    _, _, _, lse, delta, g, *mask = op.operands
    x = _Composed(op, lse, mask)
    g = _wide(g)
    moved = x.moved_scores(dq, dk, dmask[0] if dmask else None)
    if dlse is not None:
        moved = moved - _per_row(dlse)
    p_dot = x.p * moved
    slope = _times(g, x.v) - _per_row(delta)
    slope_dot = nd.zeros_like(slope)
    if dg is not None:
        slope_dot = slope_dot + _times(_wide(dg), x.v)
    if dv is not None:
        slope_dot = slope_dot + _times(g, _wide(dv))
    if ddelta is not None:
        slope_dot = slope_dot - _per_row(ddelta)
    ds, ds_dot = x.p * slope, p_dot * slope + x.p * slope_dot
    out_q, out_k = linalg.matmul(ds_dot, x.k), linalg.matmul(nd.swap_last(ds_dot), x.q)
    out_v = linalg.matmul(nd.swap_last(p_dot), g)
    if dk is not None:
        out_q = out_q + linalg.matmul(ds, _wide(dk))
    if dq is not None:
        out_k = out_k + linalg.matmul(nd.swap_last(ds), _wide(dq))
    if dg is not None:
        out_v = out_v + linalg.matmul(nd.swap_last(x.p), _wide(dg))
    return x.back(out_q * x.scale, 0), x.back(out_k * x.scale, 1), x.back(out_v, 2)


def _batched(op: Op, operands: Sequence[Value], batched: Sequence[bool], size: DimLike) -> tuple[Value, ...]:
    """One more leading axis."""
    full = [x if b else nd.broadcast_to(x, (size, *x.type.shape)) for x, b in zip(operands, batched)]
    return tuple(op.definition(*full, **op.attrs))


attention = OpDef(
    "attention", _attention_type, Attention(backward=False), reference=_attention_reference, vjp=_attention_vjp, jvp=_attention_jvp,
    batch=_batched, doc="(softmax(scale * query key' + mask) value, log of each row's sum of exponentials), over [..., T, H, D].",
)  # fmt: skip
attention_gradient = OpDef(
    "attention_gradient", _gradient_type, Attention(backward=True), reference=_gradient_reference, vjp=_gradient_vjp, jvp=_gradient_jvp,
    batch=_batched, doc="(dq, dk, dv) from query, key, value, lse, delta = sum(g * result), the cotangent g, and the mask.",
)  # fmt: skip
