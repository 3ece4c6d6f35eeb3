"""The workloads in JAX: whole training steps under jax.jit with donated parameters, images as [batch, height, width, channels]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.bench import data
from tests.bench.harness import Case, training, unit_of

Params = Any


class Jax:
    """jax.jit of everything but the products, which are ops of their own."""

    def __init__(self, threads: int) -> None:
        import jax  # optional: a peer; its threads are those of the processors that the process may use

        self.jax, self.np, self.lax = jax, jax.numpy, jax.lax

    # ------------------------------------------------------------------------------------------------------------- models
    def mlp_model(self, params: Params, x: Any) -> Any:
        for i, (w, b) in enumerate(params):
            x = (self.np.maximum(x, 0) if i else x) @ w + b
        return x

    def conv(self, x: Any, w: Any, stride: int, padding: int) -> Any:
        return self.lax.conv_general_dilated(
            x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def max_pool(self, x: Any, size: int, stride: int, padding: int) -> Any:
        around = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
        return self.lax.reduce_window(x, -self.np.inf, self.lax.max, (1, size, size, 1), (1, stride, stride, 1), around)

    def cnn_model(self, p: Params, x: Any) -> Any:
        for i in ("1", "2"):
            x = self.max_pool(self.np.maximum(self.conv(x, p["conv" + i], 1, 1) + p["bias" + i], 0), 2, 2, 0)
        x = self.np.maximum(x.reshape(x.shape[0], -1) @ p["full1"] + p["bias3"], 0)
        return x @ p["full2"] + p["bias4"]

    def resnet_model(self, p: Params, x: Any) -> Any:
        relu = lambda x: self.np.maximum(x, 0)  # noqa: E731

        def norm(x: Any, name: str) -> Any:
            weight, bias, mean, variance = p[name]
            scale = weight * self.lax.rsqrt(variance + 1e-5)
            return x * scale + (bias - mean * scale)

        x = self.max_pool(relu(norm(self.conv(x, p["conv"], 2, 3), "norm")), 3, 2, 1)
        for name, _, _, stride in data.resnet_blocks():
            y = relu(norm(self.conv(x, p[name + "conv1"], stride, 1), name + "norm1"))
            y = norm(self.conv(y, p[name + "conv2"], 1, 1), name + "norm2")
            if name + "conv3" in p:
                x = norm(self.conv(x, p[name + "conv3"], stride, 0), name + "norm3")
            x = relu(y + x)
        return x.mean((1, 2)) @ p["full"] + p["bias"]

    def layer_norm(self, x: Any, weight: Any, bias: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred * self.lax.rsqrt(variance + 1e-5) * weight + bias

    def gpt_model(self, p: Params, tokens: Any) -> Any:
        n, nn = self.np, self.jax.nn
        rows, length = tokens.shape
        heads = (rows, length, data.HEADS, data.WIDTH // data.HEADS)

        def linear(x: Any, name: str) -> Any:
            return x @ p[name][0] + p[name][1]

        x = (p["token"][tokens] + p["position"]).reshape(rows * length, data.WIDTH)  # as two axes: quicker here
        seen = n.tril(n.ones((length, length), bool))
        for i in range(data.LAYERS):
            parts = n.split(linear(self.layer_norm(x, *p[f"{i}.norm1"]), f"{i}.qkv"), 3, -1)
            q, k, v = (a.reshape(heads).transpose(0, 2, 1, 3) for a in parts)
            scores = n.where(seen, q @ k.swapaxes(-1, -2) * heads[-1] ** -0.5, -1e30)
            y = (nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
            x = x + linear(y, f"{i}.out")
            y = nn.gelu(linear(self.layer_norm(x, *p[f"{i}.norm2"]), f"{i}.up"), approximate=True)
            x = x + linear(y, f"{i}.down")
        return (self.layer_norm(x, *p["norm"]) @ p["token"].T).reshape(rows, length, -1)

    # ----------------------------------------------------------------------------------------------------------- training
    def cross_entropy(self, logits: Any, labels: Any) -> Any:
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        return -self.np.take_along_axis(self.jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    def squared_error(self, out: Any, target: Any) -> Any:
        return ((out - target) ** 2).mean()

    def rule(self, name: str, lr: float) -> tuple[Callable, Callable]:
        """(parameters, gradients, state -> new parameters and state; the state that a run starts with)."""
        tree, n = self.jax.tree.map, self.np
        zeros = lambda p: tree(n.zeros_like, p)  # noqa: E731
        if name == "sgd":
            return lambda p, g, s: (tree(lambda p, g: p - lr * g, p, g), s), lambda p: ()
        if name == "momentum":

            def momentum(p: Any, g: Any, s: Any) -> Any:
                s = tree(lambda m, g: data.MOMENTUM * m + g, s, g)
                return tree(lambda p, m: p - lr * m, p, s), s

            return momentum, zeros
        decay = 1.0 - lr * data.DECAY if name == "adamw" else 1.0

        def adam(p: Any, g: Any, s: Any) -> Any:
            count, first, second = s
            count = count + 1
            first = tree(lambda m, g: data.BETA1 * m + (1 - data.BETA1) * g, first, g)
            second = tree(lambda v, g: data.BETA2 * v + (1 - data.BETA2) * g * g, second, g)
            one, two = 1 - data.BETA1**count, 1 - data.BETA2**count
            move = lambda p, m, v: p * decay - lr * (m / one) / (n.sqrt(v / two) + data.EPSILON)  # noqa: E731
            return tree(move, p, first, second), (count, first, second)

        return adam, lambda p: (n.float32(0), zeros(p), zeros(p))

    def train_case(self, case: str, variant: str = "") -> Case:
        """The training step of that name."""
        model, loss_of, params, batch = {
            "tiny": lambda: (self.mlp_model, self.squared_error, data.mlp_params(data.TINY), data.tiny_batch()),
            "mlp adam": lambda: (self.mlp_model, self.cross_entropy, data.mlp_params(data.MLP), data.mlp_batch()),
            "mlp sgd": lambda: (self.mlp_model, self.cross_entropy, data.mlp_params(data.MLP), data.mlp_batch()),
            "cnn": lambda: (
                self.cnn_model,
                self.cross_entropy,
                data.cnn_params_channels_last(),
                _last(data.cnn_batch()),
            ),
            "gpt": lambda: (self.gpt_model, self.cross_entropy, data.gpt_params(), data.gpt_batch()),
        }[case]()
        update, start = self.rule(*data.OPTIMIZERS[case])
        x, y = (self.np.asarray(a) for a in batch)

        def step(p: Any, s: Any, x: Any, y: Any) -> Any:
            loss, gradients = self.jax.value_and_grad(lambda p: loss_of(model(p, x), y))(p)
            return *update(p, gradients, s), loss

        compiled = self.jax.jit(step, donate_argnums=(0, 1))
        p = self.tree(params)
        kept = [p, start(p)]

        def call() -> float:
            *kept[:], loss = compiled(*kept, x, y)
            return float(loss)

        return training(case, call)

    def forward_case(self, case: str) -> Case:
        """Inference: the forward pass of that name."""
        model, params, x = {
            "mlp, batch 1": lambda: (self.mlp_model, data.mlp_params(data.MLP), data.mlp_batch(1)[0]),
            "cnn, batch 1": lambda: (
                self.cnn_model, data.cnn_params_channels_last(), data.channels_last(data.cnn_batch(1)[0])
            ),
            "ResNet-18, batch 1": lambda: (
                self.resnet_model, data.hwio(data.resnet_params()), data.channels_last(data.resnet_input())
            ),
            "gpt forward": lambda: (self.gpt_model, data.gpt_params(), data.gpt_batch()[0]),
        }[case]()  # fmt: skip
        params, x, fn = self.tree(params), self.np.asarray(x), self.jax.jit(model)
        call = lambda: fn(params, x).block_until_ready()  # noqa: E731
        return Case(case, call, unit_of(case), lambda: [np.asarray(call())])

    def tree(self, params: Params) -> Params:
        return self.jax.tree.map(self.np.asarray, params)

    # ---------------------------------------------------------------------------------------------------------- workloads
    def ops(self) -> Iterator[Case]:
        x, a, b = (self.np.full((8,), v, self.np.float32) for v in (1.0, 1.0001, 1e-4))

        def chain() -> Any:
            y = x
            for _ in range(500):
                y = y * a
                y = y + b
            return y.block_until_ready()

        yield Case("tiny op", chain, "us", lambda: [np.asarray(chain())], 1000)

    def tiny(self) -> Iterator[Case]:
        yield self.train_case("tiny")

    def mlp(self) -> Iterator[Case]:
        yield self.train_case("mlp adam")
        yield self.train_case("mlp sgd")

    def cnn(self) -> Iterator[Case]:
        yield self.train_case("cnn")

    def gpt(self) -> Iterator[Case]:
        yield self.train_case("gpt")
        yield self.forward_case("gpt forward")

    def latency(self) -> Iterator[Case]:
        for case in ("mlp, batch 1", "cnn, batch 1", "ResNet-18, batch 1"):
            yield self.forward_case(case)

    def arrays(self, elements: int, label: str) -> Iterator[Case]:
        n, nn = self.np, self.jax.nn
        functions: dict[str, Callable] = {
            "copy": n.copy, "fused": lambda a, b, c: n.tanh(a * b + c) * nn.sigmoid(a) - n.exp(-c * c),
            "gelu": lambda a: nn.gelu(a, approximate=True), "softmax": lambda a: nn.softmax(a, -1),
            "layer norm": self.layer_norm, "sum axis 0": lambda a: a.sum(0), "sum axis 1": lambda a: a.sum(1),
            "sum": lambda a: a.sum(),
        }  # fmt: skip
        for name, fn in functions.items():
            arrays, moved = data.function_inputs(name, elements)
            inputs, compiled = [n.asarray(a) for a in arrays], self.jax.jit(fn)
            call = lambda fn=compiled, inputs=inputs: fn(*inputs).block_until_ready()  # noqa: E731
            yield Case(f"{name}, {label}", call, "GB/s", lambda call=call: [np.asarray(call())], moved)

    def matmul(self) -> Iterator[Case]:
        fn = self.jax.jit(self.np.matmul)
        for m, k, n in data.PRODUCTS:
            a, b = (self.np.asarray(x) for x in data.product_inputs(m, k, n))
            call = lambda a=a, b=b: fn(a, b).block_until_ready()  # noqa: E731
            yield Case(f"matmul {m}x{k}x{n}", call, "GFLOP/s", lambda call=call: [np.asarray(call())], 2.0 * m * k * n)

    def adam(self) -> Iterator[Case]:
        params, gradients = (self.tree(a) for a in data.update_inputs())
        update, start = self.rule("adam", 1e-5)
        step, kept = self.jax.jit(update, donate_argnums=(0, 2)), [params, start(params)]

        def call() -> None:
            kept[:] = step(kept[0], gradients, kept[1])
            self.jax.block_until_ready(kept[0])

        def result() -> list[np.ndarray]:
            for _ in range(3):
                call()
            return [np.asarray(p) for p in kept[0]]

        yield Case("Adam, 10M parameters", call, "ms", result, tolerance=1e-6)


def _last(batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return data.channels_last(batch[0]), batch[1]
