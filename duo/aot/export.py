"""`duo.export`: a function or module as a `.duo` file, or as a shared library with a C header."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from duo.aot.capture import session_source, source_of
from duo.numeric_mode import current
from duo_backends.aot.artefact import Artefact
from duo_backends.aot.gpu_targets import cuda_target, is_cuda
from duo_backends.aot.header import header_text
from duo_backends.aot.pack import pack
from duo_backends.aot.source import Source
from duo_backends.aot.targets import AotTarget
from duo_backends.aot.targets import target as target_of
from duo_ir.errors import ArgumentError

PRODUCER = "duo 0.1.0"


def export(
    function: Any, *specs: Any, path: Any, targets: Sequence[str] = ("native",), name: str | None = None
) -> None:
    """Compiles `function` (a module, or a function of tensors) for inputs of these specs and writes `path`: a `.duo` file, or for a path that ends in `.so`
    a shared library for C, with its header beside it.

    specs: `duo.spec`s, their text such as "f32[batch,784]" (a size that is a name is free), or example tensors, whose sizes are fixed. targets: of
    'x86-64-v3', 'x86-64-v4', 'aarch64-linux', 'native', and for a `.duo` file GPUs, 'cuda:sm_80', 'cuda:sm_90' and others (which need NVRTC or nvcc here,
    but no GPU; with the numerics of now, see `duo.set_numerics`); a library has one. name: what C functions begin with (default: from the file's name).
    Parameters and buffers go along with the values that they have now; a module in training mode is exported as it trains (`model.eval()` first for
    inference). Raises ArgumentError, ShapeError, and what `function` raises for such inputs."""
    write(source_of(function, specs, name or identifier(path)), path, targets)


def export_session(
    session: Any, fetches: Any, feeds: Any, path: Any, *, targets: Sequence[str] = ("native",), name: str | None = None
) -> None:
    """As `duo.export`, of what `session.run(fetches, feed_dict)` computes for the placeholders `feeds`, with the variables' values of now."""
    write(session_source(session, fetches, feeds, name or identifier(path)), path, targets)


def write(source: Source, path: Any, targets: Sequence[str]) -> None:
    """Writes what the path's ending asks for."""
    if os.fspath(path).endswith(".so"):
        write_library(source, path, library_target(targets, os.fspath(path)))
    else:
        write_duo(source, path, targets)


def library_target(targets: Sequence[str], what: str) -> AotTarget:
    """The target of `what`, a library or another form for a CPU. Raises ArgumentError."""
    for name in targets:
        if is_cuda(name):
            raise ArgumentError(f"{what} is code for a CPU; code for {name} goes into a .duo file, which duo.load_executable loads")
    if len(targets) != 1:
        raise ArgumentError(f"a library is for one target, not {len(targets)}: {what}")
    return target_of(targets[0])


def write_library(source: Source, path: Any, target: AotTarget) -> None:
    """Writes a shared library with its weights, and NAME.h beside it."""
    made = Artefact.of(source, target)
    write_file(path, made.library())
    header = os.path.join(os.path.dirname(os.path.abspath(path)), f"{source.name}.h")
    write_file(header, header_text(source, target.name, PRODUCER).encode())


def write_duo(source: Source, path: Any, targets: Sequence[str]) -> None:
    """Writes a `.duo` file, through a temporary one so that a crash leaves no half of it."""
    if not targets:
        raise ArgumentError("export needs a target, such as 'native'")
    made = list(dict.fromkeys([cuda_target(t, current()) if is_cuda(t) else target_of(t) for t in targets]))
    content = pack(source, made, PRODUCER)
    write_file(path, content)


def write_file(path: Any, content: bytes) -> None:
    """Writes a file whole."""
    temporary = f"{os.fspath(path)}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def identifier(path: Any) -> str:
    """A C identifier from a file's name."""
    stem = os.path.splitext(os.path.basename(os.fspath(path)))[0]
    if os.fspath(path).endswith(".so"):
        stem = stem.removeprefix("lib")
    return re.sub(r"\W", "_", stem, flags=re.ASCII).lstrip("0123456789_") or "model"
