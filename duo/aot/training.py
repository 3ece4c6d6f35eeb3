"""`duo.export_training`: a model, a loss and an optimizer as an artefact that trains without Python.

It has the programs `train_step` (inputs -> loss, and new values of all states) and `forward` (the model in evaluation mode), one that draws weights anew, and
checkpoints that `duo.load` reads: {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": duo.get_rng_state()}.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from duo import runtime
from duo.aot.capture import Names, graph_of, source_from
from duo.aot.export import identifier, write
from duo.aot.spec import spec
from duo.eager.autograd import number_in
from duo.eager.build import Construction
from duo.eager.flush import flush
from duo.eager.mode import no_grad
from duo.eager.trace import Trace, Val
from duo.eager.trace import state as recording
from duo.graph.lowering import Lowered, Needed, deferred_of, lowered
from duo.graph.states import SharedState, State
from duo.io.checkpoint import flattened
from duo.jit.capture import Capture
from duo.nn.module import Module
from duo.optim.optimizer import Optimizer
from duo.random import default_generator
from duo_backends.aot.source import Port, ProgramSource, Source, Training
from duo_ir.core import Builder
from duo_ir.errors import ArgumentError
from duo_ir.ops import broadcasting as nd
from duo_ir.types import TensorType, i64

STEP, FIRST, FORWARD, INIT = "train_step", "_first_step", "forward", "_init"


def export_training(
    model: Module, loss_fn: Callable[..., Any], optimizer: Optimizer, *specs: Any, path: Any,
    targets: Sequence[str] = ("native",), name: str | None = None, forward: Sequence[Any] | None = None,
) -> None:  # fmt: skip
    """Writes a `.duo` file or a `.so` (as `duo.export`) with `train_step(inputs...) -> loss`, `forward`, `init(seed)`, `save` and `load`.

    specs: the inputs of a step. The model is applied to all of them but the last, and `loss_fn(output, last)` gives the loss; a loss_fn whose first
    parameter is called `model` gets the model and all inputs instead. `forward` applies the model to inputs of the step: to all but the last, or, where the
    loss gets the model, to as many from the first as the model takes; or to `forward`, specs of its own. Everything starts as it is now; neither
    model nor optimizer is changed.
    The optimizer's hyperparameters are states under their names (`lr`), which a caller may change between steps. `init(seed)` draws what the modules'
    `reset_parameters` draw, in the order in which they were made, so that it equals `duo.manual_seed(seed)` and making the model anew; parameters that
    a module draws otherwise start as they are now. Raises ArgumentError, and what model and loss_fn raise."""
    write(training_source(model, loss_fn, optimizer, specs, name or identifier(path), forward), path, targets)


def training_source(
    model: Module, loss_fn: Callable[..., Any], optimizer: Optimizer, specs: Sequence[Any], name: str,
    forward: Sequence[Any] | None = None,
) -> Source:  # fmt: skip
    """The Source of a training step."""
    if not isinstance(model, Module) or not isinstance(optimizer, Optimizer):
        raise ArgumentError("export_training takes a module, a loss function and an optimizer of duo.optim")
    given = [spec(s) for s in specs]
    if not given:
        raise ArgumentError("a training step needs inputs, such as 'x: f32[batch,784]', 'y: i64[batch]'")
    params = list(inspect.signature(loss_fn).parameters)
    whole = params[:1] == ["model"]

    def loss_of(*inputs: Any) -> Any:
        return loss_fn(model, *inputs) if whole else loss_fn(model(*inputs[:-1]), inputs[-1])

    names_in = _input_names(model, given, whole, params)
    given = [spec(s, n) for s, n in zip(given, names_in)]
    with _mode(model, True), _unstarted(optimizer):
        graph, inputs, outputs = graph_of(loss_of, given, [model], {"loss"})
        loss = outputs["loss"]
        with graph.as_default():
            train = optimizer.minimize(loss)
        feeds = [x._value for x in inputs]
        deferred = deferred_of(Needed(graph, [loss, train], feeds))
        for d in deferred:
            d.variant()  # makes the states of parameters that have not been trained
        later = {d: d.variant() for d in deferred}
        first = {d: _first(v) for d, v in later.items()}
        steps = [(STEP, lowered(graph, [loss, train], feeds, {}, later))]
        if first != later:
            steps.append((FIRST, lowered(graph, [loss, train], feeds, {}, first)))
        named = _tensors(model, optimizer)
        names = _FlatNames(named)
        programs: list[tuple[str, Lowered, Sequence[str], Sequence[str]]] = [
            (label, low, names_in, ["loss"]) for label, low in steps
        ]
        with _mode(model, False), no_grad():
            shown = _shown(model, given, whole, forward)
            shape_of, model_inputs, results = graph_of(model, shown, [model])
        low = lowered(shape_of, list(results.values()), [x._value for x in model_inputs], {})
        programs.insert(0, (FORWARD, low, [s.name for s in shown], list(results)))
        source = source_from(programs, names, name, _value, mutable=True)
        states = dict(source.states)
        for known, tensor in named:
            if names.known(tensor) == known:
                states.setdefault(known, _array(tensor))
        init = _init_program(model, optimizer, names, states)
        whole_text, fresh_text = _structure(model, optimizer, True), _structure(model, optimizer, False)
    checkpoint = tuple([(known, names.known(t), known.startswith("optimizer.")) for known, t in named])
    training = Training(
        STEP, FIRST if len(steps) > 1 else None, INIT, "generator", checkpoint, (whole_text, fresh_text)
    )
    return Source(name, (*source.programs, init), source.weights, states, training)


def _shown(model: Module, given: Sequence[Any], whole: bool, forward: Sequence[Any] | None) -> list[Any]:
    """The inputs of `forward`."""
    accepted = list(inspect.signature(model.forward).parameters.values())
    if forward is not None:
        named = [p.name for p in accepted]
        own = [spec(s) for s in forward]
        return [spec(s, s.name or (named[k] if k < len(named) else f"x{k}")) for k, s in enumerate(own)]
    if not whole or any(p.kind is p.VAR_POSITIONAL for p in accepted):
        return list(given[:-1])
    places = [p for p in accepted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in places)
    if needed > len(given):
        raise ArgumentError(
            f"{type(model).__name__} takes {needed} inputs and a step has {len(given)}: say what `forward` takes by forward=[...], such as "
            "forward=['x: f32[batch,784]']"
        )
    return list(given[: len(places)])


def _input_names(model: Module, given: Sequence[Any], whole: bool, params: Sequence[str]) -> list[str]:
    """Names of the inputs: their own, else those of the model's parameters and of the loss's."""
    known = (
        list(params[1:]) if whole else [*list(inspect.signature(model.forward).parameters)[: len(given) - 1], params[1]]
    )
    out: list[str] = []
    for k, s in enumerate(given):
        name = s.name or (known[k] if k < len(known) else f"x{k}")
        out.append(name if name not in out else f"{name}_{k}")
    return out


def _first(variant: Any) -> Any:
    """The variant of a step whose parameters have never been trained."""
    options, cohorts, _ = variant
    return (options, cohorts, 0) if "momentum" in options and set(cohorts) == {0} else variant


@contextmanager
def _mode(model: Module, training: bool) -> Iterator[None]:
    """The model in a mode; every module's own is put back."""
    before = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for m, was in before:
            m.training = was


@contextmanager
def _unstarted(optimizer: Optimizer) -> Iterator[None]:
    """What is made for parameters that have not been trained is dropped again."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    fresh = [p for p in params if not optimizer.state.get(p)]
    try:
        yield
    finally:
        for p in fresh:
            optimizer.state.pop(p, None)


def _tensors(model: Module, optimizer: Optimizer) -> list[tuple[str, Any]]:
    """All tensors of a checkpoint under their names in its file."""
    out = [(f"model.{name}", t) for name, t in model.state_dict(keep_vars=True).items()]
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for k, p in enumerate(params):
        out += [(f"optimizer.state.{k}.{key}", t) for key, t in (optimizer.state.get(p) or {}).items()]
    out.append(("generator", default_generator.cell))
    return out


class _FlatNames(Names):
    """States under the names that they have in a checkpoint, those that are not in it under their own."""

    def __init__(self, named: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        for name, tensor in named:
            self._known.setdefault(id(tensor), name)

    def known(self, tensor: Any) -> str:
        """The name of a tensor of the checkpoint."""
        return self._known[id(tensor)]


def _value(state: State) -> np.ndarray:
    if isinstance(state, SharedState):
        return _array(state.tensor)
    raise ArgumentError(
        f"{state.name!r} belongs to a Session: a model that is trained ahead of time has its own parameters"
    )


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach()._array(share=False)  # type: ignore[no-any-return]


def _structure(model: Module, optimizer: Optimizer, started: bool) -> str:
    """What a checkpoint's file says of its structure."""
    state = optimizer.state_dict()
    if not started:
        state = {**state, "state": {}}
    whole = {"model": model.state_dict(), "optimizer": state, "generator": default_generator.get_state()}
    return json.dumps(flattened(whole)[0])


# -------------------------------------------------------------------------------------------------------------- init
def _init_program(
    model: Module, optimizer: Optimizer, names: _FlatNames, states: dict[str, np.ndarray]
) -> ProgramSource:
    """The program that gives all states the values that they have in a model just made, from the generator's state."""
    made = [m for m in _children_first(model) if hasattr(m, "reset_parameters") or hasattr(m, "reset_running_stats")]
    tensors = {names.known(t): t for t in [*model.parameters(), *model.buffers()] if id(t) in names._known}
    tensors["generator"] = default_generator.cell
    builder, results = Builder("init"), []
    generator = builder.parameter(TensorType(i64, (2,)), "generator")
    flush()
    capture = Capture("init", [])
    try:
        with capture, no_grad():
            for m in made:
                reset = getattr(m, "reset_parameters", None) or m.reset_running_stats
                reset()
            capture.refresh()
            trace = recording.trace
            vals = {known: t._value() for known, t in tensors.items()}
            changed = {known: v for known, v in vals.items() if v.trace is trace}
            numbers = [number_in(trace, v) for v in changed.values()]
            node = trace.entries[-1].node
            assert node is not None
            construction = Construction(node)
            recorded = construction.function(numbers)
            arguments = []
            held = {e: val for val, e in trace.leaves.items()}
            with builder:
                for (e, k), param in zip(construction.inputs, recorded.params):
                    if k is None and e in held and _is_generator(capture, held[e]):
                        arguments.append(generator)
                    else:
                        arguments.append(_constant(trace, e, k, param.type))
                values = dict(zip(changed, builder.inline(recorded, arguments)))
    finally:
        recording.capture = None
        capture.undo()
        recording.trace = Trace(recording.grad)
    with builder:
        params = [p for g in optimizer.param_groups for p in g["params"]]
        for p in params:
            for key, t in (optimizer.state.get(p) or {}).items():
                start = 0 if key == "step" else optimizer.initial(key)
                values.setdefault(names.known(t), _full(t._type, start))
    values.setdefault("generator", generator)
    results = [(known, v) for known, v in values.items() if known in states]
    function = builder.build([v for _, v in results])
    ports = tuple([Port("state", known) for known, _ in results])
    return ProgramSource(INIT, function, (Port("state", "generator"),), ports)


def _children_first(module: Module) -> Iterator[Module]:
    """Modules in the order in which their constructors end, which is that in which they draw."""
    for child in module.children():
        yield from _children_first(child)
    yield module


def _is_generator(capture: Capture, val: Val) -> bool:
    holder = capture.holders.get(val)
    return holder is not None and holder() is default_generator.cell


def _constant(trace: Trace, e: int, k: int | None, type: TensorType) -> Any:
    """A number or small tensor that the recording reads, as a constant of the program."""
    if k is not None:
        scalars = trace.entries[e].scalars
        assert scalars is not None
        return _full(type, scalars[k])
    buffer = trace.entries[e].buf
    assert buffer is not None
    array = runtime.to_numpy(buffer, type, copy=True)
    if array.size and (array == array.reshape(-1)[0]).all():
        return _full(type, array.reshape(-1)[0].item())
    raise ArgumentError(
        "a module's reset_parameters reads a tensor that is not its own; init cannot go into an artefact"
    )


def _full(type: TensorType, value: Any) -> Any:
    return nd.full(type.shape, float(value) if type.dtype.is_float else int(value), type.dtype)
