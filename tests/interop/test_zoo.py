"""Models as users write them, trained from the same weights: PyTorch's losses; equal bits in duo's three modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import duo
import duo.graph as tf
from tests.interop.zoo import zoo

MODELS = zoo(duo, duo.nn, duo.nn.functional)
STEPS = 4
IN_ALL_MODES = (
    "convnext",
    "s2s",
    "gcn",
    "diffusion",
)  # without PyTorch: what each of these has was wrong in a mode once


def start(name: str) -> tuple[Any, Any, list[np.ndarray]]:
    duo.manual_seed(0)
    model = MODELS[name][0]()
    return model, duo.optim.AdamW(model.parameters(), lr=1e-2), list(MODELS[name][1](np.random.default_rng(0)))


def trained(
    name: str, state: dict[str, np.ndarray] | None = None, compiled: bool = False
) -> tuple[list[float], list[bytes]]:
    """Losses and weights after a few steps."""
    model, optimizer, arrays = start(name)
    if state is not None:
        model.load_state_dict({k: duo.tensor(v) for k, v in state.items()})

    def step(*given: Any) -> Any:
        optimizer.zero_grad()
        loss = MODELS[name][2](model, *given)
        loss.backward()
        duo.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    run = duo.compile(step) if compiled else step
    losses = [run(*map(duo.tensor, arrays)).item() for _ in range(STEPS)]
    return losses, [v.numpy().tobytes() for v in model.state_dict().values()]


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_pytorch(name):
    torch = pytest.importorskip("torch")
    make, arrays, loss_of = zoo(torch, torch.nn, torch.nn.functional)[name]
    torch.manual_seed(0)
    model = make()
    state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = [torch.tensor(a) for a in arrays(np.random.default_rng(0))]
    want = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, *given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        want.append(loss.item())
    eager = trained(name, state)
    np.testing.assert_allclose(eager[0], want, rtol=2e-6, atol=2e-6)
    assert trained(name, state, compiled=True) == eager


@pytest.mark.parametrize("name", IN_ALL_MODES)
def test_one_result_in_every_mode(name):
    model, optimizer, arrays = start(name)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = MODELS[name][2](model, *map(duo.tensor, arrays))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = [p.detach().numpy().tobytes() for p in model.parameters()]

    model, optimizer, arrays = start(name)
    with tf.Graph().as_default(), tf.Session() as session:
        fixed = name == "gcn"  # its numbers of nodes and edges are in its program
        fed = [tf.placeholder(a.dtype, a.shape if fixed else [None, *a.shape[1:]]) for a in arrays]
        loss = MODELS[name][2](model, *fed)
        step = optimizer.minimize(loss)
        session.run(tf.global_variables_initializer())
        assert [float(session.run([loss, step], dict(zip(fed, arrays)))[0]) for _ in range(STEPS)] == losses
    assert [p.detach().numpy().tobytes() for p in model.parameters()] == weights
