"""Simplification: local rules, constant folding, common subexpressions, dead code; in one forward walk and two sweeps.

Every rule is exact to the bit, so what an op is simplified to never depends on chance or on the frontend. The rules are those of
the op definitions (`OpDef.canonicalize`); this file knows no op by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from duo_ir.core import Function, Op, Value
from duo_ir.interpret import interpret
from duo_ir.opdef import Elementwise
from duo_ir.ops import broadcasting as nd
from duo_ir.ops import constant
from duo_ir.transforms.products import turn_products
from duo_ir.transforms.rewrite import dce, rewrite


def simplify(function: Function) -> Function:
    """`function` with the same signature and the same bits, and at most the work.

    Differentiate first: simplification forgets what only derivatives ask about (stop_gradient). A Function that is simple already is
    returned itself.
    """
    function = dce(function)
    while True:
        function = dce(rewrite(function, _simpler, share=True, nested=simplify))
        turned = turn_products(function)
        if turned is function:
            return function
        function = turned


def _simpler(op: Op) -> Sequence[Value] | None:
    canonicalize = op.definition.canonicalize
    if canonicalize is not None:
        found = canonicalize(op)
        if found is not None:
            return found
    return _folded(op)


def _folded(op: Op) -> Sequence[Value] | None:
    """A 0-d elementwise op on constants, computed now by its own recipe. Nothing larger is folded: the IR stays small, and a
    constant that fills a tensor is a broadcast, which costs nothing."""
    if not op.operands or not isinstance(op.definition.kind, Elementwise) or op.results[0].type.shape:
        return None
    for v in op.operands:
        if v.op is None or v.op.definition is not constant:
            return None
    makers = dict.fromkeys(v.op for v in op.operands if v.op is not None)
    values = interpret(Function([], [*makers, op], op.results))
    return [nd.constant_of(v.item(), r.type.dtype) for v, r in zip(values, op.results)]
