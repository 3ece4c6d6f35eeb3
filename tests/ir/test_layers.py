"""Imports only point down: between the three packages, and between the rooms of each (the house of the design)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {  # package -> the packages of duo it may import
    "duo_ir": {"duo_ir"},
    "duo_backends": {"duo_ir", "duo_backends"},
    "duo": {"duo_ir", "duo_backends", "duo"},
}
THIRD_PARTY = {"numpy", "llvmlite", "ml_dtypes", "safetensors"}  # what duo needs
OPTIONAL = {"pycuda", "onnx", "onnxruntime", "torch", "sklearn", "matplotlib", "pynvml"}  # imported where first used
LAZY = {"llvmlite"} | OPTIONAL  # may be imported inside a function

# Rooms from the ground up. A module belongs to the longest name that it starts with; it imports rooms of its own floor and below.
# Modules of one floor may use each other, floors may not.
FLOORS: dict[str, list[list[str]]] = {
    "duo_ir": [
        ["duo_ir.errors"],
        ["duo_ir.types"],
        ["duo_ir.scalar"],
        ["duo_ir.core", "duo_ir.opdef"],
        ["duo_ir.ops"],
        ["duo_ir.text", "duo_ir.verify", "duo_ir.interpret"],
        ["duo_ir.transforms"],
        ["duo_ir.kernels"],
        ["duo_ir.pipeline"],
    ],
    "duo_backends": [
        [
            "duo_backends.base",
            "duo_backends.binding",
            "duo_backends.blocks",
            "duo_backends.cache",
            "duo_backends.calls",
            "duo_backends.cells",
            "duo_backends.dlpack",
            "duo_backends.flat",
        ],
        ["duo_backends.cpu", "duo_backends.cuda"],
        ["duo_backends.aot"],
    ],
    "duo": [
        ["duo.dispatch", "duo.runtime"],
        ["duo.functional"],
        ["duo.tensor"],
        ["duo.eager", "duo.random"],
        ["duo.nn", "duo.optim"],
        ["duo.graph"],
    ],
}
OPEN = {"duo"}  # its single modules need no floor
MUTUAL = "duo_ir.ops."  # a derivative rule may use any op, so these import each other, as modules


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


ALL = {name: path for package in PACKAGES for name, path in modules(package).items()}


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that an import statement names; `from package import name` names package.name where that is a module."""
    if isinstance(node, ast.Import):
        yield from [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            inside = parts if ALL[module].name == "__init__.py" else parts[:-1]
            inside = inside[: len(inside) - node.level + 1]
            base = ".".join([*inside, base] if base else inside)
        for a in node.names:
            yield f"{base}.{a.name}" if f"{base}.{a.name}" in ALL else base


def running(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every import below `node` that runs, and whether it is inside a function: not what stands under `if TYPE_CHECKING:`."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, inside
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        for statement in node.orelse:
            yield from running(statement, inside)
    else:
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):  # expressions hold no imports
                yield from running(child, inside)


@cache
def imports(module: str) -> list[tuple[str, int, bool]]:
    """(module imported, line, whether inside a function) of all imports that run."""
    found = running(ast.parse(ALL[module].read_text()))
    return [(name, node.lineno, inside) for node, inside in found for name in imported(node, module)]


def floor_of(module: str) -> tuple[str, int] | None:
    """(package, floor number) of a module that has a floor."""
    best: tuple[int, str, int] | None = None
    for package, floors in FLOORS.items():
        for number, rooms in enumerate(floors):
            for room in rooms:
                if (module == room or module.startswith(room + ".")) and (best is None or len(room) > best[0]):
                    best = (len(room), package, number)
    return best[1:] if best else None


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below(package: str) -> None:
    wrong = [
        f"{module}:{line} imports {name}"
        for module in modules(package)
        for name, line, _ in imports(module)
        if name.split(".")[0] in PACKAGES and name.split(".")[0] not in PACKAGES[package]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_only_what_lies_below(package: str) -> None:
    wrong = []
    for module in modules(package):
        mine = floor_of(module)
        if mine is None:
            assert module == package or package in OPEN, f"{module} has no floor in FLOORS"
            continue
        for name, line, _ in imports(module):
            theirs = floor_of(name)
            if theirs is not None and theirs[0] == mine[0] and theirs[1] > mine[1]:
                wrong.append(f"{module}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_are_at_module_level(package: str) -> None:
    """Only optional packages, and what compiling needs first, are imported inside functions."""
    wrong = [
        f"{module}:{line} imports {name} inside a function"
        for module in modules(package)
        for name, line, nested in imports(module)
        if nested and name.split(".")[0] not in LAZY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_third_party_imports_are_declared(package: str) -> None:
    known = set(sys.stdlib_module_names) | THIRD_PARTY | OPTIONAL | set(PACKAGES)
    wrong = [
        f"{module}:{line} imports {name}"
        for module in modules(package)
        for name, line, _ in imports(module)
        if name.split(".")[0] not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_modules() -> None:
    """Module-level imports form no cycle, so the order in which modules are loaded never matters. `from package import module` counts
    as importing that module alone: packages' __init__ files are left out."""
    edges = {m: sorted({n for n, _, nested in imports(m) if n in ALL and n != m and not nested}) for m in ALL}
    state: dict[str, int] = {}
    path: list[str] = []
    cycles: list[str] = []

    def visit(module: str) -> None:
        state[module] = 1
        path.append(module)
        for other in edges[module]:
            if state.get(other) == 1:
                if module.startswith(MUTUAL) and other.startswith(MUTUAL):
                    continue
                cycles.append(" -> ".join([*path[path.index(other) :], other]))
            elif other not in state:
                visit(other)
        path.pop()
        state[module] = 2

    for module in ALL:
        if module not in state:
            visit(module)
    assert not cycles, "\n".join(cycles)
