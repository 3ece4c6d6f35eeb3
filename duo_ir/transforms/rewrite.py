"""Rewriting: Function -> Function in one forward walk that maps old values to new ones; and dead-code elimination.

A pass is a rule, `rule(op) -> replacement values or None`. It is called with every operand already rewritten and a Builder
active; what it emits is rewritten in turn, so a rule is applied to its fixed point. Ops are immutable and an op that nothing
changes is shared between the old Function and the new, so a pass costs a few microseconds an op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from duo_ir.core import Builder, Function, Op, Value, attr_key
from duo_ir.errors import DuoError
from duo_ir.types import Dim, DimLike, TensorType, substitute

Rule: TypeAlias = Callable[[Op], "Sequence[Value] | None"]
_DEEPEST = 200  # rules that replace each other's results for longer than this never end


def dce(function: Function) -> Function:
    """`function` without the ops that no result needs; parameters stay. Nested functions are left as they are."""
    live = set(function.results)
    kept: list[Op] = []
    for op in reversed(function.ops):
        if live.isdisjoint(op.results):
            continue
        live.update(op.operands)
        kept.append(op)
    if len(kept) == len(function.ops):
        return function
    return Function(function.params, reversed(kept), function.results, function.name, function.names)


def with_operands(op: Op, operands: tuple[Value, ...], attrs: Mapping[str, Any] | None = None) -> Op:
    """`op` on other operands of the same types (so its result types are known)."""
    return Op(op.definition, operands, op.attrs if attrs is None else attrs, [r.type for r in op.results], op.loc)


def without_unread(function: Function) -> tuple[Function, list[int]]:
    """The program without the parameters that nothing reads, and the numbers of those that stay."""
    read = set(function.results)
    for op in function.ops:
        read.update(op.operands)
    kept = [i for i, p in enumerate(function.params) if p in read]
    if len(kept) == len(function.params):
        return function, kept
    builder = Builder(function.name)
    env: dict[Value, Value] = {}
    for i in kept:
        env[function.params[i]] = builder.parameter(function.params[i].type, function.names[i])
    for op in function.ops:
        new = with_operands(op, tuple([env[v] for v in op.operands]))
        builder.ops.append(new)
        env.update(zip(op.results, new.results))
    return builder.build([env[r] for r in function.results]), kept


def map_regions(op: Op, change: Callable[[Function], Function]) -> Op:
    """`op` with every nested function replaced by `change` of it; `op` itself when that changes none."""
    changed: dict[str, Function] = {}
    for name, value in op.attrs.items():
        if isinstance(value, Function):
            new = change(value)
            if new is not value:
                changed[name] = new
    return with_operands(op, op.operands, {**op.attrs, **changed}) if changed else op


def with_sizes(function: Function, sizes: Mapping[str, DimLike]) -> Function:
    """`function` with named sizes replaced everywhere, by ints (at least 2) or by other names; names not given stay."""

    def changed(value: Any) -> Any:
        if isinstance(value, Dim):
            return substitute(value, sizes)
        if isinstance(value, tuple):
            return tuple([changed(v) for v in value])
        if isinstance(value, TensorType):
            return value.with_shape(changed(value.shape))
        return with_sizes(value, sizes) if isinstance(value, Function) else value

    params = [Value(changed(p.type), None, i) for i, p in enumerate(function.params)]
    env = dict(zip(function.params, params))
    ops: list[Op] = []
    for op in function.ops:
        attrs = {name: changed(value) for name, value in op.attrs.items()}
        types = [changed(r.type) for r in op.results]
        ops.append(Op(op.definition, tuple([env[v] for v in op.operands]), attrs, types, op.loc))
        env.update(zip(op.results, ops[-1].results))
    return Function(params, ops, [env[r] for r in function.results], function.name, function.names)


def rewrite(
    function: Function, rule: Rule, *, share: bool = False, nested: Callable[[Function], Function] | None = None
) -> Function:
    """`function` with `rule` applied to every op, nested functions first.

    nested: what is done to each nested function instead of the same rewrite.
    `share`: an op equal to an earlier one (definition, operands, attributes) becomes that one; the operands of a commutative op
    are compared in either order. Raises DuoError when the rule never comes to rest or changes a type.
    """
    nested = nested or (lambda f: rewrite(f, rule, share=share))
    walk = _Walk(rule, share)
    env: dict[Value, Value] = {}
    with walk.builder:
        for op in function.ops:
            old = op
            if env:
                op = walk.mapped(op, env)
            if op.regions:
                op = map_regions(op, nested)
            new = walk.place(op, 0)
            if new is not old.results:
                env.update((a, b) for a, b in zip(old.results, new) if a is not b)
    if len(walk.kept) == len(function.ops) and all(a is b for a, b in zip(walk.kept, function.ops)):
        return function
    results = [env.get(r, r) for r in function.results]
    return Function(function.params, walk.kept, results, function.name, function.names)


class _Walk:
    def __init__(self, rule: Rule, share: bool) -> None:
        self.rule, self.share = rule, share
        self.builder = Builder()  # collects what one call of the rule emits; empty between calls
        self.kept: list[Op] = []
        self.seen: dict[tuple, tuple[Value, ...]] = {}

    def mapped(self, op: Op, env: dict[Value, Value]) -> Op:
        for v in op.operands:
            if v in env:
                return with_operands(op, tuple([env.get(v, v) for v in op.operands]))
        return op

    def place(self, op: Op, depth: int) -> Sequence[Value]:
        """The values that stand for `op`'s results, after appending whatever ops they need."""
        self.builder.loc = op.loc
        replacement = self.rule(op)
        staged = self.builder.ops
        if replacement is not None:
            self.builder.ops = []
            return self._replace(op, replacement, staged, depth)
        if staged:  # the rule emitted, then declined
            self.builder.ops = []
        if self.share:
            key = _op_key(op)
            found = self.seen.get(key)
            if found is not None:
                return found
            self.seen[key] = op.results
        self.kept.append(op)
        return op.results

    def _replace(self, op: Op, replacement: Sequence[Value], emitted: list[Op], depth: int) -> Sequence[Value]:
        name = op.definition.name
        if depth > _DEEPEST:
            raise DuoError(f"simplification rules never come to rest at {op!r}: the rule of {name} is part of a cycle")
        if [v.type for v in replacement] != [r.type for r in op.results]:
            wanted, got = ", ".join(str(r.type) for r in op.results), ", ".join(str(v.type) for v in replacement)
            raise DuoError(f"a rule replaced {op!r} of type {wanted} by {got}; a replacement keeps the types")
        env: dict[Value, Value] = {}
        for new in emitted:
            mapped = self.mapped(new, env)
            env.update(zip(new.results, self.place(mapped, depth + 1)))
        return [env.get(v, v) for v in replacement]


def _op_key(op: Op) -> tuple:
    definition, operands, attrs = op.definition, op.operands, op.attrs
    if definition.commutative and len(operands) == 2 and id(operands[0]) > id(operands[1]):
        operands = (operands[1], operands[0])  # only compared, never stored: the order by id leaves no trace
    if not attrs:
        return definition, operands
    return definition, operands, tuple([(name, _attr(attrs[name])) for name in sorted(attrs)])


def _attr(value: Any) -> Any:
    """`core.attr_key`, with True told from 1, and nested functions by their cached hash."""
    if isinstance(value, Function):
        return value.hash
    if isinstance(value, bool):
        return "true" if value else "false"
    return attr_key(value)
