"""The device's bits beside the CPU's: every op of the op table, programs of the frontends, errors. `small` is short enough for compute-sanitizer."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import duo
from duo import nn, optim, runtime
from duo_ir.errors import IndexOutOfRange
from duo_ir.pipeline import compile

ROOT = Path(__file__).resolve().parents[1]
F = nn.functional


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, NaN equal to NaN, as the numerics contract has it."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind in "biu":
        return bool((a == b).all())
    nan = np.isnan(a.astype(np.float64))
    return bool((nan == np.isnan(b.astype(np.float64))).all()) and a[~nan].tobytes() == b[~nan].tobytes()


def table(limit: float) -> tuple[int, list[str]]:
    """Every op of the op table, fused and not, for up to `limit` seconds: (programs compared, what differs)."""
    sys.path.insert(0, str(ROOT / "ir"))
    import op_table  # tests' own, found by its folder

    cpu, gpu = runtime.backend("cpu"), runtime.backend("cuda:0")
    wrong: list[str] = []
    count = 0
    end = time.monotonic() + limit
    rows = [list(op_table.cases([row])) for row in op_table.TABLE]
    for depth in range(max(map(len, rows))):  # each op's first case, then each one's second
        for cases in rows:
            if depth >= len(cases) or time.monotonic() > end:
                continue
            case = cases[depth]
            function, arrays = case.function(), case.arrays(0)
            for fusion in (True, False):
                results = []
                for backend in (cpu, gpu):
                    bound = compile(function, backend, fusion=fusion).bind({})
                    out = bound.run([backend.from_numpy(a) for a in arrays])
                    types = function.result_types
                    results.append([backend.to_numpy(b, t.dtype, t.static_shape()) for b, t in zip(out, types)])
                count += 1
                if not all(same(a, b) for a, b in zip(*results)):
                    wrong.append(f"{case}{'' if fusion else ', unfused'}")
    return count, wrong


def _trained(
    device: str, make: Callable[[], nn.Module], data: Callable[[int], tuple], steps: int, compiled: bool
) -> list[bytes]:
    """Losses and parameters of a few Adam steps, as bytes."""
    duo.manual_seed(0)
    model = make().to(device)
    optimizer = optim.Adam(model.parameters(), lr=1e-2)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    run = duo.compile(step) if compiled else step
    out = []
    for k in range(steps):
        x, y = (duo.tensor(a).to(device) for a in data(k))
        out.append(run(x, y).detach().cpu().numpy().tobytes())
    return out + [p.detach().cpu().numpy().tobytes() for p in model.parameters()]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16 * 4 * 4, 10))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        return self.head(self.block(x, is_causal=True).mean(1))


def _data(*shape: int) -> Callable[[int], tuple]:
    def make(k: int) -> tuple:
        rng = np.random.default_rng(k)
        return rng.standard_normal((9, *shape)).astype("f4"), rng.integers(0, 10, 9)

    return make


MODELS = {"MLP": (_mlp, _data(20)), "CNN": (_cnn, _data(1, 12, 12)), "transformer block": (_Attention, _data(17, 32))}


def models(steps: int = 5) -> Iterator[tuple[str, bool]]:
    """Training on the device and on the CPU, eager and compiled: (what, whether all bits are equal)."""
    for name, (make, data) in MODELS.items():
        want = _trained("cpu", make, data, steps, False)
        for compiled in (False, True):
            label = f"{name}, {'compiled' if compiled else 'eager'}, {steps} Adam steps"
            yield label, _trained("cuda", make, data, steps, compiled) == want


def artefacts(targets: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Code for GPUs from a file beside the file's code for the CPU: (what, whether all bits are equal). targets: of GPUs, the device's among them."""
    for name, (make, data) in MODELS.items():
        duo.manual_seed(0)
        model = make().eval()
        shape = ",".join(map(str, data(0)[0].shape[1:]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.duo"
            duo.export(model, f"f32[batch,{shape}]", path=path, targets=["native", *targets])
            here, there = (duo.load_executable(path, device=device) for device in ("cpu", "cuda"))
            good = there.target in targets
            for k in range(3):
                x = data(k)[0][: 9 - 4 * k]
                good = good and same(there(x), here(x)) and same(there(duo.tensor(x).cuda()).cpu().numpy(), here(x))
        yield f"{name} from a file, its cubin for {there.target}", good


def errors() -> Iterator[tuple[str, bool]]:
    """What is told when something is wrong."""
    table = duo.randn(5, 3, device="cuda")
    bad = table[duo.tensor([1, 7]).cuda()]
    try:
        bad.cpu().numpy()
        told = False
    except IndexOutOfRange as error:
        told = "7" in str(error)
    yield "an index out of range is told", told
    yield "and the device goes on", bool((table.cpu().numpy() == table.clone().cpu().numpy()).all())


def small() -> bool:
    """A few steps of every model: what compute-sanitizer watches."""
    duo.manual_seed(0)
    good = True
    for make, data in MODELS.values():
        want = _trained("cpu", make, data, 2, True)
        good = good and _trained("cuda", make, data, 2, True) == want
    return good


if __name__ == "__main__":
    sys.exit(0 if small() else 1)
