"""`duo.lower`: the program that a call would compile, without running it or leaving a trace of it.

Parameters: the tensors among the arguments, in order; then what else is read (parameters of modules, buffers, optimiser slots, generators,
captured data) and Python numbers, in canonical order. Results: the tensors returned, then the new values of what was written. The same
model written in graph mode gives the same text (`duo.graph.lower`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duo.eager.autograd import number_in
from duo.eager.build import Construction
from duo.eager.trace import Trace, Val, state
from duo.jit.capture import Capture, tensors_in
from duo.lowering import canonical
from duo_ir.core import Builder, Function
from duo_ir.errors import TraceError


def lower(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Function:
    """The program of `function(*args, **kwargs)` in canonical form: print it, or compare its `.hash`.

    Tensors, gradients, optimisers and generators are as before afterwards (what else the function does to Python objects stays
    done). Raises TraceError where the function looks at a tensor's value, and inside a compiled function.
    """
    if state.capture is not None:
        raise TraceError("duo.lower was called inside a function that is being compiled; call it outside")
    capture = Capture(getattr(function, "__qualname__", type(function).__name__), tensors_in((args, kwargs)))
    try:
        with capture:
            result = function(*args, **kwargs)
            capture.refresh()
            return _function(capture, [t._value() for t in tensors_in(result)])
    finally:
        state.capture = None
        capture.undo()
        state.trace = Trace(state.grad, state.trace.device)


def _function(capture: Capture, results: list[Val]) -> Function:
    trace = state.trace
    finals: dict[Val, Val] = {}  # first value of a tensor that was written -> its last
    for before in [*capture.given, *capture.written.values()]:
        if capture.outside_val(before.val) and before.tensor._value() is not before.val:
            finals[before.val] = before.tensor._value()
    for val, ref in [*capture.holders.items(), *[(val, ref) for ref, val in capture.begun.values()]]:
        tensor = ref()
        if tensor is not None and tensor._value() is not val:
            finals[val] = tensor._value()
    numbers = [number_in(trace, v) for v in results]
    states = {number_in(trace, first): number_in(trace, last) for first, last in finals.items()}
    given = [trace.leaves.get(val) for val in dict.fromkeys(capture.arguments)]
    node = trace.entries[-1].node
    assert node is not None
    construction = Construction(node)
    recorded = construction.function([*numbers, *states.values()])
    place = {e: j for j, (e, k) in enumerate(construction.inputs) if k is None}  # entry -> parameter as recorded
    pinned = [place.get(e) if e is not None else None for e in given]

    builder = Builder("main")
    arguments: list[Any] = [None] * len(recorded.params)
    for i, (j, val) in enumerate(zip(pinned, capture.arguments)):
        value = builder.parameter(val.info.type, f"arg{i}")
        if j is not None:
            arguments[j] = value
    for j, param in enumerate(recorded.params):
        if arguments[j] is None:
            arguments[j] = builder.parameter(param.type)
    out = builder.inline(recorded, arguments)
    form = builder.build(out)
    index = {v: i for i, v in enumerate(form.params)}
    state_results = {index[arguments[place[e]]]: len(numbers) + k for k, e in enumerate(states)}
    return canonical(form, len(pinned), state_results).function
