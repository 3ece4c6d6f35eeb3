"""Matrix products as the CUDA emitters see them: two operands that know where their elements are, the index space, the epilogue.

`gemm.py` computes them in the contract's order, `mma.py` on tensor cores; convolution (`conv.py`) is one whose operand has holes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from duo_backends.cuda.body import Emitter, Scope, Value, convert
from duo_backends.cuda.code import ceil_div, points
from duo_backends.cuda.packs import emit_points, pack_width
from duo_ir.kernels.kernel import Access, ContractKernel, ConvKernel
from duo_ir.types import DimLike, DType, evaluate, exact_div


@dataclass(frozen=True)
class Operand:
    """A matrix [row, k] for each batch. `buffer`, `dtype`: what is read. `near_k`: neighbouring k are neighbours in memory. `vector`: elements that
    one access of up to 16 bytes may read along the near axis (1: no alignment known). `address(batch, row, k)`: emits what is needed and
    gives the element's number and the condition under which it is read, +0 elsewhere; empty: always."""

    buffer: int
    dtype: DType
    near_k: bool
    vector: int
    address: Callable[[Emitter, Sequence[str], str, str], tuple[str, str]]


@dataclass(frozen=True)
class Product:
    """What is computed: batch axes, m, n, k, both operands, and how batch, m and n are the indices of the epilogue."""

    kernel: ContractKernel | ConvKernel
    batch: tuple[DimLike, ...]
    m: DimLike
    n: DimLike
    k: DimLike
    a: Operand
    b: Operand
    indices: Callable[[Emitter, Sequence[str], str, str], tuple[str, ...]]

    def tiles(self, m: int, n: int, sizes: Mapping[str, int]) -> int:
        """Tiles of m x n results, of all batches."""
        return (
            ceil_div(evaluate(self.m, sizes), m) * ceil_div(evaluate(self.n, sizes), n) * points(self.batch, sizes)
        )

    @property
    def width(self) -> int:
        """Neighbouring columns that the epilogue reads and writes as vectors."""
        return pack_width(self.kernel.args, [(self.kernel.body, self.kernel.stores)], self.n, False)


def matrices(kernel: ContractKernel) -> Product:
    """A ContractKernel as a product."""
    a = _matrix(kernel, kernel.a, transposed=False)
    b = _matrix(kernel, kernel.b, transposed=True)

    def indices(e: Emitter, batch: Sequence[str], m: str, n: str) -> tuple[str, ...]:
        return (*batch, m, n)

    return Product(kernel, kernel.batch, kernel.m, kernel.n, kernel.k, a, b, indices)


def _matrix(kernel: ContractKernel, access: Access, transposed: bool) -> Operand:
    """An operand of a matrix product; B is affine over (batch..., k, n)."""
    *outer, first, second = access.at.strides
    row, k = (second, first) if transposed else (first, second)
    dtype = kernel.args[access.buffer].dtype
    near_k = k == 1 or (row != 1 and isinstance(k, int) and isinstance(row, int) and k < row)
    near, far, size = (k, row, kernel.k) if near_k else (row, k, kernel.n if transposed else kernel.m)
    vector = aligned_vector(dtype, (access.at.offset, far, size, *outer)) if near == 1 else 1

    def address(e: Emitter, batch: Sequence[str], r: str, kk: str) -> tuple[str, str]:
        order = (kk, r) if transposed else (r, kk)
        return e.affine(access.at, (*batch, *order)), ""

    return Operand(access.buffer, dtype, near_k, vector, address)


def aligned_vector(dtype: DType, sizes: Sequence[DimLike]) -> int:
    """Elements that one access may read where all positions are sums of multiples of `sizes`."""
    vector = 16 // dtype.itemsize
    while vector > 1 and any(exact_div(d, vector) is None for d in sizes):
        vector //= 2
    return vector


def emit_results(e: Emitter, p: Product, batch: Sequence[str], value: str, count: int) -> None:
    """The epilogue at row `m`, columns `first` to `first + count`, those that exist. value: the sum of column %s as an expression."""
    kernel = p.kernel
    indices = p.indices(e, batch, "m", "first")
    width = min(count, p.width)
    for start in range(0, count, width):
        here = (*indices[:-1], f"first + {start}" if start else "first")
        with e.w.block(f"if ({here[-1]} < N)"):
            if width > 1:
                acc = Value(f"({convert(value % f'{start} + l', kernel.acc, kernel.result)})", kernel.result)
                emit_points(e, kernel.body, kernel.stores, here, width, "(m*N + first)", acc)
                continue
            acc = e.define(kernel.result, convert(value % start, kernel.acc, kernel.result), "acc")
            last = f"({here[-1]})" if start else "first"
            scope = Scope((*here[:-1], last), f"(long long)(m*N + first) + {start}", acc=acc)
            values = e.emit(kernel.body, scope)
            for store in kernel.stores:
                e.store(store, values, scope)
