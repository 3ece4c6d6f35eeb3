"""Convolution in CUDA C as an implicit matrix product: rows are (image, result position), K is (taps..., channel), columns are output channels.

What a tap reads outside the image is +0.0 and takes part (rule 2 of the numerics contract).
"""

from __future__ import annotations

from collections.abc import Sequence

from duo_backends.cuda.body import Emitter
from duo_backends.cuda.code import GpuTarget, KernelCode, polynomial
from duo_backends.cuda.gemm import compile_product
from duo_backends.cuda.products import Operand, Product, aligned_vector
from duo_ir.kernels.kernel import ConvKernel
from duo_ir.types import DimLike, product


def compile_conv(kernel: ConvKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of a ConvKernel."""
    counts = tuple([w.count for w in kernel.windows])
    taps = tuple([w.taps for w in kernel.windows])
    m, k = product((kernel.images, *counts)), product((*taps, kernel.c))

    def indices(e: Emitter, batch: Sequence[str], m: str, n: str) -> tuple[str, ...]:
        return (*e.unravel(m, (kernel.images, *counts)), batch[0], n)

    return compile_product(
        Product(kernel, (kernel.groups,), m, kernel.n, k, _image(kernel), _filter(kernel), indices), target
    )


def _image(kernel: ConvKernel) -> Operand:
    """A [image and result position, taps and channel]: each position that a tap reads, where it is inside."""
    access = kernel.a
    *rest, channel = access.at.strides
    dtype = kernel.args[access.buffer].dtype
    vector = aligned_vector(dtype, (access.at.offset, kernel.c, *rest)) if channel == 1 else 1

    def address(e: Emitter, batch: Sequence[str], row: str, col: str) -> tuple[str, str]:
        image, *at = e.unravel(row, (kernel.images, *[w.count for w in kernel.windows]))
        *tap, c = e.unravel(col, (*[w.taps for w in kernel.windows], kernel.c))
        places, conditions = [], []
        for q, t, window in zip(at, tap, kernel.windows):
            place = e.w.name("y")
            steps = [
                polynomial(window.offset),
                f"{q}*({polynomial(window.stride)})",
                f"{t}*({polynomial(window.dilation)})",
            ]
            e.w.put(f"const {e.index_type} {place} = {' + '.join(steps)};")
            places.append(place)
            unsigned = "unsigned long long" if e.wide else "unsigned"
            conditions.append(f"({unsigned}){place} < ({unsigned})({polynomial(window.bound)})")
        return e.affine(access.at, (image, *places, batch[0], c)), " && ".join(conditions)

    return Operand(access.buffer, dtype, True, vector, address)


def _filter(kernel: ConvKernel) -> Operand:
    """B [output channel, taps and channel]."""
    access = kernel.b
    *rest, channel, n = access.at.strides
    near_k = channel == 1 and n != 1
    dtype = kernel.args[access.buffer].dtype
    far: tuple[DimLike, ...] = (n, kernel.c) if near_k else (channel, kernel.n)
    vector = aligned_vector(dtype, (access.at.offset, *rest, *far)) if near_k or n == 1 else 1

    def address(e: Emitter, batch: Sequence[str], row: str, col: str) -> tuple[str, str]:
        *tap, c = e.unravel(col, (*[w.taps for w in kernel.windows], kernel.c))
        return e.affine(access.at, (*tap, batch[0], c, row)), ""

    return Operand(access.buffer, dtype, near_k, vector, address)
