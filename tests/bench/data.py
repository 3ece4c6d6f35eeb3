"""Inputs, initial weights and hyperparameters of the workloads: NumPy arrays from fixed seeds, the same for every framework.

Weights of products are [in, out]; convolutions [out, in, height, width]; images [batch, channels, height, width]. The functions
`channels_last` and `hwio` give the other layout of the same values.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

Array = np.ndarray
Params = dict[str, Any]


class Draw:
    """Seeded samples in float32."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        return self.rng.standard_normal(shape, "f4") * np.float32(scale)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Array:
        return self.rng.random(shape, "f4") * np.float32(high - low) + np.float32(low)

    def kaiming(self, fan_in: int, *shape: int) -> Array:
        """Normal with variance 2 / fan_in, for layers behind which a ReLU follows (He et al., 2015)."""
        return self.normal(*shape, scale=math.sqrt(2 / fan_in))


# ------------------------------------------------------------------------------------------------------------- training
BETA1, BETA2, EPSILON, DECAY, MOMENTUM = 0.9, 0.999, 1e-8, 0.01, 0.9
OPTIMIZERS = {  # training case: (rule, learning rate)
    "tiny": ("sgd", 1e-2),
    "mlp adam": ("adam", 3e-5),
    "mlp sgd": ("sgd", 1e-2),
    "cnn": ("momentum", 1e-3),
    "gpt": ("adamw", 1e-4),
}
TINY, MLP = (10, 5, 1), (784, 512, 256, 10)


def mlp_params(sizes: tuple[int, ...], seed: int = 21) -> list[tuple[Array, Array]]:
    """(weight, bias) per layer."""
    draw = Draw(seed)
    return [(draw.kaiming(n, n, m), draw.normal(m, scale=0.01)) for n, m in itertools.pairwise(sizes)]


def tiny_batch() -> tuple[Array, Array]:
    draw = Draw(22)
    return draw.normal(32, 10), draw.normal(32, 1)


def mlp_batch(rows: int = 128) -> tuple[Array, Array]:
    draw = Draw(23)
    return draw.uniform(rows, 784), draw.rng.integers(0, 10, rows)


# --------------------------------------------------------------------------------------------------------- convolutions
def cnn_params() -> Params:
    """Two 3 by 3 convolutions (32 and 64 channels), each with a ReLU and a 2 by 2 max pooling behind it, then 3136-128-10."""
    draw = Draw(24)
    return {
        "conv1": draw.kaiming(9, 32, 1, 3, 3), "bias1": draw.normal(32, scale=0.01),
        "conv2": draw.kaiming(288, 64, 32, 3, 3), "bias2": draw.normal(64, scale=0.01),
        "full1": draw.kaiming(3136, 3136, 128), "bias3": draw.normal(128, scale=0.01),
        "full2": draw.kaiming(128, 128, 10), "bias4": draw.normal(10, scale=0.01),
    }  # fmt: skip


def cnn_batch(rows: int = 64) -> tuple[Array, Array]:
    draw = Draw(25)
    return draw.uniform(rows, 1, 28, 28), draw.rng.integers(0, 10, rows)


def cnn_params_channels_last() -> Params:
    """The same network on [batch, height, width, channels]: also the first full layer reads its input in that order."""
    p = cnn_params()
    full1 = p["full1"].reshape(64, 7, 7, 128).transpose(1, 2, 0, 3).reshape(3136, 128)
    return hwio(p) | {"full1": np.ascontiguousarray(full1)}


def hwio(params: Params) -> Params:
    """Convolutions (the arrays with four axes) as [height, width, in, out]."""
    return {
        k: np.ascontiguousarray(v.transpose(2, 3, 1, 0)) if isinstance(v, np.ndarray) and v.ndim == 4 else v
        for k, v in params.items()
    }


def channels_last(images: Array) -> Array:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


RESNET_STAGES = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))  # channels in, out, stride; two blocks each
RESNET_CLASSES = 1000


def resnet_blocks() -> list[tuple[str, int, int, int]]:
    """(name, channels in, channels out, stride) of each basic block of ResNet-18 (He et al., 2016), in order."""
    return [
        (f"stage{s}.{b}.", out if b else channels, out, 1 if b else stride)
        for s, (channels, out, stride) in enumerate(RESNET_STAGES)
        for b in range(2)
    ]


def resnet_params() -> Params:
    """ResNet-18's weights. Batch norms are (weight, bias, mean, variance); a block's second one is small, so that values stay so."""
    draw, p = Draw(26), {}

    def conv(name: str, channels: int, out: int, size: int) -> None:
        p[name] = draw.kaiming(channels * size * size, out, channels, size, size)

    def norm(name: str, channels: int, low: float) -> None:
        p[name] = (
            draw.uniform(channels, low=low, high=low + 0.1), draw.normal(channels, scale=0.1),
            draw.normal(channels, scale=0.1), draw.uniform(channels, low=0.5, high=1.5),
        )  # fmt: skip

    conv("conv", 3, 64, 7)
    norm("norm", 64, 1.0)
    for name, channels, out, _ in resnet_blocks():
        conv(name + "conv1", channels, out, 3)
        norm(name + "norm1", out, 1.0)
        conv(name + "conv2", out, out, 3)
        norm(name + "norm2", out, 0.3)
        if channels != out:
            conv(name + "conv3", channels, out, 1)
            norm(name + "norm3", out, 1.0)
    p["full"], p["bias"] = draw.normal(512, RESNET_CLASSES, scale=0.05), draw.normal(RESNET_CLASSES, scale=0.1)
    return p


def resnet_input() -> Array:
    return Draw(27).normal(1, 3, 224, 224)


# ---------------------------------------------------------------------------------------------------------- transformer
WIDTH, HEADS, CONTEXT, ROWS, LAYERS, VOCABULARY = 256, 4, 128, 8, 4, 1000


def gpt_params() -> Params:
    """A GPT-2 in small: learned positions, norms before attention and before the GELU layer, the output tied to the embedding."""
    draw, d = Draw(28), WIDTH

    def matrix(*shape: int) -> Array:
        return draw.normal(*shape, scale=0.02)

    def norm() -> tuple[Array, Array]:
        return np.ones(d, "f4"), np.zeros(d, "f4")

    p: Params = {"token": matrix(VOCABULARY, d), "position": matrix(CONTEXT, d)}
    for i in range(LAYERS):
        p[f"{i}.norm1"], p[f"{i}.norm2"] = norm(), norm()
        for name, n, m in (("qkv", d, 3 * d), ("out", d, d), ("up", d, 4 * d), ("down", 4 * d, d)):
            p[f"{i}.{name}"] = matrix(n, m), np.zeros(m, "f4")
    p["norm"] = norm()
    return p


def gpt_batch() -> tuple[Array, Array]:
    """Tokens and the tokens to predict: [8, 128] each."""
    rng = np.random.default_rng(29)
    return rng.integers(0, VOCABULARY, (ROWS, CONTEXT)), rng.integers(0, VOCABULARY, (ROWS, CONTEXT))


# ------------------------------------------------------------------------------------------------------- array functions
FUNCTIONS = ("copy", "fused", "gelu", "softmax", "layer norm", "sum axis 0", "sum axis 1", "sum")
NORM_WIDTH = 1024


def function_inputs(name: str, elements: int) -> tuple[list[Array], float]:
    """(operands, bytes that a call must move: each operand read and each result written once); `elements` is a square.

    fused: tanh(a*b + c) * sigmoid(a) - exp(-c*c). gelu: its tanh approximation. Softmax and layer norm go along the last axis."""
    draw, side = Draw(30), math.isqrt(elements)

    def numbers(*shape: int) -> Array:
        return draw.uniform(*shape, low=-2.0, high=2.0)

    size = 4.0 * elements
    if name == "fused":
        return [numbers(elements) for _ in range(3)], 4 * size
    if name in ("copy", "gelu"):
        return [numbers(elements)], 2 * size
    if name == "layer norm":
        return [numbers(elements // NORM_WIDTH, NORM_WIDTH), numbers(NORM_WIDTH), numbers(NORM_WIDTH)], 2 * size
    return [numbers(side, side)], 2 * size if name == "softmax" else size


PRODUCTS = (
    *[(n, n, n) for n in (64, 128, 256, 512, 1024, 2048)],
    (1, 1024, 1024), (8, 1024, 4096), (128, 784, 512), (4096, 64, 4096), (64, 4096, 64),
)  # fmt: skip


def product_inputs(m: int, k: int, n: int) -> tuple[Array, Array]:
    draw = Draw(31)
    return draw.normal(m, k), draw.normal(k, n, scale=k**-0.5)


UPDATED, UPDATED_SIZE = 10, 1_000_000  # tensors that the optimiser workload updates, and their size


def update_inputs() -> tuple[list[Array], list[Array]]:
    """(parameters, gradients). The gradients keep away from 0, where the formulas of Adam differ in where epsilon stands."""
    draw = Draw(32)
    params = [draw.normal(UPDATED_SIZE) for _ in range(UPDATED)]
    return params, [draw.uniform(UPDATED_SIZE, low=0.1, high=1.0) for _ in range(UPDATED)]
