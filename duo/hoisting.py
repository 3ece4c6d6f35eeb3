"""Hoisting for programs that are run again and again: what they make of parameters alone (weights laid out for products) is made once.

A program that writes nothing and records no gradients is watched. When the tensors that it reads have had the very same values for a few
calls, it becomes the main program of duo_ir/transforms/hoist.py, called with kept results of the prologue. Values never change while somebody
holds them: all that overwrites memory asks first whether it is the only owner. So the values are held, and native code looks, in the same
breath in which it reads the rest, whether each tensor still has its own. Where one has not, all that was kept is dropped and the plain
program does the call. The extra memory is the prologue's results, and, between a change and the next call, the old values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from duo import runtime
from duo.eager.keeping import is_on
from duo.eager.tensor import EagerTensor
from duo.eager.trace import Val, settle
from duo_ir.core import Function

_CALLS = 2  # with equal values, before the values are held for one more
_MOST_CALLS = 64


class Hoister:
    """Decides in which form a program runs. `plain`: its form as it is; `miss`: what a form gives when it refuses a call; `tensors`: the
    inputs that may stay the same, by number."""

    def __init__(self, plain: Any, miss: Any, tensors: Mapping[int, EagerTensor]) -> None:
        self.plain, self.miss, self.tensors = plain, miss, tensors
        self.split: Any = None
        self.patience = _CALLS
        self._forget()

    # -------------------------------------------------------------------------------------- what each kind of program knows
    def become(self, form: Any) -> None:
        """The program runs in this form from now on."""
        raise NotImplementedError

    def program(self) -> tuple[Function, Collection[int]]:
        """The program and the numbers of its parameters that are given as Python numbers."""
        raise NotImplementedError

    def form(self, given: tuple, fixed: dict[int, Val], buffers: list[runtime.Buffer]) -> Any:
        """The main program with the prologue's results, for these values of inputs; it calls `lost` for what it refuses. None: no such form."""
        raise NotImplementedError

    def tell(self, text: str) -> None:
        """What is kept between calls, in words."""

    # ---------------------------------------------------------------------------------------------------- before and after
    def _forget(self) -> None:
        self.ids: list[int] = []
        self.calls = 0
        self.held: dict[int, Val] | None = None  # number of an input -> its value

    def watch(self, *given: Any) -> Any:
        """The call, plainly, after which it may be time to hoist."""
        out = self.plain(*given)
        if out is not self.miss:
            self._look(given)
        return out

    def _look(self, given: tuple) -> None:
        held = self.held
        if held is None:
            # Training overwrites values that nobody holds: equal ids are a guess, and holding would make it take other memory.
            ids = [id(t._val) for t in self.tensors.values() if t._storage is None]
            self.calls = self.calls + 1 if ids == self.ids and len(ids) == len(self.tensors) else 1
            self.ids = ids
            if self.calls >= self.patience:
                self.held = {k: t._val for k, t in self.tensors.items()}
        elif self._unchanged(held):
            self._hoist(given, held)
        else:
            self._forget()
            self.patience = min(2 * self.patience, _MOST_CALLS)

    def _unchanged(self, held: dict[int, Val]) -> bool:
        return all(self.tensors[k]._val is v and self.tensors[k]._storage is None for k, v in held.items())

    def lost(self, *given: Any) -> Any:
        """What the hoisted form refused: other arguments, a guard that failed, or other values."""
        held = self.held
        if held is not None and self._unchanged(held):
            return self.plain(*given)
        self._forget()
        self.tell("")
        self.become(self.watch)
        return self.watch(*given)

    # ------------------------------------------------------------------------------------------------------------ hoisting
    def _hoist(self, given: tuple, held: dict[int, Val]) -> None:
        if self.split is None:
            function, scalars = self.program()
            self.split = runtime.hoist(function, self.tensors, scalars)
        form = None
        if self.split is not None:
            fixed = {k: held[k] for k in self.split.constants}
            buffers = self.split.prologue.run([settle(v) for v in fixed.values()])
            form = self.form(given, fixed, buffers)
        if form is None:
            self._forget()
            self.become(self.plain)  # for good
            return
        self.held, self.patience = fixed, _CALLS
        nbytes = sum(b.nbytes for b in buffers)
        self.tell(f"{len(buffers)} values made of parameters alone are kept between calls ({nbytes} bytes)")
        self.become(form)


__all__ = ["Hoister", "is_on"]
