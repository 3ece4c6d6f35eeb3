"""torch.nn.utils: gradient clipping and flat parameter vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import duo.functional as F
from duo.eager.creation import zeros
from duo.eager.mode import no_grad
from duo.tensor import Tensor


def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
    """Scales all gradients in place so that their joint norm is at most `max_norm`; gives the norm before."""
    params: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return zeros(())
    with no_grad():
        first = grads[0].device
        total = F.norm(F.stack([F.norm(g, norm_type).to(first) for g in grads]), norm_type)
        scale = F.clamp(max_norm / (total + 1e-6), max=1.0)
        for g in grads:
            g.mul_(scale.to(g.device))
    return total


def clip_grad_value_(parameters: Any, clip_value: float) -> None:
    """Clips every gradient element to [-clip_value, clip_value], in place."""
    params: list[Any] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with no_grad():
        for p in params:
            if p.grad is not None:
                p.grad.clamp_(-clip_value, clip_value)


def parameters_to_vector(parameters: Iterable[Any]) -> Any:
    """All parameters as one flat vector."""
    return F.cat([p.reshape(-1) for p in parameters])


def vector_to_parameters(vec: Any, parameters: Iterable[Any]) -> None:
    """Writes a flat vector back into the parameters."""
    at = 0
    for p in parameters:
        n = p.numel()
        p.data.copy_(vec[at : at + n].reshape(p.shape))
        at += n
