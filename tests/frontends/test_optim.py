"""Optimisers and schedules against torch.optim, and their state."""

import math

import numpy as np
import pytest

import duo
from duo_ir.errors import ArgumentError
from tests.frontends.eager_modes import agree, flat, in_every_mode, numbers, same

torch = pytest.importorskip("torch")

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}),
    "sgd_dampening": ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
    "sgd_nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd_decay": ("SGD", {"lr": 0.1, "weight_decay": 0.2}),
    "sgd_maximize": ("SGD", {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.1}),
    "adam": ("Adam", {"lr": 0.1}),
    "adam_betas": ("Adam", {"lr": 0.05, "betas": (0.5, 0.7), "eps": 1e-3}),
    "adam_decay": ("Adam", {"lr": 0.05, "weight_decay": 0.3}),
    "adam_amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.01}),
    "adam_maximize": ("Adam", {"lr": 0.01, "maximize": True}),
    "adamw": ("AdamW", {"lr": 0.1}),
    "adamw_amsgrad": ("AdamW", {"lr": 0.05, "weight_decay": 0.5, "amsgrad": True}),
    "adamw_maximize": ("AdamW", {"lr": 0.05, "weight_decay": 0.5, "maximize": True}),
    "rmsprop": ("RMSprop", {"lr": 0.01}),
    "rmsprop_centered": ("RMSprop", {"lr": 0.01, "alpha": 0.8, "centered": True, "weight_decay": 0.1}),
    "rmsprop_momentum": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "eps": 1e-4}),
    "adagrad": ("Adagrad", {"lr": 0.1}),
    "adagrad_all": (
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3, "maximize": True},
    ),
    "rmsprop_all": ("RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True, "maximize": True}),
}


def parameters(T, dtype=np.float32):
    return [
        T.tensor(numbers(*shape, seed=k, dtype=dtype), requires_grad=True) for k, shape in enumerate([(3, 4), (4,), ()])
    ]


def loss_of(T, params, step=0):
    w, b, s = params
    x = T.tensor(numbers(5, 3, seed=10 + step % 3, dtype=np.float64)).to(w.dtype)
    return (((x @ w + b).tanh() * s - 0.5) ** 2).mean()


def optimizer(T, name, params, **more):
    cls, options = OPTIMIZERS[name]
    return getattr(T.optim, cls)(params, **{**options, **more})


def train(T, params, opt, steps, start=0, skip=False):
    losses = []
    for k in range(start, start + steps):
        opt.zero_grad()
        loss = loss_of(T, params, k)
        loss.backward()
        if skip and k % 3 == 1:
            params[1].grad = None
        if skip and k < 2:
            params[2].grad = None
        opt.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("skip", [False, True], ids=["every", "some"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps(name, skip):
    def program(T):
        params = parameters(T)
        return train(T, params, optimizer(T, name, params), 10, skip=skip), params

    agree(program, torch, 2e-5, 2e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_in_float64(name):
    def program(T):
        params = parameters(T, np.float64)
        return train(T, params, optimizer(T, name, params), 10), params

    ours, theirs = flat(program(duo)), flat(program(torch))
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_groups():
    def program(T):
        w, b, s = parameters(T)
        opt = T.optim.SGD([{"params": [w], "lr": 0.5}, {"params": b, "momentum": 0.9}], lr=0.1, weight_decay=0.01)
        opt.add_param_group({"params": [s], "weight_decay": 0.0})
        losses = train(T, [w, b, s], opt, 3)
        opt.param_groups[0]["lr"] = 0.01
        opt.param_groups[1]["nesterov"] = True
        return losses, train(T, [w, b, s], opt, 3, 3), w, b, s, [g["lr"] for g in opt.param_groups]

    agree(program, torch)


def test_changing_options_midway():
    def program(T):
        params = parameters(T)
        opt = T.optim.SGD(params, lr=0.1)
        losses = train(T, params, opt, 2)
        opt.param_groups[0].update(momentum=0.9, weight_decay=0.1)
        return losses, train(T, params, opt, 3, 2), params

    agree(program, torch)


def test_closure():
    def program(T):
        params = parameters(T)
        opt = T.optim.SGD(params, lr=0.1)

        def closure():
            opt.zero_grad()
            loss = loss_of(T, params)
            loss.backward()
            return loss

        losses = [opt.step(closure) for _ in range(3)]
        with T.no_grad():
            losses.append(opt.step(closure))
        return losses, params, T.is_grad_enabled()

    agree(program, torch)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(name, tmp_path):
    straight = parameters(duo)
    opt = optimizer(duo, name, straight)
    expected = train(duo, straight, opt, 8, skip=True)

    first = parameters(duo)
    opt = optimizer(duo, name, first)
    losses = train(duo, first, opt, 4, skip=True)
    duo.save({"params": first, "opt": opt.state_dict()}, tmp_path / "c")
    loaded = duo.load(tmp_path / "c")
    second = [p.requires_grad_() for p in loaded["params"]]
    opt = optimizer(duo, name, second, lr=99.0)
    opt.load_state_dict(loaded["opt"])
    losses += train(duo, second, opt, 4, 4, skip=True)
    assert same(losses, expected) and same(second, straight)
    assert same(list(opt.state_dict()["state"].values()), list(optimizer_state(name)))


def optimizer_state(name):
    params = parameters(duo)
    opt = optimizer(duo, name, params)
    train(duo, params, opt, 8, skip=True)
    return opt.state_dict()["state"].values()


@pytest.mark.parametrize("name", ["sgd_momentum", "adam_amsgrad", "adamw", "rmsprop_all"])
def test_state_dict_from_torch(name):
    theirs = parameters(torch)
    their_opt = optimizer(torch, name, theirs)
    train(torch, theirs, their_opt, 4)
    ours = [duo.tensor(p.detach().numpy(), requires_grad=True) for p in theirs]
    opt = optimizer(duo, name, ours)
    state = their_opt.state_dict()
    state["state"] = {
        n: {k: duo.tensor(v.numpy()) if isinstance(v, torch.Tensor) else v for k, v in slots.items()}
        for n, slots in state["state"].items()
    }
    opt.load_state_dict(state)
    assert opt.state_dict()["state"].keys() == state["state"].keys()
    losses = train(duo, ours, opt, 4, 4)
    expected = train(torch, theirs, their_opt, 4, 4)
    for a, b in zip(flat([losses, ours]), flat([expected, theirs])):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_state_dict_form():
    params, theirs = parameters(duo), parameters(torch)
    ours, other = optimizer(duo, "adam", params), optimizer(torch, "adam", theirs)
    train(duo, params, ours, 2)
    train(torch, theirs, other, 2)
    a, b = ours.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and a["state"].keys() == b["state"].keys()
    assert set(a["state"][0]) == set(b["state"][0])
    assert a["param_groups"][0]["params"] == b["param_groups"][0]["params"] and int(a["state"][0]["step"]) == 2
    with pytest.raises(ArgumentError, match="groups"):
        optimizer(duo, "adam", params[:2]).load_state_dict(a)


def test_schedules_do_not_compile_anew():
    params = parameters(duo)
    opt = optimizer(duo, "adam", params)
    schedule = duo.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    def step(k):
        opt.zero_grad()
        loss_of(duo, params).backward()
        opt.step()
        schedule.step()

    for k in range(4):
        step(k)
    before = duo.debug.statistics().compiled
    for k in range(20):
        step(k)
    assert duo.debug.statistics().compiled == before


SCHEDULES = {
    "step": lambda S, o: S.StepLR(o, 3, 0.5),
    "multistep": lambda S, o: S.MultiStepLR(o, [2, 5, 9], 0.3),
    "exponential": lambda S, o: S.ExponentialLR(o, 0.9),
    "cosine": lambda S, o: S.CosineAnnealingLR(o, 7, 0.01),
    "lambda": lambda S, o: S.LambdaLR(o, lambda e: 1 / (1 + e)),
    "multiplicative": lambda S, o: S.MultiplicativeLR(o, lambda e: 1 - 0.01 * e),
    "constant": lambda S, o: S.ConstantLR(o, 0.25, 4),
    "linear": lambda S, o: S.LinearLR(o, 0.1, 0.8, 7),
    "polynomial": lambda S, o: S.PolynomialLR(o, 9, 2.0),
    "restarts": lambda S, o: S.CosineAnnealingWarmRestarts(o, 2, 2, 0.01),
    "one cycle": lambda S, o: S.OneCycleLR(o, [0.5, 0.9], 14, cycle_momentum=False),
    "one cycle, straight": lambda S, o: S.OneCycleLR(
        o, 0.5, epochs=7, steps_per_epoch=2, pct_start=0.5, anneal_strategy="linear", base_momentum=0.7, div_factor=5.0
    ),
    "sequential": lambda S, o: S.SequentialLR(
        o, [S.LinearLR(o, 0.1, total_iters=3), S.CosineAnnealingLR(o, 6), S.ConstantLR(o, 0.5, 1)], [3, 9]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    seen = []
    for T in (duo, torch):
        w, b, s = parameters(T)
        opt = T.optim.SGD([{"params": [w]}, {"params": [b, s], "lr": 0.3}], lr=0.1, momentum=0.9)
        schedule = SCHEDULES[name](T.optim.lr_scheduler, opt)
        rates = [[g[k] for g in opt.param_groups for k in ("lr", "momentum")]]
        for k in range(12):
            opt.step()
            schedule.step()
            rates.append([g[k] for g in opt.param_groups for k in ("lr", "momentum")])
            if k == 5:
                state, rate = schedule.state_dict(), [g["lr"] for g in opt.param_groups]
                assert state["last_epoch"] == 6
                schedule = SCHEDULES[name](T.optim.lr_scheduler, opt)
                schedule.load_state_dict(state)
                for g, lr in zip(opt.param_groups, rate):  # as the optimiser's own checkpoint does
                    g["lr"] = lr
        seen.append(rates)
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-9)


@pytest.mark.parametrize("kwargs", [{}, {"mode": "max", "threshold_mode": "abs", "threshold": 0.1, "cooldown": 2, "min_lr": [0.02, 0.1]}])
def test_a_plateau(kwargs):
    rng, seen = np.random.default_rng(0), []
    metrics = rng.standard_normal(40).round(2).tolist()
    for T in (duo, torch):
        w, b, s = parameters(T)
        opt = T.optim.Adam([{"params": [w]}, {"params": [b, s], "lr": 0.3}], lr=0.1)
        schedule = T.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=3, factor=0.5, **kwargs)
        rates = []
        for k, metric in enumerate(metrics):
            schedule.step(T.tensor(metric) if k % 2 else metric)
            rates.append([g["lr"] for g in opt.param_groups])
            if k == 20:
                state = schedule.state_dict()
                schedule = T.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=3, factor=0.5, **kwargs)
                schedule.load_state_dict(state)
        seen.append(rates)
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-9)
    assert seen[0][-1][0] < 0.1


def test_mistakes_of_schedules():
    (w, *_), S = parameters(duo), duo.optim.lr_scheduler
    opt = duo.optim.Adagrad([w], lr=0.1)
    for bad, text in (
        (lambda: S.OneCycleLR(opt, 0.1), "total_steps, or epochs and steps_per_epoch"),
        (lambda: S.OneCycleLR(opt, 0.1, 5), "Adagrad has no momentum or betas; give cycle_momentum=False"),
        (lambda: S.OneCycleLR(opt, [0.1, 0.2], 5, cycle_momentum=False), "2 values of max_lr for 1 groups"),
        (lambda: S.SequentialLR(opt, [S.LinearLR(opt)], [3]), "1 schedules of one optimizer need 0 milestones, not 1"),
        (lambda: S.ReduceLROnPlateau(opt, "least"), "mode 'least' must be 'min' or 'max'"),
        (lambda: S.CosineAnnealingWarmRestarts(opt, 0), "T_0 0 and T_mult 1 must be 1 or more"),
    ):
        with pytest.raises(ArgumentError, match=text):
            bad()
    schedule = S.OneCycleLR(opt, 0.1, 3, cycle_momentum=False)
    with pytest.raises(ArgumentError, match="step 4 of 3"):
        for _ in range(4):
            schedule.step()


def test_zero_grad():
    params = parameters(duo)
    opt = optimizer(duo, "sgd", params)
    loss_of(duo, params).backward()
    grad = params[0].grad
    opt.zero_grad(set_to_none=False)
    assert params[0].grad is grad and (grad == 0).all()
    opt.zero_grad()
    assert params[0].grad is None
    opt.step()


def test_wrong_arguments():
    params = parameters(duo)
    for bad in (
        lambda: duo.optim.SGD([], lr=0.1),
        lambda: duo.optim.SGD(params, lr=-1.0),
        lambda: duo.optim.SGD(params, lr=0.1, nesterov=True),
        lambda: duo.optim.Adam(params, betas=(1.0, 0.9)),
        lambda: duo.optim.SGD([params[0] * 2], lr=0.1),
        lambda: duo.optim.SGD(["w"], lr=0.1),
        lambda: duo.optim.SGD([{"params": params}, {"params": params[:1]}], lr=0.1),
    ):
        with pytest.raises(ArgumentError):
            bad()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["sgd_momentum", "adamw"])
def test_narrow_floats(name, dtype):
    def program(T):
        params = [T.tensor(numbers(6, seed=k), dtype=getattr(T, dtype), requires_grad=True) for k in range(2)]
        opt = optimizer(T, name, params, **({"eps": 1e-4} if name == "adamw" else {}))
        for _ in range(5):
            opt.zero_grad()
            (params[0] * params[1] + params[0] ** 2).sum().backward()
            opt.step()
        return params

    agree(program, torch, 4e-2, 2e-2)


def test_the_rate_is_read_at_each_call():
    w = duo.zeros(1, requires_grad=True)
    opt = duo.optim.SGD([w], lr=1.0)
    for k in range(5):
        opt.param_groups[0]["lr"] = float(math.factorial(k))
        w.sum().backward()
        opt.step()
        opt.zero_grad()
    assert w.item() == -(1 + 1 + 2 + 6 + 24)


def test_equal_bits_in_every_mode_with_accumulation():
    def program(_):
        params = parameters(duo)
        opt = optimizer(duo, "adam", params)
        for k in range(9):
            loss_of(duo, params, k).backward()
            if k % 3 == 2:
                opt.step()
                opt.zero_grad(set_to_none=k == 5)
        return params

    in_every_mode(program)
