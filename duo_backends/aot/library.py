"""From programs to a shared library: kernels and the artefact's module as object code, put together by `elf.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from duo_backends.aot.elf import shared_library
from duo_backends.aot.entries import Entry, State, Trainer
from duo_backends.aot.module import module_text
from duo_backends.aot.targets import AotTarget, initialise
from duo_backends.binding import kernels_of
from duo_backends.cpu import jit
from duo_backends.cpu.code import KernelCode
from duo_backends.cpu.emit import compile_kernel
from duo_ir.kernels.kernel import Kernel
from duo_ir.kernels.program import Program

COMMON = (
    "create",
    "destroy",
    "message",
    "set_scratch",
    "state",
)  # functions of every library, after its prefix and `_`

TRAINER = ("init", "save", "load")  # of those that train


def emit_kernels(programs: Sequence[Program], target: AotTarget) -> dict[Kernel, KernelCode]:
    """The code of all kernels of the programs."""
    kernels = dict.fromkeys(k for program in programs for k in kernels_of(program))
    return {kernel: compile_kernel(kernel, target.code) for kernel in kernels}


def build_library(
    prefix: str,
    entries: Sequence[Entry],
    codes: Mapping[Kernel, KernelCode],
    target: AotTarget,
    *,
    weights: bytes = b"",
    states: Sequence[State] = (),
    trainer: Trainer | None = None,
) -> bytes:
    """The bytes of lib`prefix`.so. `weights` lie in it as they are."""
    initialise()
    texts = module_texts(prefix, entries, codes, target, states, trainer, bool(weights))
    objects = jit.object_codes(texts, target.machine)
    data_symbol = "duo_weights" if weights else ""
    exports = exports_of(prefix, entries, trainer)
    return shared_library(objects, target.arch, exports, f"lib{prefix}.so", weights, data_symbol)


def module_texts(
    prefix: str, entries: Sequence[Entry], codes: Mapping[Kernel, KernelCode], target: AotTarget, states: Sequence[State],
    trainer: Trainer | None, inside: bool,
) -> Iterator[str]:  # fmt: skip
    """LLVM text of all modules: the artefact's own, then one for each kernel. `inside`: whether weights are part of the library."""
    yield module_text(prefix, entries, target, states, trainer) + _weights_text(inside)
    yield from dict.fromkeys(code.text for code in codes.values())


def exports_of(prefix: str, entries: Sequence[Entry], trainer: Trainer | None) -> list[str]:
    """The functions that callers see."""
    names = [*COMMON, *(TRAINER if trainer is not None else ())]
    for e in entries:
        if not e.name.startswith("_"):
            names += [e.name, f"{e.name}_scratch_bytes"]
    return [f"{prefix}_{name}" for name in names]


def _weights_text(inside: bool) -> str:
    """`duo.weights`: where weights lie; 0 where the library has none in it."""
    declared = "@duo_weights = external hidden constant i8\n" if inside else ""
    value = "  %w = ptrtoint ptr @duo_weights to i64\n  ret i64 %w\n" if inside else "  ret i64 0\n"
    return f"{declared}define internal i64 @duo.weights() nounwind {{\n{value}}}\n"
