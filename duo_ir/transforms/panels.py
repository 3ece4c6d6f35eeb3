"""Panels: a product of a few rows with a constant matrix reads that matrix once, at the speed of its memory, so it should lie in the order
in which it is read.

    a b  =  [a b0 | a b1 | ...]    with b = [b0 | b1 | ...], narrow matrices that each lie in one piece

A panel is walked from its first byte to its last, and panels are computed by different threads. It is an ordinary product with a batch of
panels, whose rows are then put side by side. Bits stay: each element is the same sum over k in the same order. `hoist.py` keeps the panels.
"""

from __future__ import annotations

from collections.abc import Container

from duo_ir.core import Builder, Function, Op, Value
from duo_ir.opdef import Contraction
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.rewrite import with_operands

ROWS = 32  # up to which a product gains by it (measured)
WIDTHS = (64, 32)  # columns of a panel: some vectors of sums at once, and enough panels for some threads
PANELS = 4  # at least, or the narrower ones are taken


def in_panels(function: Function, constant: Container[Value]) -> tuple[Function, list[Value]]:
    """`function`, of static types, with the matrices among the values `constant` that products of a few rows read cut into panels; and
    these panels, [count, k, width] each."""
    panels: list[Value] = []
    env: dict[Value, Value] = {}
    builder = Builder()
    with builder:
        for op in function.ops:
            new = op
            if any(v in env for v in op.operands):
                new = with_operands(op, tuple([env.get(v, v) for v in op.operands]))
            width = _width(new, constant)
            if width is None:
                builder.ops.append(new)
                env.update((a, b) for a, b in zip(op.results, new.results) if a is not b)
                continue
            builder.loc = op.loc
            a, b = new.operands
            rows, (k, n) = a.type.static_shape()[-2], b.type.static_shape()[-2:]
            count = n // width
            panels.append(nd.transpose(nd.reshape(b, (k, count, width)), (1, 0, 2)))
            a = nd.broadcast_to(nd.reshape(a, (1, rows, k)), (count, rows, k))
            product = new.definition(a, panels[-1], **new.attrs)
            env[op.result] = nd.reshape(nd.transpose(product, (1, 0, 2)), op.result.type.shape)
    if not panels:
        return function, panels
    results = [env.get(r, r) for r in function.results]
    return Function(function.params, builder.ops, results, function.name, function.names), panels


def _width(op: Op, constant: Container[Value]) -> int | None:
    """The width of panels for the second operand of `op`, or None where there are none to be made."""
    if not isinstance(op.definition.kind, Contraction):
        return None
    a, b = op.operands
    if b not in constant or a in constant:
        return None
    *batch, rows, _ = a.type.static_shape()
    _, n = b.type.static_shape()[-2:]
    if any(d != 1 for d in batch) or rows > ROWS:
        return None
    widths = [w for w in WIDTHS if n % w == 0 and n > w]
    return next((w for w in widths if n >= PANELS * w), widths[-1] if widths else None)
