"""Figures of the device beside PyTorch's and JAX's where these are installed and have it: bandwidth, products, training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import duo
from duo.eager.flush import flush
from tests.bench import data
from tests.bench.torch_style import Duo, DuoCompile, TorchStyle

GIGA = 1 << 28  # f32 elements of a gibibyte


class Figure(NamedTuple):
    """`value` in `unit`, as `framework` has it."""

    what: str
    framework: str
    value: float
    unit: str


def seconds(call: Callable[[], Any], wait: Callable[[], None], least: float = 0.2) -> float:
    """Seconds of a call, when the device is kept busy: the median of five runs of as many calls as fill some time."""
    for _ in range(3):
        call()
    wait()
    start = time.perf_counter()
    call()
    wait()
    count = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        runs.append((time.perf_counter() - start) / count)
    return statistics.median(runs)


class Side:
    """A framework on the device: `style` makes models and functions by PyTorch's names."""

    def __init__(self, name: str, style: TorchStyle, wait: Callable[[], None]) -> None:
        self.name, self.style, self.wait, self.t = name, style, wait, style.t

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of a call whose result is wanted: what eager mode has only recorded is handed to the device."""
        if self.t is not duo:
            return seconds(call, self.wait)

        def run() -> None:
            out = call()
            flush()
            del out

        return seconds(run, self.wait)

    def tensor(self, array: np.ndarray) -> Any:
        return self.style.t.from_numpy(array).to("cuda")


class _OnGpu:
    """Mixed into a style: models and what they are given lie on the device, and nobody waits for a result."""

    moving = False

    def tensor(self, array: np.ndarray) -> Any:
        made = self.t.from_numpy(array.copy())  # type: ignore[attr-defined]
        return made.to("cuda") if self.moving else made

    def step(self, case: str, model: Any, *rest: Any) -> Any:
        model.to("cuda")
        self.moving = True
        try:
            return super().step(case, model, *rest)  # type: ignore[misc]
        finally:
            self.moving = False

    def force(self, out: Any) -> Any:
        return out


def sides() -> Iterator[Side]:
    """duo in two modes, and PyTorch in two where it has a device."""
    for name, base in (("duo", Duo), ("duo.compile", DuoCompile)):
        kind = type(f"{name} on the device", (_OnGpu, base), {})
        yield Side(name, kind(1), duo.synchronize)
    try:
        import torch  # optional: a peer
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    from tests.bench.torch_style import Torch, TorchCompile

    for name, peer in (("torch", Torch), ("torch.compile", TorchCompile)):
        options: dict[str, Any] = {"layouts": ("",)}
        if name == "torch.compile":
            options["compiled"] = lambda self, fn: torch.compile(fn, mode="max-autotune")  # with CUDA graphs
        kind = type(f"{name} on the device", (_OnGpu, peer), options)
        yield Side(name, kind(1), torch.cuda.synchronize)


def figures(
    elements: int = GIGA, product: int = 4096, tensor_product: int = 8192, limit: float = 600
) -> Iterator[Figure]:
    """All of them, as they come, for up to `limit` seconds."""
    end = time.monotonic() + limit
    for side in sides():
        if time.monotonic() > end:
            return
        yield from bandwidth(side, elements)
        yield from products(side, product, tensor_product)
        yield from steps(side)


def bandwidth(side: Side, elements: int) -> Iterator[Figure]:
    """GB/s of what moves memory: a copy first, which the others are measured by."""
    x = side.tensor(np.zeros(elements, "f4"))
    yield Figure("copy", side.name, 8 * elements / side.seconds(x.clone) / 1e9, "GB/s")
    del x
    for name, fn in side.style.functions().items():
        arrays, moved = data.function_inputs(name, elements)
        inputs = [side.tensor(a) for a in arrays]
        run = side.style.compiled(fn)
        yield Figure(name, side.name, moved / side.seconds(lambda run=run, inputs=inputs: run(*inputs)) / 1e9, "GB/s")


def products(side: Side, n: int, wide: int) -> Iterator[Figure]:
    """TFLOP/s of square products: f32, strict and fast (PyTorch: without TF32), and bf16 fast."""
    rng = np.random.default_rng(0)
    a, b = (side.tensor(rng.standard_normal((n, n), dtype="f4")) for _ in range(2))
    kinds = ["strict", "fast"] if side.t is duo else ["strict"]
    for kind in kinds:
        run = _numerics(side, kind, lambda: side.t.matmul(a, b))
        yield Figure(f"f32 {kind} {n}^3", side.name, 2 * n**3 / side.seconds(run) / 1e12, "TFLOP/s")
    c, d = (side.tensor(rng.standard_normal((wide, wide), dtype="f4")).to(side.t.bfloat16) for _ in range(2))
    run = _numerics(side, "fast", lambda: side.t.matmul(c, d))
    yield Figure(f"bf16 fast {wide}^3", side.name, 2 * wide**3 / side.seconds(run) / 1e12, "TFLOP/s")


def _numerics(side: Side, kind: str, call: Callable[[], Any]) -> Callable[[], Any]:
    if side.t is not duo or kind == "strict":
        return call

    def run() -> Any:
        with duo.numerics("fast"):
            out = call()
            flush()
            return out

    return run


def steps(side: Side) -> Iterator[Figure]:
    """us of a training step, and of its first call."""
    for case in ("mlp adam", "cnn", "gpt"):
        start = time.perf_counter()
        made = side.style.train_case(case)
        made.call()
        side.wait()
        yield Figure(f"{case}, first call", side.name, time.perf_counter() - start, "s")
        yield Figure(case, side.name, 1e6 * side.seconds(made.call), "us")


def table(found: list[Figure]) -> str:
    """One row for each thing, one column for each framework."""
    names = list(dict.fromkeys(f.framework for f in found))
    rows = []
    for what in dict.fromkeys(f.what for f in found):
        mine = {f.framework: f for f in found if f.what == what}
        unit = next(iter(mine.values())).unit
        cells = [f"{mine[n].value:.4g}" if n in mine else "" for n in names]
        rows.append([f"{what}, {unit}", *cells])
    head = ["", *names]
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (head, *rows))
