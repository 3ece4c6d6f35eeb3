"""nn.MultiheadAttention and the transformer layers, against PyTorch."""

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn
from duo_ir.errors import ArgumentError, ShapeError
from tests.frontends.eager_modes import agree, numbers

torch = pytest.importorskip("torch")


def set_numbers(module):
    """Gives the parameters of a module of either library the same small numbers."""
    for k, (_, p) in enumerate(module.named_parameters()):
        p.data.copy_(
            (torch if isinstance(p, torch.Tensor) else duo).tensor(numbers(*p.shape, seed=k) * np.float32(0.3))
        )
    return module


def with_gradients(T, module, inputs, *arguments, **options):
    """Results of a module, gradients of inputs and parameters."""
    xs = [T.tensor(x, requires_grad=True) for x in inputs]
    out = module(*xs, *arguments, **options)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    loss = sum((o * T.tensor(numbers(*o.shape, seed=8 + i))).sum() for i, o in enumerate(outs))
    loss.backward()
    return outs, [x.grad for x in xs], [p.grad for p in module.parameters()]


def causal(T, n, m):
    return T.ones(n, m, dtype=T.bool).triu(1)


def padding(T, batch, m):
    return T.tensor(np.arange(m)[None, :] >= m - np.arange(batch)[:, None])


def float_mask(T, *shape):
    return T.tensor(numbers(*shape, seed=5))


X, Y = numbers(5, 2, 8, seed=1), numbers(7, 2, 8, seed=2)
MULTIHEAD = {
    "self": (lambda N: N.MultiheadAttention(8, 2), lambda T: ((X,) * 3, {})),
    "no weights": (lambda N: N.MultiheadAttention(8, 2), lambda T: ((X,) * 3, {"need_weights": False})),
    "cross": (lambda N: N.MultiheadAttention(8, 2), lambda T: ((X, Y, Y), {"average_attn_weights": False})),
    "batch first": (lambda N: N.MultiheadAttention(8, 4, batch_first=True), lambda T: ((X, X, X), {})),
    "no bias": (lambda N: N.MultiheadAttention(8, 4, bias=False), lambda T: ((X, Y, Y), {})),
    "own sizes": (
        lambda N: N.MultiheadAttention(8, 2, kdim=3, vdim=5),
        lambda T: ((X, numbers(7, 2, 3, seed=3), numbers(7, 2, 5, seed=4)), {}),
    ),
    "extra keys": (
        lambda N: N.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True),
        lambda T: ((X, Y, Y), {"attn_mask": causal(T, 5, 7), "key_padding_mask": padding(T, 2, 7)}),
    ),
    "unbatched": (
        lambda N: N.MultiheadAttention(8, 2),
        lambda T: ((X[:, 0], Y[:, 0], Y[:, 0]), {"key_padding_mask": padding(T, 2, 7)[1]}),
    ),
    "causal": (lambda N: N.MultiheadAttention(8, 2), lambda T: ((X,) * 3, {"attn_mask": causal(T, 5, 5), "is_causal": True})),
    "causal and padding": (
        lambda N: N.MultiheadAttention(8, 2),
        lambda T: ((X,) * 3, {"attn_mask": causal(T, 5, 5), "key_padding_mask": padding(T, 2, 5), "need_weights": False}),
    ),
    "float masks": (
        lambda N: N.MultiheadAttention(8, 2),
        lambda T: ((X, Y, Y), {"attn_mask": float_mask(T, 5, 7), "key_padding_mask": float_mask(T, 2, 7)}),
    ),
    "mask per head": (lambda N: N.MultiheadAttention(8, 2), lambda T: ((X, Y, Y), {"attn_mask": float_mask(T, 4, 5, 7)})),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention(name):
    make, inputs = MULTIHEAD[name]

    def program(T):
        module = set_numbers(make(T.nn))
        arrays, options = inputs(T)
        if len({id(a) for a in arrays}) == 1:  # one tensor three times, as self-attention is written
            x = T.tensor(arrays[0], requires_grad=True)
            out = [o for o in module(x, x, x, **options) if o is not None]
            sum((o * T.tensor(numbers(*o.shape, seed=8))).sum() for o in out).backward()
            return out, x.grad, [p.grad for p in module.parameters()]
        return with_gradients(T, module, arrays, **options)

    agree(program, torch, 1e-4, 1e-5)


def test_mixed_masks():
    """A bool mask of one kind beside a float one of the other, which PyTorch refuses for speed and documents as a sum."""
    module = set_numbers(nn.MultiheadAttention(8, 2))
    x, mask = duo.tensor(X), duo.tensor(numbers(5, 5, seed=5))
    hidden = padding(duo, 2, 5)
    as_float = duo.zeros(2, 5).masked_fill(hidden, float("-inf"))
    got = module(x, x, x, key_padding_mask=hidden, attn_mask=mask)
    want = module(x, x, x, key_padding_mask=as_float, attn_mask=mask)
    for a, b in zip(got, want):
        assert np.array_equal(a.detach().numpy(), b.detach().numpy())
    no_mask = module(x, x, x, is_causal=True, need_weights=False, key_padding_mask=hidden)[0]
    both = module(x, x, x, attn_mask=causal(duo, 5, 5), need_weights=False, key_padding_mask=hidden)[0]
    assert np.array_equal(no_mask.detach().numpy(), both.detach().numpy())


ENCODER = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0}
LAYERS = {
    "encoder": (lambda N: N.TransformerEncoderLayer(**ENCODER), (X,), {}),
    "encoder norm first": (lambda N: N.TransformerEncoderLayer(**ENCODER, norm_first=True, activation="gelu"), (X,), {}),
    "encoder batch first": (lambda N: N.TransformerEncoderLayer(**ENCODER, batch_first=True, bias=False), (X,), {}),
    "encoder causal": (
        lambda N: N.TransformerEncoderLayer(**ENCODER), (X,), {"src_mask": lambda T: causal(T, 5, 5), "is_causal": True}
    ),
    "encoder stack": (
        lambda N: N.TransformerEncoder(N.TransformerEncoderLayer(**ENCODER), 2, N.LayerNorm(8), enable_nested_tensor=False),
        (X,), {"src_key_padding_mask": lambda T: padding(T, 2, 5)},
    ),
    "decoder": (lambda N: N.TransformerDecoderLayer(**ENCODER), (X, Y), {"tgt_mask": lambda T: causal(T, 5, 5)}),
    "decoder stack": (
        lambda N: N.TransformerDecoder(N.TransformerDecoderLayer(**ENCODER, norm_first=True), 2),
        (X, Y), {"memory_key_padding_mask": lambda T: padding(T, 2, 7)},
    ),
    "transformer": (
        lambda N: N.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True), (np.swapaxes(Y, 0, 1), np.swapaxes(X, 0, 1)),
        {"tgt_mask": lambda T: T.nn.Transformer.generate_square_subsequent_mask(5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_transformer(name):
    make, inputs, options = LAYERS[name]

    def program(T):
        module = set_numbers(make(T.nn))
        given = {k: v(T) if callable(v) else v for k, v in options.items()}
        return with_gradients(T, module, inputs, **given)

    agree(program, torch, 1e-4, 1e-5)


@pytest.mark.parametrize("make", [
    lambda N: N.MultiheadAttention(8, 2, add_bias_kv=True), lambda N: N.MultiheadAttention(8, 2, kdim=3, bias=False),
    lambda N: N.TransformerEncoderLayer(8, 2), lambda N: N.TransformerDecoder(N.TransformerDecoderLayer(8, 2), 2),
    lambda N: N.Transformer(8, 2, 1, 1),
])  # fmt: skip
def test_names(make):
    """State dicts have PyTorch's names, shapes and order, so that checkpoints pass between the two."""
    ours, theirs = (make(T.nn).state_dict() for T in (duo, torch))
    assert [(k, tuple(v.shape)) for k, v in ours.items()] == [(k, tuple(v.shape)) for k, v in theirs.items()]


def test_dropout_and_initialisation():
    duo.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5)
    x = duo.tensor(numbers(5, 2, 16))
    assert not np.array_equal(layer(x).detach().numpy(), layer(x).detach().numpy())
    layer.eval()
    assert np.array_equal(layer(x).detach().numpy(), layer(x).detach().numpy())
    attention = nn.MultiheadAttention(64, 4, dropout=0.25)
    bound = (6 / (64 + 192)) ** 0.5
    weight = attention.in_proj_weight.detach().numpy()
    assert np.abs(weight).max() <= bound and weight.std() > bound / 2
    assert not attention.in_proj_bias.detach().numpy().any()
    y = duo.tensor(numbers(5, 2, 64))
    dropped = attention(y, y, y, average_attn_weights=False)[1].detach().numpy()
    kept = dropped != 0
    assert 0.5 < kept.mean() < 0.95
    whole = attention.eval()(y, y, y, average_attn_weights=False)[1].detach().numpy()
    np.testing.assert_allclose(dropped[kept], (whole / 0.75)[kept], rtol=1e-6)


def test_graph_mode():
    layer = set_numbers(nn.TransformerEncoderLayer(**ENCODER))
    want = layer(duo.tensor(X)).detach().numpy()
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, 2, 8])
        y = layer(x)
        session.run(tf.global_variables_initializer())
        assert np.array_equal(session.run(y, {x: X}), want)


OTHERS = {  # name: (constructor's arguments, which of three different inputs query, key and value are)
    "cross": ({}, (0, 1, 1)),
    "three": ({}, (0, 1, 2)),
    "widths": ({"kdim": 6, "vdim": 6}, (0, 3, 4)),
    "extra": ({"add_bias_kv": True, "add_zero_attn": True}, (0, 0, 0)),
    "no bias": ({"bias": False, "add_bias_kv": True}, (0, 1, 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_graph_mode_with_parts_of_parameters(name):
    """What is taken out of a packed parameter belongs to the graph, its gradient too; no size is known, none is equal without need."""
    kwargs, which = OTHERS[name]
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(s).astype("f4") for s in ((3, 5, 8), (3, 7, 8), (3, 7, 8), (3, 7, 6), (3, 7, 6))]
    module = set_numbers(nn.MultiheadAttention(8, 2, batch_first=True, **kwargs))
    tensors = [duo.tensor(x) for x in given]
    want = module(*[tensors[i] for i in which])[0]
    (want * want).sum().backward()
    with tf.Graph().as_default(), tf.Session() as session:
        fed = [tf.placeholder(tf.float32, [None, None, x.shape[-1]]) for x in given]
        out = module(*[fed[i] for i in which])[0]
        gradients = tf.gradients(tf.reduce_sum(out * out), list(module.parameters()))
        session.run(tf.global_variables_initializer())
        found = session.run([out, *gradients], dict(zip(fed, given)))
    for a, b in zip(found, [want.detach(), *[p.grad for p in module.parameters()]], strict=True):
        assert np.array_equal(a, b.numpy())


def test_nothing_to_see():
    """A query whose keys are all masked gets the output projection's bias."""
    module = set_numbers(nn.MultiheadAttention(8, 2))
    x = duo.tensor(X)
    mask = duo.tensor(np.arange(5)[:, None] == np.full((1, 5), 2))
    for need in (False, True):
        out, weights = module(x, x, x, attn_mask=mask, need_weights=need)
        assert np.array_equal(out[2, 0].detach().numpy(), module.out_proj.bias.detach().numpy())
        assert weights is None or not weights[:, 2].detach().numpy().any()


def test_function_of_one_projection():
    """As GPT writes it: q, k and v are parts of one array, the heads come back together; long enough for several blocks of keys."""

    def program(T):
        x = T.tensor(numbers(2, 130, 24, seed=1), requires_grad=True)
        q, k, v = (t.reshape(2, 130, 2, 4).transpose(1, 2) for t in x.split(8, 2))
        y = T.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(2, 130, 8)
        (y * T.tensor(numbers(2, 130, 8, seed=2))).sum().backward()
        return y, x.grad

    agree(program, torch, 1e-4, 1e-5)


def test_a_mask_that_learns():
    """A float mask gets its gradient, summed over what it was broadcast to."""

    def program(T):
        q, k, v, m = (
            T.tensor(numbers(*s, seed=n), requires_grad=True)
            for n, s in enumerate(((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (5, 7)))
        )
        y = T.nn.functional.scaled_dot_product_attention(q, k, v, m)
        (y * T.tensor(numbers(2, 3, 5, 6, seed=9))).sum().backward()
        return y, [t.grad for t in (q, k, v, m)]

    agree(program, torch, 1e-4, 1e-5)


@pytest.mark.parametrize("mask", [None, (5, 7), (1, 5, 7), (6, 5, 7), (2, 1, 5, 7), (2, 6, 5, 7)], ids=str)
def test_heads_that_share_keys(mask):
    def program(T):
        q, k, v = (
            T.tensor(numbers(*s, seed=n), requires_grad=True)
            for n, s in enumerate(((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)))
        )
        m = None if mask is None else T.tensor(numbers(*mask, seed=5))
        y = T.nn.functional.scaled_dot_product_attention(q, k, v, m, is_causal=m is None, enable_gqa=True)
        (y * T.tensor(numbers(2, 6, 5, 3, seed=9))).sum().backward()
        return y, [t.grad for t in (q, k, v)]

    agree(program, torch, 1e-4, 1e-5)


def test_second_derivatives():
    def program(T):
        x = T.tensor(numbers(1, 2, 5, 4), requires_grad=True)
        if T is torch:  # PyTorch's fused kernels have no second derivative
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                y = T.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        else:
            y = T.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        (first,) = T.autograd.grad((y * y).sum(), x, create_graph=True)
        (second,) = T.autograd.grad((first * first).sum(), x)
        return y, first, second

    agree(program, torch, 1e-3, 1e-3)


def test_mistakes():
    with pytest.raises(ArgumentError, match="does not split into 3 heads"):
        nn.MultiheadAttention(8, 3)
    module, x = nn.MultiheadAttention(8, 2), duo.tensor(X)
    with pytest.raises(ShapeError, match=r"attn_mask has shape .* takes \(5, 5\)"):
        module(x, x, x, attn_mask=duo.ones(4, 5))
    with pytest.raises(ShapeError, match=r"key_padding_mask has shape .* takes \(2, 5\)"):
        module(x, x, x, key_padding_mask=duo.ones(5, 2))
    with pytest.raises(ShapeError, match="3 dims each, or 2"):
        module(x, x[0], x)
    with pytest.raises(ArgumentError, match="'relu', 'gelu' or a function"):
        nn.TransformerEncoderLayer(8, 2, activation="swish")
