"""What is timed inside this process. Each function gives the cases of one workload: the same inputs and mathematics per framework."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import duo
import duo.graph as tf
from tests.bench.harness import Case, installed


def frameworks(threads: int) -> Iterator[tuple[str, Any]]:
    """(name, module) of those with PyTorch's names, told how many threads to use."""
    duo.set_num_threads(threads)
    yield "duo", duo
    if installed("torch"):
        import torch  # optional: a peer

        torch.set_num_threads(threads)
        yield "torch", torch


def force(tensor: Any) -> Any:
    """The values, as an array without a copy: lazily recorded work has run."""
    return np.asarray(tensor.detach())


# --------------------------------------------------------------------------------------------------------- small things
def chain(threads: int) -> Iterator[Case]:
    """Microseconds per recorded op: 1000 multiplications and additions of eight numbers, then a look at the result."""

    def steps(x: Any, a: Any, b: Any) -> Any:
        for _ in range(500):
            x = x * a
            x = x + b
        return force(x)

    for name, t in frameworks(threads):
        x, a, b = t.full((8,), 1.0), t.full((8,), 1.0001), t.full((8,), 1e-4)
        leaf = t.full((8,), 1.0, requires_grad=True)
        yield Case("eager op", name, functools.partial(steps, x, a, b), "us", 1000)
        yield Case("eager op, with gradients", name, functools.partial(steps, leaf, a, b), "us", 1000)
    x, a, b = np.full(8, 1.0, "f4"), np.full(8, 1.0001, "f4"), np.full(8, 1e-4, "f4")

    def numpy_steps() -> Any:
        y = x
        for _ in range(500):
            y = y * a
            y = y + b
        return y

    yield Case("eager op", "numpy", numpy_steps, "us", 1000)


def _mlp(t: Any, sizes: tuple[int, ...]) -> Any:
    layers: list[Any] = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += ([t.nn.ReLU()] if i else []) + [t.nn.Linear(n, m)]
    return t.nn.Sequential(*layers)


def _training(t: Any, model: Any, optimizer: Any, loss_of: Callable, x: Any, y: Any) -> tuple[Callable, Callable]:
    """(a step that gives its loss as a tensor, the same with the loss read)."""

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step, lambda: step(x, y).item()


def simplenet(threads: int) -> Iterator[Case]:
    """A training step of 10-5-1 with 32 rows: SGD, mean squared error."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 10), "f4"), rng.standard_normal((32, 1), "f4")
    for name, t in frameworks(threads):
        t.manual_seed(0)
        model, data = _mlp(t, (10, 5, 1)), (t.from_numpy(x.copy()), t.from_numpy(y.copy()))
        optimizer = t.optim.SGD(model.parameters(), lr=0.01)
        _, run = _training(t, model, optimizer, t.nn.functional.mse_loss, *data)
        yield Case("step 10-5-1, batch 32", name, run, "us")
    model = _mlp(duo, (10, 5, 1))
    optimizer = duo.optim.SGD(model.parameters(), lr=0.01)
    data = duo.tensor(x), duo.tensor(y)
    step = duo.compile(_training(duo, model, optimizer, duo.nn.functional.mse_loss, *data)[0])
    yield Case("step 10-5-1, batch 32", "duo.compile", lambda: step(*data).item(), "us")
    with tf.Graph().as_default() as graph:
        model = _mlp(duo, (10, 5, 1))
        images, targets = tf.placeholder(tf.float32, [32, 10]), tf.placeholder(tf.float32, [32, 1])
        loss = duo.nn.functional.mse_loss(model(images), targets)
        train = duo.optim.SGD(model.parameters(), lr=0.01).minimize(loss)
    session, feed = tf.Session(graph=graph), {images: x, targets: y}
    yield Case("step 10-5-1, batch 32", "duo.graph", lambda: session.run([loss, train], feed), "us")


def mlp(threads: int) -> Iterator[Case]:
    """A training step of 784-512-256-10 with 128 rows: Adam, cross-entropy."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((128, 784), "f4"), rng.integers(0, 10, 128)
    sizes = (784, 512, 256, 10)
    for name, t in frameworks(threads):
        t.manual_seed(0)
        model, data = _mlp(t, sizes), (t.from_numpy(x.copy()), t.from_numpy(y.copy()))
        fused = {"fused": True} if name == "torch" else {}
        optimizer = t.optim.Adam(model.parameters(), lr=1e-4, **fused)
        _, run = _training(t, model, optimizer, t.nn.functional.cross_entropy, *data)
        yield Case("step 784-512-256-10, batch 128", name, run, "us")
    model = _mlp(duo, sizes)
    optimizer = duo.optim.Adam(model.parameters(), lr=1e-4)
    data = duo.tensor(x), duo.tensor(y)
    step = duo.compile(_training(duo, model, optimizer, duo.nn.functional.cross_entropy, *data)[0])
    yield Case("step 784-512-256-10, batch 128", "duo.compile", lambda: step(*data).item(), "us")


# --------------------------------------------------------------------------------------------------------- large things
def gemm(threads: int) -> Iterator[Case]:
    """Square f32 products, 64 to 1024."""
    rng = np.random.default_rng(0)
    for n in (64, 128, 256, 512, 1024):
        a, b = rng.standard_normal((n, n), "f4"), rng.standard_normal((n, n), "f4")
        work = 2.0 * n**3
        for name, t in frameworks(threads):
            ta, tb = t.from_numpy(a.copy()), t.from_numpy(b.copy())
            yield Case(f"matmul {n}^3", name, functools.partial(_look, t.matmul, ta, tb), "GFLOP/s", work)
        yield Case(f"matmul {n}^3", "numpy", _numpy_matmul(a, b, threads), "GFLOP/s", work)


def _numpy_matmul(a: np.ndarray, b: np.ndarray, threads: int) -> Callable[[], Any]:
    """NumPy's product on that many threads, where threadpoolctl is installed to see to it."""
    if not installed("threadpoolctl"):
        return lambda: a @ b
    import threadpoolctl  # optional: comes with scikit-learn

    threadpoolctl.threadpool_limits(threads, user_api="blas")
    return lambda: a @ b


def _look(fn: Callable, *arguments: Any) -> Any:
    return force(fn(*arguments))


def arrays(threads: int) -> Iterator[Case]:
    """A million f32: softmax, layer norm, GELU, sums. GB/s counts each input read once and each output written once."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 1024), "f4")
    g, b = rng.standard_normal(1024, "f4"), rng.standard_normal(1024, "f4")
    for name, t in frameworks(threads):
        X, G, B = t.from_numpy(x.copy()), t.from_numpy(g.copy()), t.from_numpy(b.copy())
        F = t.nn.functional
        todo: dict[str, tuple[Callable, float]] = {
            "softmax": (lambda t=t, X=X: t.softmax(X, -1), 2),
            "layer norm": (lambda F=F, X=X, G=G, B=B: F.layer_norm(X, (1024,), G, B), 2),
            "gelu": (lambda F=F, X=X: F.gelu(X), 2),
            "sum axis 0": (lambda X=X: X.sum(0), 1),
            "sum axis 1": (lambda X=X: X.sum(1), 1),
            "sum": (lambda X=X: X.sum(), 1),
        }
        for what, (fn, passes) in todo.items():
            yield Case(f"{what}, 1M", name, functools.partial(_look, fn), "GB/s", passes * x.nbytes)
    for what, call in {
        "sum axis 0": lambda: x.sum(0),
        "sum axis 1": lambda: x.sum(1),
        "sum": lambda: x.sum(),
    }.items():
        yield Case(f"{what}, 1M", "numpy", call, "GB/s", x.nbytes)


WORKLOADS: dict[str, Callable[[int], Iterator[Case]]] = {
    "chain": chain, "simplenet": simplenet, "mlp": mlp, "gemm": gemm, "arrays": arrays,
}  # fmt: skip
