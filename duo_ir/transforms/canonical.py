"""The canonical form of a program, in which the same model written in two frontends is the same Function.

Ops that no result needs are dropped; the rest come in depth-first postorder from the results, operands left to right. The first
parameters are pinned (feeds, arguments); the others (states, scalars) come in the order in which that walk first meets them, and
results that are new values of states come in the order of their parameters. Use `Function.hash` of the outcome to compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from duo_ir.core import Function, Op, Value, attr_key
from duo_ir.transforms.rewrite import map_regions, with_operands, with_sizes
from duo_ir.types import Dim
from duo_ir.verify import bound_sizes, used_sizes


@dataclass(frozen=True)
class Canonical:
    """A canonical Function and how it came out of the original one.

    params[i]: the original number of parameter i; results[k]: the original number of result k. Parameters that nothing uses are
    left out (with `state_results`, so is a state that comes back unchanged and unread, and its result).
    """

    function: Function
    params: tuple[int, ...]
    results: tuple[int, ...]


def canonicalize(
    function: Function, pinned: int, state_results: Mapping[int, int] | None = None, rename_sizes: bool = False
) -> Canonical:
    """The canonical form of `function`, whose first `pinned` parameters keep their places.

    state_results: parameter number -> number of the result that is its next value; the other results are pinned: they come first, in
    their order, then one result per state, in the order of the parameters. States that no pinned result leads to are ordered by
    the structure of their next value (equal structures keep their given order). A parameter that nothing reads stays, last, when
    it alone fixes a named size that is used. rename_sizes: named sizes become s0, s1... in the order of their first appearance in the
    parameters (frontends name them differently).
    """
    out = _Canonicalizer(function, pinned, dict(state_results or {})).run()
    if not rename_sizes or not out.function.dims:
        return out
    names = {name: Dim.symbol(f"s{i}") for i, name in enumerate(out.function.dims)}
    return replace(out, function=with_sizes(out.function, names))


class _Canonicalizer:
    def __init__(self, function: Function, pinned: int, state_results: dict[int, int]) -> None:
        self.f, self.pinned, self.state_results = function, pinned, state_results
        self.number = {p: i for i, p in enumerate(function.params)}
        self.order: list[int] = []  # free parameters as the walk meets them
        self.met: set[Value] = set(function.params[:pinned])
        self.done: set[Op] = set()
        self.ops: list[Op] = []

    def run(self) -> Canonical:
        f = self.f
        pinned_results = [k for k in range(len(f.results)) if k not in set(self.state_results.values())]
        for k in pinned_results:
            self.walk(f.results[k])
        walked = self.follow(0)
        while rest := self.waiting():
            for i in rest:
                if f.params[i] not in self.met:
                    self.meet(f.params[i])
            walked = self.follow(walked)
        results = pinned_results + [self.state_results[i] for i in self.order if i in self.state_results]
        kept = [f.results[k] for k in results]
        params = [*range(self.pinned), *self.order]
        params += self.sizing(params, kept)
        env: dict[Value, Value] = {}
        ops = _renamed(self.ops, env, regions=True)
        kept = [env.get(v, v) for v in kept]
        new = Function([f.params[i] for i in params], ops, kept, f.name, [f.names[i] for i in params])
        return Canonical(_fresh(new), tuple(params), tuple(results))

    def walk(self, root: Value) -> None:
        """Appends the ops that make `root`, operands first, left to right."""
        stack: list[tuple[Value, bool]] = [(root, False)]
        while stack:
            v, ready = stack.pop()
            if v.op is None:
                self.meet(v)
            elif ready:
                if v.op not in self.done:
                    self.done.add(v.op)
                    self.ops.append(v.op)
            elif v.op not in self.done:
                stack.append((v, True))
                stack += [(u, False) for u in reversed(v.op.operands)]

    def meet(self, param: Value) -> None:
        if param not in self.met:
            self.met.add(param)
            self.order.append(self.number[param])

    def follow(self, start: int) -> int:
        """Walks the next values of the states met since place `start` of the order; returns the place reached."""
        while start < len(self.order):
            result = self.state_results.get(self.order[start])
            if result is not None:
                self.walk(self.f.results[result])
            start += 1
        return start

    def waiting(self) -> list[int]:
        """States not met yet whose next value is something else than themselves, by the structure of that value."""
        waiting = [
            i for i, k in self.state_results.items()
            if self.f.params[i] not in self.met and self.f.results[k] is not self.f.params[i]
        ]  # fmt: skip
        if len(waiting) < 2:
            return waiting
        known = {p: str(i) for i, p in enumerate(self.f.params[: self.pinned])}
        known |= {self.f.params[i]: str(self.pinned + place) for place, i in enumerate(self.order)}
        digests = _digests(self.f, known)
        return sorted(waiting, key=lambda i: (digests[self.f.results[self.state_results[i]]], i))

    def sizing(self, params: list[int], results: Iterable[Value]) -> list[int]:
        """Parameters outside `params` needed only for the named sizes they fix."""
        types = [self.f.params[i].type for i in params]
        bound, extra = bound_sizes(types), []
        for name in used_sizes([*types, *(r.type for r in results)], self.ops):
            if name in bound:
                continue
            for i, p in enumerate(self.f.params):
                if i not in params and name in bound_sizes([p.type]):
                    extra.append(i)
                    bound |= bound_sizes([p.type])
                    break
        return extra


def _digests(function: Function, known: Mapping[Value, str]) -> dict[Value, str]:
    """A digest of how each value is computed; parameters not in `known` count by type alone."""
    out = {p: f"{known.get(p, '?')}:{p.type}" for p in function.params}
    for op in function.ops:
        attrs = [(k, attr_key(op.attrs[k])) for k in sorted(op.attrs)]
        row = (op.definition.name, [out[v] for v in op.operands], attrs, [str(r.type) for r in op.results])
        digest = hashlib.sha256(repr(row).encode()).hexdigest()
        out.update((r, f"{digest}.{i}") for i, r in enumerate(op.results))
    return out


def _canonical_region(region: Function) -> Function:
    """A nested function keeps its parameters and results; its ops are put in order."""
    walk = _Canonicalizer(region, len(region.params), {})
    return walk.run().function


def _renamed(ops: Iterable[Op], env: dict[Value, Value], regions: bool = False) -> list[Op]:
    """The ops with operands mapped by `env`, which also learns the results of the ops that had to be made again; with `regions`,
    nested functions in canonical form."""
    out = []
    for op in ops:
        new = op
        if any(v in env for v in op.operands):
            new = with_operands(op, tuple([env.get(v, v) for v in op.operands]))
        if regions and op.regions:
            new = map_regions(new, _canonical_region)
        if new is not op:
            env.update(zip(op.results, new.results))
        out.append(new)
    return out


def _fresh(function: Function) -> Function:
    """The same with parameters of its own, numbered in their new places."""
    params = [Value(p.type, None, i) for i, p in enumerate(function.params)]
    env = {old: new for old, new in zip(function.params, params) if old.index != new.index}
    if not env:
        return function
    params = [env.get(old, old) for old in function.params]
    ops = _renamed(function.ops, env)
    results = [env.get(r, r) for r in function.results]
    return Function(params, ops, results, function.name, function.names)
