"""Random small programs for property tests: a strategy that gives (Function, arguments as NumPy arrays)."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

import duo_ir.ops as ops
from duo_ir.core import Builder, Function, Value, function_of
from duo_ir.ops import broadcasting as nd
from duo_ir.types import DType, TensorType, bool_

SMOOTH = ["add", "sub", "mul", "neg", "tanh", "sin", "sigmoid", "exp_of_tanh", "div_by_positive"]
ROUGH = [
    "div",
    "maximum",
    "minimum",
    "abs",
    "sqrt",
    "where",
    "times_one",
    "double_neg",
    "constant",
    "same_again",
    "floor",
]
MOVE = [
    "transpose",
    "reshape",
    "sum",
    "sum_all",
    "broadcast",
    "slice",
    "pad",
    "flip",
    "concat",
    "matmul",
    "gather",
    "cumsum",
]
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, 0.5]


def _move(name: str, x: Value, draw: st.DrawFn) -> Value | None:
    rank, shape = x.type.rank, x.type.shape
    if name == "sum_all":
        return nd.sum(x)
    if name == "broadcast":
        return nd.broadcast_to(x, (2, *shape)) if rank < 3 else None
    if rank == 0:
        return None
    axis = draw(st.integers(0, rank - 1))
    if name == "transpose":
        return nd.transpose(x, draw(st.permutations(range(rank))))
    if name == "reshape":
        return nd.reshape(x, (x.type.size,))
    if name == "sum":
        return nd.sum(x, axis)
    if name == "flip":
        return ops.flip(x, axes=(axis,))
    if name == "cumsum":
        return ops.cumsum(x, axis=axis)
    if name == "concat":
        return ops.concat(x, x, axis=axis)
    if name == "slice":
        return nd.slice_axis(x, axis, draw(st.integers(0, shape[axis])), shape[axis])
    if name == "gather":
        if shape[axis] == 0:
            return None
        return ops.gather(x, nd.iota((2,), 0) % shape[axis], axes=(axis,))
    if name == "pad":
        zero = (0,) * rank
        return ops.pad(x, nd.constant_of(1, x.type.dtype), low=(*zero[1:], 1), high=zero, interior=zero)
    return nd.matmul(x, nd.swap_last(x)) if rank >= 2 else None


def _rough(name: str, x: Value, y: Value, draw: st.DrawFn) -> Value:
    if name in ("div", "maximum", "minimum"):
        return getattr(ops, name)(x, y)
    if name in ("abs", "sqrt", "floor"):
        return getattr(ops, name)(x)
    if name == "where":
        return ops.where(ops.lt(x, y), y, x)
    if name == "times_one":
        return x * 1.0
    if name == "double_neg":
        return ops.neg(ops.neg(x))
    if name == "constant":
        return x + nd.constant_of(draw(st.sampled_from(SPECIAL)), x.type.dtype) * draw(st.sampled_from(SPECIAL))
    return (x * y) + (y * x)


def _smooth(name: str, x: Value, y: Value) -> Value:
    if name in ("add", "sub", "mul"):
        return getattr(ops, name)(x, y)
    if name == "exp_of_tanh":
        return ops.exp(ops.tanh(x))
    if name == "div_by_positive":
        return x / (y * y + 1.0)
    return getattr(ops, name)(x)


@st.composite
def programs(
    draw: st.DrawFn, dtype: DType, rough: bool = True, max_ops: int = 8, control: bool = True
) -> tuple[Function, list[np.ndarray]]:
    """A Function over `dtype` with arguments. Without `rough`, smooth ops only and moderate arguments (for differences)."""
    builder = Builder("random")
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (0, 2), (2, 1, 2)]))
    with builder:
        pool = [builder.parameter(TensorType(dtype, shape), n) for n in ("x", "y")]
        flag = builder.parameter(TensorType(bool_), "flag")
        names = SMOOTH + MOVE + (ROUGH if rough else []) + (["cond"] if control else [])
        for _ in range(draw(st.integers(1, max_ops))):
            name, x = draw(st.sampled_from(names)), draw(st.sampled_from(pool))
            if x.type.size > 200:
                continue
            y = draw(st.sampled_from([v for v in pool if v.type is x.type]))
            if name == "cond":
                then = function_of(lambda a, b: a * b, x.type, x.type, name="then")
                orelse = function_of(lambda a, b: ops.tanh(a) - b, x.type, x.type, name="orelse")
                made = ops.cond(flag, x, y, then=then, orelse=orelse)
            elif name in MOVE:
                made = _move(name, x, draw)
            else:
                made = _rough(name, x, y, draw) if name in ROUGH else _smooth(name, x, y)
            if made is not None:
                pool.append(made)
    function = builder.build([pool[-1], draw(st.sampled_from(pool))])
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    arrays = []
    for _ in range(2):
        values = np.asarray(rng.uniform(0.3, 1.2, shape))
        if rough:
            special = rng.choice(np.array(SPECIAL), size=shape)
            values = np.where(rng.random(shape) < 0.4, special, values * 3 - 1)
        with np.errstate(all="ignore"):
            arrays.append(np.asarray(values).astype(dtype.numpy))
    return function, [*arrays, np.asarray(draw(st.booleans()))]
