"""Sources to `.duo` files and back: `pack` writes what `container.py` frames, `unpack_source` reads a file's programs again as a Source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from duo_backends.aot.artefact import Artefact
from duo_backends.aot.container import Manifest, section_bytes, write
from duo_backends.aot.source import Port, ProgramSource, Source, Training
from duo_backends.aot.targets import AotTarget
from duo_backends.aot.weights import PAD, arrays_of
from duo_ir.core import Function
from duo_ir.errors import FormatError
from duo_ir.text import parse, to_text
from duo_ir.types import Dim, DimLike, TensorType, dtype
from duo_ir.verify import verify


def pack(source: Source, targets: Sequence[AotTarget], producer: str) -> bytes:
    """The bytes of a `.duo` file with code for these targets. Weights are laid out for each target; those that are the same are there once."""
    sections: list[tuple[str, bytes, dict[str, Any]]] = []
    for target in targets:
        made = Artefact.of(source, target)
        rows = {
            "programs": [_program_row(p) for p in made.source.programs if p.special is None],
            "training": _training_row(made.source.training),
        }
        ir = json.dumps(rows, separators=(",", ":")).encode()
        number = []
        for kind, content in (("weights", made.block.content), ("ir", ir)):
            same = [k for k, s in enumerate(sections) if s[0] == kind and s[1] == content]
            if not same:
                sections.append((kind, content, {}))
                same = [len(sections) - 1]
            number.append(same[0])
        about = {
            "target": target.name,
            "arch": target.arch,
            "needs": target.needs,
            "weights": number[0],
            "ir": number[1],
        }
        sections.append(("code", made.library(embed=False), about))
    return write(source.name, producer, [describe_program(p) for p in source.public], _states(source), sections)


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
        ir, weights = manifest.sections[about["ir"]], manifest.sections[about["weights"]]
        rows = json.loads(bytes(section_bytes(content, ir, where)))
        programs = tuple([_program(row) for row in rows["programs"]])
        arrays = arrays_of(section_bytes(content, weights, where), where)
        states = [s["name"] for s in manifest.states]
        fixed = {n: a for n, a in arrays.items() if n not in states and not n.startswith(PAD)}
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
