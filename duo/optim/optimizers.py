"""torch.optim's optimisers: SGD, Adam, AdamW, RMSprop, Adagrad. The formulas are in `rules.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from duo.optim import rules
from duo.optim.optimizer import Optimizer
from duo_ir.errors import ArgumentError


def _at_least_zero(group: dict[str, Any], *names: str) -> None:
    for name in names:
        if not group[name] >= 0:
            raise ArgumentError(f"{name} must be at least 0, not {group[name]}")


def _flags(**options: bool) -> frozenset:
    return frozenset(name for name, on in options.items() if on)


class SGD(Optimizer):
    """Stochastic gradient descent, optionally with (Nesterov) momentum and L2 weight decay."""

    rule = rules.SGD

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
             "maximize": maximize},
        )  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        _at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ArgumentError("Nesterov momentum needs a momentum above 0 and no dampening")

    def options(self, group: dict[str, Any]) -> frozenset:
        return _flags(
            momentum=group["momentum"] != 0,
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"] != 0,
            maximize=group["maximize"],
        )


class Adam(Optimizer):
    """Adam with L2 weight decay (added to the gradient)."""

    rule = rules.ADAM
    decoupled = False

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
            },
        )

    def check_group(self, group: dict[str, Any]) -> None:
        _at_least_zero(group, "lr", "eps", "weight_decay")
        if not all(0 <= b < 1 for b in group["betas"]):
            raise ArgumentError(f"betas must lie in [0, 1), not {group['betas']}")

    def options(self, group: dict[str, Any]) -> frozenset:
        return _flags(
            amsgrad=group["amsgrad"],
            weight_decay=group["weight_decay"] != 0,
            maximize=group["maximize"],
            decoupled=self.decoupled,
        )

    def hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    decoupled = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)


class RMSprop(Optimizer):
    """RMSprop, optionally centred and with momentum."""

    rule = rules.RMSPROP

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "centered": centered,
             "maximize": maximize},
        )  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        _at_least_zero(group, "lr", "alpha", "eps", "weight_decay", "momentum")

    def options(self, group: dict[str, Any]) -> frozenset:
        return _flags(
            momentum=group["momentum"] != 0,
            centered=group["centered"],
            weight_decay=group["weight_decay"] != 0,
            maximize=group["maximize"],
        )


class Adagrad(Optimizer):
    """Adagrad: rates fall with the sum of the squared gradients, which starts at `initial_accumulator_value`."""

    rule = rules.ADAGRAD

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
             "initial_accumulator_value": initial_accumulator_value, "maximize": maximize},
        )  # fmt: skip

    def check_group(self, group: dict[str, Any]) -> None:
        _at_least_zero(group, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def options(self, group: dict[str, Any]) -> frozenset:
        return _flags(weight_decay=group["weight_decay"] != 0, maximize=group["maximize"])

    def initial(self, slot: str) -> float:
        return float(self.defaults["initial_accumulator_value"])
