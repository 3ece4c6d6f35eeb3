"""`tf.layers`: dense, dropout, flatten. Their weights are variables `name/kernel` and `name/bias`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duo import functional as F
from duo.graph import math, nn
from duo.graph.control_flow import cond
from duo.graph.initializers import zeros_initializer
from duo.graph.tensor import convert_to_tensor, named
from duo.graph.variables import get_variable, variable_scope
from duo_ir.errors import ShapeError


def dense(
    inputs: Any,
    units: int,
    activation: Callable[[Any], Any] | None = None,
    use_bias: bool = True,
    kernel_initializer: Any = None,
    bias_initializer: Any = None,
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
) -> Any:
    """activation(inputs @ kernel + bias): [..., n] -> [..., units], with a kernel [n, units]."""
    x = convert_to_tensor(inputs)
    n = x._type.shape[-1]
    if not isinstance(n, int):
        raise ShapeError(f"dense: the last size of {x.name!r} must be known, its shape is {x.shape!r}")
    with variable_scope(name, default_name="dense", reuse=reuse):
        kernel = get_variable("kernel", [n, units], x.dtype, kernel_initializer, kernel_regularizer, trainable)
        out = math.matmul(x, kernel) if x.ndim == 2 else named(x.graph, "Tensordot", None, lambda: F.matmul(x, kernel))
        if use_bias:
            bias = get_variable(
                "bias", [units], x.dtype, bias_initializer or zeros_initializer(), bias_regularizer, trainable
            )
            out = nn.bias_add(out, bias)
        return out if activation is None else activation(out)


def dropout(
    inputs: Any,
    rate: Any = 0.5,
    noise_shape: Any = None,
    seed: int | None = None,
    training: Any = False,
    name: str | None = None,
) -> Any:
    """Dropout while `training` (a Python bool or a bool tensor) holds."""
    x = convert_to_tensor(inputs)
    if isinstance(training, bool):
        return nn.dropout(x, rate=rate, seed=seed, name=name) if training else x
    return cond(training, lambda: nn.dropout(x, rate=rate, seed=seed), lambda: x, name=name or "dropout")


def flatten(inputs: Any, name: str | None = None) -> Any:
    """[batch, ...] -> [batch, everything else]."""
    x = convert_to_tensor(inputs)
    return named(x.graph, "flatten", name, lambda: F.flatten(x, 1) if x.ndim > 1 else F.unsqueeze(x, 1))
