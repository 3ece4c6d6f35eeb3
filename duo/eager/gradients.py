"""Asking for gradients: `backward` and `grad` of eager tensors.

Most backward passes start at a single value in the open trace and are one entry (autograd.py); what is not as plain takes an Engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duo.eager.autograd import Engine, GradLeaf, backward_at_once, call_hooks, check_device_of
from duo.eager.trace import hooks, state
from duo.eager.values import conform, filled
from duo.tensor import Tensor
from duo_ir.errors import ArgumentError, GradientError, ShapeError


def _ones(tensor: Any) -> Any:
    return hooks.tensor(filled(1, tensor._type, tensor._val.info.device))


def _check_roots(tensors: Sequence[Any], gradients: Sequence[Any]) -> list[tuple[Any, Any]]:
    roots = []
    for t, g in zip(tensors, gradients):
        if g is None and t._type.size != 1:
            raise GradientError(
                f"a gradient can be implied for one element only; this tensor is {t._type}: pass gradient=..."
            )
        if g is not None:
            check_device_of("the gradient given is", g, t)
            if g._type.shape != t._type.shape:
                raise ShapeError(f"the gradient given has shape {list(g._type.shape)}, the tensor is {t._type}")
            if g._type.dtype is not t._type.dtype:
                g = hooks.tensor._apply(conform, (g,), (t._type.dtype, t._type.shape))
        if state.capture is None:  # a second reading could record and flush
            t, g = hooks.tensor(t._value()), None if g is None else hooks.tensor(g._value())
        roots.append((t, g))
    return roots


def backward(
    tensors: Any,
    gradients: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Adds the gradients of sum(tensor * gradient) to `.grad` of the leaves (or of `inputs` only). One tensor or several."""
    if gradients is None and not create_graph and inputs is None and state.capture is None:  # noqa: SIM102
        if isinstance(tensors, hooks.tensor) and _backward_at_once(tensors, bool(retain_graph)):
            return
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    gradients = (
        [None] * len(tensors)
        if gradients is None
        else [gradients]
        if isinstance(gradients, Tensor)
        else list(gradients)
    )
    if len(gradients) != len(tensors):
        raise ArgumentError(f"backward got {len(tensors)} tensors and {len(gradients)} gradients")
    retain = create_graph if retain_graph is None else retain_graph
    engine = Engine(hooks.tensor, (), retain, create_graph)
    engine.run(_check_roots(tensors, gradients), _ones)
    given: list[Any] = [inputs] if isinstance(inputs, Tensor) else list(inputs or ())
    chosen = None if inputs is None else {t._leaf for t in given}
    for leaf, gradient in engine.cotangents.items():
        if chosen is None or leaf in chosen:
            _accumulate(leaf, gradient, create_graph)


def _backward_at_once(tensor: Any, retain: bool) -> bool:
    """The backward pass that most programs have, from a loss in the open trace; False where it is another."""
    val = tensor._val if tensor._storage is None else tensor._current()
    found = backward_at_once(val, retain) if not val.info.type.shape else None
    if found is None:
        return False
    for leaf, _ in found:
        if leaf.__class__ is not GradLeaf:
            engine = Engine(hooks.tensor, (), retain, False)
            engine.cotangents = {leaf: hooks.tensor(val) for leaf, val in found}
            engine.go_on()
            found = [(leaf, gradient._value()) for leaf, gradient in engine.cotangents.items()]
            break
    for leaf, val in found:
        if leaf.grad is None and not leaf.hooks:
            leaf.grad = hooks.tensor(val)
        else:
            _accumulate(leaf, hooks.tensor(val), False)
    return True


def _accumulate(leaf: GradLeaf, gradient: Any, create_graph: bool) -> None:
    """Adds the gradient, once the leaf's hooks have seen it, to `.grad`."""
    gradient = call_hooks(leaf.hooks, gradient)
    if state.capture is not None:
        state.capture.read_leaf(leaf)
    if leaf.grad is None:
        leaf.grad = hooks.tensor(gradient._value())  # a tensor of its own: adding to it later changes nobody else's
    elif create_graph:
        leaf.grad = leaf.grad + gradient
    else:
        leaf.grad._write((leaf.grad + gradient)._value())


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple:
    """Gradients of sum(output * grad_output) with respect to each of `inputs`, leaves or not; nothing is added to `.grad`."""
    outs: list[Any] = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    ins: list[Any] = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = (
        [None] * len(outs)
        if grad_outputs is None
        else ([grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs))
    )
    for t in ins:
        if not t.requires_grad:
            raise GradientError(
                f"an input {t._type} of grad does not require grad; call requires_grad_() before using it"
            )
    retain = create_graph if retain_graph is None else retain_graph
    vals = [t._value() for t in ins]
    engine = Engine(hooks.tensor, [v for t, v in zip(ins, vals) if t._leaf is None], retain, create_graph)
    engine.run(_check_roots(outs, grads), _ones)
    out = []
    for t, v in zip(ins, vals):
        gradient = engine.cotangents.get(t._leaf) if t._leaf is not None else engine.found.get(v)
        if gradient is None and not allow_unused:
            raise GradientError(
                f"an input {t._type} of grad was not used to compute the outputs; pass allow_unused=True for None"
            )
        out.append(gradient)
    return tuple(out)


__all__ = ["backward", "grad"]
