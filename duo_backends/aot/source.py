"""What an artefact is made of: `Source`, one or more programs over common weights and states, as a frontend hands it over.

Parameters of a program are inputs of the caller, weights (constants), or states, which a program may also give new values; results are outputs or
such values. `hoisted` computes what depends on weights alone once, here, so that the artefact holds what kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from duo_ir.core import Function
from duo_ir.errors import ArgumentError
from duo_ir.transforms.hoist import hoist
from duo_ir.transforms.panels import Columns
from duo_ir.transforms.simplify import simplify
from duo_ir.types import TensorType


@dataclass(frozen=True)
class Port:
    """What a parameter or result is: `kind` 'input', 'weight', 'state' or 'output', and its name among those."""

    kind: str
    name: str


@dataclass(frozen=True)
class Special:
    """What a program stands in for: the program `of`, whose free sizes are `dims`, where its `sizes` (name, number) are these."""

    of: str
    dims: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ProgramSource:
    """`params[k]` and `results[k]` say what the Function's are. `special`: where it stands in for another; `least`: the least values of its free sizes
    (both by `special.py`)."""

    name: str
    function: Function
    params: tuple[Port, ...]
    results: tuple[Port, ...]
    special: Special | None = None
    least: Mapping[str, int] = field(default_factory=dict)

    @property
    def dims(self) -> tuple[str, ...]:
        """The free sizes that a call gives."""
        return self.function.dims if self.special is None else self.special.dims

    def ports(self, kind: str) -> list[tuple[Port, TensorType]]:
        """The parameters (for outputs: the results) of that kind, with their types."""
        if kind == "output":
            pairs = zip(self.results, self.function.result_types)
        else:
            pairs = zip(self.params, self.function.param_types)
        return [(port, type) for port, type in pairs if port.kind == kind]


@dataclass(frozen=True)
class Training:
    """What makes programs a training step. `step`: the program that trains; `first`: the one for its first run, where that differs; `init`: the one that
    draws the states anew; `generator`: the state of the random numbers that they draw. `checkpoint`: tensors of a checkpoint (name in the file, state,
    whether it is of the optimizer); `metadata`: what a checkpoint says beside, with the optimizer's states, and without them."""

    step: str
    first: str | None
    init: str | None
    generator: str | None
    checkpoint: tuple[tuple[str, str, bool], ...]
    metadata: tuple[str, str]


@dataclass(frozen=True)
class Source:
    """`weights` and `states` (their values at the start) by name. Programs whose names begin with `_` are not for callers."""

    name: str
    programs: tuple[ProgramSource, ...]
    weights: Mapping[str, np.ndarray]
    states: Mapping[str, np.ndarray]
    training: Training | None = None

    @property
    def public(self) -> list[ProgramSource]:
        """The programs that callers see."""
        return [p for p in self.programs if not p.name.startswith("_")]

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not self.name.isascii():
            raise ArgumentError(f"an artefact's name must be a C identifier, not {self.name!r}")
        for program in self.programs:
            for port, type in [*program.ports("weight"), *program.ports("state")]:
                array = (self.weights if port.kind == "weight" else self.states)[port.name]
                if array.shape != type.shape or array.dtype != type.dtype.numpy:
                    raise ArgumentError(
                        f"{port.name} is {array.dtype}{list(array.shape)}, and the program reads {type}"
                    )


def hoisted(
    source: Source, columns: Columns | None, run: Callable[[Function, Sequence[np.ndarray]], Sequence[np.ndarray]]
) -> Source:
    """`source` with weights as its kernels read them; `run` computes a Function. Weights that no program reads any more are left out."""
    weights = dict(source.weights)
    programs = []
    for program in source.programs:
        numbers = [k for k, port in enumerate(program.params) if port.kind == "weight"]
        function = simplify(program.function)
        split = hoist(function, numbers, columns) if numbers else None
        if split is None:
            programs.append(replace(program, function=function))
            continue
        made = run(split.prologue, [weights[program.params[k].name] for k in split.constants])
        ports: list[Port] = []
        for array in made:
            name = f"{program.name}.{len(ports)}"
            while name in weights:
                name += "_"
            weights[name] = array
            ports.append(Port("weight", name))
        programs.append(_without_unread(replace(program, function=split.main, params=(*program.params, *ports))))
    read = {port.name for program in programs for port in program.params if port.kind == "weight"}
    return replace(source, programs=tuple(programs), weights={n: a for n, a in weights.items() if n in read})


def _without_unread(program: ProgramSource) -> ProgramSource:
    """Without parameters for weights that nothing reads."""
    function = program.function
    read = set(function.results).union(*[op.operands for op in function.ops])
    kept = [k for k, p in enumerate(function.params) if p in read or program.params[k].kind != "weight"]
    params = [function.params[k] for k in kept]
    names = [function.names[k] for k in kept]
    small = Function(params, function.ops, function.results, function.name, names)
    return replace(program, function=small, params=tuple([program.params[k] for k in kept]))
