"""Whole programs on the CUDA backend, on the emulated GPU: the tests of `test_conformance_programs.py` that are quick there, on another machine.

Every buffer is an allocation of its own, so an access out of bounds is an error; fused programs run under two schedules, others under the third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import conformance as c
import numpy as np
import pytest
from test_conformance_programs import (  # noqa: F401
    test_activations,
    test_attention_block,
    test_control_flow,
    test_embedding,
    test_joins_and_cuts,
    test_optimisers,
    test_random,
    test_symbolic_batch,
    test_training_step,
)

from duo_backends.cuda.backend import CudaBackend
from duo_ir.core import Function, bind_dims
from duo_ir.pipeline import compile as compile_function
from tests.cuda_emulator import build
from tests.cuda_emulator.support import driver, needs_emulator

pytestmark = needs_emulator


@cache
def gpu() -> CudaBackend:
    return CudaBackend(driver=driver(), compiler=build.EmulatorCompiler(), exact=True)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    """What the tests compare with the interpreter are results of the GPU."""

    def outcomes(
        function: Function, *runs: Sequence[np.ndarray], fusions: Sequence[bool] = (True, False), **_: Any
    ) -> Iterator[tuple[str, int, list[np.ndarray]]]:
        for fusion, order in ((True, "0"), (True, "2"), (False, "1")):
            if fusion not in fusions:
                continue
            monkeypatch.setenv("DUO_EMU_ORDER", order)
            executable = compile_function(function, gpu(), fusion=fusion)
            for k, arrays in enumerate(runs):
                bound = executable.bind(bind_dims(function.param_types, [a.shape for a in arrays]))
                for donated in (range(0), range(len(arrays))):
                    how = f"GPU, fusion {fusion}, order {order}, {len(donated)} inputs given away"
                    yield how, k, c.run_once(gpu(), function, bound, arrays, donated)

    monkeypatch.setattr(c, "outcomes", outcomes)
