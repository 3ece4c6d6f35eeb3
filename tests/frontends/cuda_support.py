"""The emulated GPU as the device 'cuda:0' of the frontends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import duo
from duo import runtime
from duo_backends.cuda.backend import CudaBackend
from tests.cuda_emulator import build
from tests.cuda_emulator.support import driver


def emulated(number: int = 0) -> CudaBackend:
    """A backend on the emulated GPU under another number."""
    return CudaBackend(number, driver=driver(), compiler=build.EmulatorCompiler())


@pytest.fixture
def gpu() -> Iterator[CudaBackend]:
    """The backend of 'cuda:0' during a test."""
    duo.synchronize()
    runtime.use_backend("cuda:0", backend := emulated_once())
    yield backend
    duo.random.default_generator.manual_seed(0)
    duo.synchronize()
    runtime.use_backend("cuda:0", None)


_made: list[CudaBackend] = []


def emulated_once() -> CudaBackend:
    """One for the process: what it has compiled stays."""
    if not _made:
        _made.append(emulated())
    return _made[0]
