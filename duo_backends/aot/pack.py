"""Sources to `.duo` files and back: `pack` writes what `container.py` frames, `unpack_source` reads a file's programs again as a Source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from duo_backends.aot.artefact import Artefact
from duo_backends.aot.container import Manifest, section_bytes, write
from duo_backends.aot.cuda_artefact import CudaArtefact
from duo_backends.aot.gpu_targets import CudaTarget
from duo_backends.aot.source import Port, ProgramSource, Source, Training
from duo_backends.aot.targets import AotTarget
from duo_backends.aot.weights import arrays_of, block_of
from duo_ir.core import Function
from duo_ir.errors import FormatError
from duo_ir.text import parse, to_text
from duo_ir.types import Dim, DimLike, TensorType, dtype
from duo_ir.verify import verify

Sections: TypeAlias = "list[tuple[str, bytes, dict[str, Any]]]"


def pack(source: Source, targets: Sequence[AotTarget | CudaTarget], producer: str) -> bytes:
    """The bytes of a `.duo` file with code for these targets. Weights are laid out for each CPU; those that are the same are there once. A GPU's are
    there beside only where no CPU's has the same array."""
    sections: Sections = []
    gpus = [CudaArtefact.of(source, t) for t in targets if isinstance(t, CudaTarget)]  # what they refuse is told first
    for target in targets:
        if isinstance(target, AotTarget):
            _pack_cpu(Artefact.of(source, target), sections)
    for made in gpus:
        _pack_cuda(made, sections)
    return write(source.name, producer, [describe_program(p) for p in source.public], _states(source), sections)


def _pack_cpu(made: Artefact, sections: Sections) -> None:
    about = {
        "target": made.target.name,
        "arch": made.target.arch,
        "needs": made.target.needs,
        "weights": _section("weights", made.block.content, sections),
        "ir": _section("ir", _ir(made.source), sections),
    }
    sections.append(("code", made.library(embed=False), about))


def _pack_cuda(made: CudaArtefact, sections: Sections) -> None:
    modules, plan, target = made.modules, made.plan, made.target  # what may fail first
    arrays = {**made.source.weights, **made.source.states}
    shared = [k for k, s in enumerate(sections) if s[0] == "weights"]
    numbers: list[int] = []
    for k in shared:
        there = arrays_of(memoryview(sections[k][1]), "")
        same = [n for n, a in arrays.items() if n in there and _equal(a, there[n])]
        if same and not numbers:  # names are looked up in one section of others, so that none hides another
            numbers.append(k)
            arrays = {n: a for n, a in arrays.items() if n not in same}
    if arrays or not numbers:
        numbers.insert(0, _section("weights", block_of(arrays).content, sections))
    about = {
        "target": target.name,
        "arch": target.arch,
        "numerics": target.numerics,
        "compiler": made.compiler.version,
        "weights": numbers,
        "ir": _section("ir", _ir(made.source), sections),
        "modules": [_section("cubin", m, sections) for m in modules],
    }
    sections.append(("launch", plan, about))


def _equal(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _ir(source: Source) -> bytes:
    rows = {
        "programs": [_program_row(p) for p in source.programs if p.special is None],
        "training": _training_row(source.training),
    }
    return json.dumps(rows, separators=(",", ":")).encode()


def _section(kind: str, content: bytes, sections: Sections) -> int:
    """The number of a section with this content."""
    for k, s in enumerate(sections):
        if s[0] == kind and s[1] == content:
            return k
    sections.append((kind, content, {}))
    return len(sections) - 1


def describe_program(p: ProgramSource) -> dict[str, Any]:
    """A program's signature, as manifests have it."""
    ports = {kind: [_port_row(port.name, type) for port, type in p.ports(kind)] for kind in ("input", "output")}
    return {"name": p.name, "dims": list(p.function.dims), "inputs": ports["input"], "outputs": ports["output"]}


def _states(source: Source) -> list[dict[str, Any]]:
    return [_port_row(name, TensorType(dtype(a.dtype), a.shape)) for name, a in source.states.items()]


def _port_row(name: str, type: TensorType) -> dict[str, Any]:
    return {"name": name, "dtype": type.dtype.name, "shape": [_dim_row(d) for d in type.shape]}


def _dim_row(d: DimLike) -> Any:
    return d if isinstance(d, int) else [[coefficient, *names] for names, coefficient in d.terms]


def dim_of(row: Any) -> DimLike:
    """A size of a manifest."""
    if isinstance(row, int):
        return row
    total: DimLike = 0
    for coefficient, *names in row:
        term: DimLike = coefficient
        for name in names:
            term = term * Dim.symbol(name)
        total = total + term
    return total


def _program_row(p: ProgramSource) -> dict[str, Any]:
    def rows(ports: Sequence[Port]) -> list[list[str]]:
        return [[port.kind, port.name] for port in ports]

    return {"name": p.name, "text": to_text(p.function, False), "params": rows(p.params), "results": rows(p.results)}


def _training_row(t: Training | None) -> Any:
    return None if t is None else asdict(t)


def _training(row: Any) -> Training | None:
    if row is None:
        return None
    checkpoint = tuple([(str(name), str(state), bool(optimizer)) for name, state, optimizer in row["checkpoint"]])
    whole, fresh = row["metadata"]
    return Training(row["step"], row["first"], row["init"], row["generator"], checkpoint, (str(whole), str(fresh)))


def unpack_source(manifest: Manifest, content: Any, where: str, code: int) -> Source:
    """The Source that the code of section number `code` was made of, to be compiled anew. Raises FormatError."""
    about = manifest.sections[code].about
    try:
        rows = json.loads(bytes(section_bytes(content, manifest.sections[about["ir"]], where)))
        programs = tuple([_program(row) for row in rows["programs"]])
        arrays: dict[str, np.ndarray] = {}
        for k in about["weights"] if isinstance(about["weights"], list) else [about["weights"]]:
            arrays = {**arrays_of(section_bytes(content, manifest.sections[k], where), where), **arrays}
        states = [s["name"] for s in manifest.states]
        read = {port.name for p in programs for port in p.params if port.kind == "weight"}
        fixed = {n: a for n, a in arrays.items() if n in read}
        return Source(manifest.name, programs, fixed, {n: arrays[n] for n in states}, _training(rows["training"]))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: its programs cannot be read: {error}") from None


def _program(row: dict[str, Any]) -> ProgramSource:
    function: Function = parse(row["text"])
    verify(function)
    params, results = [tuple([Port(kind, name) for kind, name in row[side]]) for side in ("params", "results")]
    if len(params) != len(function.params) or len(results) != len(function.results):
        raise ValueError("a program and its description differ")
    return ProgramSource(row["name"], function, params, results)


__all__ = ["describe_program", "dim_of", "pack", "unpack_source"]
