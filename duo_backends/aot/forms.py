"""Other forms of an artefact than a library: one relocatable object, LLVM text, assembler text."""

from __future__ import annotations

from duo_backends.aot.artefact import Artefact
from duo_backends.aot.library import exports_of, module_texts
from duo_backends.aot.targets import initialise
from duo_backends.cpu import jit
from duo_ir.text import to_text


def ir_text(made: Artefact) -> str:
    """The programs, as they are compiled."""
    return "\n".join(to_text(p.function) for p in made.source.programs)


def llvm_text(made: Artefact) -> str:
    """All modules one after the other; each is a module of its own."""
    return "\n".join(f"; ---- module {k}\n{text}" for k, text in enumerate(_texts(made)))


def assembly_text(made: Artefact) -> str:
    """All modules as assembler text."""
    initialise()
    return "\n".join(jit.assembly(text, made.target.machine) for text in _texts(made))


def object_code(made: Artefact) -> bytes:
    """One relocatable object with all code, of which other objects see what callers see; it has no weights in it (options.weights)."""
    initialise()
    machine = made.target.machine
    exports = set(exports_of(made.source.name, made.entries, made.trainer))
    return jit.linked_object(_texts(made), machine, exports)


def _texts(made: Artefact) -> list[str]:
    return list(module_texts(made.source.name, made.entries, made.codes, made.target, made.states, made.trainer, False))
