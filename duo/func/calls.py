"""Modules as functions of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from duo import functional as F
from duo.nn.module import Module
from duo_ir.errors import ArgumentError, ShapeError


def functional_call(
    module: Module, parameter_and_buffer_dicts: Any, args: Any = None, kwargs: Mapping[str, Any] | None = None
) -> Any:
    """module(*args, **kwargs) with the parameters and buffers of the dict (or dicts) given in the place of its own, by their dotted names.

    Those not named are the module's. `args` is a tuple, or one argument. The values may be any tensors of the same shapes: those that `grad` or
    `vmap` pass in, for one. Tied parameters change together. Raises ArgumentError for names that the module does not have.
    """
    dicts = parameter_and_buffer_dicts
    given: dict[str, Any] = {}
    for d in dicts if isinstance(dicts, (list, tuple)) else (dicts,):
        given.update(d)
    args = () if args is None else args if isinstance(args, tuple) else (args,)
    with replaced(module, given):
        return module(*args, **(kwargs or {}))


@contextmanager
def replaced(module: Module, given: Mapping[str, Any]) -> Iterator[None]:
    """The module with other tensors in its tables, which are put back after. The tables are written past their watch: nothing that a compiled
    function could see later has changed."""
    places: list[tuple[dict, str, Any]] = []  # every name of every parameter, also of tied ones
    wanted: dict[int, Any] = {}
    names = {}
    for path, part in module.named_modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    full = f"{path}.{name}" if path else name
                    names[full] = tensor
                    places.append((table, name, tensor))
    for full, new in given.items():
        if full not in names:
            raise ArgumentError(
                f"functional_call: {type(module).__name__} has no parameter or buffer {full!r}; it has {', '.join(names) or 'none'}"
            )
        if new._type.shape != names[full]._type.shape:
            raise ShapeError(f"functional_call: {full!r} has type {names[full]._type}, not {new._type}")
        wanted[id(names[full])] = new
    changed = [(table, name, tensor) for table, name, tensor in places if id(tensor) in wanted]
    try:
        for table, name, tensor in changed:
            dict.__setitem__(table, name, wanted[id(tensor)])
        yield
    finally:
        for table, name, tensor in changed:
            dict.__setitem__(table, name, tensor)


def stack_module_state(models: Sequence[Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, buffers) of modules of one structure, each stacked along a new dim 0: what `vmap` over an ensemble takes.

    The parameters are new leaves that require gradients where the models' do.
    """
    if not models:
        raise ArgumentError("stack_module_state: it needs at least one module")
    if len({type(m) for m in models}) != 1:
        raise ArgumentError(
            f"stack_module_state: the modules are of different classes: {[type(m).__name__ for m in models]}"
        )
    params = {}
    for name, p in models[0].named_parameters():
        stacked = F.stack([m.get_parameter(name).detach() for m in models])
        params[name] = stacked.requires_grad_() if p.requires_grad else stacked
    every = [dict(m.named_buffers()) for m in models]
    return params, {name: F.stack([b[name].detach() for b in every]) for name in every[0]}
