"""The optimiser base: parameter groups, state, and the step as one entry of the trace.

`step()` records one macro for each group: all parameters' updates by the group's rule, with hyperparameters as run-time scalars read
at the call, then flushes. The same rule makes the update ops of graph mode (`minimize`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duo.eager.autograd import number_in
from duo.eager.flush import flush
from duo.eager.mode import enable_grad
from duo.eager.steps import macro_run
from duo.eager.tensor import EagerTensor, full_value
from duo.eager.trace import OVERWRITTEN, Trace, commit, hooks, note_overwritten, open_trace, state
from duo.eager.trie import Info, Macro, Node
from duo.eager.watch import Group, Slots, WatchedList, changed
from duo.optim.known import KnownStep, Memory, Noted
from duo.optim.rules import Rule, apply_rule
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.types import TensorType, f64, i64


class Optimize(Macro):
    """One rule with its options. Key (self, number of the step or None, numbers of each parameter, its gradient and its slots). Values: the
    new step if counted, then each parameter and its slots."""

    name = "optimize"

    def __init__(self, rule: Rule, options: frozenset) -> None:
        self.rule, self.options, self.slots = rule, options, rule.slots(options)

    def rows(self, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
        width = 2 + len(self.slots)
        return [numbers[i : i + width] for i in range(0, len(numbers), width)]

    def infer(self, parent: Node, key: tuple, trace: Trace | None = None) -> tuple[tuple[Info, ...], Any]:
        _, step, numbers = key
        infos = [parent.info_of(step)] if step is not None else []
        count = len(self.slots)
        for p, g, *_ in self.rows(numbers):
            kind = parent.info_of(p).type
            if parent.info_of(g).type is not kind:
                raise ShapeError(f"{self.rule.name}: a parameter {kind} has a gradient {parent.info_of(g).type}")
            infos.append(Info(kind, parent.info_of(p).requires_grad, parent.device))
            infos.extend([Info(kind, False, parent.device)] * count)
        return tuple(infos), None

    def build(self, construction: Any, node: Node) -> tuple[Value, ...]:
        _, step, numbers = node.key
        rows = self.rows(numbers)
        hyper = [construction.scalar(k, f64) for k in range(len(self.rule.hyper))]
        count = _next(construction.value(step)) if step is not None else None
        values = [[construction.value(n) for n in row] for row in rows]
        self.enter(construction, node)
        out = apply_rule(self.rule, self.options, count, hyper, values)
        made = [construction.stop(v) for row in out for v in row]
        return tuple(made if count is None else [count, *made])

    def updates(self, node: Node) -> dict[int, int]:
        _, step, numbers = node.key
        old = [n for p, _, *slots in self.rows(numbers) for n in (p, *slots)]
        return dict(enumerate(old if step is None else [step, *old], node.first))

    def enter(self, path: Any, node: Node) -> None:
        path.overwritten.update((n, -1) for p, _, *slots in self.rows(node.key[2]) for n in (p, *slots))

    def alone(self, node: Node, type_of: Callable[[int], TensorType]) -> tuple[Sequence[int], Callable[..., Any]]:
        _, step, rows = node.key
        numbers = list(dict.fromkeys(rows if step is None else (step, *rows)))
        place = {n: k for k, n in enumerate(numbers)}
        key = (self, None if step is None else place[step], tuple([place[n] for n in rows]))
        return numbers, macro_run(self, key, tuple([type_of(n) for n in numbers]))


def _next(step: Value) -> Value:
    return step + 1  # type: ignore[operator]


@functools.cache
def _optimize(rule: Rule, options: frozenset) -> Optimize:
    return Optimize(rule, options)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a group's options say, as long as its `version` stays. hyper: None where a value could change unnoticed."""

    version: int
    macro: Optimize
    hyper: tuple[float, ...] | None
    owner: type


class Optimizer:
    """Base of duo's optimisers, with torch.optim's interface: `param_groups`, `state`, `step`, `zero_grad`, `state_dict`."""

    rule: Rule

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.state: dict[Any, dict[str, Any]] = Slots()
        self.param_groups: list[dict[str, Any]] = WatchedList()
        self._sharing: dict[int, tuple[Any, int]] = {}  # id of a step counter -> it, and how many parameters share it
        self._memory = Memory()
        groups = list(params)
        if not groups:
            raise ArgumentError("an optimizer got an empty parameter list")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Adds a group {'params': [...], 'lr': ...}; what it does not say comes from the defaults."""
        group = Group(group)
        params = group["params"]
        params = [params] if hasattr(params, "_type") else list(params)
        group["params"] = WatchedList([p[1] if isinstance(p, tuple) else p for p in params])
        known = {id(p) for g in self.param_groups for p in g["params"]}
        for p in group["params"]:
            if not isinstance(p, EagerTensor):
                raise ArgumentError(f"an optimizer takes tensors, not {type(p).__name__}")
            if not p.is_leaf:
                raise ArgumentError(f"an optimizer takes leaf tensors; one of type {p._type} was computed from others")
            if id(p) in known:
                raise ArgumentError("a parameter is in two groups of the optimizer")
            known.add(id(p))
        for name, value in self.defaults.items():
            group.setdefault(name, value)
        self.check_group(group)
        self.param_groups.append(group)

    def __setattr__(self, name: str, value: Any) -> None:
        changed()
        object.__setattr__(self, name, value)

    # What a kind of optimiser says of a group's options.
    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ArgumentError for values out of range."""

    def options(self, group: dict[str, Any]) -> frozenset:
        """Static flags of the rule."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Values of `rule.hyper`."""
        return tuple([float(group[name]) for name in self.rule.hyper])

    def initial(self, slot: str) -> float:
        """What a slot is full of before the first step."""
        return 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients (or writes zeros into them)."""
        capture = state.capture
        if capture is not None:
            capture.touch_optimizer(self)
        for group in self.param_groups:
            for p in group["params"]:
                if not set_to_none:
                    if p.grad is not None:
                        p.grad.zero_()
                elif capture is None and (leaf := p._leaf) is not None:
                    leaf.grad = None
                else:
                    p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. `closure` recomputes the loss first."""
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        if state.capture is not None:
            state.capture.touch_optimizer(self)
            for group in self.param_groups:
                self._step_group(group, self._settings(group))
            return loss
        trace, memory = open_trace(), self._memory
        node = trace.entries[-1].node
        known = memory.steps.get(node)
        if known.__class__ is KnownStep and known.run(self, trace):
            return loss
        watched = memory.watch(node) and not hooks.busy
        for group in self.param_groups:
            self._step_group(group, self._settings(group))
        flush()
        if watched:
            memory.learn(self, node, trace)
        return loss

    def minimize(self, loss: Any) -> Any:
        """The operation of a graph that performs one step on `loss`, a graph's tensor; run it with a Session. In eager mode: backward() and step()."""
        minimize = getattr(loss, "_minimize", None)
        if minimize is None:
            raise ArgumentError(
                "minimize takes the loss of a graph; in eager mode call loss.backward() and optimizer.step()"
            )
        return minimize(self, loss)

    def _settings(self, group: Any) -> _Settings:
        found = group.settings
        if found is None or found.version != group.version or found.owner is not self.__class__:
            version = group.version
            fixed = all(_immutable(v) for k, v in group.items() if k != "params")
            macro = _optimize(self.rule, self.options(group))
            found = group.settings = _Settings(version, macro, self.hyper(group) if fixed else None, self.__class__)
        return found

    def _step_group(self, group: dict[str, Any], settings: _Settings) -> None:
        macro = settings.macro
        if not self.rule.counts and not macro.slots:
            params = [p for p in group["params"] if p._leaf is not None and p._leaf.grad is not None]
            for device in dict.fromkeys([p._val.info.device for p in params]):
                self._update(macro, group, settings, [p for p in params if p._val.info.device is device])
            return
        options = macro.options
        cohorts: dict[Any, list[Any]] = {}  # parameters that were updated equally often, of one device
        moved = [p for p in group["params"] if self._is_elsewhere(p)]
        if moved:
            self._follow(moved)
        for p in group["params"]:
            if p.grad is not None:
                slots = self.state[p]
                key = id(slots.get("step")) if slots else "new", p._val.info.device
                cohorts.setdefault(key, []).append(p)
        for (key, _), params in cohorts.items():
            if key == "new":
                self._start(options, params)
                first = _optimize(self.rule, options | {"first"}) if "momentum" in options else macro
                self._memory.notes = None
                self._update(first, group, settings, params)
            else:
                self._update(macro, group, settings, params)

    def _start(self, options: frozenset, params: list[Any]) -> None:
        """State for parameters that meet their first gradient; those that start together share one step counter."""
        device = params[0]._val.info.device
        step = full_value(0, TensorType(i64, ()), device) if self.rule.counts else None
        if step is not None:
            self._sharing[id(step)] = (step, len(params))
        for p in params:
            slots = {"step": step} if step is not None else {}
            slots.update((name, full_value(self.initial(name), p._type, device)) for name in self.rule.slots(options))
            self.state[p].update(slots)  # all at once: an interrupt finds a parameter started or not

    def _is_elsewhere(self, param: Any) -> bool:
        """Whether the parameter has left its state behind on another device."""
        slots = self.state[param]
        return bool(slots) and next(iter(slots.values()))._val.info.device is not param._val.info.device

    def _follow(self, params: list[Any]) -> None:
        """State goes where its parameter has gone. Those that shared a step counter and are together again share one there."""
        self._memory.notes = None
        counters: dict[Any, Any] = {}
        for p in params:
            device = p._val.info.device
            for name, value in self.state[p].items():
                if name != "step":
                    self.state[p][name] = value._to_device(device)
                    continue
                counter = counters.get((id(value), device))
                if counter is None:
                    counter = counters[id(value), device] = value._to_device(device)
                self.state[p][name] = counter
                self._sharing[id(value)] = (value, self._sharing.get(id(value), (value, 1))[1] - 1)
                self._sharing[id(counter)] = (counter, self._sharing.get(id(counter), (counter, 0))[1] + 1)

    def _update(self, macro: Optimize, group: dict[str, Any], settings: _Settings, params: list[Any]) -> None:
        if state.capture is not None:
            for p in params:
                state.capture.read_grad(p)
        names = macro.slots
        step = self.state[params[0]]["step"] if self.rule.counts else None
        # A row for each parameter: it, its gradient, its slots.
        if names:
            tensors = [t for p in params for t in (p, p._leaf.grad, *[self.state[p][n] for n in names])]
        else:
            tensors = [t for p in params for t in (p, p._leaf.grad)]
        hyper = settings.hyper if settings.hyper is not None else self.hyper(group)
        # Reading a tensor may record and flush: all are read before the first gets its number.
        read = [t._val if t._storage is None else t._current() for t in tensors]
        read_step = step._value() if step is not None else None
        trace = open_trace()
        try:
            trace, vals = self._commit(macro, hyper, tensors, read, step, read_step)
            if state.capture is not None:
                state.capture.hyper[vals[0].index] = (self, group)
            if self._memory.notes is not None:
                self._memory.notes.append(Noted(trace, group, macro, params, tensors, step, vals[0].node))
            start = 0
            if step is not None:
                self._advance(step, params, vals[0])
                start = 1
            width = 2 + len(names)
            updated = params if not names else [t for k, t in enumerate(tensors) if k % width != 1]
            for tensor, val in zip(updated, vals[start:]):
                take_update(tensor, val)
        except BaseException:
            # An interrupt: not all that the trace calls updated is. What is recorded next would read values that the trace calls overwritten.
            if state.capture is None:
                flush(trace)
            raise

    def _commit(
        self, macro: Optimize, hyper: tuple, tensors: list[Any], read: list[Any], step: Any, read_step: Any
    ) -> tuple[Trace, list[Any]]:
        """The entry of the step, of values that were read already: the trace that it is in, and its values."""
        while True:
            trace = open_trace(read[0].info.device)
            leaves = trace.leaves
            numbers = [
                v.index if v.trace is trace else leaves.get(v) or trace.enter(v, t) for v, t in zip(read, tensors)
            ]
            count = number_in(trace, read_step, step) if read_step is not None else None
            if count == -1 or -1 in numbers:
                continue
            vals = commit(trace, (macro, count, tuple(numbers)), hyper)
            if vals is not None:
                return trace, vals

    def _advance(self, step: Any, params: list[Any], val: Any) -> None:
        _, sharers = self._sharing.get(id(step), (step, 0))
        if sharers == len(params):
            take_update(step, val)
            return
        self._memory.notes = None
        mine = EagerTensor(val)  # some of those that shared the counter had no gradient this time
        self._sharing[id(step)] = (step, sharers - len(params))
        self._sharing[id(mine)] = (mine, len(params))
        for p in params:
            self.state[p]["step"] = mine

    def state_dict(self) -> dict[str, Any]:
        """{'state': {number of the parameter: slots}, 'param_groups': [...]} as torch.optim writes it. `step` counts updates done."""
        number = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        slots = {number[id(p)]: dict(s) for p, s in self.state.items() if id(p) in number and s}
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": [number[id(p)] for p in g["params"]]}
            for g in self.param_groups
        ]
        return {"state": slots, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned; the groups must have as many parameters."""
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ArgumentError("the state dict has other parameter groups than this optimizer")
        by_number: dict[int, Any] = {}
        for mine, theirs in zip(self.param_groups, groups):
            by_number.update(zip(theirs["params"], mine["params"]))
            mine.update({k: v for k, v in theirs.items() if k != "params"})
        self.state = Slots()
        self._sharing = {}
        counters: dict[Any, Any] = {}
        for n, slots in state_dict["state"].items():
            p = by_number[int(n)]
            mine, device = self.state[p], p._val.info.device
            for name, value in slots.items():
                if name == "step":
                    mine[name] = self._counter(value, device, counters)
                else:
                    mine[name] = value.detach().clone()._to_device(device)

    def _counter(self, step: Any, device: str, counters: dict[Any, Any]) -> Any:
        """The shared step counter for parameters of a device that were updated this often."""
        done = int(step.item()) if hasattr(step, "item") else int(step)
        if (done, device) not in counters:
            counters[done, device] = full_value(done, TensorType(i64, ()), device)
        counter = counters[done, device]
        self._sharing[id(counter)] = (counter, self._sharing.get(id(counter), (counter, 0))[1] + 1)
        return counter


def _immutable(value: Any) -> bool:
    if value.__class__ is tuple:
        return all(map(_immutable, value))
    return value.__class__ in (float, int, bool, str, type(None))


def take_update(tensor: Any, val: Any) -> None:
    """Makes `val`, which a step computed from the tensor's value, the tensor's value."""
    if state.capture is not None:
        state.capture.write(tensor)
    old, storage = tensor._val, tensor._storage
    if tensor._leaf is not None:
        val.extra = tensor._leaf
    # The old value is marked after it was replaced: an interrupt in between must not leave the tensor with a value that no gradient may read.
    if storage is None:
        tensor._val = val
    elif storage.shared is None and not tensor._chain:
        storage.val = tensor._val = val
        storage.version += 1
        tensor._seen = storage.version
    else:
        tensor._write(val)
    if old.stamp is None:
        old.stamp = OVERWRITTEN
    else:
        note_overwritten(old)
