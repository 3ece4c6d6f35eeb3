"""A product that is only read transposed is computed transposed: (a b)' = b' a'.

Bits stay: fma(a, b, acc) does not care which factor comes first, and the order of k is the same. A weight's gradient then comes
out in the weight's own layout, so that what follows (an optimizer's update) can be done on its tiles as they are finished. Sizes of 1
are left alone, and those that artefacts are called with at run time, which may be 1: one output column is a reduction with another order
(numerics contract, rule 2).
"""

from __future__ import annotations

from duo_ir.core import Builder, Function, Op, Value
from duo_ir.opdef import AxisMap, Contraction, Movement
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.rewrite import with_operands
from duo_ir.types import Dim


def turn_products(function: Function) -> Function:
    """`function` with such products turned; itself when there are none."""
    users: dict[Value, list[Op]] = {}
    for op in function.ops:
        for v in dict.fromkeys(op.operands):
            users.setdefault(v, []).append(op)
    kept = set(function.results)
    turned: dict[Op, Op] = {}  # the transposition -> the product
    for op in function.ops:
        if not isinstance(op.definition.kind, Contraction) or op.result in kept:
            continue
        if any(d == 1 or isinstance(d, Dim) for d in op.result.type.shape[-2:]):
            continue
        readers = users.get(op.result, [])
        if len(readers) == 1 and _swaps_last(readers[0]):
            turned[readers[0]] = op
    if not turned:
        return function
    products = set(turned.values())
    env: dict[Value, Value] = {}
    builder = Builder()
    with builder:
        for op in function.ops:
            if op in products:
                continue
            if op in turned:
                a, b = [env.get(v, v) for v in turned[op].operands]
                builder.loc = turned[op].loc
                product = turned[op].definition(nd.swap_last(b), nd.swap_last(a), **turned[op].attrs)
                env[op.result] = product
                continue
            new = op
            if any(v in env for v in op.operands):
                new = with_operands(op, tuple([env.get(v, v) for v in op.operands]))
                env.update(zip(op.results, new.results))
            builder.ops.append(new)
    results = [env.get(r, r) for r in function.results]
    return Function(function.params, builder.ops, results, function.name, function.names)


def _swaps_last(op: Op) -> bool:
    """Whether `op` does nothing but exchange the last two axes."""
    kind = op.definition.kind
    if not isinstance(kind, Movement):
        return False
    source, result = op.operands[0].type.shape, op.result.type.shape
    view, rank = kind.view(source, result, **op.attrs), len(source)
    order = (*range(rank - 2), rank - 1, rank - 2)
    return not view.guards and view.axes == tuple([AxisMap(terms=((axis, 1),)) for axis in order])
