"""Random inputs, running a function on SSA values, and its gradients: what the tests of duo.functional share."""

import numpy as np

from duo_ir.core import Builder, function_of
from duo_ir.interpret import interpret
from duo_ir.transforms.autodiff import reverse
from duo_ir.types import TensorType, dtype

_STREAM = np.random.default_rng(7)


def f(*shape):
    return _STREAM.standard_normal(shape)


def p(*shape):
    """In (0.1, 0.9)."""
    return _STREAM.uniform(0.1, 0.9, shape)


def i(low, high, *shape):
    return _STREAM.integers(low, high, shape)


def b(*shape):
    return _STREAM.random(shape) < 0.5


def types_of(arrays):
    return [TensorType(dtype(a.dtype), a.shape) for a in arrays]


def run(fn, *arrays):
    arrays = [np.asarray(a) for a in arrays]
    return interpret(function_of(fn, *types_of(arrays)), *arrays)


def flat(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def gradients(fn, arrays, cotangents):
    """vjp of all float results, by our reverse mode."""
    builder = Builder()
    with builder:
        params = [builder.parameter(t) for t in types_of(arrays)]
        outs = [o for o in flat(fn(*params)) if o.type.dtype.is_float]
        seeds = [builder.parameter(o.type) for o in outs]
        merged = {}
        for o, s in zip(outs, seeds):
            merged[o] = merged[o] + s if o in merged else s
        wrt = [v for v in params if v.type.dtype.is_float]
        grads = reverse(builder.ops, merged, wrt)
        there = [g for g in grads if g is not None]
    values = interpret(builder.build(there), *arrays, *cotangents)
    rest = iter(values)
    return [None if g is None else next(rest) for g in grads]
