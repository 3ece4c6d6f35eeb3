"""Multi-head attention with torch.nn's parameters and arguments."""

from __future__ import annotations

from typing import Any

from duo.dispatch import beside
from duo.eager.creation import empty, zeros
from duo.functional import cat
from duo.functional._args import type_of
from duo.functional.attention import attention_weights
from duo.nn import functional as F
from duo.nn import init
from duo.nn.layers import Linear
from duo.nn.module import Module
from duo.nn.parameter import Parameter
from duo_ir.errors import ArgumentError, DTypeError, ShapeError
from duo_ir.types import bool_


class MultiheadAttention(Module):
    """softmax(Q K' / sqrt(head size)) V for `num_heads` heads over projections of query, key and value, and a projection of the result.

    query: [target, batch, embed_dim] ([batch, target, embed_dim] with batch_first; batch may be missing), key [source, batch, kdim], value
    [source, batch, vdim]. Gives (output, weights averaged over the heads, or None). As in PyTorch, True in a bool mask means *not*
    allowed, the reverse of `scaled_dot_product_attention`. A query that may see no key gives weights of 0 (PyTorch: NaN, or 0 without weights).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ArgumentError(f"MultiheadAttention: embed_dim {embed_dim} does not split into {num_heads} heads")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = Parameter(empty(3 * embed_dim, embed_dim, dtype=dtype, device=device))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = Parameter(empty(embed_dim, embed_dim, dtype=dtype, device=device))
            self.k_proj_weight = Parameter(empty(embed_dim, self.kdim, dtype=dtype, device=device))
            self.v_proj_weight = Parameter(empty(embed_dim, self.vdim, dtype=dtype, device=device))
            self.register_parameter("in_proj_weight", None)
        in_proj_bias = Parameter(zeros(3 * embed_dim, dtype=dtype, device=device)) if bias else None
        self.register_parameter("in_proj_bias", in_proj_bias)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, dtype=dtype, device=device)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(
                name, Parameter(empty(1, 1, embed_dim, dtype=dtype, device=device)) if add_bias_kv else None
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Xavier uniform, biases 0, bias_k and bias_v Xavier normal, as torch.nn.MultiheadAttention."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                init.zeros_(bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                init.xavier_normal_(extra)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """key_padding_mask: [batch, source]; attn_mask: [target, source] or [batch * heads, target, source]; bool (True is masked) or a
        float to add. is_causal lets target i see sources 0..i where attn_mask is not given, and is a hint without effect where it is."""
        ranks = [type_of(x).rank for x in (query, key, value)]
        if ranks not in ([2] * 3, [3] * 3):
            given = ", ".join(str(type_of(x)) for x in (query, key, value))
            raise ShapeError(
                f"MultiheadAttention: query, key and value have 3 dims each, or 2 without batch, got {given}"
            )
        batched = ranks[0] == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None and type_of(key_padding_mask).rank == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = self._batch_first(query, key, value)
        q, k, v = (self._heads(x) for x in self._extended(*self._projected(query, key, value)))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        causal = is_causal and attn_mask is None
        if causal and mask is not None:
            mask, causal = self._merged(self._causal_mask(q, k), mask), False
        out, weights = self._attend(q, k, v, mask, causal, need_weights)
        batch, _, target, _ = type_of(out).shape
        out = self.out_proj(out.transpose(1, 2).reshape(batch, target, self.embed_dim))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _batch_first(self, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
        """The three with batch before sequence; one tensor given twice stays one, so that it is projected once."""
        moved = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        return moved[id(query)], moved[id(key)], moved[id(value)]

    def _projected(self, query: Any, key: Any, value: Any) -> Any:
        e, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        weight, bias = beside(query, weight, bias)
        biases = (None,) * 3 if bias is None else bias.chunk(3, 0)
        if weight is not None and key is value:
            q = F.linear(query, weight[:e], biases[0])
            return (q, *F.linear(key, weight[e:], None if bias is None else bias[e:]).chunk(2, -1))
        weights = weight.chunk(3, 0) if weight is not None else (
            self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        )  # fmt: skip
        return tuple([F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)])

    def _extended(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        """Keys and values with those that add_bias_kv and add_zero_attn put behind them."""
        batch, _, e = type_of(k).shape
        if self.bias_k is not None:
            bias_k, bias_v = beside(k, self.bias_k, self.bias_v)
            k = cat((k, bias_k.expand(batch, 1, e)), 1)
            v = cat((v, bias_v.expand(batch, 1, e)), 1)
        if self.add_zero_attn:
            k, v = (cat((x, x.new_zeros(batch, 1, e)), 1) for x in (k, v))
        return q, k, v

    def _heads(self, x: Any) -> Any:
        """[batch, length, embed_dim] as [batch, heads, length, head size]."""
        batch, length, _ = type_of(x).shape
        return x.reshape(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Any, k: Any, attn_mask: Any, padding: Any) -> Any:
        """What `scaled_dot_product_attention` takes: True is allowed, or a float to add; broadcasts to [batch, heads, target, source]."""
        batch, heads, target, _ = type_of(q).shape
        extra = (self.bias_k is not None) + self.add_zero_attn
        source = type_of(k).shape[-2] - extra
        out = None
        if attn_mask is not None:
            shape = type_of(attn_mask).shape
            if shape not in ((target, source), (batch * heads, target, source)):
                wanted = f"({target}, {source}) or ({batch * heads}, {target}, {source})"
                raise ShapeError(f"MultiheadAttention: attn_mask has shape {shape}; it takes {wanted}")
            out = _allowed(attn_mask)
            if len(shape) == 3:
                out = out.reshape(batch, heads, target, source)
        if padding is not None:
            if type_of(padding).shape != (batch, source):
                found = type_of(padding).shape
                raise ShapeError(
                    f"MultiheadAttention: key_padding_mask has shape {found}; it takes ({batch}, {source})"
                )
            out = self._merged(out, _allowed(padding).reshape(batch, 1, 1, source))
        if out is not None and extra:
            lead = type_of(out).shape[:-1]
            fill = out.new_ones(*lead, extra) if type_of(out).dtype is bool_ else out.new_zeros(*lead, extra)
            out = cat((out, fill), -1)
        return out

    def _merged(self, x: Any, y: Any) -> Any:
        if x is None:
            return y
        both = [type_of(m).dtype is bool_ for m in (x, y)]
        if all(both):
            return x & y
        x, y = (_additive(m, like) if b else m for m, like, b in ((x, y, both[0]), (y, x, both[1])))
        return x + y

    def _causal_mask(self, q: Any, k: Any) -> Any:
        target, source = type_of(q).shape[-2], type_of(k).shape[-2]
        return q.new_ones(target, source, dtype=bool_).tril()

    def _attend(self, q: Any, k: Any, v: Any, mask: Any, causal: bool, need_weights: bool) -> tuple[Any, Any]:
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, p, causal), None
        weights = attention_weights(q, k, mask, causal)
        weights = F.dropout(weights, p) if p else weights
        return weights @ v, weights

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}"


def _allowed(mask: Any) -> Any:
    """PyTorch's layer mask as the function's: a bool one is turned round."""
    d = type_of(mask).dtype
    if d is bool_:
        return ~mask
    if not d.is_float:
        raise DTypeError(f"MultiheadAttention: a mask is bool or float, not {d.name}")
    return mask


def _additive(mask: Any, like: Any) -> Any:
    return mask.new_zeros(*type_of(mask).shape, dtype=type_of(like).dtype).masked_fill(~mask, float("-inf"))
