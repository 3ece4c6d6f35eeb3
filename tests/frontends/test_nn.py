"""nn.Module and its layers, losses and initialisers, against PyTorch."""

import copy
from collections import OrderedDict

import numpy as np
import pytest

import duo
from duo import nn
from duo_ir.errors import ArgumentError, DuoError, IndexOutOfRange, ShapeError
from tests.frontends.eager_modes import agree, flat, in_every_mode, numbers

torch = pytest.importorskip("torch")


def set_numbers(module):
    """Gives the parameters and buffers of a module of either library the same numbers."""
    for k, (_, p) in enumerate(module.named_parameters()):
        p.data.copy_((torch if isinstance(p, torch.Tensor) else duo).tensor(numbers(*p.shape, seed=k)))
    return module


F, INT = np.float32, np.int64
LAYERS = {
    "linear": (lambda N: N.Linear(5, 3), (4, 5)),
    "linear_nd": (lambda N: N.Linear(5, 3), (2, 4, 5)),
    "linear_1d": (lambda N: N.Linear(5, 3), (5,)),
    "linear_no_bias": (lambda N: N.Linear(5, 3, bias=False), (4, 5)),
    "layer_norm": (lambda N: N.LayerNorm(6), (4, 6)),
    "layer_norm_2": (lambda N: N.LayerNorm((3, 6)), (4, 3, 6)),
    "layer_norm_plain": (lambda N: N.LayerNorm(6, elementwise_affine=False, eps=1e-3), (4, 6)),
    "layer_norm_no_bias": (lambda N: N.LayerNorm(6, bias=False), (4, 6)),
    "rms_norm": (lambda N: N.RMSNorm(6), (4, 6)),
    "dropout_0": (lambda N: N.Dropout(0.0), (4, 6)),
    "dropout_1": (lambda N: N.Dropout(1.0), (4, 6)),
    "dropout_eval": (lambda N: N.Dropout(0.5).eval(), (4, 6)),
    "flatten": (lambda N: N.Flatten(), (2, 3, 4)),
    "flatten_part": (lambda N: N.Flatten(0, 1), (2, 3, 4)),
    "unflatten": (lambda N: N.Unflatten(1, (2, 3)), (4, 6)),
    "identity": (lambda N: N.Identity(3, a=4), (4, 6)),
    "relu": (lambda N: N.ReLU(), (4, 6)),
    "relu6": (lambda N: N.ReLU6(), (4, 6)),
    "leaky_relu": (lambda N: N.LeakyReLU(0.2), (4, 6)),
    "elu": (lambda N: N.ELU(0.7), (4, 6)),
    "gelu": (lambda N: N.GELU(), (4, 6)),
    "gelu_tanh": (lambda N: N.GELU("tanh"), (4, 6)),
    "silu": (lambda N: N.SiLU(), (4, 6)),
    "mish": (lambda N: N.Mish(), (4, 6)),
    "hardtanh": (lambda N: N.Hardtanh(-0.4, 0.7), (4, 6)),
    "prelu": (lambda N: N.PReLU(), (4, 6)),
    "prelu_channels": (lambda N: N.PReLU(3, 0.1), (2, 3, 4)),
    "tanh": (lambda N: N.Tanh(), (4, 6)),
    "sigmoid": (lambda N: N.Sigmoid(), (4, 6)),
    "softplus": (lambda N: N.Softplus(2.0), (4, 6)),
    "softmax": (lambda N: N.Softmax(dim=-1), (4, 6)),
    "softmax_0": (lambda N: N.Softmax(dim=0), (4, 6)),
    "log_softmax": (lambda N: N.LogSoftmax(dim=1), (4, 6)),
    "sequential": (lambda N: N.Sequential(N.Linear(6, 8), N.GELU(), N.LayerNorm(8), N.Linear(8, 2)), (4, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, shape = LAYERS[name]

    def program(T):
        module = set_numbers(make(T.nn))
        x = T.tensor(numbers(*shape, seed=9), requires_grad=True)
        y = module(x)
        (y * T.tensor(numbers(*y.shape, seed=8))).sum().backward()
        return y, x.grad, [p.grad for p in module.parameters()]

    agree(program, torch, 1e-4, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias):
    def program(T):
        module = set_numbers(T.nn.Bilinear(4, 5, 3, bias=bias))
        a, b = (T.tensor(numbers(2, 6, n, seed=n), requires_grad=True) for n in (4, 5))
        y = module(a, b)
        (y * T.tensor(numbers(2, 6, 3, seed=8))).sum().backward()
        return y, a.grad, b.grad, [p.grad for p in module.parameters()]

    agree(program, torch, 1e-4, 1e-5)
    a, b = numbers(2, 4), numbers(2, 5, seed=1)
    module = nn.Bilinear(4, 5, 3, bias=bias)
    got = module(duo.tensor(a), duo.tensor(b)).detach().numpy()
    want = np.einsum("ni,oij,nj->no", a, module.weight.detach().numpy(), b)
    assert np.allclose(got, want + (module.bias.detach().numpy() if bias else 0), rtol=1e-5, atol=1e-6)


def test_new_layers_start_as_pytorchs():
    assert nn.PReLU(3, 0.1).weight.tolist() == duo.full((3,), 0.1).tolist()
    module = nn.Bilinear(16, 5, 3)
    for p in module.parameters():
        assert 0 < p.detach().abs().max().item() <= 0.25  # 1/sqrt(16)
    assert repr(module) == repr(torch.nn.Bilinear(16, 5, 3))
    assert repr(nn.Hardtanh()) == repr(torch.nn.Hardtanh()) and repr(nn.PReLU(2)) == repr(torch.nn.PReLU(2))


def test_embedding():
    def program(T):
        out = []
        for padding in (None, 2, -1):
            e = T.nn.Embedding(7, 3, padding_idx=padding)
            out.append((e.weight[padding] if padding is not None else e.weight[:0]).sum())
            set_numbers(e)
            index = T.tensor([[0, 2, 6], [2, 2, 1]])
            y = e(index)
            (y * T.tensor(numbers(2, 3, 3))).sum().backward()
            out += [y, e.weight.grad]
        return out

    agree(program, torch)


def test_embedding_out_of_range():
    e = nn.Embedding(4, 2)
    with pytest.raises(IndexOutOfRange):
        e(duo.tensor([0, 4])).sum().item()


X, TARGET = numbers(6, 4), numbers(6, 4, seed=1)
CLASSES = numbers(6, seed=2, dtype=INT, low=0, high=4)
P = numbers(6, 4, seed=3, low=0.05, high=0.95)
LOSSES = {
    "mse": (lambda T, **k: T.nn.MSELoss(**k), X, TARGET),
    "l1": (lambda T, **k: T.nn.L1Loss(**k), X, TARGET),
    "smooth_l1": (lambda T, **k: T.nn.SmoothL1Loss(beta=0.5, **k), X, TARGET),
    "huber": (lambda T, **k: T.nn.HuberLoss(delta=0.5, **k), X, TARGET),
    "kl_div": (lambda T, **k: T.nn.KLDivLoss(**k), np.log(P), P[::-1].copy()),
    "kl_div_log": (lambda T, **k: T.nn.KLDivLoss(log_target=True, **k), np.log(P), np.log(P[::-1])),
    "cross_entropy": (lambda T, **k: T.nn.CrossEntropyLoss(**k), X, CLASSES),
    "cross_entropy_weight": (lambda T, **k: T.nn.CrossEntropyLoss(weight=T.tensor(P[0]), **k), X, CLASSES),
    "cross_entropy_ignore": (lambda T, **k: T.nn.CrossEntropyLoss(ignore_index=1, **k), X, CLASSES),
    "cross_entropy_smooth": (lambda T, **k: T.nn.CrossEntropyLoss(label_smoothing=0.1, **k), X, CLASSES),
    "cross_entropy_soft": (lambda T, **k: T.nn.CrossEntropyLoss(**k), X, P),
    "cross_entropy_nd": (
        lambda T, **k: T.nn.CrossEntropyLoss(**k), numbers(2, 4, 3), numbers(2, 3, dtype=INT, low=0, high=4),
    ),
    "nll": (lambda T, **k: T.nn.NLLLoss(**k), X, CLASSES),
    "bce": (lambda T, **k: T.nn.BCELoss(**k), P, (TARGET > 0).astype(F)),
    "bce_logits": (lambda T, **k: T.nn.BCEWithLogitsLoss(**k), X, (TARGET > 0).astype(F)),
    "bce_logits_weight": (
        lambda T, **k: T.nn.BCEWithLogitsLoss(weight=T.tensor(P), pos_weight=T.tensor(P[0]), **k), X, P,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, reduction):
    make, x, target = LOSSES[name]

    def program(T):
        t = T.tensor(x, requires_grad=True)
        loss = make(T, reduction=reduction)(t, T.tensor(target))
        loss.sum().backward()
        return loss, t.grad

    agree(program, torch, 1e-4, 1e-5)


def test_kl_div_is_a_divergence():
    p, q = (x / x.sum(1, keepdims=True) for x in (P, P[::-1]))
    loss = nn.KLDivLoss("batchmean")(duo.tensor(np.log(q)), duo.tensor(p)).item()
    assert np.isclose(loss, (p * np.log(p / q)).sum(1).mean(), rtol=1e-5)
    with pytest.raises(ArgumentError, match="'batchmean'"):
        nn.KLDivLoss("average")


def test_bad_arguments():
    for bad in (
        lambda: nn.Hardtanh(1.0, 1.0), lambda: nn.HuberLoss(delta=0.0), lambda: nn.Bilinear(0, 2, 3), lambda: nn.MSELoss("avg"), lambda: nn.Dropout(1.5), lambda: nn.Embedding(3, 2, padding_idx=5)):
        with pytest.raises(ArgumentError):
            bad()


# ------------------------------------------------------------------------------------------------------------ Module
def net(N):
    class Block(N.Module):
        def __init__(self):
            super().__init__()
            self.inner = N.Linear(3, 3)
            self.scale = N.Parameter((torch if N is torch.nn else duo).ones(3))
            self.register_buffer("seen", (torch if N is torch.nn else duo).zeros(2))
            self.register_buffer("cache", (torch if N is torch.nn else duo).zeros(1), persistent=False)
            self.register_parameter("none", None)
            self.plain = 7

        def forward(self, x):
            return self.inner(x) * self.scale

    class Net(N.Module):
        def __init__(self):
            super().__init__()
            self.blocks = N.ModuleList([Block(), Block()])
            self.heads = N.ModuleDict({"a": N.Linear(3, 2), "b": N.Sequential(N.ReLU(), N.Linear(3, 1))})
            self.tied = self.heads["a"]

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.heads["a"](x), self.heads["b"](x)

    return Net()


def test_names_as_in_torch():
    ours, theirs = net(nn), net(torch.nn)
    for method in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        assert [n for n, _ in getattr(ours, method)()] == [n for n, _ in getattr(theirs, method)()], method
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert [tuple(v.shape) for v in ours.state_dict().values()] == [
        tuple(v.shape) for v in theirs.state_dict().values()
    ]
    assert str(ours) == str(theirs)
    assert ours.get_submodule("blocks.1.inner") is ours.blocks[1].inner
    assert ours.get_parameter("blocks.0.scale") is ours.blocks[0].scale


@pytest.mark.parametrize("name", LAYERS)
def test_repr_as_in_torch(name):
    make, _ = LAYERS[name]
    assert str(make(nn)) == str(make(torch.nn))


def test_state_dict_between_libraries():
    ours, theirs = set_numbers(net(nn)), net(torch.nn)
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in ours.state_dict().items()})
    x = numbers(5, 3)
    for a, b in zip(ours(duo.tensor(x)), theirs(torch.tensor(x))):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-5, atol=1e-5)
    again = net(nn)
    result = again.load_state_dict(ours.state_dict())
    assert result.missing_keys == [] and all(
        (a == b).all() for a, b in zip(again.state_dict().values(), ours.state_dict().values())
    )


def test_load_state_dict_is_strict():
    model = nn.Linear(3, 2)
    good = model.state_dict()
    with pytest.raises(ArgumentError, match=r"missing \['bias'\]"):
        model.load_state_dict({"weight": good["weight"]})
    with pytest.raises(ArgumentError, match=r"unexpected \['extra'\]"):
        model.load_state_dict({**good, "extra": good["bias"]})
    with pytest.raises(ShapeError, match="weight"):
        model.load_state_dict({**good, "weight": duo.zeros(2, 2)})
    result = model.load_state_dict({"weight": duo.ones(2, 3), "extra": good["bias"]}, strict=False)
    assert result.missing_keys == ["bias"] and result.unexpected_keys == ["extra"] and model.weight.sum().item() == 6


def test_state_dict_shares_storage():
    model = nn.Linear(3, 2)
    state = model.state_dict()
    with duo.no_grad():
        model.weight.fill_(4)
    assert (state["weight"] == 4).all() and not state["weight"].requires_grad
    state["weight"][0, 0] = 9
    assert model.weight[0, 0].item() == 9


def test_attributes():
    model = net(nn)
    assert model.blocks[0].plain == 7 and model.blocks[0].none is None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing
    with pytest.raises(ArgumentError, match="Parameter"):
        model.blocks[0].scale = duo.ones(3)
    model.blocks[0].scale = nn.Parameter(duo.full((3,), 2.0))
    assert model.blocks[0].scale[0].item() == 2
    model.blocks[0].seen = duo.ones(2)
    assert dict(model.named_buffers())["blocks.0.seen"].sum().item() == 2
    del model.blocks[0].scale
    assert "blocks.0.scale" not in dict(model.named_parameters())
    with pytest.raises(DuoError, match="super"):
        type("Bad", (nn.Module,), {"__init__": lambda self: setattr(self, "x", nn.Linear(1, 1))})()
    with pytest.raises(DuoError, match="forward"):
        nn.Module()(1)


def test_train_and_eval():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5)))
    assert all(m.training for m in model.modules())
    assert model.eval() is model and not any(m.training for m in model.modules())
    x = duo.ones(2, 3)
    assert (model(x) == model(x)).all()
    assert model.train()[1][0].training


def test_hooks():
    def program(T):
        model, log = set_numbers(T.nn.Linear(3, 2)), []
        model.register_forward_pre_hook(lambda m, args: log.append(len(args)))
        double = model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        model.register_forward_hook(lambda m, args, out: log.append(tuple(out.shape)))
        plus = model.register_forward_hook(lambda m, args, out: out + 100)
        x = T.tensor(numbers(4, 3))
        first = model(x)
        double.remove()
        plus.remove()
        return first, model(x), [v for t in log for v in (t if isinstance(t, tuple) else (t,))]

    agree(program, torch)


def test_apply_and_zero_grad():
    model, names = net(nn), []
    model.apply(lambda m: names.append(type(m).__name__))
    theirs = []
    net(torch.nn).apply(lambda m: theirs.append(type(m).__name__))
    assert names == theirs
    sum(y.sum() for y in model(duo.ones(2, 3))).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_to_dtype():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    weight = model[0].weight
    before = weight.detach().numpy().copy()
    for method, kind in (
        ("double", duo.float64),
        ("bfloat16", duo.bfloat16),
        ("half", duo.float16),
        ("float", duo.float32),
    ):
        assert getattr(model, method)() is model
        assert model[0].weight is weight and all(p.dtype is kind for p in model.parameters())
        y = model(duo.ones(4, 3, dtype=kind))
        y.sum().backward()
        assert y.dtype is kind and weight.grad.dtype is kind
        model.zero_grad()
    np.testing.assert_allclose(weight.detach().numpy(), before, rtol=1e-2)
    model.to("cpu").to(device="cpu", dtype=duo.float64)
    assert weight.dtype is duo.float64
    with pytest.raises(DuoError, match="cuda"):
        model.to("cuda:63")


def test_freezing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    model(duo.ones(2, 3)).sum().backward()
    assert model[0].weight.grad is None and model[1].weight.grad is not None
    model[0].requires_grad_(True)
    model(duo.ones(2, 3)).sum().backward()
    assert model[0].weight.grad is not None


def test_deepcopy():
    model = set_numbers(net(nn))
    copied = copy.deepcopy(model)
    with duo.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert copied.heads["a"] is copied.tied
    assert all((p == 0).all() for p in copied.parameters()) and not any((p == 0).all() for p in model.parameters())
    sum(y.sum() for y in copied(duo.ones(2, 3))).backward()
    assert all(p.grad is None for p in model.parameters())


def test_containers():
    s = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.ReLU()))
    assert list(dict(s.named_children())) == ["a", "b"] and s[-1] is s.b and len(s[:1]) == 1
    s.append(nn.Tanh())
    s[0] = nn.Identity()
    assert [type(m).__name__ for m in s] == ["Identity", "ReLU", "Tanh"]
    m = nn.ModuleList([nn.Linear(1, 1)])
    m.insert(0, nn.ReLU())
    m += [nn.Tanh()]
    assert [type(x).__name__ for x in m] == ["ReLU", "Linear", "Tanh"] and list(m.state_dict()) == [
        "1.weight",
        "1.bias",
    ]
    d = nn.ModuleDict({"x": nn.ReLU()})
    d["y"] = nn.Linear(1, 1)
    assert "y" in d and list(d.keys()) == ["x", "y"] and len(list(d.values())) == 2
    p = nn.ParameterList([nn.Parameter(duo.ones(2)), nn.Parameter(duo.zeros(1))])
    assert [n for n, _ in p.named_parameters()] == ["0", "1"] and p[0].sum().item() == 2


def test_tied_parameters_train():
    def program(T):
        class Tied(T.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = T.nn.Embedding(5, 3)
                self.out = T.nn.Linear(3, 5, bias=False)
                self.out.weight = self.embed.weight

            def forward(self, x):
                return self.out(self.embed(x).tanh())

        model = set_numbers(Tied())
        opt = T.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            loss = T.nn.functional.cross_entropy(model(T.tensor([0, 3, 4])), T.tensor([3, 4, 0]))
            loss.backward()
            opt.step()
        return (
            loss,
            model.embed.weight,
            model.out.weight,
            len(list(model.parameters())),
            model.out.weight is model.embed.weight,
        )

    agree(program, torch)


# ------------------------------------------------------------------------------------------------- chance and starts
def test_dropout_statistics_and_seed():
    def program(_):
        duo.manual_seed(3)
        drop = nn.Dropout(0.3)
        x = duo.ones(100, 100, requires_grad=True)
        y = drop(x)
        y.sum().backward()
        z = drop(x)
        return y, x.grad, z

    y, g, z = in_every_mode(program)
    kept = y != 0
    assert abs(kept.mean() - 0.7) < 0.02 and np.allclose(y[kept], 1 / 0.7) and (g == y).all() and (z != y).any()
    assert abs((kept & (z != 0)).mean() - 0.49) < 0.03


MADE = {
    "uniform_": (lambda init, t: init.uniform_(t, -2, 3), 0.5, 5 / 12**0.5, -2, 3),
    "normal_": (lambda init, t: init.normal_(t, 1, 2), 1, 2, -9, 11),
    "trunc_normal_": (lambda init, t: init.trunc_normal_(t, 0, 1, -1, 1), 0, 0.5398, -1, 1),
    "constant_": (lambda init, t: init.constant_(t, 0.3), 0.3, 0, 0.29, 0.31),
    "ones_": (lambda init, t: init.ones_(t), 1, 0, 1, 1),
    "zeros_": (lambda init, t: init.zeros_(t), 0, 0, 0, 0),
    "xavier_uniform_": (lambda init, t: init.xavier_uniform_(t, 2.0), 0, 2 * (2 / 500) ** 0.5, -0.22, 0.22),
    "xavier_normal_": (lambda init, t: init.xavier_normal_(t), 0, (2 / 500) ** 0.5, -1, 1),
    "kaiming_uniform_": (
        lambda init, t: init.kaiming_uniform_(t, nonlinearity="relu"),
        0,
        (2 / 200) ** 0.5,
        -0.174,
        0.174,
    ),
    "kaiming_normal_": (lambda init, t: init.kaiming_normal_(t, mode="fan_out"), 0, (2 / 300) ** 0.5, -1, 1),
}


@pytest.mark.parametrize("name", MADE)
def test_initialisers(name):
    make, mean, std, low, high = MADE[name]
    for library in (duo, torch):
        library.manual_seed(0)
        t = library.zeros(300, 200, requires_grad=True)
        assert make(library.nn.init, t) is t and t.requires_grad
        a = t.detach().numpy()
        assert (
            abs(a.mean() - mean) < 0.02
            and abs(a.std() - std) < 0.02 * max(1, std)
            and a.min() >= low - 1e-6
            and a.max() <= high + 1e-6
        )


def test_eye_and_gain():
    assert (nn.init.eye_(duo.zeros(2, 3)).numpy() == np.eye(2, 3)).all()
    for kind in ("linear", "sigmoid", "tanh", "relu", "selu", "leaky_relu"):
        assert nn.init.calculate_gain(kind) == torch.nn.init.calculate_gain(kind)
    with pytest.raises(ArgumentError):
        nn.init.xavier_uniform_(duo.zeros(3))


def test_default_initialisation_has_torchs_bounds():
    duo.manual_seed(0)
    w = nn.Linear(400, 300)
    assert (
        abs(w.weight.detach().numpy()).max() <= 1 / 20 and abs(w.weight.detach().numpy().std() - 1 / 20 / 3**0.5) < 1e-3
    )
    assert abs(nn.Embedding(200, 100).weight.detach().numpy().std() - 1) < 0.02


def test_utils():
    def program(T):
        w, v = (T.tensor(numbers(3, 2, seed=k), requires_grad=True) for k in range(2))
        ((w * 3) ** 2).sum().backward()
        (v**3).sum().backward()
        flat_ = T.nn.utils.parameters_to_vector([w, v])
        norm = T.nn.utils.clip_grad_norm_([w, v], 0.5)
        clipped = [w.grad.clone(), v.grad.clone()]
        inf = T.nn.utils.clip_grad_norm_([w, v], 0.1, norm_type=float("inf"))
        T.nn.utils.clip_grad_value_([w, v], 0.05)
        T.nn.utils.vector_to_parameters(flat_.detach() * 2, [w, v])
        return flat_, norm, clipped, inf, w.grad, v.grad, w, v

    agree(program, torch)


def test_flat_is_what_it_says():
    assert [a.shape for a in flat({"a": [duo.ones(2), None], "b": 1})] == [(2,), (), ()]


@pytest.mark.parametrize("layer", [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU])
def test_inplace_activations_write_into_their_input(layer):
    x = duo.tensor([-1.0, 2.0])
    want = layer()(x).tolist()
    assert x.tolist() == [-1.0, 2.0]
    y = layer(inplace=True)(x)
    assert y is x
    assert x.tolist() == want
