"""The workloads written by hand in NumPy, and models in ONNX Runtime. What either cannot do in reasonable code is left out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import data
from tests.bench.harness import Case, training, unit_of
from tests.bench.torch_style import Torch


class Numpy:
    """Forward, gradients and updates of the perceptrons by hand; the array functions; products by NumPy's BLAS."""

    def __init__(self, threads: int) -> None:
        self.threads = threads  # OPENBLAS_NUM_THREADS was set for this process

    def updater(self, rule: str, lr: float, params: list[np.ndarray]) -> Callable[[list[np.ndarray]], None]:
        """Updates in place; for Adam with the scalar factors outside the arrays."""
        f = np.float32
        first, second = ([np.zeros_like(p) for p in params] for _ in range(2))
        count = 0

        def update(gradients: list[np.ndarray]) -> None:
            nonlocal count
            count += 1
            one, two = 1 - data.BETA1**count, 1 - data.BETA2**count
            for p, g, m, v in zip(params, gradients, first, second):
                if rule == "sgd":
                    p -= f(lr) * g
                    continue
                m *= f(data.BETA1)
                m += f(1 - data.BETA1) * g
                v *= f(data.BETA2)
                v += f(1 - data.BETA2) * (g * g)
                size = np.sqrt(v)
                size *= f(two**-0.5)
                size += f(data.EPSILON)
                np.divide(m, size, out=size)
                size *= f(lr / one)
                p -= size

        return update

    def train(self, case: str, layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, y: np.ndarray) -> Case:
        params = [a for layer in layers for a in layer]
        update = self.updater(*data.OPTIMIZERS[case], params)
        weights, biases, rows = params[0::2], params[1::2], np.arange(len(x))
        last = len(weights) - 1

        def step() -> float:
            inputs, out = [], x
            for i, (w, b) in enumerate(zip(weights, biases)):
                inputs.append(out)
                out = out @ w + b
                if i < last:
                    out = np.maximum(out, 0)
            if y.dtype.kind == "f":
                error = out - y
                loss, g = (error * error).mean(), error * np.float32(2 / error.size)
            else:
                e = np.exp(out - out.max(1, keepdims=True))
                g = e / e.sum(1, keepdims=True)
                loss = -np.log(g[rows, y]).mean()
                g[rows, y] -= 1
                g /= np.float32(len(x))
            gradients: list[np.ndarray] = []
            for i in range(last, -1, -1):
                gradients[:0] = [inputs[i].T @ g, g.sum(0)]
                if i:
                    g = (g @ weights[i].T) * (inputs[i] > 0)
            update(gradients)
            return float(loss)

        return training(case, step)

    def ops(self) -> Iterator[Case]:
        x, a, b = (np.full(8, v, "f4") for v in (1.0, 1.0001, 1e-4))

        def chain() -> np.ndarray:
            y = x
            for _ in range(500):
                y = y * a
                y = y + b
            return y

        yield Case("tiny op", chain, "us", lambda: [chain()], 1000)

    def tiny(self) -> Iterator[Case]:
        yield self.train_case("tiny")

    def train_case(self, case: str, variant: str = "") -> Case:
        """The training step of that name. Raises LookupError for models that nobody writes by hand."""
        sizes, batch = {
            "tiny": (data.TINY, data.tiny_batch), "mlp adam": (data.MLP, data.mlp_batch), "mlp sgd": (data.MLP, data.mlp_batch),
        }[case]  # fmt: skip
        return self.train(case, data.mlp_params(sizes), *batch())

    def mlp(self) -> Iterator[Case]:
        yield self.train_case("mlp adam")
        yield self.train_case("mlp sgd")

    def latency(self) -> Iterator[Case]:
        params, x = data.mlp_params(data.MLP), data.mlp_batch(1)[0]

        def call() -> np.ndarray:
            out = x
            for i, (w, b) in enumerate(params):
                out = (np.maximum(out, 0) if i else out) @ w + b
            return out

        yield Case("mlp, batch 1", call, unit_of("mlp, batch 1"), lambda: [call()])

    def arrays(self, elements: int, label: str) -> Iterator[Case]:
        f = np.float32

        def softmax(a: np.ndarray) -> np.ndarray:
            e = np.exp(a - a.max(1, keepdims=True))
            e /= e.sum(1, keepdims=True)
            return e

        def layer_norm(a: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
            centred = a - a.mean(1, keepdims=True)
            centred *= 1 / np.sqrt((centred * centred).mean(1, keepdims=True) + f(1e-5))
            return centred * weight + bias

        functions: dict[str, Callable] = {
            "copy": np.copy, "fused": lambda a, b, c: np.tanh(a * b + c) * (1 / (1 + np.exp(-a))) - np.exp(-c * c),
            "gelu": lambda a: f(0.5) * a * (1 + np.tanh(f((2 / np.pi) ** 0.5) * (a + f(0.044715) * a * a * a))),
            "softmax": softmax, "layer norm": layer_norm, "sum axis 0": lambda a: a.sum(0),
            "sum axis 1": lambda a: a.sum(1), "sum": lambda a: a.sum(),
        }  # fmt: skip
        for name, fn in functions.items():
            inputs, moved = data.function_inputs(name, elements)
            call = lambda fn=fn, inputs=inputs: fn(*inputs)  # noqa: E731
            yield Case(f"{name}, {label}", call, "GB/s", lambda call=call: [call()], moved)

    def matmul(self) -> Iterator[Case]:
        for m, k, n in data.PRODUCTS:
            a, b = data.product_inputs(m, k, n)
            call = lambda a=a, b=b: a @ b  # noqa: E731
            yield Case(f"matmul {m}x{k}x{n}", call, "GFLOP/s", lambda call=call: [call()], 2.0 * m * k * n)

    def adam(self) -> Iterator[Case]:
        params, gradients = data.update_inputs()
        update = self.updater("adam", 1e-5, params)

        def result() -> list[np.ndarray]:
            for _ in range(3):
                update(gradients)
            return params

        yield Case("Adam, 10M parameters", lambda: update(gradients), "ms", result, tolerance=1e-6)


class Memcpy:
    """No framework but a yardstick: how fast the machine copies an array, in equal parts on each thread, into memory that is there. For the functions
    of large arrays that write as much as they read or less; starting a thread takes too long for small ones."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def arrays(self, elements: int, label: str) -> Iterator[Case]:
        if elements < 1 << 24:
            return
        source = np.ones(elements, "f4")
        parts = list(zip(np.array_split(np.zeros_like(source), self.threads), np.array_split(source, self.threads)))
        call = lambda: list(self.pool.map(np.copyto, *zip(*parts)))  # noqa: E731
        for name in data.FUNCTIONS:
            if not name.startswith("sum"):
                yield Case(f"{name}, {label}", call, "GB/s", None, 2.0 * source.nbytes)


class OnnxRuntime:
    """Inference of the models that PyTorch exports; needs torch and onnxscript beside onnxruntime."""

    MODELS = {
        "mlp, batch 1": lambda s: (s.mlp_model(data.MLP), data.mlp_batch(1)[0]),
        "cnn, batch 1": lambda s: (s.cnn_model(), data.cnn_batch(1)[0]),
        "ResNet-18, batch 1": lambda s: (s.resnet_model(), data.resnet_input()),
        "gpt forward": lambda s: (s.gpt_model(), data.gpt_batch()[0]),
    }

    def __init__(self, threads: int) -> None:
        import onnxruntime  # optional: a peer

        self.ort, self.threads = onnxruntime, threads

    def forward_case(self, case: str) -> Case:
        """Inference: the forward pass of that name."""
        _, x = self.MODELS[case](_Inputs())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            in_child(lambda: export(case, path))
            options = self.ort.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = self.threads, 3
            session = self.ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        call = lambda: session.run(None, feed)[0]  # noqa: E731
        return Case(case, call, unit_of(case), lambda: [call()])

    def gpt(self) -> Iterator[Case]:
        yield self.forward_case("gpt forward")

    def latency(self) -> Iterator[Case]:
        for case in ("mlp, batch 1", "cnn, batch 1", "ResNet-18, batch 1"):
            yield self.forward_case(case)


class _Inputs:
    """Makes no models: for the inputs alone."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def in_child(work: Callable[[], None]) -> None:
    """Runs it in a forked process, so that what it loads (torch and its threads) does not stay in this one."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("exporting the model by PyTorch failed; its output is above")


def export(case: str, path: Path) -> None:
    style = Torch(1)
    model, x = OnnxRuntime.MODELS[case](style)
    style.t.onnx.export(
        model.eval(), (style.tensor(x),), str(path), input_names=["x"], output_names=["y"], dynamo=True, external_data=False,
        verbose=False,
    )  # fmt: skip
