"""duo: a deep-learning framework with two frontends and one result.

`import duo` is eager mode and reads like PyTorch; `import duo.graph as tf` is graph mode and reads like TensorFlow 1. Both build the same
IR, which one compiler runs: the same program gives the same bits in either mode.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

import numpy as _numpy  # from here and not from deep within: with few frames below, CPython 3.11 loads it 15 ms sooner

from duo import autograd, debug, functional, nn, optim
from duo.control import cond, while_loop
from duo.devices import Device as device
from duo.devices import get_default_device
from duo.eager import native as _native
from duo.eager.creation import (
    arange,
    as_tensor,
    bernoulli,
    empty,
    eye,
    from_numpy,
    full,
    get_default_dtype,
    linspace,
    multinomial,
    normal,
    ones,
    rand,
    rand_like,
    randint,
    randn,
    randn_like,
    randperm,
    set_default_device,
    set_default_dtype,
    tensor,
    zeros,
)
from duo.eager.exchange import from_dlpack
from duo.eager.flush import synchronize
from duo.eager.mode import enable_grad, inference_mode, is_grad_enabled, no_grad, set_grad_enabled
from duo.eager.printing import set_printoptions
from duo.functional import *  # noqa: F403
from duo.io.checkpoint import load, save
from duo.numeric_mode import get_numerics, numerics, set_numerics
from duo.random import Generator, default_generator, get_rng_state, initial_seed, manual_seed, seed, set_rng_state
from duo.tensor import Tensor
from duo_backends.cpu.threads import get_num_threads, set_num_threads
from duo_ir.errors import DuoError
from duo_ir.types import bf16 as bfloat16
from duo_ir.types import bool_ as bool
from duo_ir.types import dtype as _dtype
from duo_ir.types import f16 as float16
from duo_ir.types import f32 as float32
from duo_ir.types import f64 as float64
from duo_ir.types import i8 as int8
from duo_ir.types import i16 as int16
from duo_ir.types import i32 as int32
from duo_ir.types import i64 as int64
from duo_ir.types import u8 as uint8

__version__ = "0.1.0"
# PyTorch's memory formats. They name no value: a convolution has its channels last whatever a program says.
channels_last, channels_last_3d, contiguous_format, preserve_format = (
    "channels_last", "channels_last_3d", "contiguous_format", "preserve_format"
)  # fmt: skip
half, double, long, short = float16, float64, int64, int16
float, int = float32, int32

if _TYPE_CHECKING:
    from duo import aot, cuda, func
    from duo.aot import export, export_training, load_executable, spec
    from duo.func import vmap
    from duo.jit.compile import compile
    from duo.jit.lowering import lower
    from duo.profiling import profile

# What a script without it need not load: name -> its module, and what it is there ("": the module itself).
_LATER = {
    "aot": ("duo.aot", ""), "export": ("duo.aot", "export"),
    "export_training": ("duo.aot", "export_training"), "load_executable": ("duo.executable", "load_executable"),
    "spec": ("duo.aot", "spec"), "cuda": ("duo.cuda", ""),
    "jit": ("duo.jit", ""), "compile": ("duo.jit.compile", "compile"), "lower": ("duo.jit.lowering", "lower"),
    "func": ("duo.func", ""), "vmap": ("duo.func", "vmap"), "profile": ("duo.profiling", "profile"),
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'duo' has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = _importlib.import_module(module)
    globals()[name] = out = getattr(found, attribute) if attribute else found
    return out


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
