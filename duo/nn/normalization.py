"""Layers that normalise channels: batch, instance and group norm, with torch.nn's arguments and names in state dicts."""

from __future__ import annotations

from typing import Any, ClassVar

from duo.eager.creation import ones, zeros
from duo.functional._args import need_rank, type_of
from duo.nn import functional as F
from duo.nn import init
from duo.nn.module import Module
from duo.nn.parameter import Buffer, Parameter
from duo_ir.errors import ArgumentError
from duo_ir.types import i64


class _PerChannel(Module):
    """`weight` and `bias` per channel, 1 and 0 at first, where the layer is affine."""

    def __init__(self, channels: int, affine: bool, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.affine = affine
        self.register_parameter("weight", Parameter(ones(channels, dtype=dtype, device=device)) if affine else None)
        self.register_parameter(
            "bias", Parameter(zeros(channels, dtype=dtype, device=device)) if affine and bias else None
        )

    def reset_parameters(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _affinity(self) -> str:
        return f"affine={self.affine}, bias={self.bias is not None}"


class _BatchNorm(_PerChannel):
    _one_op = True
    _ranks: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine, bias, device, dtype)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.track_running_stats = track_running_stats
        tracked = track_running_stats
        self.register_buffer(
            "running_mean", Buffer(zeros(num_features, dtype=dtype, device=device)) if tracked else None
        )
        self.register_buffer("running_var", Buffer(ones(num_features, dtype=dtype, device=device)) if tracked else None)
        self.register_buffer("num_batches_tracked", Buffer(zeros(dtype=i64, device=device)) if tracked else None)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches seen."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1.0)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        super().reset_parameters()

    def forward(self, input: Any) -> Any:
        need_rank(type(self).__name__, "the input", type_of(input), *self._ranks)
        mine, kept = self._parameters, self._buffers  # looking there first is much quicker than attributes
        own = self.__class__ in _PLAIN and "weight" in mine and "bias" in mine
        if own and "running_mean" in kept and "running_var" in kept:
            weight, bias, mean, var = mine["weight"], mine["bias"], kept["running_mean"], kept["running_var"]
        else:
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if self.training or mean is None:
            count = self.num_batches_tracked if self.training else None
            return F.batch_norm_tracked(input, mean, var, count, weight, bias, self.momentum, self.eps)
        return F.batch_norm(input, mean, var, weight, bias, eps=self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, {self._affinity()}, "
            f"track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(_BatchNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias per channel of [batch, channels] or [batch, channels, length].

    In training mean and biased variance are the batch's, and running_mean and running_var move towards them (the variance there divided by
    n - 1): new = (1 - momentum) * old + momentum * batch's; momentum None: the average of all batches. In evaluation, and
    with track_running_stats, the running ones count."""

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """`BatchNorm1d` of [batch, channels, height, width]."""

    _ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """`BatchNorm1d` of [batch, channels, depth, height, width]."""

    _ranks = (5,)


_PLAIN = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class _InstanceNorm(_PerChannel):
    _ranks: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        if track_running_stats:
            raise ArgumentError(
                f"{type(self).__name__} keeps no running statistics; use BatchNorm, or normalise by the input"
            )
        super().__init__(num_features, affine, bias, device, dtype)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.track_running_stats = False

    def forward(self, input: Any) -> Any:
        need_rank(type(self).__name__, "the input", type_of(input), *self._ranks)
        return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, {self._affinity()}, "
            f"track_running_stats={self.track_running_stats}"
        )


class InstanceNorm1d(_InstanceNorm):
    """(x - mean) / sqrt(var + eps) per sample and channel of [batch, channels, length], with weight and bias where affine."""

    _ranks = (3,)


class InstanceNorm2d(_InstanceNorm):
    """`InstanceNorm1d` of [batch, channels, height, width]."""

    _ranks = (4,)


class InstanceNorm3d(_InstanceNorm):
    """`InstanceNorm1d` of [batch, channels, depth, height, width]."""

    _ranks = (5,)


class GroupNorm(_PerChannel):
    """(x - mean) / sqrt(var + eps) * weight + bias over each of num_groups groups of neighbouring channels of [batch, channels, ...]."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ArgumentError(f"GroupNorm: {num_channels} channels do not make {num_groups} groups")
        super().__init__(num_channels, affine, bias, device, dtype)
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps

    def forward(self, input: Any) -> Any:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, {self._affinity()}"
