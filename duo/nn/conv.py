"""Convolution layers, with torch.nn's arguments and initial values. weight: [out, in/groups, kernel...], transposed: [in, out/groups, kernel...]."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from duo.eager.creation import empty
from duo.functional._args import choice, per_axis
from duo.nn import functional as F
from duo.nn import init
from duo.nn.module import Module
from duo.nn.parameter import Parameter
from duo_ir.errors import ArgumentError

_MODES = ("zeros", "reflect", "replicate", "circular")


class _Convolution(Module):
    """What convolutions and their transposes have in common."""

    _dims: ClassVar[int]
    _transposed: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        output_padding: Any,
        dilation: Any,
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        name, n = type(self).__name__, self._dims
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ArgumentError(f"{name}: {in_channels} and {out_channels} channels do not both make {groups} groups")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_axis(name, "kernel_size", kernel_size, n)
        self.stride = per_axis(name, "stride", stride, n)
        self.padding: Any = padding if isinstance(padding, str) else per_axis(name, "padding", padding, n, 0)
        self.output_padding = per_axis(name, "output_padding", output_padding, n, 0)
        self.dilation = per_axis(name, "dilation", dilation, n)
        self.padding_mode = choice(name, "padding_mode", padding_mode, _MODES)
        shape = (in_channels, out_channels // groups) if self._transposed else (out_channels, in_channels // groups)
        self.weight = Parameter(empty(*shape, *self.kernel_size, dtype=dtype, device=device))
        self.register_parameter("bias", Parameter(empty(out_channels, dtype=dtype, device=device)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(n), weight and bias, with n = weight.shape[1] * elements of the kernel, as torch.nn's."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            inputs = self.out_channels if self._transposed else self.in_channels
            fan = inputs // self.groups * math.prod(self.kernel_size)
            bound = 1 / math.sqrt(fan) if fan > 0 else 0
            init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """As torch.nn's: what is not the default after the kernel and the stride."""
        n = self._dims
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0,) * n:
            text += f", padding={self.padding}"
        if self.dilation != (1,) * n:
            text += f", dilation={self.dilation}"
        if self.output_padding != (0,) * n:
            text += f", output_padding={self.output_padding}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text if self.padding_mode == "zeros" else f"{text}, padding_mode={self.padding_mode}"


class _Conv(_Convolution):
    _one_op = True
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, 0, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip

    def forward(self, input: Any) -> Any:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self._dims - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._around(), self.padding_mode), 0
        mine = (
            self._parameters
        )  # where those attributes are, unless a subclass says otherwise: looking there first is much quicker
        if self.__class__ in _PLAIN and "weight" in mine and "bias" in mine:
            return conv(input, mine["weight"], mine["bias"], self.stride, padding, self.dilation, self.groups)
        return conv(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _around(self) -> list[int]:
        """The padding as `pad` takes it: the last dim first."""
        amounts: list[int] = []
        for i in range(self._dims - 1, -1, -1):
            if self.padding == "same":
                total = self.dilation[i] * (self.kernel_size[i] - 1)
                amounts += [total // 2, total - total // 2]
            else:
                amounts += [0, 0] if self.padding == "valid" else [self.padding[i]] * 2
        return amounts


class Conv1d(_Conv):
    """conv1d: cross-correlation of [batch, in_channels, length] with a learned kernel, plus a bias per channel."""

    _dims = 1


class Conv2d(_Conv):
    """conv2d: cross-correlation of [batch, in_channels, height, width] with a learned kernel, plus a bias per channel."""

    _dims = 2


class Conv3d(_Conv):
    """conv3d: cross-correlation of [batch, in_channels, depth, height, width] with a learned kernel, plus a bias per channel."""

    _dims = 3


_PLAIN = (Conv1d, Conv2d, Conv3d)


class _ConvTranspose(_Convolution):
    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ArgumentError(f"{type(self).__name__}: padding_mode is 'zeros', not {padding_mode!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups, bias, padding_mode, device,
            dtype,
        )  # fmt: skip

    def forward(self, input: Any, output_size: Any = None) -> Any:
        """output_size: the spatial size of the result, of those that differ in output_padding."""
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self._dims - 1]
        extra = self.output_padding if output_size is None else self._extra(input, output_size)
        return conv(input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)

    def _extra(self, input: Any, output_size: Any) -> tuple[int, ...]:
        name, n = type(self).__name__, self._dims
        wanted = per_axis(name, "output_size", tuple(output_size)[-n:], n)
        extra = []
        for i, d in enumerate(input.shape[-n:]):
            least = (d - 1) * self.stride[i] - 2 * self.padding[i] + self.dilation[i] * (self.kernel_size[i] - 1) + 1
            if not 0 <= wanted[i] - least < max(self.stride[i], self.dilation[i]):
                most = least + max(self.stride[i], self.dilation[i]) - 1
                raise ArgumentError(
                    f"{name}: spatial dim {i} of the result has {least} to {most} elements, not {wanted[i]}"
                )
            extra.append(wanted[i] - least)
        return tuple(extra)


class ConvTranspose1d(_ConvTranspose):
    """conv_transpose1d: the transpose of `Conv1d`, from [batch, in_channels, length]."""

    _dims = 1


class ConvTranspose2d(_ConvTranspose):
    """conv_transpose2d: the transpose of `Conv2d`, from [batch, in_channels, height, width]."""

    _dims = 2


class ConvTranspose3d(_ConvTranspose):
    """conv_transpose3d: the transpose of `Conv3d`, from [batch, in_channels, depth, height, width]."""

    _dims = 3
