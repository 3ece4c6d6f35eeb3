"""Options and fixtures shared by all tests: golden files and their `--update-golden`, the hypothesis profile, and the round
trip through text of every Function that a test of the IR builds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import duo_ir.ops  # noqa: F401  (fills the registry that the text form reads)
from duo_ir.core import Builder, Function
from duo_ir.opdef import REGISTRY
from duo_ir.text import parse, to_text
from tests.cuda_emulator.support import toolkit

# DUO_EXAMPLES=1000 searches longer than a usual run does.
EXAMPLES = int(os.environ.get("DUO_EXAMPLES", "60"))
settings.register_profile("duo", deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("duo")

MOST_PER_TEST = 30  # functions taken through text, of those a test builds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says by what the CUDA tests reach their emulated GPU."""
    if any("test_cuda_" in report.nodeid for report in terminalreporter.stats.get("passed", ())):
        built = os.environ.get("DUO_TEST_PYCUDA") == "1" and toolkit() is not None
        pycuda = built or importlib.util.find_spec("pycuda") is not None
        terminalreporter.write_line(f"CUDA tests: emulated GPU through {'PyCUDA' if pycuda else 'ctypes (no PyCUDA here)'}")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares `text` with the file golden/<name> beside the test; --update-golden writes it."""

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing; run with --update-golden, then read it"
        assert text == path.read_text(), f"differs from {path}; if that is right, run with --update-golden"

    return check


@pytest.fixture(autouse=True)
def text_round_trip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test under tests/ir builds prints, and reads back to an equal Function."""
    if Path(request.path).parent.name != "ir":
        yield
        return
    built: list[Function] = []
    build = Builder.build

    def recording(self: Builder, *args: object, **kwargs: object) -> Function:
        function = build(self, *args, **kwargs)
        if len(built) < MOST_PER_TEST:
            built.append(function)
        return function

    monkeypatch.setattr(Builder, "build", recording)
    yield
    for function in built:
        if all(REGISTRY.get(op.definition.name) is op.definition for op in function.walk()):
            assert parse(to_text(function)).key() == function.key(), to_text(function)
