"""The workloads with PyTorch's names. duo's eager mode and @duo.compile run the very same functions as PyTorch and torch.compile; the
classes at the end say where they differ: how a value is forced, what is compiled, which of PyTorch's options are the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.bench import data
from tests.bench.harness import Case, training, unit_of


class TorchStyle:
    """Everything that has `nn`, `optim` and the rest under PyTorch's names; `t` is that module."""

    def __init__(self, t: Any, threads: int) -> None:
        self.t, self.F = t, t.nn.functional
        t.set_num_threads(threads)
        t.manual_seed(0)

    # ---------------------------------------------------------------------------------------- what the classes below differ in
    def compiled(self, fn: Callable) -> Callable:
        """`fn` as the framework's compiler makes it, where this class stands for one."""
        return fn

    def force(self, out: Any) -> np.ndarray:
        """The values of a result: what was only recorded has run when this returns. No copy."""
        return out.detach().numpy()

    fused: dict[str, Any] = {}  # what makes an optimiser fast, where that is not the default
    layouts: tuple[str, ...] = ("",)  # variants of models that convolve

    def tensor(self, array: np.ndarray) -> Any:
        return self.t.from_numpy(array.copy())

    def set(self, layer: Any, weight: np.ndarray, bias: np.ndarray | None = None) -> Any:
        """The layer with these values. weight: as duo's benchmarks keep it, [in, out] or [out, in, height, width]."""
        layer.weight.data = self.tensor(np.ascontiguousarray(weight.T) if weight.ndim == 2 else weight)
        if bias is not None:
            layer.bias.data = self.tensor(bias)
        return layer

    def optimizer(self, case: str, model: Any) -> Any:
        rule, lr = data.OPTIMIZERS[case]
        optim, params = self.t.optim, list(model.parameters())
        if rule == "adam":
            return optim.Adam(params, lr=lr, **self.fused)
        if rule == "adamw":
            return optim.AdamW(params, lr=lr, weight_decay=data.DECAY, **self.fused)
        return optim.SGD(params, lr=lr, momentum=data.MOMENTUM if rule == "momentum" else 0.0, **self.fused)

    # ------------------------------------------------------------------------------------------------------------- models
    def mlp_model(self, sizes: tuple[int, ...]) -> Any:
        nn, layers = self.t.nn, []
        for i, (w, b) in enumerate(data.mlp_params(sizes)):
            layers += ([nn.ReLU()] if i else []) + [self.set(nn.Linear(*w.shape), w, b)]
        return nn.Sequential(*layers)

    def cnn_model(self) -> Any:
        nn, p = self.t.nn, data.cnn_params()
        return nn.Sequential(
            self.set(nn.Conv2d(1, 32, 3, padding=1), p["conv1"], p["bias1"]), nn.ReLU(), nn.MaxPool2d(2),
            self.set(nn.Conv2d(32, 64, 3, padding=1), p["conv2"], p["bias2"]), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            self.set(nn.Linear(3136, 128), p["full1"], p["bias3"]), nn.ReLU(), self.set(nn.Linear(128, 10), p["full2"], p["bias4"]),
        )  # fmt: skip

    def resnet_model(self) -> Any:
        style, nn, F, p = self, self.t.nn, self.F, data.resnet_params()

        def conv(name: str, stride: int, padding: int) -> Any:
            out, channels, size, _ = p[name].shape
            return style.set(nn.Conv2d(channels, out, size, stride, padding, bias=False), p[name])

        def norm(name: str) -> Any:
            weight, bias, mean, var = p[name]
            layer = style.set(nn.BatchNorm2d(len(weight)), weight, bias)
            layer.running_mean.copy_(style.tensor(mean))
            layer.running_var.copy_(style.tensor(var))
            return layer

        class Block(nn.Module):
            def __init__(self, name: str, stride: int) -> None:
                super().__init__()
                self.conv1, self.norm1 = conv(name + "conv1", stride, 1), norm(name + "norm1")
                self.conv2, self.norm2 = conv(name + "conv2", 1, 1), norm(name + "norm2")
                wider = name + "conv3" in p
                self.short = (
                    nn.Sequential(conv(name + "conv3", stride, 0), norm(name + "norm3")) if wider else nn.Identity()
                )

            def forward(self, x: Any) -> Any:
                y = F.relu(self.norm1(self.conv1(x)))
                return F.relu(self.norm2(self.conv2(y)) + self.short(x))

        blocks = [Block(name, stride) for name, _, _, stride in data.resnet_blocks()]
        head = self.set(nn.Linear(512, data.RESNET_CLASSES), p["full"], p["bias"])
        return nn.Sequential(
            conv("conv", 2, 3), norm("norm"), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head,
        ).eval()  # fmt: skip

    def gpt_model(self) -> Any:
        style, nn, F, p = self, self.t.nn, self.F, data.gpt_params()

        def norm(name: str) -> Any:
            return style.set(nn.LayerNorm(data.WIDTH), *p[name])

        def linear(name: str) -> Any:
            weight, bias = p[name]
            return style.set(nn.Linear(*weight.shape), weight, bias)

        class Block(nn.Module):
            def __init__(self, i: int) -> None:
                super().__init__()
                self.norm1, self.norm2 = norm(f"{i}.norm1"), norm(f"{i}.norm2")
                self.qkv, self.out, self.up, self.down = (linear(f"{i}.{n}") for n in ("qkv", "out", "up", "down"))

            def forward(self, x: Any) -> Any:
                rows, length, width = x.shape
                parts = self.qkv(self.norm1(x)).split(width, 2)
                q, k, v = (a.view(rows, length, data.HEADS, width // data.HEADS).transpose(1, 2) for a in parts)
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
                return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.token, self.position = (nn.Parameter(style.tensor(p[n])) for n in ("token", "position"))
                self.blocks = nn.ModuleList([Block(i) for i in range(data.LAYERS)])
                self.norm = norm("norm")

            def forward(self, tokens: Any) -> Any:
                x = F.embedding(tokens, self.token) + self.position
                for block in self.blocks:
                    x = block(x)
                return F.linear(self.norm(x), self.token)

        return Network()

    # ----------------------------------------------------------------------------------------------------------- training
    def cross_entropy(self, out: Any, target: Any) -> Any:
        return self.F.cross_entropy(out.flatten(0, -2), target.flatten())

    def step(self, case: str, model: Any, loss_of: Callable, x: np.ndarray, y: np.ndarray, layout: str = "") -> Case:
        inputs, target, optimizer = self.tensor(x), self.tensor(y), self.optimizer(case, model)
        if layout:
            model, inputs = self.in_layout(layout, model), self.in_layout(layout, inputs)
        loss_fn = self.compiled(lambda x, y: loss_of(model(x), y))

        def step() -> float:
            optimizer.zero_grad()
            loss = loss_fn(inputs, target)
            loss.backward()
            optimizer.step()
            return loss.item()

        return training(case, step, layout)

    def in_layout(self, layout: str, x: Any) -> Any:
        return x.to(memory_format=getattr(self.t, layout))

    def train_case(self, case: str, layout: str = "") -> Case:
        """The training step of that name."""
        if case == "tiny":
            return self.step(case, self.mlp_model(data.TINY), self.F.mse_loss, *data.tiny_batch())
        model, batch = {
            "mlp adam": (lambda: self.mlp_model(data.MLP), data.mlp_batch),
            "mlp sgd": (lambda: self.mlp_model(data.MLP), data.mlp_batch),
            "cnn": (self.cnn_model, data.cnn_batch),
            "gpt": (self.gpt_model, data.gpt_batch),
        }[case]
        return self.step(case, model(), self.cross_entropy, *batch(), layout)

    def forward_case(self, case: str, layout: str = "") -> Case:
        """Inference: the forward pass of that name."""
        make, x = {
            "mlp, batch 1": (lambda: self.mlp_model(data.MLP), lambda: data.mlp_batch(1)[0]),
            "cnn, batch 1": (self.cnn_model, lambda: data.cnn_batch(1)[0]),
            "ResNet-18, batch 1": (self.resnet_model, data.resnet_input),
            "gpt forward": (self.gpt_model, lambda: data.gpt_batch()[0]),
        }[case]
        model, inputs = make().eval(), self.tensor(x())
        if layout:
            model, inputs = self.in_layout(layout, model), self.in_layout(layout, inputs)
        fn = self.compiled(model)

        def call() -> np.ndarray:
            with self.t.inference_mode():
                return self.force(fn(inputs))

        return Case(case, call, unit_of(case), lambda: [call()], variant=layout)

    # ---------------------------------------------------------------------------------------------------------- workloads
    def ops(self) -> Iterator[Case]:
        x, a, b = (self.t.full((8,), v) for v in (1.0, 1.0001, 1e-4))
        leaf = self.t.full((8,), 1.0, requires_grad=True)

        def chain(x: Any) -> Any:
            for _ in range(500):
                x = x * a
                x = x + b
            return self.force(x)

        for name, start in (("tiny op", x), ("tiny op, gradients recorded", leaf)):
            call = lambda start=start: chain(start)  # noqa: E731
            yield Case(name, call, "us", lambda call=call: [call()], 1000)

    def tiny(self) -> Iterator[Case]:
        yield self.train_case("tiny")

    def mlp(self) -> Iterator[Case]:
        yield self.train_case("mlp adam")
        yield self.train_case("mlp sgd")

    def cnn(self) -> Iterator[Case]:
        for layout in self.layouts:
            yield self.train_case("cnn", layout)

    def gpt(self) -> Iterator[Case]:
        yield self.train_case("gpt")
        yield self.forward_case("gpt forward")

    def latency(self) -> Iterator[Case]:
        yield self.forward_case("mlp, batch 1")
        for case in ("cnn, batch 1", "ResNet-18, batch 1"):
            for layout in self.layouts:
                yield self.forward_case(case, layout)

    def functions(self) -> dict[str, Callable]:
        t, F = self.t, self.F
        return {
            "copy": lambda a: a.clone(),
            "fused": lambda a, b, c: t.tanh(a * b + c) * t.sigmoid(a) - t.exp(-c * c),
            "gelu": lambda a: F.gelu(a, approximate="tanh"),
            "softmax": lambda a: t.softmax(a, -1),
            "layer norm": lambda a, w, b: F.layer_norm(a, (data.NORM_WIDTH,), w, b),
            "sum axis 0": lambda a: a.sum(0), "sum axis 1": lambda a: a.sum(1), "sum": lambda a: a.sum(),
        }  # fmt: skip

    def arrays(self, elements: int, label: str) -> Iterator[Case]:
        for name, fn in self.functions().items():
            arrays, moved = data.function_inputs(name, elements)
            inputs, compiled = [self.tensor(a) for a in arrays], self.compiled(fn)
            call = lambda f=compiled, inputs=inputs: self.force(f(*inputs))  # noqa: E731
            yield Case(f"{name}, {label}", call, "GB/s", lambda call=call: [call()], moved)

    def matmul(self) -> Iterator[Case]:
        for m, k, n in data.PRODUCTS:
            a, b = (self.tensor(x) for x in data.product_inputs(m, k, n))
            call = lambda a=a, b=b: self.t.matmul(a, b).numpy()  # noqa: E731
            yield Case(f"matmul {m}x{k}x{n}", call, "GFLOP/s", lambda call=call: [call()], 2.0 * m * k * n)

    def adam(self) -> Iterator[Case]:
        params, gradients = data.update_inputs()
        tensors = [self.t.nn.Parameter(self.tensor(p)) for p in params]
        for p, g in zip(tensors, gradients):
            p.grad = self.tensor(g)
        step = self.update(self.t.optim.Adam(tensors, lr=1e-5, **self.fused).step)

        def result() -> list[np.ndarray]:
            for _ in range(3):
                step()
            return [self.force(p) for p in tensors]

        yield Case("Adam, 10M parameters", step, "ms", result, tolerance=1e-6)

    def update(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """One step of an optimiser whose gradients are there, complete when it returns."""
        return self.compiled(step)


# -------------------------------------------------------------------------------------------------------------- frameworks
class Torch(TorchStyle):
    """PyTorch, eager: its fused optimisers, and both memory layouts for images."""

    fused, layouts = {"fused": True}, ("", "channels_last")

    def __init__(self, threads: int) -> None:
        import torch  # optional: a peer

        super().__init__(torch, threads)


class TorchCompile(Torch):
    """torch.compile, with weights frozen for inference."""

    def compiled(self, fn: Callable) -> Callable:
        return self.t.compile(fn, dynamic=False)  # the shapes and layouts of other cases do not count

    def latency(self) -> Iterator[Case]:
        import torch._inductor.config as settings  # optional: a peer

        settings.freezing = True
        yield from super().latency()

    def ops(self) -> Iterator[Case]:
        return iter(())

    matmul = ops


class Duo(TorchStyle):
    """duo's eager mode."""

    def __init__(self, threads: int) -> None:
        import duo  # here: a peer's process does without

        super().__init__(duo, threads)

    def update(self, step: Callable[[], Any]) -> Callable[[], Any]:
        update = self.compiled(step)

        def call() -> None:
            update()
            self.t.synchronize()

        return call


class DuoCompile(Duo):
    """@duo.compile: on a forward function, and on training steps as a whole."""

    def compiled(self, fn: Callable) -> Callable:
        return self.t.compile(fn)

    def step(self, case: str, model: Any, loss_of: Callable, x: np.ndarray, y: np.ndarray, layout: str = "") -> Case:
        inputs, target, optimizer = self.tensor(x), self.tensor(y), self.optimizer(case, model)

        @self.t.compile
        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return training(case, lambda: step(inputs, target).item())

    def ops(self) -> Iterator[Case]:
        return iter(())

    matmul = ops
