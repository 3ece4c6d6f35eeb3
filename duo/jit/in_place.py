"""The quick form of a replay: one native call that reads the tensors themselves and overwrites parameters, optimiser state and gradients
where they are.

Native code looks whether each tensor has the value it should have, and each that is overwritten is owned by nobody else, then runs the
program; no Python code is executed in between, so an interrupt or another thread finds every value whole. Whenever it refuses, or a check
fails, the plain replay (replay.py) does the call: it has a way for everything, and leaves tensors that own their values.
"""

from __future__ import annotations

import os
import textwrap
from dataclasses import replace
from typing import Any

from duo.eager import cells
from duo.eager.tensor import EagerTensor
from duo.eager.trace import Val
from duo.jit.lending import shares
from duo.jit.recording import Source
from duo.jit.replay import Replay, Writer
from duo_backends.cells import ANY, GRADIENT, GRADIENT_READ, NUMBER, OWNED, POINTER, READ, SAME, Argument


def quicken(replay: Replay, name: str, args: tuple, kwargs: dict, tensors: list[EagerTensor]) -> bool:
    """Gives `replay.run` its quick form, if it can have one; tells whether."""
    writer = Quick(replay, name, args, kwargs, tensors)
    quick = writer.function() if writer.possible() else None
    if quick is not None:
        replay.run = quick
    return quick is not None


class Quick(Writer):
    """Writes the quick form of a replay."""

    miss = "return slow(args, kwargs)"
    fixed: dict[int, Val] = {}  # number of an input -> the value that it must have

    def possible(self) -> bool:
        """Whether everything that the call does has a quick form."""
        r = self.r
        program = r.program
        if (
            program is None
            or program.alive
            or cells.layout() is None
            or os.environ.get("DUO_VERIFY", "0") not in ("", "0")
        ):
            return False
        bound = program.runnable
        if not hasattr(bound, "cell_entry"):
            return False
        self.bound, self.ir = bound, bound.program
        sources = [x for x in [*r.inputs, *r.writes, *[owner for owner, *_ in r.grads]] if isinstance(x, Source)]
        return (
            all(s.kind != "argument" or s not in r.writes for s in sources)
            and all(owner.kind == "outside" for owner, *_ in r.grads)
            and all(t._leaf is None for t in self.tensors)
            and not r.storages
            and not any(made.chain or made.source is not None for made in r.made)
            and all(self._output(n) is not None for n in self._wanted())
            and not any(t.dtype.is_narrow_float and k in bound.program.scalars for k, t in enumerate(self.ir.inputs))
        )

    def _output(self, n: int) -> int | None:
        """The number of the program's output that is value n."""
        assert self.r.program is not None
        slot = self.ir.results[self.r.program.order.index(n)] - len(self.ir.inputs)
        return slot if slot >= 0 else None

    def function(self) -> Any:
        self.names["slow"] = self.slow()
        self.add("mine = state.__dict__")
        self.miss_if(f"mine['grad'] is not {self.replay.grad} or mine['capture'] is not None")
        self._ambient()
        self._arguments()
        self.miss_if("Epoch.count != structure.epoch")
        self._guards()
        self._choose()
        if any(source.kind == "grad" for source in self.r.writes):
            return None
        self._look()
        self._groups()
        self._call()
        self._effects()
        self._result()
        text = "def quick(args, kwargs):\n    try:\n" + textwrap.indent("\n".join(self.lines[: self.checked]), " " * 8)
        text += f"\n    except LOOKS: {self.miss}\n    used[0] = True\n"
        text += textwrap.indent("\n".join(self.lines[self.checked :]), " " * 4)
        self.names["LOOKS"] = (LookupError, TypeError, AttributeError, ValueError)
        exec(compile(text, f"<quick replay of {self.title}>", "exec"), self.names)
        return self.names.pop("quick")  # what it holds goes with it

    def slow(self) -> Any:
        """What does the calls that the quick form refuses."""
        return self.replay.run

    # ----------------------------------------------------------------------------------------------- what is overwritten
    def _choose(self) -> None:
        """owned: input number -> output that overwrites it; gradients: output -> leaf. What is left has buffers of its own and is stored
        as in a plain replay (`self.r` is reduced to that)."""
        r, results = self.r, self.ir.results
        self.owned: dict[int, int] = {}
        self.gradients: dict[int, Any] = {}
        writes, grads = dict(r.writes), []
        for source, (n, _) in r.writes.items():
            output = self._output(n)
            given = r.inputs.index(source) if source in r.inputs else -1
            alone = output is not None and results.count(output + len(self.ir.inputs)) == 1
            if alone and r.infos[source] is r.node.info_of(n) and self.bound.may_overwrite(output, given):
                self.owned[given] = output  # type: ignore[assignment]
                del writes[source]
        returned = repr(r.result)
        for grad in r.grads:
            _, leaf, before, after = grad
            if before == "any" and isinstance(after, int):
                n = r.made[after].number
                output = self._output(n)
                assert output is not None
                alone = results.count(output + len(self.ir.inputs)) == 1 and f"made {after}" not in returned
                alone = alone and [m.number for m in r.made].count(n) == 1 and [g[3] for g in r.grads].count(after) == 1
                if alone and output in self.bound.safe_outputs and not r.node.info_of(n).requires_grad:
                    self.gradients[output] = (leaf, r.node.info_of(n))
                    continue
            grads.append(grad)
        self.r = replace(r, writes=writes, grads=grads)

    def _is_lent(self, source: Source) -> bool:
        """Whether it is read of a tensor whose memory NumPy may share."""
        if source.kind == "outside":
            return source not in self.r.writes and shares(source.what)
        return source.kind == "argument"

    # ------------------------------------------------------------------------------------------------------- the checks
    def _look(self) -> None:
        """What native code does not look at: storages of arguments, tensors that the program does not take."""
        r = self.r
        self.leaf_names = {}
        read = {x for x in r.inputs if isinstance(x, Source)}
        written = [x for k, x in enumerate(r.inputs) if k in self.owned and x.kind != "grad"] + list(r.writes)
        for source in written:
            self.variables[source] = self.const(source.what, "T")
        for source, info in r.infos.items():
            if source.kind == "argument":
                a = self.variables[source]
                self.miss_if(f"{a}._storage is not None and stale({a})")
                self.add(f"v_{a} = {a}._val", f"if v_{a}.buf is None: settle(v_{a})")
                for other in written:
                    if r.infos[other] is info:
                        self.miss_if(f"{a} is {self.variables[other]}")
                if source not in read:
                    self.miss_if(f"v_{a}.info is not {self.const(info, 'i')}")
            elif source.kind == "outside" and source not in read:
                t = self.variables[source] = self.const(source.what, "T")
                self.miss_if(f"{t}._val.info is not {self.const(info, 'i')} or {t}._storage is not None and stale({t})")
            elif source.kind == "outside" and source not in self.variables:
                t = self.variables[source] = self.const(source.what, "T")
                if self._is_lent(source):
                    self.miss_if(f"{t}._storage is not None and stale({t})")
        for source in r.writes:
            t = self.variables[source]
            self.miss_if(f"{t}._chain or {t}._storage is not None")
            self.add(f"v_{t} = {t}._val")
        for owner, leaf, before, _ in r.grads:
            name = self.leaf_names[id(leaf)] = self.const(leaf, "L")
            if before == "none":
                self.miss_if(f"{name}.grad is not None")
            elif before == "tensor" and Source("grad", leaf) not in read:
                self.miss_if(f"{name}.grad is None")
            if owner not in read:
                self.miss_if(f"{self.variables[owner]}._leaf is not {name}")
        for tensor in r.no_leaf:
            name = self.const(tensor, "T")
            self.miss_if(f"{name}._leaf is not None or getattr({name}, '_kept', None) is not None")

    # --------------------------------------------------------------------------------------------------------- the call
    def _call(self) -> None:
        r, count = self.r, len(self.ir.inputs)
        given: list[str] = []
        arguments: list[Argument] = []
        place: dict[str, int] = {}
        used = sorted({x[1] for x in r.inputs if isinstance(x, tuple) and x[0] == "hyper"})
        self.add(*[f"h{i} = hyper[{i}]" for i in used])
        for k, x in enumerate(r.inputs):
            if isinstance(x, Source):
                owned = k in self.owned
                slots = (k, count + self.owned[k]) if owned else (k,)
                if x.kind == "grad":
                    text, kind, leaf = self.const(x.what, "L"), GRADIENT if owned else GRADIENT_READ, None
                else:
                    text, kind = self.variables[x], OWNED if owned else ANY if self._is_lent(x) else READ
                    if kind == ANY:
                        t, text = text, f"c_{text}"
                        if text not in place:
                            self.add(f"{text} = {t}")
                            self.add(f"if {t}._storage is not None: {text} = holder({t}, {self._apart(k)})")
                    leaf = x.what._leaf if x.kind == "outside" else None
                fixed = self.fixed.get(k)
                if fixed is not None:
                    self._give(given, arguments, place, text, Argument(SAME, slots, fixed, leaf))
                else:
                    self._give(given, arguments, place, text, Argument(kind, slots, r.infos[x], leaf))
            elif x[0] == "constant":
                self.const(x[1].buf, "B")
                self._give(given, arguments, place, self.const(x[1].buf.ptr, "x"), Argument(POINTER, (k,)))
            elif x[0] == "number":
                self._give(given, arguments, place, self.const(x[1], "x"), Argument(NUMBER, (k,)))
            else:
                self._give(given, arguments, place, f"h{x[1]}[{x[2]}]", Argument(NUMBER, (k,)))
        for output in range(len(self.ir.outputs)):
            if output in self.gradients:
                leaf, info = self.gradients[output]
                argument = Argument(GRADIENT, (count + output,), info)
                self._give(given, arguments, place, self.const(leaf, "L"), argument)
            elif output not in self.owned.values():
                self.add(*self.bound.output_lines(output, self.names))
                self._give(given, arguments, place, f"o{output}.ptr", Argument(POINTER, (count + output,)))
        flight = cells.Flight() if self.bound.releases else None
        made, self.names["kept"] = self.bound.cell_entry(arguments, cells.layout(), flight)
        entry = self.const(made, "entry")
        overwrites = bool(self.owned or self.gradients)  # nobody waits for values that are only read
        lock = self.const(flight.lock, "lock") if flight is not None and overwrites else ""
        self.add(*self.bound.call_lines(entry, given, self.names, self.miss, lock))
        for n in sorted({m.number for m in r.made} | {n for n, _ in r.writes.values()}):
            if self._output(n) not in self.gradients:
                self._val(n, f"o{self._output(n)}")

    @staticmethod
    def _give(
        given: list[str], arguments: list[Argument], place: dict[str, int], text: str, argument: Argument
    ) -> None:
        """Adds an argument; a tensor that is read in two places is given once."""
        if argument.kind in (READ, ANY, SAME) and text in place:
            at = place[text]
            arguments[at] = arguments[at]._replace(slots=(*arguments[at].slots, *argument.slots))
            return
        place[text] = len(given)
        given.append(text)
        arguments.append(argument)


__all__ = ["Quick", "quicken"]
