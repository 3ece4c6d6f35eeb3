"""Which of the user's lines an error at run time is of.

Executables are shared by all recordings of equal programs, so what they say of a line is where such a program was recorded first. Once
one has failed, the recording at hand, which knows its own lines, is asked which of its ops it was; that costs something, but only then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from duo import runtime
from duo.eager.build import Construction
from duo.eager.trace import Trace, places
from duo_ir.core import Function, Op, Value
from duo_ir.errors import DuoError, IndexOutOfRange, NanError
from duo_ir.opdef import Gather, Scatter
from duo_ir.ops.reference import check_indices
from duo_ir.transforms.rewrite import dce, without_unread


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
            device = trace.node.device

            def arrays(indices: Sequence[Value]) -> list[np.ndarray]:
                function = construction.builder.build(indices)
                buffers = runtime.runnable(function, False, scalar_inputs, device).run(inputs)
                return [runtime.to_numpy(b, i.type) for b, i in zip(buffers, indices)]

            _check(construction, [number], arrays)
    except DuoError as found:
        return found.with_traceback(None) if type(found) is type(error) else error
    return error


def index_inputs(function: Function) -> frozenset[int]:
    """Numbers of the inputs that the indices of a program's gathers and scatters are computed from."""
    indices = [i for op in function.ops for i in _indices(op)]
    read = {v for op in _needed(list(function.ops), indices) for v in op.operands}.union(indices)
    return frozenset([k for k, p in enumerate(function.params) if p in read])


def explainer(
    trace: Trace, live: Sequence[int], reads: Collection[int], inputs: list[Any]
) -> Callable[[IndexOutOfRange], Exception]:
    """What tells, after a trace has run on a GPU and its values `live` met an index out of range, at which line of this recording. It keeps the
    `inputs` numbered `reads` (`index_inputs`)."""
    node, lines = trace.node, places(trace)
    kept = {k: inputs[k] for k in reads}

    def explain(error: IndexOutOfRange) -> Exception:
        assert node is not None
        try:
            construction = Construction(node, lines)

            def arrays(indices: Sequence[Value]) -> list[np.ndarray]:
                function, numbers = without_unread(dce(construction.builder.build(indices)))
                buffers = runtime.Interpreted(function).run([kept[k] for k in numbers])
                return [runtime.to_numpy(b, i.type) for b, i in zip(buffers, indices)]

            _check(construction, live, arrays)
        except (DuoError, KeyError) as found:
            return found.with_traceback(None) if isinstance(found, IndexOutOfRange) else error
        return error

    return explain


def _check(
    construction: Construction, numbers: Iterable[int], arrays: Callable[[Sequence[Value]], list[np.ndarray]]
) -> None:
    """Raises IndexOutOfRange for the first op that the values `numbers` need whose indices, as `arrays` gives them, are wrong."""
    for op in _needed(construction.builder.ops, [construction.value(n) for n in numbers]):
        indices = _indices(op)
        if indices:
            where = f" at {op.loc}" if op.loc is not None else ""
            shape = op.operands[0].type.static_shape()
            check_indices(op.definition.name + where, arrays(indices), shape, op.attrs["axes"])


def _indices(op: Op) -> tuple[Value, ...]:
    """The operands that are indices."""
    kind = op.definition.kind
    return op.operands[1:] if isinstance(kind, Gather) else op.operands[2:] if isinstance(kind, Scatter) else ()


def _needed(ops: list[Op], values: Iterable[Value]) -> list[Op]:
    """The ops that `values` are computed by, in order."""
    needed, out = set(values), []
    for op in reversed(ops):
        if not needed.isdisjoint(op.results):
            needed.update(op.operands)
            out.append(op)
    return out[::-1]
