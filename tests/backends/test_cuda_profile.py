"""Profiles of programs on the emulated GPU, what it does at most, and kernels as text."""

from __future__ import annotations

import time

import numpy as np
import pytest

from duo_backends.binding import kernels_of
from duo_backends.cuda import compiler
from duo_backends.cuda.backend import CudaBackend
from duo_backends.cuda.peaks import measure
from duo_ir.core import function_of
from duo_ir.errors import ArgumentError
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.types import TensorType, f32
from tests.cuda_emulator import build
from tests.cuda_emulator.support import driver, needs_emulator

pytestmark = needs_emulator


@pytest.fixture
def gpu():
    return CudaBackend(driver=driver(), compiler=build.EmulatorCompiler())


def program(gpu):
    x = TensorType(f32, (40, 600))
    return gpu.compile(lower(function_of(lambda x: (nd.sum(x * 2.0), x + 1), x), False)).bind({})


def test_each_kernel_is_timed_on_the_clock_of_the_host(gpu):
    bound, array = program(gpu), np.ones((40, 600), "f4")
    x = gpu.from_numpy(array)
    for _ in range(3):
        bound.run([x])
    gpu.synchronize()
    replays = gpu.runtime.replays
    began = time.perf_counter_ns()
    with gpu.recording(100) as recording:
        for _ in range(2):
            total, _ = bound.run([x])
        gpu.synchronize()
    ended = time.perf_counter_ns()
    events = recording.events()
    assert gpu.runtime.replays == replays and len(events) == 6 and recording.lost == 0
    assert [e.note.description for e in events[:3]] == [e.note.description for e in events[3:]]
    assert len({e.note.description for e in events}) == 2
    for e in events:
        assert began <= e.start <= e.end <= ended + 1000 and e.note.traffic > 0
    bound.run([x])
    assert len(recording.events()) == 6 and gpu.to_numpy(total, f32, ()) == 48000


def test_no_room_and_no_second_profile(gpu):
    bound, x = program(gpu), gpu.from_numpy(np.ones((40, 600), "f4"))
    with gpu.recording(2) as recording:
        with pytest.raises(ArgumentError, match="being made already"), gpu.recording(2):
            pass
        bound.run([x])
    assert len(recording.events()) == 2 and recording.lost == 1
    with pytest.raises(ArgumentError, match="room for at least one"):
        gpu.recording(0)


def test_peaks_are_measured(gpu):
    found = measure(gpu, 1 << 16, 1, 2)
    assert found.gflops > 0 and found.gbytes > 0


def test_kernels_as_text(gpu, monkeypatch):
    (kernel,) = dict.fromkeys(kernels_of(lower(function_of(lambda x: x + 1, TensorType(f32, (8,))))))
    monkeypatch.setattr(compiler, "_tool", lambda name: None)
    assert gpu.assembly(kernel) == gpu.emit(kernel).text and "__global__" in gpu.assembly(kernel)
    monkeypatch.setattr(compiler, "_tool", lambda name: "/bin/echo")
    assert gpu.assembly(kernel).splitlines()[-1].startswith("-sass ")
