"""The way of a program, on one page: Function -> Executable.

    differentiate   frontends expand gradients while they build, so a Function arrives with its derivatives in it
    batch           likewise what `vmap` asks for                                         transforms/batch.py
    simplify        canonical forms, folding, common subexpressions, dead code          transforms/simplify.py
    hoist           what depends on constant parameters apart, where the caller asks      transforms/hoist.py, panels.py
    layout          around convolutions: transposes cancel                              transforms/layout.py
    fuse            values that need memory, their loops, and which loops are one kernel  kernels/fuse.py
    plan            slots, lifetimes, donations, control flow                             kernels/plan.py
    generalize      without fusion: kernels for any sizes, so that new shapes compile nothing  kernels/generic.py
    compile         machine code, by the backend that the caller passes in

`DUO_DUMP=stage[,stage]` ('input', 'simplify', 'layout', 'fuse', 'plan', or 'all') prints the program after a stage to stderr; `DUO_VERIFY=1` verifies
the IR before and after each pass. Neither the passes nor fusion change a bit of any result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import Protocol, TypeVar

from duo_ir.core import Function
from duo_ir.errors import ArgumentError
from duo_ir.kernels.assemble import Built
from duo_ir.kernels.fuse import Fused, fuse
from duo_ir.kernels.generic import generalize_program
from duo_ir.kernels.plan import plan
from duo_ir.kernels.program import Program
from duo_ir.kernels.text import print_kernel, print_program
from duo_ir.text import to_text
from duo_ir.transforms.layout import propagate_layout
from duo_ir.transforms.simplify import simplify
from duo_ir.verify import verify

E = TypeVar("E", covariant=True)
STAGES = ("input", "simplify", "layout", "fuse", "plan")


class Compiles(Protocol[E]):
    """What is asked of a backend here."""

    def compile(self, program: Program, scalars: Collection[int] = (), numerics: str = "strict") -> E: ...


def compile(
    function: Function,
    backend: Compiles[E],
    *,
    fusion: bool = True,
    scalars: Collection[int] = (),
    numerics: str = "strict",
) -> E:
    """The executable of `function` on `backend`. Without `fusion`, one kernel per op: the same bits, compiled sooner.
    `scalars`: numbers of 0-d parameters whose values will be Python numbers. `numerics`: 'strict', or 'fast', in which a backend may use
    orders and roundings of its own."""
    return backend.compile(lower(function, fusion=fusion), scalars, numerics)


def lower(function: Function, fusion: bool = True) -> Program:
    """The Program of `function`: everything before the backend. Raises VerifyError under DUO_VERIFY=1 for a faulty Function."""
    _after("input", function)
    function = simplify(function)
    _after("simplify", function)
    placed = propagate_layout(function)
    if placed is not function:
        function = simplify(placed)
        _after("layout", function)
    fused = fuse(function, fusion)
    _show_kernels(fused)
    program = plan(fused, fusion=fusion)
    if not fusion:
        program = generalize_program(program)
    _show("plan", program)
    return program


def _after(stage: str, function: Function) -> None:
    if os.environ.get("DUO_VERIFY") == "1":
        verify(function)
    if _wanted(stage):
        _print(stage, to_text(function))


def _show_kernels(fused: Fused) -> None:
    if not _wanted("fuse"):
        return
    parts = [print_kernel(item.kernel) if isinstance(item, Built) else f"{item!r}\n" for item in fused.items]
    _print("fuse", "\n".join(parts))


def _show(stage: str, program: Program) -> None:
    if _wanted(stage):
        _print(stage, print_program(program))


def _wanted(stage: str) -> bool:
    asked = os.environ.get("DUO_DUMP")
    if not asked:
        return False
    stages = asked.split(",")
    for name in stages:
        if name not in STAGES and name != "all":
            raise ArgumentError(f"DUO_DUMP names {name!r}; the stages are {', '.join(STAGES)}, or all")
    return stage in stages or "all" in stages


def _print(stage: str, text: str) -> None:
    print(f"# ---- after {stage}\n{text}", file=sys.stderr)
