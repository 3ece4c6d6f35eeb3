"""`tf.train`: optimisers with TensorFlow's formulas, and `minimize` for those of duo.optim.

TensorFlow's optimisers keep their slots in variables of the graph. A duo.optim optimizer keeps its own: the same eager tensors as in
eager mode, so that a checkpoint moves between modes; what its step is (first step or not, which flags) is asked at each run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from duo.eager.infer import user_location
from duo.eager.tensor import EagerTensor, material
from duo.graph.control_flow import gradients
from duo.graph.errors import InvalidArgumentError
from duo.graph.graph import Graph, get_default_graph
from duo.graph.initializers import zeros_initializer
from duo.graph.items import Deferred, Operation
from duo.graph.saver import Saver, checkpoint_exists, get_checkpoint_state, latest_checkpoint
from duo.graph.states import Live, Number, SharedState, State
from duo.graph.tensor import GraphElement, convert_to_tensor, quiet
from duo.graph.variables import GraphKeys, Variable, assign_add, group, trainable_variables
from duo.optim import rules
from duo.optim.rules import Rule, apply_rule
from duo.tensor import Tensor
from duo_ir.core import Value
from duo_ir.errors import GradientError
from duo_ir.ops.broadcasting import cast_to
from duo_ir.types import TensorType, f64

Pair = tuple[Any, Any]


# ----------------------------------------------------------------------------------------------- global step
def get_global_step(graph: Graph | None = None) -> Variable | None:
    """The graph's step counter, or None."""
    found = (graph or get_default_graph()).get_collection(GraphKeys.GLOBAL_STEP)
    return found[0] if found else None


def create_global_step(graph: Graph | None = None) -> Variable:
    """An i64 variable `global_step`, 0 at first, not trained."""
    graph = graph or get_default_graph()
    if get_global_step(graph) is not None:
        raise InvalidArgumentError("the graph has a global_step already; use get_or_create_global_step")
    with graph.as_default(), graph.name_scope(None):
        step = Variable(np.int64(0), trainable=False, name="global_step")
    graph.add_to_collection(GraphKeys.GLOBAL_STEP, step)
    return step


def get_or_create_global_step(graph: Graph | None = None) -> Variable:
    return get_global_step(graph) or create_global_step(graph)


def global_step(sess: Any, global_step_tensor: Any) -> int:
    """Its value in that Session."""
    return int(sess.run(global_step_tensor))


# ----------------------------------------------------------------------------------------------- tf.train optimisers
class Optimizer:
    """Base of TensorFlow's optimisers. Learning rates and other numbers may be Python numbers, tensors, or functions that are called
    at each run."""

    rule: Rule

    def __init__(self, name: str, hyper: Sequence[Any], use_locking: bool = False) -> None:
        self._name = name
        self._hyper = tuple(hyper)
        self._slots: dict[tuple[int, str], Variable] = {}
        self._steps: dict[int, Variable] = {}

    def options(self) -> frozenset:
        """Static flags of the rule."""
        return frozenset()

    def minimize(
        self,
        loss: Any,
        global_step: Variable | None = None,
        var_list: Any = None,
        gate_gradients: Any = None,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
        name: str | None = None,
        grad_loss: Any = None,
    ) -> Operation:
        """An operation that updates the variables (the trainable ones, and module parameters that the graph uses) by one step."""
        pairs = self.compute_gradients(loss, var_list, grad_loss=grad_loss)
        if all(g is None for g, _ in pairs):
            names = [_name_of(v) for _, v in pairs][:8]
            raise GradientError(
                f"{type(self).__name__}.minimize: the loss {loss.name!r} depends on no variable of {names or 'the graph'}; make it from "
                "trainable variables, or pass var_list"
            )
        return self.apply_gradients(pairs, global_step, name)

    def compute_gradients(
        self, loss: Any, var_list: Any = None, *args: Any, grad_loss: Any = None, **kwargs: Any
    ) -> list[Pair]:
        """(gradient or None, variable) for each."""
        chosen = trainable_of(loss.graph) if var_list is None else _listed(var_list)
        if not chosen:
            raise InvalidArgumentError("no variables to optimize: the graph has no trainable variable; pass var_list")
        found = gradients(loss, chosen, None if grad_loss is None else [grad_loss])
        return list(zip(found, chosen))

    def apply_gradients(
        self, grads_and_vars: Iterable[Pair], global_step: Variable | None = None, name: str | None = None
    ) -> Operation:
        """An operation that updates each variable by its gradient, and then counts the global step."""
        pairs = [(g, v) for g, v in grads_and_vars if g is not None]
        if not pairs:
            raise GradientError("apply_gradients got no gradient: all are None")
        graph = next(g.graph for g, _ in pairs)
        options = self.options()
        slots = [[self._slot(graph, v, n, i) for i, n in enumerate(self.rule.slots(options))] for _, v in pairs]
        counter = self._counter(graph) if self.rule.counts else None
        base = name or self._name
        with graph.name_scope(base) as scope:
            with quiet(graph):
                done = group(*self._update(graph, options, pairs, slots, counter), name="update")
            if global_step is not None:
                with graph.control_dependencies([done]):
                    done = assign_add(global_step, 1, name="count").op
            done = group(done, name=scope)
        graph.add_to_collection(GraphKeys.TRAIN_OP, done)
        return done

    def _update(
        self, graph: Graph, options: frozenset, pairs: list[Pair], slots: list[list[Variable]], counter: Variable | None
    ) -> list[Any]:
        frame = graph.frame
        hyper = [self._number(graph, h, n) for h, n in zip(self._hyper, self.rule.hyper)]
        frame.loc = user_location()
        with frame:
            values = [cast_to(graph.value_of(h), f64) for h in hyper]
            count = graph.value_of(counter) + 1 if counter is not None else None  # type: ignore[operator]
            rows = [
                [graph.value_of(v), cast_to(graph.value_of(g), v.dtype), *[graph.value_of(s) for s in own]]
                for (g, v), own in zip(pairs, slots)
            ]
            made = apply_rule(self.rule, options, count, values, rows)
        frame.loc = None
        out = []
        targets = [[v, *own] for (_, v), own in zip(pairs, slots)]
        written = [(t, value) for row, new in zip(targets, made) for t, value in zip(row, new)]
        if counter is not None and count is not None:
            written.append((counter, count))
        for target, value in written:
            state: State = graph.share(target) if isinstance(target, EagerTensor) else target._state
            out.append(graph.wrap(graph.assign(state, value)))
        return out

    def _number(self, graph: Graph, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return convert_to_tensor(value)
        kind = TensorType(f64, ())
        if callable(value):
            return graph.wrap(graph.source(Live(lambda: (float(value()),), 0, name), kind))
        return graph.wrap(graph.source(Number(float(value)), kind))

    def _slot(self, graph: Graph, of: Any, name: str, number: int) -> Variable:
        key = (id(of), name)
        if key not in self._slots:
            base = of.op.name if isinstance(of, GraphElement) else graph.share(of).name
            shape = of._type.static_shape()
            with graph.as_default(), graph.name_scope(None), graph.control_dependencies(None):
                initial = self._initial(name, shape, of.dtype)
                self._slots[key] = Variable(initial, trainable=False, name=f"{base}/{self._name}")
        return self._slots[key]

    def _initial(self, slot: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return zeros_initializer()(shape, dtype)

    def _counter(self, graph: Graph) -> Variable:
        if id(graph) not in self._steps:
            with graph.as_default(), graph.name_scope(None), graph.control_dependencies(None):
                self._steps[id(graph)] = Variable(np.int64(0), trainable=False, name=f"{self._name}/step")
        return self._steps[id(graph)]

    def get_slot(self, var: Any, name: str) -> Variable | None:
        """The variable that holds `name` (such as 'm') for `var`."""
        return self._slots.get((id(var), name))

    def get_slot_names(self) -> list[str]:
        return list(self.rule.slots(self.options()))

    def variables(self) -> list[Variable]:
        """Everything the optimizer keeps."""
        return [*self._slots.values(), *self._steps.values()]

    def get_name(self) -> str:
        return self._name


class GradientDescentOptimizer(Optimizer):
    """p -= lr * g."""

    rule = rules.TF_SGD

    def __init__(self, learning_rate: Any, use_locking: bool = False, name: str = "GradientDescent") -> None:
        super().__init__(name, (learning_rate,))


class MomentumOptimizer(Optimizer):
    """a = momentum * a + g; p -= lr * a (with Nesterov: lr * (g + momentum * a))."""

    rule = rules.TF_MOMENTUM

    def __init__(
        self,
        learning_rate: Any,
        momentum: Any,
        use_locking: bool = False,
        name: str = "Momentum",
        use_nesterov: bool = False,
    ) -> None:
        super().__init__(name, (learning_rate, momentum))
        self._nesterov = use_nesterov

    def options(self) -> frozenset:
        return frozenset({"nesterov"} if self._nesterov else ())


class AdamOptimizer(Optimizer):
    """p -= lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon): "epsilon hat" of Kingma & Ba 2015."""

    rule = rules.TF_ADAM

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: Any = 0.9,
        beta2: Any = 0.999,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
    ) -> None:
        super().__init__(name, (learning_rate, beta1, beta2, epsilon))


class AdamWOptimizer(Optimizer):
    """p -= weight_decay * p, then AdamOptimizer's step: tf.contrib.opt's optimizer and order of arguments. The decay is not multiplied by the
    learning rate, which torch.optim.AdamW (`duo.optim.AdamW`, whose `minimize` works in graphs too) does."""

    rule = rules.TF_ADAMW

    def __init__(
        self,
        weight_decay: Any,
        learning_rate: Any = 0.001,
        beta1: Any = 0.9,
        beta2: Any = 0.999,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "AdamW",
    ) -> None:
        super().__init__(name, (learning_rate, beta1, beta2, epsilon, weight_decay))


class AdagradOptimizer(Optimizer):
    """a += g^2; p -= lr * g / sqrt(a), where a begins at `initial_accumulator_value` (Duchi, Hazan & Singer 2011)."""

    rule = rules.TF_ADAGRAD

    def __init__(
        self,
        learning_rate: Any,
        initial_accumulator_value: float = 0.1,
        use_locking: bool = False,
        name: str = "Adagrad",
    ) -> None:
        if not initial_accumulator_value > 0:
            raise InvalidArgumentError(f"initial_accumulator_value must be above 0, not {initial_accumulator_value}")
        super().__init__(name, (learning_rate,))
        self._start = initial_accumulator_value

    def _initial(self, slot: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.full(shape, self._start, dtype.numpy)


class RMSPropOptimizer(Optimizer):
    """s = decay * s + (1 - decay) * g^2; b = momentum * b + lr * g / sqrt(s + epsilon); p -= b. s begins at 1, as TensorFlow's."""

    rule = rules.TF_RMSPROP

    def __init__(
        self,
        learning_rate: Any,
        decay: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: Any = 1e-10,
        use_locking: bool = False,
        centered: bool = False,
        name: str = "RMSProp",
    ) -> None:
        super().__init__(name, (learning_rate, decay, momentum, epsilon))
        self._centered = centered

    def options(self) -> frozenset:
        return frozenset({"centered"} if self._centered else ())

    def _initial(self, slot: str, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.ones(shape, dtype.numpy) if slot == "rms" else super()._initial(slot, shape, dtype)


def trainable_of(graph: Graph) -> list[Any]:
    """The trainable variables, and the module parameters (and other eager leaves that require grad) that the graph uses."""
    with graph.as_default():
        variables = trainable_variables()
    return [*variables, *[s.tensor for s in graph.shared.values() if s.tensor.requires_grad]]


def _listed(var_list: Any) -> list[Any]:
    return [var_list] if isinstance(var_list, Tensor) else list(var_list)


def _name_of(v: Any) -> str:
    return v.op.name if isinstance(v, GraphElement) else "parameter"


# ----------------------------------------------------------------------------------------------- duo.optim
class _Slot(SharedState):
    """A slot of a duo.optim optimizer, found anew at each run: loading a state dict replaces them."""

    __slots__ = ("key", "owner", "param")

    def __init__(self, owner: Any, param: Any, key: str) -> None:
        super().__init__(key, owner.state[param][key])
        self.owner, self.param, self.key = owner, param, key

    @property
    def tensor(self) -> Any:
        return self.owner.state[self.param][self.key]


class _Counter(_Slot):
    """The step counter that parameters which were updated equally often share."""

    __slots__ = ("params",)

    def __init__(self, owner: Any, params: list[Any]) -> None:
        super().__init__(owner, params[0], "step")
        self.params = params

    def store(self, buffer: Any) -> None:
        """Parameters that shared the counter with others which had no gradient get one of their own."""
        self.owner._advance(self.tensor, self.params, material(buffer, self.type))


class Step(Deferred):
    """One step of a group of a duo.optim optimizer in the graph. rows: (state of the parameter, its gradient)."""

    def __init__(self, optimizer: Any, group: dict[str, Any], rows: list[tuple[SharedState, Value]]) -> None:
        self.optimizer, self.group, self.rows = optimizer, group, rows
        self.loc = user_location()

    def needs(self) -> Sequence[Value]:
        return [g for _, g in self.rows]

    def variant(self) -> tuple:
        """(flags, for each row the number of its cohort, whether each cohort is new). Starts the state of new parameters."""
        opt, options = self.optimizer, self.optimizer.options(self.group)
        if not opt.rule.counts and not opt.rule.slots(options):
            return options, (0,) * len(self.rows), -1
        numbers: dict[Any, int] = {}
        cohorts = []
        new = []
        for state, _ in self.rows:
            slots = opt.state[state.tensor]
            key = id(slots.get("step")) if slots else "new"
            if not slots:
                new.append(state.tensor)
            cohorts.append(numbers.setdefault(key, len(numbers)))
        if new:
            opt._start(options, new)
        return options, tuple(cohorts), numbers.get("new", -1)

    def cancel(self, variant: tuple) -> None:
        _, cohorts, new = variant
        for (state, _), c in zip(self.rows, cohorts):
            if c == new:
                self.optimizer.state.pop(state.tensor, None)

    def emit(self, variant: tuple, lowering: Any, values: Sequence[Value]) -> None:
        options, cohorts, new = variant
        opt = self.optimizer
        lowering.builder.loc = self.loc
        for c in range(max(cohorts) + 1):
            rows = [(s, g) for (s, _), g, k in zip(self.rows, values, cohorts) if k == c]
            self._emit_cohort(
                lowering, opt.rule, options | {"first"} if c == new and "momentum" in options else options, rows
            )

    def _emit_cohort(
        self, lowering: Any, rule: Rule, options: frozenset, rows: list[tuple[SharedState, Value]]
    ) -> None:
        opt, group = self.optimizer, self.group
        read = lambda: opt.hyper(group)  # noqa: E731
        hyper = [lowering.source(Live(read, k, n, id(group)), TensorType(f64, ())) for k, n in enumerate(rule.hyper)]
        params = [s.tensor for s, _ in rows]
        memo = lowering.memo
        counter = None
        if rule.counts:
            key = (opt, id(opt.state[params[0]]["step"]))
            counter = memo[key] = memo.get(key) or _Counter(opt, params)
        names = rule.slots(options)
        slots = []
        for p in params:
            for n in names:
                memo[opt, id(p), n] = memo.get((opt, id(p), n)) or _Slot(opt, p, n)
            slots.append([memo[opt, id(p), n] for n in names])
        count = lowering.read(counter) + 1 if counter is not None else None
        given = [[lowering.read(s), g, *[lowering.read(t) for t in own]] for (s, g), own in zip(rows, slots)]
        made = apply_rule(rule, options, count, hyper, given)
        if counter is not None:
            lowering.write(counter, count)
        for (s, _), own, new in zip(rows, slots, made):
            for state, value in zip([s, *own], new):
                lowering.write(state, value)


def minimize(optimizer: Any, loss: Any) -> Operation:
    """An operation that performs one step of a duo.optim optimizer: what `optimizer.minimize(loss)` gives on a graph's loss.

    Its parameters are the module parameters that it was made with; those that the loss does not depend on stay as they are."""
    graph = loss.graph
    params = [p for g in optimizer.param_groups for p in g["params"]]
    found = dict(zip(map(id, params), gradients(loss, params)))
    if all(g is None for g in found.values()):
        raise GradientError(
            f"{type(optimizer).__name__}.minimize: the loss {loss.name!r} depends on none of the optimizer's {len(params)} parameters"
        )
    op = graph.operation(type(optimizer).__name__, None)
    for g in optimizer.param_groups:
        rows = [(graph.share(p), found[id(p)]._value) for p in g["params"] if found[id(p)] is not None]
        if not rows:
            continue
        step = Step(optimizer, g, rows)
        graph._placed(step)
        for known in graph._known:
            for state, _ in rows:
                known.pop(state, None)
        op.effects.append(step)
    graph.add_to_collection(GraphKeys.TRAIN_OP, op)
    return op


GraphElement._minimizer = staticmethod(minimize)

__all__ = [
    "AdagradOptimizer", "AdamOptimizer", "AdamWOptimizer", "GradientDescentOptimizer", "MomentumOptimizer", "Optimizer", "RMSPropOptimizer", "Saver", "checkpoint_exists",
    "create_global_step", "get_checkpoint_state", "get_global_step", "get_or_create_global_step", "global_step",
    "latest_checkpoint",
]  # fmt: skip
