"""Which of the user's lines an error at run time is of.

Executables are shared by all recordings of equal programs, so what they say of a line is where such a program was recorded first. Once
one has failed, the recording at hand, which knows its own lines, is asked which of its ops it was; that costs something, but only then.
"""

from __future__ import annotations

from typing import Any

from duo import runtime
from duo.eager.build import Construction
from duo.eager.trace import Trace, places
from duo_ir.core import Op, Value
from duo_ir.errors import DuoError, IndexOutOfRange, NanError
from duo_ir.opdef import Gather, Scatter
from duo_ir.ops.reference import check_indices


def relocated(trace: Trace, sources: list[tuple[int, int | None]], number: int, error: Exception) -> Exception:
    """`error`, which value `number` of a trace met when it was computed, with the line that this trace was recorded at. sources: where
    the program's inputs are found, as in `Construction.inputs`."""
    if not isinstance(error, IndexOutOfRange | NanError) or trace.node is None:
        return error
    try:
        construction = Construction(trace.node, places(trace))
        entries = trace.entries
        inputs: list[Any] = []
        for entry, k in sources:
            scalars = entries[entry].scalars
            inputs.append(entries[entry].buf if k is None or scalars is None else scalars[k])
        scalar_inputs = [i for i, (_, k) in enumerate(sources) if k is not None]
        if isinstance(error, NanError):
            runtime.Interpreted(construction.function([number]), True, trace.node.device).run(inputs)
        else:
            _check(construction, construction.value(number), inputs, scalar_inputs, trace.node.device)
    except DuoError as found:
        return found.with_traceback(None) if type(found) is type(error) else error
    return error


def _check(construction: Construction, value: Value, inputs: list[Any], scalars: list[int], device: str) -> None:
    """Raises IndexOutOfRange for the first op that `value` needs whose indices are wrong."""
    builder = construction.builder
    for op in _needed(builder.ops, value):
        kind = op.definition.kind
        if not isinstance(kind, Gather | Scatter):
            continue
        indices = op.operands[1:] if isinstance(kind, Gather) else op.operands[2:]
        buffers = runtime.runnable(builder.build(indices), False, scalars, device).run(inputs)
        arrays = [runtime.to_numpy(b, i.type) for b, i in zip(buffers, indices)]
        where = f" at {op.loc}" if op.loc is not None else ""
        check_indices(op.definition.name + where, arrays, op.operands[0].type.static_shape(), op.attrs["axes"])


def _needed(ops: list[Op], value: Value) -> list[Op]:
    """The ops that `value` is computed by, in order."""
    needed, out = {value}, []
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.operands)
            out.append(op)
    return out[::-1]
