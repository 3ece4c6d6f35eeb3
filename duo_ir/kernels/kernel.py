"""The kernel IR: the only thing a backend sees.

A kernel works on flat buffers. Its `axes` are the parallel loop nest (row-major, any split of the flattened range
over threads gives the same bits); positions in buffers are affine in the loop indices; the work at one point is a
`Body`, scalar SSA made by `body.py` from the ops' recipes. Sizes, strides and offsets are ints or `Dim`s, whose
values arrive at run time as i64 arguments named by `dims`.

Kinds: `LoopKernel` (everything elementwise, movement, reductions, gather), `ContractKernel` (matmul), `ConvKernel`, `AttentionKernel`,
`ScanKernel` (cumulative ops), `SortKernel` and `ScatterKernel`. All are frozen, compare by value and print (`text.py` beside this file).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from duo_ir.types import DimLike, DType


@dataclass(frozen=True, slots=True)
class Affine:
    """offset + sum(strides[k] * index[k]) in elements, one stride per axis in scope (outer axes, then the stage's)."""

    offset: DimLike
    strides: tuple[DimLike, ...]


@dataclass(frozen=True, slots=True)
class Guard:
    """0 <= position < bound and position divisible by step (interior padding)."""

    position: Affine
    bound: DimLike
    step: int = 1


@dataclass(frozen=True, slots=True)
class Access:
    """Where a load reads or a store writes: element `at` of argument number `buffer`, plus, for indexed accesses, the sum
    of index value * stride over the instruction's extra operands. With guards: a load yields its fill operand and a
    store does nothing where one fails (the address is then not touched)."""

    buffer: int
    at: Affine
    guards: tuple[Guard, ...] = ()
    index_strides: tuple[DimLike, ...] = ()


@dataclass(frozen=True, slots=True)
class Instr:
    """One scalar instruction; `args` number earlier instructions of the same body.

    Beside those of the scalar protocol (unary, binary, compare, fma, select, bitcast, convert, const):
      const     attr: Python value
      load      attr: Access; args: indices (i64, one per index_stride), then the fill value when there are guards.
                A bool is one byte, 0 or 1, in memory. `dtype` is the buffer's dtype (f16/bf16 too: convert follows).
      index     attr: Affine over the axes in scope -> i64
      dim       attr: DimLike -> i64 (a run-time size)
      reduced   attr: (stage, n) -> result n of an earlier stage's reductions (outer point's value)
      saved     attr: n -> part n of a scan's state before this element (ScanKernel)
      acc       the contraction's value at this point (ContractKernel epilogue), already rounded to its result dtype
      check     args: i64 index; attr: (DimLike bound, int site) -> the index; when not 0 <= index < bound it
                reports `site` and the offending index to the status word and yields 0
    """

    op: str
    args: tuple[int, ...]
    dtype: DType
    attr: object = None


Body: TypeAlias = tuple[Instr, ...]


@dataclass(frozen=True, slots=True)
class Store:
    """Writes instruction `value` of the body; `indices` are i64 instructions, one per index_stride of the access."""

    access: Access
    value: int
    indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reduce:
    """A reduction of the body's values over the stage's axes, in the order of the numerics contract.

    kind: sum, prod (accumulated in the dtype of the value, which for f16/bf16 has been converted to f32 already),
    dot (args: a, b; acc = fma(a, b, acc), absent elements skipped), max, min (IEEE 754-2019 maximum/minimum for floats), argmax,
    argmin (-> i64: position in the row-major order of the stage's axes), any, all (bool).
    """

    kind: str
    args: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Stage:
    """A loop nest inside each outer point. Body sees outer axes then `axes`. With axes == () it runs once."""

    axes: tuple[DimLike, ...]
    body: Body
    stores: tuple[Store, ...] = ()
    reduces: tuple[Reduce, ...] = ()


@dataclass(frozen=True, slots=True)
class Arg:
    """A buffer argument: dtype, number of elements, and whether the kernel writes it (then it never reads it, except at
    the very position it writes when the planner aliases an input to it). `last`: a backend knows that nothing reads what is written until long
    after; `shared`, that other kernels read the input too."""

    dtype: DType
    size: DimLike
    output: bool = False
    last: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class LoopKernel:
    args: tuple[Arg, ...]
    axes: tuple[DimLike, ...]
    stages: tuple[Stage, ...]
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)  # what each `check` site tells the user


@dataclass(frozen=True, slots=True)
class ContractKernel:
    """out[batch..., m, n] = epilogue(sum over k of a[batch..., m, k] * b[batch..., k, n]), rule 2 of the contract.

    `a` is affine over (batch..., m, k), `b` over (batch..., k, n), epilogue's body over (batch..., m, n). `acc` is f32 for
    f16, bf16 and f32 operands, f64 for f64, the operand's own dtype for integers (wrapping). `result` is the dtype that the sum is rounded to
    before the epilogue. Never has n == 1: that is a LoopKernel with a `dot` reduction.
    """

    args: tuple[Arg, ...]
    batch: tuple[DimLike, ...]
    m: DimLike
    n: DimLike
    k: DimLike
    a: Access
    b: Access
    acc: DType
    result: DType
    body: Body
    stores: tuple[Store, ...]
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Window:
    """One spatial axis of a convolution: tap j < `taps` of result position q < `count` reads element offset + stride*q + dilation*j of
    the `bound` elements of x, or +0.0 outside."""

    count: DimLike
    taps: DimLike
    bound: DimLike
    offset: DimLike
    stride: DimLike
    dilation: DimLike


@dataclass(frozen=True, slots=True)
class ConvKernel:
    """out[image, q..., group, n] = epilogue(sum over taps..., c of a[image, p..., group, c] * b[taps..., group, c, n]), where p is what the
    `windows` say: rule 2 of the contract with K = (taps..., c) row-major.

    `a` is affine over (image, p..., group, c), p within bounds, `b` over (taps..., group, c, n), the epilogue's body over (image, q..., group,
    n). `acc` and `result` as in a ContractKernel.
    """

    args: tuple[Arg, ...]
    images: DimLike
    windows: tuple[Window, ...]
    groups: DimLike
    n: DimLike
    c: DimLike
    a: Access
    b: Access
    acc: DType
    result: DType
    body: Body
    stores: tuple[Store, ...]
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)

    @property
    def axes(self) -> tuple[DimLike, ...]:
        """Of the result and the body."""
        return (self.images, *[w.count for w in self.windows], self.groups, self.n)


@dataclass(frozen=True, slots=True)
class ScanKernel:
    """A running fold along one axis, in ascending index, at each point of `axes`: the state is `start` (dtype and number of each part), and
    after element i it is the instructions `following` of the body.

    The body and the stores are over (axes..., i); `saved` n is part n of the state before element i.
    """

    args: tuple[Arg, ...]
    axes: tuple[DimLike, ...]
    length: DimLike
    start: tuple[tuple[DType, float | int], ...]
    following: tuple[int, ...]
    body: Body
    stores: tuple[Store, ...]
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class SortKernel:
    """At each point of `axes`, of which there is at least one axis, the first `count` of `length` elements in stable order, as `duo_ir/ops/order.py` defines it.

    `source` is affine over (axes..., i < length); `values` and `positions` (i64), of which one may be missing, over (axes..., j < count).
    """

    args: tuple[Arg, ...]
    axes: tuple[DimLike, ...]
    length: DimLike
    count: DimLike
    source: Access
    values: Access | None
    positions: Access | None
    descending: bool
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)

    @property
    def dtype(self) -> DType:
        return self.args[self.source.buffer].dtype


@dataclass(frozen=True, slots=True)
class ScatterKernel:
    """out = base copied, then for each update point in row-major order: out[target] += value or = value (`mode` 'add', 'set').

    `base` is argument 0, out is the last argument, both `size` elements, contiguous; they may be the same memory. The body runs over
    (updates..., window...): of `axes` the first `sequential` are updates that follow one another, points along the others never write the
    same place. f16/bf16 add as their elementwise op does: widen, add, round.
    """

    args: tuple[Arg, ...]
    size: DimLike
    axes: tuple[DimLike, ...]
    sequential: int
    body: Body
    store: Store
    mode: str
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """Scaled dot-product attention or its gradient, in the order that `duo_ir/ops/attention.py` defines, for each point of `batch`.

    `queries`, `keys`, `width` and `value_width` are its T, S, D and E (the widths are ints). `reads` are affine over (batch..., row, column):
    q, k, v, and for the gradient g over the same; `rows` over (batch..., row): its lse and delta. `mask`, if there is one, is affine over (batch...,
    query, key), a bool or a number of `acc`, the dtype computed in. `writes`: the result, or dq, dk, dv, over (batch..., row, column);
    `sums`: where forward writes the lse, over (batch..., row).
    """

    args: tuple[Arg, ...]
    batch: tuple[DimLike, ...]
    queries: DimLike
    keys: DimLike
    width: int
    value_width: int
    reads: tuple[Access, ...]
    rows: tuple[Access, ...]
    mask: Access | None
    writes: tuple[Access, ...]
    sums: Access | None
    causal: bool
    scale: float
    acc: DType
    dims: tuple[str, ...] = ()
    sites: tuple[str, ...] = field(default=(), compare=False)

    @property
    def backward(self) -> bool:
        return self.sums is None


Kernel: TypeAlias = LoopKernel | ContractKernel | ConvKernel | AttentionKernel | ScanKernel | SortKernel | ScatterKernel
