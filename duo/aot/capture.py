"""From a function, module or Session to a Source of artefacts: the program is built in a graph of its own, with free sizes for those named."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from duo.aot.spec import Spec, spec
from duo.eager.mode import no_grad
from duo.eager.tensor import EagerTensor
from duo.func.calls import replaced
from duo.graph.arrays import placeholder
from duo.graph.errors import InvalidArgumentError, NoValueError
from duo.graph.graph import Graph, located
from duo.graph.items import Operation
from duo.graph.lowering import Lowered, lowered
from duo.graph.states import Constant, Live, Number, SeededState, SharedState, State
from duo.graph.tensor import GraphElement
from duo.nn.module import Module
from duo.symbolic import FreeSizeError
from duo_backends.aot.source import Port, ProgramSource, Source
from duo_ir.core import Function
from duo_ir.errors import ArgumentError, DuoError, ShapeError
from duo_ir.transforms.sizes import with_sizes
from duo_ir.types import Dim, DType

_HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep  # code of duo's own, no user's


class Names:
    """Names of states: those that the user's modules give them, or their own."""

    def __init__(self, modules: Sequence[Module] = ()) -> None:
        self._known: dict[int, str] = {}  # id of a tensor -> its name
        self.states: dict[Any, str] = {}
        for module in modules:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                self._known.setdefault(id(tensor), name)

    def of(self, state: State) -> str:
        """The state's name; states that are one tensor have one."""
        if isinstance(state, SharedState):
            return self._free(("tensor", id(state.tensor)), self._known.get(id(state.tensor), state.name or "state"))
        return self._free(state, state.name or "state")

    def of_live(self, origin: Live) -> str:
        """The name of a hyperparameter."""
        return self._free(("live", origin.owner, origin.index), origin.name or "number")

    def _free(self, key: Any, wanted: str) -> str:
        if key not in self.states:
            name, n = wanted, 1
            while name in self.states.values():
                name, n = f"{wanted}_{n}", n + 1
            self.states[key] = name
        return self.states[key]


def source_of(function: Any, specs: Sequence[Any], name: str) -> Source:
    """The Source of `function(*inputs)`, a module or a function of tensors, with one program, `forward`."""
    if not callable(function):
        raise ArgumentError(f"export takes a function or a module, not {function!r}")
    given = _named(function, [spec(s) for s in specs])
    with no_grad():  # what does not depend on inputs may be computed right now
        modules = _modules_of(function)
        graph, inputs, outputs = graph_of(function, given, modules)
    names = Names(modules)
    low = lowered(graph, list(outputs.values()), [x._value for x in inputs], {})
    return source_from([("forward", low, [s.name for s in given], list(outputs))], names, name, _eager_value)


def graph_of(
    function: Any, given: Sequence[Spec], modules: Sequence[Module], names: Collection[str] | None = None
) -> tuple[Graph, list[Any], dict[str, GraphElement]]:
    """A graph of `function` on placeholders of these specs: it, the placeholders, the named results. `modules`: those that it uses; `names`:
    what the results are to be called."""
    graph = Graph()
    with graph.as_default(), ExitStack() as stack:
        for module in modules:  # what is computed of parameters alone belongs to the program too
            params = {n: graph.wrap(graph.read(graph.share(p))) for n, p in module.named_parameters()}
            stack.enter_context(replaced(module, params))
        inputs = [placeholder(s.dtype, list(s.shape), s.name) for s in given]
        try:
            out = function(*inputs)
        except NoValueError as error:
            raise ArgumentError(
                f"{_called(function)} cannot be exported as it is{_line_of(error)}: it asks for the value of a tensor, which there is only when the "
                "program runs, without Python. Decide with duo.where, duo.cond or duo.while_loop, and compute with tensors"
            ) from error
        except (InvalidArgumentError, FreeSizeError) as error:
            raise ArgumentError(f"{_called(function)} cannot be exported as it is{_line_of(error)}: {error}") from error
        except DuoError as error:
            line = _line_of(error)
            if line.removeprefix(" at ") not in str(error):
                error.args = (f"{error}{line}",)
            raise
    _check_free(graph, given, inputs)
    outputs = _outputs(out, function)
    if names is not None:
        if len(outputs) != len(names):
            raise ArgumentError(f"{_called(function)} returns {len(outputs)} tensors instead of {len(names)}")
        outputs = dict(zip(names, outputs.values()))
    return graph, inputs, outputs


def _line_of(error: BaseException) -> str:
    """The user's own line in an error's traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_HERE)]
    return f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def _check_free(graph: Graph, given: Sequence[Spec], inputs: Sequence[Any]) -> None:
    """Raises where a size that was to be free is not: an operand of a known size has decided it."""
    for s, x in zip(given, inputs):
        for wanted, d in zip(s.shape, x._type.shape):
            if isinstance(wanted, str) and isinstance(d, int):
                at = next((located(loc) for n, loc in graph.fixed_sizes if n == d), "")
                raise ShapeError(
                    f"{wanted} of {s} can only be {d}{at}; write {d} in the spec, or make the program fit all sizes"
                )


def source_from(
    programs: Sequence[tuple[str, Lowered, Sequence[str], Sequence[str]]],
    names: Names,
    name: str,
    value: Callable[[State], np.ndarray],
    mutable: bool = False,
) -> Source:
    """A Source of lowered programs (name, program, names of inputs, names of outputs). States that none writes are weights, unless they are `mutable`,
    as hyperparameters are then. `value`: a state's value."""
    written = {names.of(s) for _, low, _, _ in programs for s in low.states}
    weights: dict[str, np.ndarray] = {}
    states: dict[str, np.ndarray] = {}
    made = []
    for label, low, inputs, outputs in programs:
        params = []
        for k, origin in enumerate(low.origins):
            type = low.function.params[k].type
            if isinstance(origin, int):
                params.append(Port("input", inputs[origin]))
            elif isinstance(origin, State):
                known = names.of(origin)
                kind, among = ("state", states) if mutable or known in written else ("weight", weights)
                if known not in among:
                    among[known] = value(origin)
                params.append(Port(kind, known))
            elif mutable and isinstance(origin, Live):
                known = names.of_live(origin)
                states[known] = _constant(origin, type.dtype)
                params.append(Port("state", known))
            else:
                known = f"constant_{len(weights)}"
                weights[known] = _constant(origin, type.dtype)
                params.append(Port("weight", known))
        results = [Port("output", n) for n in outputs]
        for state in low.states:
            known = names.of(state)
            if known not in states:
                states[known] = value(state)
            results.append(Port("state", known))
        made.append(ProgramSource(label, low.function, tuple(params), tuple(results)))
    return Source(name, tuple(made), weights, states)


def _constant(origin: Any, dtype: DType) -> np.ndarray:
    if isinstance(origin, Constant):
        return origin.array
    if isinstance(origin, Number):
        return np.asarray(origin.value, dtype.numpy)
    assert isinstance(origin, Live)
    return np.asarray(origin.read()[origin.index], dtype.numpy)


def _eager_value(state: State) -> np.ndarray:
    if isinstance(state, SharedState):
        return state.tensor.detach()._array(share=False)
    if isinstance(state, SeededState):
        return state.start()
    raise ArgumentError(
        f"variable {state.name!r} belongs to a Session; export with duo.graph.export(session, fetches, feeds, path)"
    )


def _modules_of(function: Any) -> list[Module]:
    """The modules that a function is, or is bound to, or sees."""
    found = [function, getattr(function, "__self__", None)]
    code = getattr(function, "__wrapped__", function)
    try:
        seen = inspect.getclosurevars(code)
        found += [*seen.nonlocals.values(), *seen.globals.values()]
    except TypeError:
        pass
    return [m for m in found if isinstance(m, Module)]


def _named(function: Any, specs: list[Spec]) -> list[Spec]:
    """The specs with names: their own, else those of the function's parameters, else x0, x1, ..."""
    call = function.forward if isinstance(function, Module) else function
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        signature = inspect.Signature([inspect.Parameter("x", inspect.Parameter.VAR_POSITIONAL)])
    try:
        signature.bind(*specs)
    except TypeError as error:
        given = ", ".join(map(str, specs)) or "none"
        raise ArgumentError(
            f"{_called(function)}{signature} needs a spec for each input, such as 'x: f32[batch,784]'; given: {given} ({error})"
        ) from None
    params = list(signature.parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [p.name for p in params if p.kind in kinds]
    out: list[Spec] = []
    for k, s in enumerate(specs):
        name = s.name or (known[k] if k < len(known) else f"x{k}")
        if name in [o.name for o in out]:
            raise ArgumentError(f"two inputs are called {name!r}")
        out.append(spec(s, name))
    return out


def _outputs(out: Any, function: Any) -> dict[str, GraphElement]:
    """Named results: keys of a dict, else output, or output_0, output_1, ..."""
    if isinstance(out, Mapping):
        found = dict(out)
    elif isinstance(out, (list, tuple)):
        found = {f"output_{k}": v for k, v in enumerate(out)}
    else:
        found = {"output": out}
    for name, v in found.items():
        if isinstance(v, EagerTensor):
            raise ArgumentError(f"{name} of {_called(function)} does not depend on its inputs: it is an eager tensor")
        if not isinstance(v, GraphElement):
            raise ArgumentError(
                f"{name} of {_called(function)} is {type(v).__name__}; exported functions return tensors"
            )
    return found


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def session_source(session: Any, fetches: Any, feeds: Any, name: str) -> Source:
    """The Source of what `session.run(fetches, feeds)` computes: variables that it assigns to are states, others weights, with the values that they have
    in the session now. Sizes that placeholders leave open are free."""
    graph = session.graph
    listed = list(fetches.values()) if isinstance(fetches, Mapping) else fetches
    listed = list(listed) if isinstance(listed, (list, tuple)) else [listed]
    elements = [session.element(f) for f in listed]
    keys = [session.element(f) for f in (feeds if isinstance(feeds, (list, tuple)) else [feeds])]
    for k in keys:
        if getattr(k, "_value", None) is None:
            raise ArgumentError(f"{k!r} cannot be an input; name placeholders or other tensors of the graph")
    low = lowered(graph, elements, [k._value for k in keys], {})
    low.function = _named_sizes(low.function)
    tensors = [e for e in elements if not isinstance(e, Operation)]
    if isinstance(fetches, Mapping):
        outputs = [n for n, e in zip(fetches, elements) if not isinstance(e, Operation)]
    else:
        outputs = [_label(e.name) for e in tensors]
    inputs = [_label(k.name) for k in keys]
    if len({*inputs, *outputs}) < len(inputs) + len(outputs):
        outputs = [f"output_{k}" for k in range(len(outputs))]

    def value(state: State) -> np.ndarray:
        cell = session.cell(state)
        if cell is not None:
            return cell.tensor.detach()._array(share=False)  # type: ignore[no-any-return]
        found = session._values.get(state)
        return (found if found is not None else session._first(state)).detach()._array(share=False)  # type: ignore[no-any-return]

    return source_from([("forward", low, inputs, outputs)], Names(), name, value)


def _label(name: str) -> str:
    """A C identifier from a graph's name, "dense/Softmax:0"."""
    return re.sub(r"\W", "_", name.removesuffix(":0"), flags=re.ASCII)


def _named_sizes(function: Function) -> Function:
    """Sizes without a name of the user's get one: `batch` if there is only one, else d0, d1, ..."""
    loose = [d for d in function.dims if re.fullmatch(r"n\d+", d)]
    taken = set(function.dims) - set(loose)
    wanted = ["batch"] if len(loose) == 1 and "batch" not in taken else [f"d{k}" for k in range(len(loose))]
    if not loose or not taken.isdisjoint(wanted):
        return function
    return with_sizes(function, {old: Dim.symbol(new) for old, new in zip(loose, wanted)})
