"""The layout pass: equal bits and signature; transposes between convolutions vanish; what has no convolution is left alone."""

from __future__ import annotations

import itertools

import numpy as np
import op_table
import pytest

import duo_ir.ops as ops
from duo_ir.core import Function, current_builder, function_of
from duo_ir.interpret import interpret
from duo_ir.ops import broadcasting as nd
from duo_ir.ops.conv import conv
from duo_ir.transforms.derivatives import grad_function
from duo_ir.transforms.layout import _is_free, propagate_layout
from duo_ir.transforms.simplify import simplify
from duo_ir.types import Dim, TensorType, f32
from duo_ir.verify import verify

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
B = Dim.symbol("b")


def F(*shape):
    return TensorType(f32, shape)


def layer(x, w):
    """[n, c, h, w] convolved with [h, w, c, o], padded so that the size stays."""
    pads = ((1, 1),) * 2
    out = conv(nd.transpose(x, LAST), w, strides=(1, 1), padding=pads, x_dilation=(1, 1), w_dilation=(1, 1), groups=1)
    return nd.transpose(out, FIRST)


def relu(x):
    return ops.where(ops.le(x, nd.zeros_like(x)), nd.zeros_like(x), x)


def normed(x, scale):
    """Batch norm as the frontends have it, with statistics over all but the channels."""
    n = x.type.size // x.type.shape[1]
    mean = nd.reshape(nd.sum(x, (0, 2, 3)) / float(n), (1, x.type.shape[1], 1, 1))
    centred = x - mean
    var = nd.reshape(nd.sum(centred * centred, (0, 2, 3)) / float(n), (1, x.type.shape[1], 1, 1))
    return centred * ops.rsqrt(var + 1e-5) * nd.reshape(scale, (scale.type.shape[0], 1, 1))


def chain(x, w1, w2, scale):
    y = relu(normed(layer(x, w1), scale))
    return relu(layer(y, w2) + y)


def loss(x, w1, w2, scale):
    y = chain(x, w1, w2, scale)
    return nd.sum(y * y, None)


def max_over_pixels(x, w, *_):
    return nd.max(layer(x, w), (2, 3))


def channels_between(x, w, *_):
    """Reduces over (channels, height): in memory height comes first, so the order of the sum would change."""
    return nd.sum(layer(x, w), (1, 2)), nd.max(layer(x, w), (1,))


def sliced(x, w, *_):
    y = relu(layer(x, w))
    return nd.slice_axis(y, 2, 1, 3), nd.reshape(y, (y.type.shape[0], 3 * 5 * 4)), y


def smooth(x, w1, w2, *_):
    """An activation of two results, value and slope, both on their way out in another order than the next convolution's."""
    y, slope = ops.gelu(layer(x, w1))
    z, steep = ops.silu(layer(y * slope, w2))
    return nd.transpose(z, LAST), steep, slope


def smooth_loss(x, w1, w2, *_):
    return nd.sum(layer(ops.gelu(layer(x, w1))[0], w2), None)


CASES = {"smooth": smooth, "smooth loss": smooth_loss, "chain": chain, "loss": loss, "max": max_over_pixels, "between": channels_between, "sliced": sliced}
TYPES = [F(2, 3, 5, 4), F(3, 3, 3, 3), F(3, 3, 3, 3), F(3)]


def arrays():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(t.shape).astype("f4") for t in TYPES]


def count(function: Function, name: str = "transpose") -> int:
    return sum(op.definition.name == name for op in function.ops)


def check(function: Function) -> Function:
    function = simplify(function)
    out = simplify(propagate_layout(function))
    verify(out)
    assert out.param_types == function.param_types and out.result_types == function.result_types
    for a, b in zip(interpret(function, *arrays()), interpret(out, *arrays()), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return out


@pytest.mark.parametrize("name", CASES)
def test_bits_stay(name):
    check(function_of(CASES[name], *TYPES))


def test_only_the_ends_of_a_chain_are_transposed():
    """What stays is the transpose of the input, that of the result, and those of per-channel numbers spread over an image."""
    after = check(function_of(chain, *TYPES))
    stored = [op.operands[0] for op in after.ops if op.definition.name == "transpose" and not _is_free(op.operands[0])]
    assert stored == [after.params[0], after.results[0].op.operands[0]]
    assert after.results[0].op.definition.name == "transpose"


def test_an_update_of_weights_is_computed_in_their_order():
    """The gradient is transposed once; what is added to it is read, and written, as it is."""

    def update(x, w, momentum):
        y = layer(nd.transpose(x, FIRST), nd.transpose(w, (2, 3, 1, 0)))
        g = nd.transpose(y, (1, 0, 2, 3))
        return g, momentum * 0.9 + g

    function = simplify(function_of(update, F(3, 3, 3, 5), F(4, 5, 3, 3), F(4, 3, 3, 3)))
    out = simplify(propagate_layout(function))
    g, new = out.results
    assert new.op.definition.name == "add" and g in new.op.operands
    assert out.params[2] in new.op.operands[0].op.operands or out.params[2] in new.op.operands[1].op.operands


@pytest.mark.parametrize("fn", [loss, smooth_loss])
def test_gradients_too(fn):
    check(grad_function(function_of(fn, *TYPES)))


@pytest.mark.parametrize("row", op_table.TABLE, ids=lambda row: row.name)
def test_every_op_beside_a_convolution(row):
    """The pass takes any op, of any number of operands and results."""
    for case in itertools.islice(op_table.cases([row]), 8):
        alone = case.function()

        def beside(x, w, *operands, alone=alone):
            return layer(x, w), *current_builder().inline(alone, operands)

        function = function_of(beside, *TYPES[:2], *alone.param_types)
        out = propagate_layout(function)
        verify(out)
        assert out.result_types == function.result_types


def test_a_sum_in_another_order_stays_where_it_is():
    out = check(function_of(channels_between, *TYPES))
    (total,) = (op for op in out.ops if op.definition.name == "sum")
    assert total.attrs["axes"] == (1, 2) and total.operands[0].op.definition.name == "transpose"
    (largest,) = (op for op in out.ops if op.definition.name == "max")
    assert largest.attrs["axes"] == (3,)


def test_without_a_convolution_nothing_changes():
    function = simplify(function_of(lambda x: nd.transpose(relu(nd.transpose(x, LAST)), FIRST), F(2, 3, 4, 5)))
    assert propagate_layout(function) is function


def test_symbolic_batches():
    types = [F(B, 3, 5, 4), *TYPES[1:]]
    function = simplify(function_of(lambda x, w1, w2, s: relu(layer(relu(layer(x, w1)), w2)), *types))
    out = simplify(propagate_layout(function))
    verify(out)
    assert count(out) < count(function) and out.result_types == function.result_types
