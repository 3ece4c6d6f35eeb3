"""Panels: constant weights in the order in which kernels read them, each panel from its first byte to its last.

A product of a few rows reads its matrix once, at the speed of memory. It is a product with a batch of panels, whose rows are put side by side:

    a b  =  [a b0 | a b1 | ...]    with b = [b0 | b1 | ...], narrow matrices that each lie in one piece

A convolution's kernel takes some output channels at a time through all taps and channels. Its panels are groups, each of which reads all of x:

    conv(x, w) = conv(repeat(x, panels), w', groups=panels)    w' is a view of the panels, repeat(x) one of x

Panels are computed by different threads. Bits stay: each element is the same sum in the same order. `hoist.py` keeps the panels.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TypeAlias

from duo_ir.core import Builder, Function, Op, Value
from duo_ir.opdef import Contraction, Convolution
from duo_ir.ops import broadcasting as nd
from duo_ir.transforms.rewrite import with_operands

ROWS = 32  # up to which a product gains by it (measured)
WIDTHS = (64, 32)  # columns of a panel: some vectors of sums at once, and enough panels for some threads
PANELS = 4  # at least, or the narrower ones are taken

# Output channels of a panel for a convolution, a divisor of all; None: its kernel would not read panels in place.
Columns: TypeAlias = Callable[[Op], "int | None"]


def in_panels(
    function: Function, constant: Container[Value], columns: Columns | None = None
) -> tuple[Function, list[Value]]:
    """`function` with the weights among the values `constant` cut into panels where products of a few rows read them, and
    where `columns` says so for convolutions; and these panels, [count, k, width] or [count, taps..., c, width] each."""
    walk = _Walk(constant, columns)
    with walk.builder:
        for op in function.ops:
            walk.take(op)
    panels = list(walk.panels.values())
    if not panels:
        return function, panels
    results = [walk.env.get(r, r) for r in function.results]
    return Function(function.params, walk.builder.ops, results, function.name, function.names), panels


class _Walk:
    def __init__(self, constant: Container[Value], columns: Columns | None) -> None:
        self.constant, self.columns = constant, columns
        self.builder = Builder()
        self.env: dict[Value, Value] = {}
        self.panels: dict[tuple[Value, tuple[int, ...], int], Value] = {}

    def take(self, op: Op) -> None:
        new = op
        if any(v in self.env for v in op.operands):
            new = with_operands(op, tuple([self.env.get(v, v) for v in op.operands]))
        self.builder.loc = op.loc
        made = self.in_panels(new)
        if made is not None:
            self.env[op.result] = made
            return
        self.builder.ops.append(new)
        self.env.update((a, b) for a, b in zip(op.results, new.results) if a is not b)

    def in_panels(self, op: Op) -> Value | None:
        if len(op.operands) != 2 or op.operands[1] not in self.constant or op.operands[0] in self.constant:
            return None
        if isinstance(op.definition.kind, Contraction):
            width = _width(op)
            return None if width is None else self.product(op, width)
        if self.columns is None or not _is_plain(op):
            return None
        width = self.columns(op)
        return None if width is None else self.convolution(op, width)

    def cut(self, w: Value, shape: tuple[int, ...], width: int) -> Value:
        """`w`, of `shape` but for axes of size 1, as [count, shape[:-1]..., width]."""
        key = (w, shape, width)
        if key not in self.panels:
            parts = nd.reshape(w, (*shape[:-1], shape[-1] // width, width))
            last = len(shape) - 1
            self.panels[key] = nd.transpose(parts, (last, *range(last), last + 1))
        return self.panels[key]

    def product(self, op: Op, width: int) -> Value:
        a, b = op.operands
        rows, (k, n) = a.type.shape[-2], b.type.static_shape()[-2:]
        count = n // width
        a = nd.broadcast_to(nd.reshape(a, (1, rows, k)), (count, rows, k))
        out = op.definition(a, self.cut(b, (k, n), width), **op.attrs)
        return nd.reshape(nd.transpose(out, (1, 0, 2)), op.result.type.shape)

    def convolution(self, op: Op, width: int) -> Value:
        x, w = op.operands
        *places, c = x.type.shape
        rank, count = w.type.rank, w.type.static_shape()[-1] // width
        panels = self.cut(w, w.type.static_shape(), width)
        whole = nd.reshape(nd.transpose(panels, (*range(1, rank), 0, rank)), w.type.shape)
        repeated = nd.broadcast_to(nd.reshape(x, (*places, 1, c)), (*places, count, c))
        return op.definition(nd.reshape(repeated, (*places, count * c)), whole, **{**op.attrs, "groups": count})


def _is_plain(op: Op) -> bool:
    """Whether it is a convolution of one group whose result positions all have all taps."""
    kind = op.definition.kind
    if not isinstance(kind, Convolution) or op.attrs["groups"] != 1:
        return False
    x, w = op.operands
    phases = kind.phases(x.type.shape, w.type.shape, op.result.type.shape, **op.attrs)
    return all(len(axis) == 1 and axis[0].tap_step == 1 for axis in phases)


def _width(op: Op) -> int | None:
    """The width of panels for the matrix of a product, or None where there are none to be made."""
    a, b = op.operands
    *batch, rows, _ = a.type.shape
    _, n = b.type.static_shape()[-2:]
    if any(d != 1 for d in batch) or not isinstance(rows, int) or rows > ROWS:
        return None
    widths = [w for w in WIDTHS if n % w == 0 and n > w]
    return next((w for w in widths if n >= PANELS * w), widths[-1] if widths else None)
