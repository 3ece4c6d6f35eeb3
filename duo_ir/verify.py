"""The verifier: `verify(function)` checks every rule of the IR and raises VerifyError at the first that is broken.

The message gives the rule, the op with its types, the IR around it, the user's source line and what to do. Passes are
checked with it in tests and under DUO_VERIFY=1; nothing else in duo depends on it.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NoReturn

from duo_ir.core import Function, Op, Value
from duo_ir.errors import DuoError, VerifyError
from duo_ir.opdef import Control, OpDef
from duo_ir.text import op_lines, value_names
from duo_ir.types import DTYPES, Dim, DType, TensorType

_AROUND = 5  # ops shown before and after the broken one


# ----------------------------------------------------------------------------------------------------- named sizes
def bound_sizes(types: Iterable[TensorType]) -> set[str]:
    """Named sizes that arguments of these types fix: those that are a whole axis of one (as `core.bind_dims` reads them)."""
    return {d.names[0] for t in types for d in t.shape if isinstance(d, Dim) and d.terms == (((d.names[0],), 1),)}


def used_sizes(types: Iterable[TensorType], ops: Iterable[Op]) -> list[str]:
    """Named sizes in the types, and in the ops' results and attributes (nested functions too), in order of first use."""
    seen: dict[str, None] = {}
    for t in types:
        seen.update(dict.fromkeys(t.names))
    for op in ops:
        seen.update(dict.fromkeys(_op_sizes(op)))
    return list(seen)


def _op_sizes(op: Op) -> list[str]:
    names = [n for r in op.results for n in r.type.names]
    for value in op.attrs.values():
        names += _attribute_sizes(value)
    return names


def _attribute_sizes(value: Any) -> list[str]:
    if isinstance(value, Dim):
        return list(value.names)
    if isinstance(value, tuple):
        return [n for v in value for n in _attribute_sizes(v)]
    if isinstance(value, Function):
        return used_sizes([*value.param_types, *value.result_types], value.ops)
    return []


# ------------------------------------------------------------------------------------------------------------- rules
def verify(function: Function) -> None:
    """Checks `function` and the functions nested in it. Raises VerifyError naming the rule that is broken and the op that breaks it.

    Rules: parameters and results are values of this function, each made once; operands are defined before they are
    used; an op takes the operands and attributes of its definition's type rule; attributes are hashable and of the kinds the
    text form knows; recorded types are the inferred ones; the types of a nested function fit its op; every named size is an axis of a
    parameter; no size is negative.
    """
    _Verifier(function).run(bound=None)


class _Verifier:
    def __init__(self, function: Function) -> None:
        self.f = function

    def run(self, bound: set[str] | None) -> None:
        """`bound`: the named sizes of the enclosing function, None at the top."""
        f = self.f
        defined: set[Value] = set()
        if len(f.names) != len(f.params):
            self.fail(
                None,
                "names",
                f"{len(f.names)} names for {len(f.params)} parameters",
                "give one name per parameter ('' for none)",
            )
        for i, p in enumerate(f.params):
            self.parameter(i, p, defined)
            defined.add(p)
        bound = bound_sizes(f.param_types) if bound is None else bound
        self.sizes(None, [n for t in f.param_types for n in t.names], bound)
        for op in f.ops:
            self.op(op, defined, bound)
            defined.update(op.results)
        for i, r in enumerate(f.results):
            if r not in defined:
                self.fail(
                    None, "results are defined", f"result {i}, {r!r}, is not a value of this function",
                    "return parameters and results of its own ops; a nested function captures nothing",
                )  # fmt: skip

    def parameter(self, i: int, p: Value, defined: set[Value]) -> None:
        if p in defined:
            self.fail(None, "parameters are unique", f"parameter {i} is there twice", "make one Value per parameter")
        if p.op is not None:
            self.fail(
                None, "parameters are unique", f"parameter {i} is the result of {p.op!r}",
                "a parameter has no op: make it with Builder.parameter",
            )  # fmt: skip
        self.type(None, f"parameter {i}", p.type)

    def op(self, op: Op, defined: set[Value], bound: set[str]) -> None:
        for i, r in enumerate(op.results):
            if r.op is not op or r.index != i:
                self.fail(op, "results belong to their op", f"result {i} says it is result {r.index} of {r.op!r}",
                          "let Op make its results; do not move Values between ops")  # fmt: skip
            if r in defined:
                self.fail(op, "results belong to their op", "the op is in this function twice", "list each op once")
            self.type(op, f"result {i}", r.type)
        for i, v in enumerate(op.operands):
            if v not in defined:
                self.fail(op, "operands are defined before use", self.undefined(i, v),
                          "order ops so that each follows those it reads; pass outer values into nested functions as operands")  # fmt: skip
        self.attributes(op)
        self.inferred(op)
        if isinstance(op.definition.kind, Control):
            self.regions(op, bound)
        self.sizes(op, _op_sizes(op), bound)

    def undefined(self, i: int, v: Value) -> str:
        own = {r for op in self.f.ops for r in op.results}
        where = "is defined only later" if v in own else "is not a value of this function"
        return f"operand {i}, {v!r}, {where}"

    def attributes(self, op: Op) -> None:
        for name, value in op.attrs.items():
            problem = _attribute_problem(value)
            if problem:
                self.fail(op, "attributes are static and hashable", f"attribute {name} = {value!r} {problem}",
                          "give floats, ints, bools, None, strings, dtypes, sizes, functions, or tuples of them")  # fmt: skip
        try:
            _signature(op.definition).bind(*op.operands, **op.attrs)
        except TypeError as error:
            self.fail(op, "operands and attributes fit the definition",
                      f"{op.definition.name}{_signature(op.definition)} cannot take {len(op.operands)} operands and attributes "
                      f"({', '.join(op.attrs)}): {error}",
                      "build ops by calling their definition, which checks this")  # fmt: skip

    def inferred(self, op: Op) -> None:
        try:
            types = op.definition.infer_types(op.operands, op.attrs)
        except Exception as error:  # a type rule may assume anything of attributes that a pass got wrong
            self.fail(op, "types are valid", _said(error), "change the operands, or the pass that made them")
        recorded = tuple(r.type for r in op.results)
        if types != recorded:
            self.fail(op, "recorded types are the inferred ones",
                      f"it records ({_listed(recorded)}), but its operands give ({_listed(types)})",
                      "emit the op again (Builder.emit infers) where its operands' types changed")  # fmt: skip

    def regions(self, op: Op, bound: set[str]) -> None:
        for region in op.regions:
            _Verifier(region).run(bound)

    def sizes(self, op: Op | None, names: Sequence[str], bound: set[str]) -> None:
        free = sorted(set(names) - bound)
        if free:
            self.fail(op, "named sizes are axes of parameters", f"size {free[0]} is used, but no parameter has it as an axis",
                      "add a parameter with that axis (an empty one, bool[size,0], will do), or make the size static")  # fmt: skip

    def type(self, op: Op | None, what: str, t: object) -> None:
        if not isinstance(t, TensorType) or not isinstance(t.dtype, DType) or DTYPES.get(t.dtype.name) is not t.dtype:
            self.fail(
                op,
                "types are valid",
                f"{what} has type {t!r}, which is not a TensorType of duo",
                "use TensorType(dtype, shape)",
            )
        for axis, d in enumerate(t.shape):
            if isinstance(d, bool) or not isinstance(d, (int, Dim)):
                self.fail(op, "types are valid", f"{what} has size {d!r} along axis {axis}", "sizes are ints or Dims")
            if isinstance(d, int) and d < 0:
                self.fail(op, "types are valid", f"{what} has {d} elements along axis {axis}", "sizes are not negative")

    def fail(self, op: Op | None, rule: str, message: str, advice: str) -> NoReturn:
        lines = [f"@{self.f.name} breaks the rule '{rule}': {message}"]
        if op is not None:
            names = value_names(self.f)
            operands = ", ".join(f"{names.get(v, '%undefined')}: {v.type}" for v in op.operands)
            lines.append(f"  op: {op.definition.name}({operands}) -> {_listed(r.type for r in op.results)}")
            lines += self.around(op)
            if op.loc is not None:
                source = linecache.getline(op.loc.file, op.loc.line).strip()
                lines.append(f"  source: {op.loc.full()}" + (f": {source}" if source else ""))
        lines.append(f"  to do: {advice}")
        raise VerifyError("\n".join(lines))

    def around(self, op: Op) -> list[str]:
        at = next(i for i, o in enumerate(self.f.ops) if o is op)
        printed = op_lines(self.f)
        out = []
        for i in range(max(0, at - _AROUND), min(len(printed), at + _AROUND + 1)):
            first, *rest = printed[i].split("\n")
            out += [("  > " if i == at else "    ") + first.strip(), *("    " + line for line in rest)]
        return out


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, DuoError) else f"{type(error).__name__}: {error}"


def _listed(types: Iterable[TensorType]) -> str:
    return ", ".join(map(str, types))


def _attribute_problem(value: Any) -> str:
    """Why `value` cannot be an attribute; empty when it can."""
    if isinstance(value, tuple):
        return next((p for p in map(_attribute_problem, value) if p), "")
    if value is None or type(value) in (bool, int, float, str, DType, Dim, Function):
        return ""
    return f"is a {type(value).__name__}"


@cache
def _signature(definition: OpDef) -> inspect.Signature:
    return inspect.signature(definition.infer)
