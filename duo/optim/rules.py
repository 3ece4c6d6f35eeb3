"""Optimiser updates as IR: one function per optimiser, shared by eager mode, graph mode and artefacts.

A rule maps (parameter, gradient, slots, step, hyperparameters) to (new parameter, new slots). Hyperparameters are f64 scalars
given at run time; `options` are static flags that decide which terms exist. Formulas are named for the framework whose
documentation defines them: the two disagree on where epsilon goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from duo_ir import ops
from duo_ir.core import Value
from duo_ir.ops.broadcasting import broadcast_to, cast_to, constant_like
from duo_ir.types import f64

Hyper = Mapping[str, Value]
Update = Callable[[Value, Value, Sequence[Value], Value, Hyper, frozenset], tuple[Value, list[Value]]]


@dataclass(frozen=True)
class Rule:
    """slots(options): names of the per-parameter state. hyper: names of the run-time scalars. counts: whether it reads the step number."""

    name: str
    slots: Callable[[frozenset], tuple[str, ...]]
    hyper: tuple[str, ...]
    update: Update
    counts: bool = False


def _at(scalar: Value, like: Value) -> Value:
    """An f64 scalar rounded to the dtype of `like` and broadcast to its shape."""
    return broadcast_to(cast_to(scalar, like.type.dtype), like.type.shape)


def _one(like: Value) -> Value:
    return constant_like(like, 1.0)


def _count(step: Value) -> Value:
    return cast_to(step, f64)


def _weight_decay(p: Value, g: Value, h: Hyper, options: frozenset) -> Value:
    """L2 regularisation: the gradient of weight_decay/2 * p^2 is added."""
    if "maximize" in options:
        g = ops.neg(g)
    return ops.add(g, ops.mul(p, _at(h["weight_decay"], p))) if "weight_decay" in options else g


def _sgd(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """torch.optim.SGD: b = momentum*b + (1 - dampening)*g (the first time b = g); p -= lr*b, or lr*(g + momentum*b)."""
    g = _weight_decay(p, g, h, options)
    out: list[Value] = []
    if "momentum" in options:
        momentum = _at(h["momentum"], p)
        if "first" in options:
            buffer = g
        else:
            buffer = ops.add(
                ops.mul(slots[0], momentum), ops.mul(g, _at(ops.sub(_one(h["dampening"]), h["dampening"]), p))
            )
        out = [buffer]
        g = ops.add(g, ops.mul(buffer, momentum)) if "nesterov" in options else buffer
    return ops.sub(p, ops.mul(g, _at(h["lr"], p))), out


def _moments(g: Value, m: Value, v: Value, h: Hyper) -> tuple[Value, Value]:
    """m + (1 - beta1)*(g - m) and beta2*v + (1 - beta2)*g*g."""
    m = ops.add(m, ops.mul(ops.sub(g, m), _at(ops.sub(_one(h["beta1"]), h["beta1"]), m)))
    v = ops.add(ops.mul(v, _at(h["beta2"], v)), ops.mul(ops.mul(g, _at(ops.sub(_one(h["beta2"]), h["beta2"]), v)), g))
    return m, v


def _adam(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """torch.optim.Adam and, with 'decoupled', AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019):
    p -= lr/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps)."""
    if "decoupled" in options:
        if "maximize" in options:
            g = ops.neg(g)
        if "weight_decay" in options:
            p = ops.mul(p, _at(ops.sub(_one(h["lr"]), ops.mul(h["lr"], h["weight_decay"])), p))
    else:
        g = _weight_decay(p, g, h, options)
    m, v = _moments(g, slots[0], slots[1], h)
    t = _count(step)
    step_size = ops.div(h["lr"], ops.sub(_one(t), ops.pow(h["beta1"], t)))
    correction = ops.sqrt(ops.sub(_one(t), ops.pow(h["beta2"], t)))
    out = [m, v]
    second = v
    if "amsgrad" in options:
        second = ops.maximum(slots[2], v)
        out.append(second)
    denominator = ops.add(ops.div(ops.sqrt(second), _at(correction, v)), _at(h["eps"], v))
    return ops.sub(p, ops.mul(ops.div(m, denominator), _at(step_size, p))), out


def _rmsprop(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """torch.optim.RMSprop: s = alpha*s + (1 - alpha)*g*g; p -= lr * g / (sqrt(s [- mean^2]) + eps), optionally with momentum."""
    g = _weight_decay(p, g, h, options)
    rest = _at(ops.sub(_one(h["alpha"]), h["alpha"]), p)
    square = ops.add(ops.mul(slots[0], _at(h["alpha"], p)), ops.mul(ops.mul(g, rest), g))
    out = [square]
    second = square
    if "centered" in options:
        mean = ops.add(slots[len(out)], ops.mul(ops.sub(g, slots[len(out)]), rest))
        out.append(mean)
        second = ops.sub(square, ops.mul(mean, mean))
    scaled = ops.div(g, ops.add(ops.sqrt(second), _at(h["eps"], p)))
    if "momentum" in options:
        scaled = ops.add(ops.mul(slots[len(out)], _at(h["momentum"], p)), scaled)
        out.append(scaled)
    return ops.sub(p, ops.mul(scaled, _at(h["lr"], p))), out


def _adagrad(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """torch.optim.Adagrad (Duchi, Hazan & Singer 2011): s += g*g; p -= lr/(1 + (t - 1)*lr_decay) * g / (sqrt(s) + eps)."""
    g = _weight_decay(p, g, h, options)
    total = ops.add(slots[0], ops.mul(g, g))
    t = _count(step)
    rate = ops.div(h["lr"], ops.add(_one(t), ops.mul(ops.sub(t, _one(t)), h["lr_decay"])))
    scaled = ops.div(g, ops.add(ops.sqrt(total), _at(h["eps"], p)))
    return ops.sub(p, ops.mul(scaled, _at(rate, p))), [total]


def _tf_momentum(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """tf.train.MomentumOptimizer: a = momentum*a + g; p -= lr*a, or lr*(g + momentum*a) with use_nesterov."""
    momentum = _at(h["momentum"], p)
    accumulated = ops.add(ops.mul(slots[0], momentum), g)
    direction = ops.add(g, ops.mul(accumulated, momentum)) if "nesterov" in options else accumulated
    return ops.sub(p, ops.mul(direction, _at(h["lr"], p))), [accumulated]


def _tf_adam(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """tf.train.AdamOptimizer, the form before section 2.1 of Kingma & Ba 2015 ("epsilon hat"):
    p -= lr*sqrt(1 - beta2^t)/(1 - beta1^t) * m / (sqrt(v) + eps)."""
    m, v = _moments(g, slots[0], slots[1], h)
    t = _count(step)
    root = ops.sqrt(ops.sub(_one(t), ops.pow(h["beta2"], t)))
    rate = ops.div(ops.mul(h["lr"], root), ops.sub(_one(t), ops.pow(h["beta1"], t)))
    return ops.sub(p, ops.mul(ops.div(m, ops.add(ops.sqrt(v), _at(h["eps"], v))), _at(rate, p))), [m, v]


def _tf_adamw(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """tf.contrib.opt.AdamWOptimizer: p -= weight_decay*p (not times lr: Loshchilov & Hutter 2019, algorithm 2), then AdamOptimizer's step."""
    return _tf_adam(ops.sub(p, ops.mul(p, _at(h["weight_decay"], p))), g, slots, step, h, options)


def _tf_adagrad(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """tf.train.AdagradOptimizer (Duchi, Hazan & Singer 2011): a += g*g; p -= lr * g / sqrt(a)."""
    total = ops.add(slots[0], ops.mul(g, g))
    return ops.sub(p, ops.div(ops.mul(g, _at(h["lr"], p)), ops.sqrt(total))), [total]


def _tf_rmsprop(
    p: Value, g: Value, slots: Sequence[Value], step: Value, h: Hyper, options: frozenset
) -> tuple[Value, list[Value]]:
    """tf.train.RMSPropOptimizer: s = decay*s + (1 - decay)*g*g; b = momentum*b + lr * g / sqrt(s [- mean^2] + eps); p -= b."""
    rest = _at(ops.sub(_one(h["decay"]), h["decay"]), p)
    decay = _at(h["decay"], p)
    square = ops.add(ops.mul(slots[0], decay), ops.mul(ops.mul(g, g), rest))
    out = [square]
    second = square
    if "centered" in options:
        mean = ops.add(ops.mul(slots[2], decay), ops.mul(g, rest))
        second = ops.sub(square, ops.mul(mean, mean))
    scaled = ops.div(ops.mul(g, _at(h["lr"], p)), ops.sqrt(ops.add(second, _at(h["eps"], p))))
    buffer = ops.add(ops.mul(slots[1], _at(h["momentum"], p)), scaled)
    out.append(buffer)
    if "centered" in options:
        out.append(mean)
    return ops.sub(p, buffer), out


def _flagged(*pairs: tuple[str, str]) -> Callable[[frozenset], tuple[str, ...]]:
    return lambda options: tuple(name for flag, name in pairs if not flag or flag in options)


SGD = Rule("sgd", _flagged(("momentum", "momentum_buffer")), ("lr", "momentum", "dampening", "weight_decay"), _sgd)
ADAM = Rule(
    "adam",
    _flagged(("", "exp_avg"), ("", "exp_avg_sq"), ("amsgrad", "max_exp_avg_sq")),
    ("lr", "beta1", "beta2", "eps", "weight_decay"),
    _adam,
    counts=True,
)
RMSPROP = Rule(
    "rmsprop",
    _flagged(("", "square_avg"), ("centered", "grad_avg"), ("momentum", "momentum_buffer")),
    ("lr", "alpha", "eps", "weight_decay", "momentum"),
    _rmsprop,
)
ADAGRAD = Rule(
    "adagrad", _flagged(("", "sum")), ("lr", "lr_decay", "eps", "weight_decay"), _adagrad, counts=True,
)  # fmt: skip
TF_SGD = Rule("tf_sgd", _flagged(), ("lr",), lambda p, g, s, t, h, o: (ops.sub(p, ops.mul(g, _at(h["lr"], p))), []))
TF_MOMENTUM = Rule("tf_momentum", _flagged(("", "Momentum")), ("lr", "momentum"), _tf_momentum)
TF_ADAM = Rule("tf_adam", _flagged(("", "m"), ("", "v")), ("lr", "beta1", "beta2", "eps"), _tf_adam, counts=True)
TF_ADAMW = Rule(
    "tf_adamw", TF_ADAM.slots, ("lr", "beta1", "beta2", "eps", "weight_decay"), _tf_adamw, counts=True,
)  # fmt: skip
TF_ADAGRAD = Rule("tf_adagrad", _flagged(("", "accumulator")), ("lr",), _tf_adagrad)
TF_RMSPROP = Rule(
    "tf_rmsprop",
    _flagged(("", "rms"), ("", "momentum"), ("centered", "mg")),
    ("lr", "decay", "momentum", "eps"),
    _tf_rmsprop,
)


def apply_rule(
    rule: Rule, options: frozenset, step: Value | None, hyper: Sequence[Value], rows: Sequence[Sequence[Value]]
) -> list[list[Value]]:
    """One update of several parameters. rows: [parameter, gradient, slots...]; `step` is the number of this update, from 1, for a rule that
    counts. Returns [parameter, slots...] rows."""
    named = dict(zip(rule.hyper, hyper))
    out = []
    for p, g, *slots in rows:
        new, new_slots = rule.update(p, g, slots, step, named, options)  # type: ignore[arg-type]
        out.append([new, *new_slots])
    return out
