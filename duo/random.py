"""Random numbers: generators whose state is a tensor, so that programs carry the stream with them.

A Generator's state is i64[2]: (seed, counter). Every random op reads it, draws n words of the Philox stream at the counter, and
leaves a state with the counter moved on; both modes and compiled programs therefore draw the same numbers in program order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from duo.devices import Device
from duo.dispatch import apply
from duo.eager.moving import bring
from duo.eager.tensor import EagerTensor, tensor_of
from duo.eager.trace import roaming
from duo.eager.trace import state as tracing
from duo.runtime import check_device
from duo.tracing import innermost


class Generator:
    """A stream of random numbers, the same on every device. `manual_seed(seed)` starts it again; `get_state`/`set_state` save and restore it.
    `device` is where it says that it is; its state is where it was drawn from last."""

    def __init__(self, device: object = "cpu") -> None:
        self.device = Device(check_device(device))
        self._state = _state(0, 0)
        roaming[id(self._state)] = self._state

    @property
    def cell(self) -> EagerTensor:
        """The tensor that holds the state, whatever is being traced."""
        return self._state

    @property
    def state(self) -> Any:
        """i64[2]. What is stored here may come from either mode: a graph's new state is written when the graph runs. Inside a function that is
        traced (`duo.vmap`), what stands for it there."""
        around = innermost()
        return self._state if around is None else around.state(self._state)

    @state.setter
    def state(self, new: Any) -> None:
        new._update(self._state, new)

    def manual_seed(self, seed: int) -> Generator:
        """Starts the stream of `seed` (taken modulo 2^64)."""
        self._state._write(_state(seed, 0)._value())
        return self

    def seed(self) -> int:
        """Starts a stream from the system's entropy; gives the seed."""
        if tracing.capture is not None:
            tracing.capture.impure("a generator is seeded from the system's entropy")
        seed = int.from_bytes(os.urandom(8), "little") >> 1
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        """The seed of the current stream."""
        return int(self._state.detach()._array(share=False)[0])

    def get_state(self) -> EagerTensor:
        """i64[2]: (seed, counter)."""
        return self._state.clone()

    def set_state(self, state: EagerTensor) -> None:
        self._state._write(state.clone()._value())


def _state(seed: int, counter: int) -> EagerTensor:
    word = seed % (1 << 64)
    signed = word - (1 << 64) if word >= 1 << 63 else word
    return tensor_of(np.array([signed, counter], np.int64))


default_generator = Generator()
EagerTensor._generator = staticmethod(lambda: default_generator)  # what x.normal_() and the like draw from


def manual_seed(seed: int) -> Generator:
    """Seeds the default generator, which both modes draw from; gives it back."""
    return default_generator.manual_seed(seed)


def seed() -> int:
    """Seeds the default generator from the system's entropy; gives the seed."""
    return default_generator.seed()


def initial_seed() -> int:
    return default_generator.initial_seed()


def get_rng_state() -> EagerTensor:
    return default_generator.get_state()


def set_rng_state(state: EagerTensor) -> None:
    default_generator.set_state(state)


def draw(
    body: Callable[..., Any],
    tensors: tuple = (),
    attrs: tuple = (),
    generator: Generator | None = None,
    device: str | None = None,
) -> Any:
    """The sample of `body(state, *tensors, *attrs) -> (sample, new state)`; the generator moves on. `device`: where it is made; else where the
    tensors are."""
    source = default_generator if generator is None else generator
    if device is None and tracing.capture is not None:  # the state is there before the op looks for it: one program, wherever it was
        device = next((t._val.info.device for t in tensors if isinstance(t, EagerTensor)), None)
    if device is not None:
        bring(source.cell, device)
    sample, source.state = apply(body, (source.state, *tensors), attrs)
    return sample
