"""The quick form of a prepared run: one native call that reads variables where they are and overwrites those that are assigned.

See duo/jit/in_place.py, which does the same for compiled functions. Where native code refuses (a variable that someone else holds too, one
that is pending) the plain way is taken, which leaves variables that own their values. A run that assigns nothing keeps what it makes of
variables alone (duo/hoisting.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from duo import runtime
from duo.eager import cells
from duo.eager.trace import Val
from duo.eager.values import material
from duo.graph.states import SharedState
from duo.hoisting import Hoister, is_on
from duo_backends.cells import ARRAY, NUMBER, OWNED, POINTER, READ, SAME, Argument
from duo_ir.core import Function

SMALL_RESULT = 4096  # bytes up to which a result is an array from the start, which costs less than one made of a buffer


def quicken(session: Any, program: Any) -> Callable[[list[np.ndarray]], list[Any] | None] | None:
    """A function of the fed arrays that runs the program and gives what is fetched, as arrays, or None when it was refused; None where there is no such function. Every variable must have its value."""
    bound = program.executable
    if cells.layout() is None or not hasattr(bound, "cell_entry") or os.environ.get("DUO_VERIFY", "0") not in ("", "0"):
        return None
    results, count = bound.program.results, len(bound.program.inputs)
    if any(results[k] < count for k in range(len(program.fetched))):
        return None
    if any(bound.program.inputs[i].dtype.is_narrow_float for i in bound.program.scalars):
        return None
    tensors = {i: cell.tensor for i, cell in program.cells}
    tensors.update((i, session._values[state]) for i, state in program.owned)
    number = {state: i for i, state in [*program.cells, *program.owned]}
    owned: dict[int, int] = {}
    fresh = []
    for k, state, cell, type_, copied in program.writes:
        output, given = results[k] - count, number.get(cell if cell is not None else state, -1)
        if output < 0 or copied:
            return None
        if results.count(results[k]) == 1 and bound.may_overwrite(output, given):
            owned[given] = output
        else:
            fresh.append((output, state, cell, type_))
    run = _written(session, program, bound, tensors, owned, fresh)
    if not is_on() or program.writes or not tensors:
        return run
    return RunHoister(session, program, run, tensors).watch


class RunHoister(Hoister):
    """Of a prepared run."""

    def __init__(self, session: Any, program: Any, run: Any, tensors: dict) -> None:
        super().__init__(run, None, tensors)
        self.session, self.prepared = session, program

    def become(self, form: Any) -> None:
        self.prepared.quick = form

    def program(self) -> tuple[Function, Collection[int]]:
        return self.prepared.function, self.prepared.executable.program.scalars

    def form(self, given: tuple, fixed: dict[int, Val], buffers: list[runtime.Buffer]) -> Any:
        main, program = self.split.main, self.prepared
        if not hasattr(main, "cell_entry"):
            return None
        first = len(main.program.inputs)
        if any(main.program.results[k] < first for k in range(len(program.fetched))):
            return None
        return _written(self.session, program, main, self.tensors, {}, [], fixed, buffers, self.lost)


def _written(
    session: Any, program: Any, bound: Any, tensors: Any, owned: dict, fresh: list,
    fixed: dict[int, Val] | None = None, kept: list[runtime.Buffer] | None = None, lost: Any = None,
) -> Any:  # fmt: skip
    """The function's text, and the function. owned: input -> output that overwrites it; fresh: outputs that are stored afterwards. fixed: values
    that inputs must have; kept: further inputs; lost: what does the calls that are refused."""
    layout, names = cells.layout(), dict[str, Any]()
    count = len(bound.program.inputs)
    fixed, kept = fixed or {}, kept or []
    lines: list[str] = []
    given: list[str] = []
    arguments: list[Argument] = []
    live: dict[int, str] = {}

    def const(value: Any) -> str:
        name = f"x{len(names)}"
        names[name] = value
        return name

    def give_array(text: str, slot: int) -> None:
        if bound.takes_arrays:
            given.append(text)
            arguments.append(Argument(ARRAY, (slot,)))
        else:
            names["from_numpy"] = runtime.from_numpy
            given.append(f"from_numpy({text}, False).ptr")
            arguments.append(Argument(POINTER, (slot,)))

    for n, (read, places) in enumerate(program.live):
        lines.append(f"h{n} = {const(read)}()")
        live.update((i, f"h{n}[{k}]") for i, k in places)
    for i in range(count):
        if i < len(program.fed):
            give_array(f"fed[{program.fed[i]}]", i)
        elif i >= count - len(kept):
            buffer = kept[i - count + len(kept)]
            const(buffer)
            given.append(const(buffer.ptr))
            arguments.append(Argument(POINTER, (i,)))
        elif i in fixed:
            given.append(const(tensors[i]))
            arguments.append(Argument(SAME, (i,), fixed[i], tensors[i]._leaf))
        elif i in tensors:
            tensor = tensors[i]
            slots = (i, count + owned[i]) if i in owned else (i,)
            given.append(const(tensor))
            arguments.append(Argument(OWNED if i in owned else READ, slots, tensor._val.info, tensor._leaf))
        elif i in live:
            given.append(live[i])
            arguments.append(Argument(NUMBER, (i,)))
        elif i in bound.program.scalars:
            given.append(const(program.template[i]))
            arguments.append(Argument(NUMBER, (i,)))
        else:
            given.append(const(program.template[i].ptr))
            arguments.append(Argument(POINTER, (i,)))
    fetched = [bound.program.results[k] - count for k in range(len(program.fetched))]
    values, arrays = [], set()
    for output, (kind, copied) in zip(fetched, program.fetched):
        dtype, shape, value = kind.dtype, kind.static_shape(), f"o{output}"
        alone = not copied and fetched.count(output) == 1
        if alone and bound.takes_arrays and math.prod(shape) * dtype.itemsize <= SMALL_RESULT:
            names["empty"] = np.empty
            lines.append(f"{value} = empty({const(shape)}, {const(dtype.numpy)})")
            give_array(value, count + output)
            arrays.add(output)
        else:
            value += f".{'read' if copied else 'numpy'}({const(dtype)}, {const(shape)})"
        values.append(value if shape else f"{value}[()]")
    for output in range(len(bound.program.outputs)):
        if output not in owned.values() and output not in arrays:
            lines += bound.output_lines(output, names)
            given.append(f"o{output}.ptr")
            arguments.append(Argument(POINTER, (count + output,)))
    flight = cells.Flight() if bound.releases else None
    names["entry"], names["kept"] = bound.cell_entry(arguments, layout, flight)
    lock = const(flight.lock) if flight is not None else ""
    refused = f"return {const(lost)}(fed)" if lost is not None else "return None"
    lines += bound.call_lines("entry", given, names, refused, lock)
    for output, state, cell, type_ in fresh:
        lines.append(f"{const(_store(session, state, cell, type_))}(o{output})")
    lines.append(f"return [{', '.join(values)}]")
    text = "def quick(fed):\n" + "".join([f"    {line}\n" for line in lines])
    exec(compile(text, "<quick run>", "exec"), names)
    return names["quick"]


def _store(session: Any, state: Any, cell: SharedState | None, type_: Any) -> Callable[[Any], None]:
    if cell is not None:
        return cell.store
    return lambda buffer: session.set_value(state, material(buffer, type_))
