"""The convolution kernel on the CPU: chooses how, by what is known of it, and says what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from duo_backends.cpu.code import KernelCode, Phase, Target, no_scratch
from duo_backends.cpu.conv_images import emit_images, make_image_plan
from duo_backends.cpu.conv_pixels import emit_pixels
from duo_backends.cpu.conv_plain import emit_plain, over_groups
from duo_backends.cpu.conv_plan import SLAB_BYTES, make_plan
from duo_backends.cpu.gemm_tile import compute_dtype
from duo_backends.cpu.llvm import Module
from duo_ir.kernels.kernel import ConvKernel
from duo_ir.types import evaluate, product

FEW_IMAGES = 4


def compile_conv(kernel: ConvKernel, target: Target) -> KernelCode:
    """Tiles of result positions where all but the batch is known, else one vector of sums at a time."""
    name = "conv_" + hashlib.sha256(repr((kernel, target)).encode()).hexdigest()[:16]
    module = Module()
    images, pixels = make_image_plan(kernel, target), make_plan(kernel, target)
    # Few images make low tiles: tiles of positions do better, while what they read of x fits the cache.
    few = images is not None and images.images < FEW_IMAGES
    if few and pixels is not None and pixels.slab_bytes <= SLAB_BYTES:
        images = None
    work = product(kernel.axes) * product([kernel.c, *[w.taps for w in kernel.windows]])

    def cost(sizes: Mapping[str, int]) -> float:
        return 50.0 + evaluate(work, sizes) * 2 / (1.5 * target.vector_bytes * (4 / compute_dtype(kernel.acc).itemsize))

    if images is not None:
        phases = emit_images(module, target, images, name)
        return KernelCode(module.text(), phases, images.scratch, cost)
    if pixels is not None:
        phases = emit_pixels(module, target, pixels, name)
        return KernelCode(module.text(), phases, pixels.scratch, cost)
    emit_plain(module, target, kernel, name)

    outer, lanes = kernel.axes[:-1], kernel.n
    if over_groups(kernel):
        outer, lanes = (*kernel.axes[:-2], kernel.n), kernel.groups

    def units(sizes: Mapping[str, int]) -> int:
        return 0 if evaluate(lanes, sizes) == 0 else evaluate(product(outer), sizes)

    def slow_cost(sizes: Mapping[str, int]) -> float:
        return 20 * cost(sizes)

    return KernelCode(module.text(), (Phase(name, units),), no_scratch, slow_cost)
