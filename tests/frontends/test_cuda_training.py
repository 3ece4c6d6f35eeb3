"""Training on an (emulated) GPU gives the CPU's bits, eager and compiled; models and the state of optimizers move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import duo
from duo.nn import functional as F
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401

pytestmark = [needs_emulator, pytest.mark.usefixtures("gpu")]


def mlp() -> Any:
    return duo.nn.Sequential(duo.nn.Linear(5, 7), duo.nn.ReLU(), duo.nn.Dropout(0.3), duo.nn.Linear(7, 3))


class Block(duo.nn.Module):
    """An embedding, attention with a causal mask, a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = duo.nn.Embedding(6, 8)
        self.norm = duo.nn.LayerNorm(8)
        self.attend = duo.nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = duo.nn.Linear(8, 6)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        h = self.norm(x)
        x = x + self.attend(h, h, h, need_weights=False, is_causal=True)[0]
        return self.out(F.gelu(x)).reshape(-1, 6)


def batch(model: Callable[[], Any], device: str) -> tuple[Any, Any]:
    if model is mlp:
        return duo.randn(4, 5, device=device), duo.tensor([0, 2, 1, 1], device=device)
    return duo.tensor([[1, 5, 0], [2, 2, 4]], device=device), duo.tensor([5, 0, 2, 2, 4, 1], device=device)


def trained(model: Callable[[], Any], device: str, compiled: bool, steps: int = 4) -> list[Any]:
    """The losses of some steps of AdamW, parameters and slots after them."""
    duo.manual_seed(1)
    net = model().to(device)
    x, y = batch(model, device)
    opt = duo.optim.AdamW(net.parameters(), lr=0.01)

    def step() -> Any:
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    run = duo.compile(step) if compiled else step
    losses = []
    for k in range(steps):
        opt.param_groups[0]["lr"] = 0.01 / (k + 1)
        losses.append(run().item())
    slots = [t.tolist() for p in net.parameters() for t in opt.state[p].values()]
    assert {str(t.device) for p in net.parameters() for t in (p, p.grad, *opt.state[p].values())} == {device}
    if compiled:
        assert run.recordings == 2, run.explain()
    return [losses, [p.tolist() for p in net.parameters()], slots, duo.get_rng_state().tolist()]


@pytest.mark.parametrize("model", [mlp, Block])
def test_training_gives_the_bits_of_the_cpu(model):
    want = trained(model, "cpu", False)
    assert trained(model, "cuda:0", False) == want
    assert trained(model, "cuda:0", True) == want
