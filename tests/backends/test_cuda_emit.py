"""CUDA C for every kind of kernel: deterministic, and accepted by the real nvcc for both architectures where there is one, without spills
in the kernels that matter. What it computes is tested on the emulator."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import conformance  # finds the op table
import op_table
import pytest

from duo_backends.cpu.backend import kernels_of
from duo_backends.cuda.code import GpuTarget, KernelCode
from duo_backends.cuda.emit import compile_kernel, source
from duo_ir import ops
from duo_ir.core import Value, function_of
from duo_ir.errors import DeviceError
from duo_ir.kernels.kernel import Kernel
from duo_ir.ops import broadcasting as nd
from duo_ir.ops.attention import attention, attention_gradient
from duo_ir.pipeline import lower
from duo_ir.types import Dim, DType, TensorType, bf16, bool_, f32, f64

assert conformance
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def _table_kernels() -> Iterator[Kernel]:
    """Kernels of the first cases of each op that have any, for fixed sizes and for any sizes."""
    for row in op_table.TABLE:
        for number, case in enumerate(op_table.cases([row])):
            if number > 2:
                break
            for fusion in (True, False):
                yield from kernels_of(lower(case.function(), fusion=fusion))


def _product(dtype: DType, m: object, n: object, k: object, ta: bool = False, tb: bool = False) -> Kernel:
    def turned(x: Value) -> Value:
        return ops.transpose(x, permutation=(1, 0))

    def f(x: Value, y: Value) -> Value:
        return ops.matmul(turned(x) if ta else x, turned(y) if tb else y)

    types = [TensorType(dtype, s) for s in ((k, m) if ta else (m, k), (n, k) if tb else (k, n))]  # type: ignore[arg-type]
    (kernel,) = kernels_of(lower(function_of(f, *types)))
    return kernel


def _products() -> list[Kernel]:
    large = [_product(d, 4096, 4096, 4096, ta, tb) for d in (f32, bf16, f64) for ta, tb in ((0, 0), (0, 1), (1, 0))]  # type: ignore[arg-type]
    b = Dim.symbol("b")
    return [*large, _product(f32, b, 512, 784), _product(f32, 128, 10, 256), _product(f32, 784, 512, b, ta=True)]


def _nvcc(tmp_path: Path, text: str, arch: int) -> str:
    """What ptxas says of the kernels."""
    file = tmp_path / "kernels.cu"
    file.write_text(text)
    command = [
        "nvcc",
        f"-arch=sm_{arch}",
        "-cubin",
        "-fmad=false",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        "-diag-suppress",
        "177",
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.cubin"), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stderr


def test_equal_kernels_give_equal_text() -> None:
    for kernel in list(_table_kernels())[::7]:
        assert compile_kernel(kernel, GpuTarget()).text == compile_kernel(kernel, GpuTarget()).text


def test_every_launch_has_its_function() -> None:
    for kernel in dict.fromkeys(_table_kernels()):
        code = compile_kernel(kernel, GpuTarget())
        defined = re.findall(r"__global__ void __launch_bounds__\((\d+)(?:, 1)?\) (\w+)\(", code.text)
        assert len(set(defined)) == len(defined)  # some are launched more than once
        assert {(str(launch.threads), launch.symbol) for launch in code.launches} == set(defined)


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_takes_the_kernels_of_the_op_table(arch: int, tmp_path: Path) -> None:
    kernels = list(dict.fromkeys(_table_kernels()))[:: 6 if arch == 80 else 4]
    codes: list[KernelCode] = [compile_kernel(kernel, GpuTarget(arch)) for kernel in kernels]
    _nvcc(tmp_path, source(codes), arch)


def _convolution(dtype: DType, channels: int) -> Kernel:
    def f(x: Value, w: Value) -> Value:
        return ops.conv(x, w, strides=(1, 1), padding=((1, 1), (1, 1)), x_dilation=(1, 1), w_dilation=(1, 1), groups=1)

    types = [TensorType(dtype, (64, 28, 28, channels)), TensorType(dtype, (3, 3, channels, channels))]
    (kernel,) = kernels_of(lower(function_of(f, *types)))
    return kernel


def _fast_products() -> list[Kernel]:
    """Every tile and layout."""
    layouts = [(ta, tb) for ta in (False, True) for tb in (False, True)]
    large = [_product(d, 4096, 4096, 4096, ta, tb) for d in (bf16, f32) for ta, tb in layouts]
    others = [(1024, 1024, 1024), (256, 256, 512), (4, 4096, 4096), (4096, 10, 512), (4095, 4097, 4093), (Dim.symbol("b"), 512, 784)]
    small = [_product(d, *sizes) for d in (bf16, f32) for sizes in others]
    return [*large, *small, *[_convolution(d, c) for d in (bf16, f32) for c in (64, 256)]]


def _reductions() -> list[Kernel]:
    """Rows that threads read as vectors, in one launch and in several; few elements; a transpose by tiles."""

    def spread(x: Value) -> Value:
        return x - nd.sum(x, (1,), True) * 0.001

    def turned(x: Value) -> Value:
        return ops.transpose(x, permutation=(1, 0)) * 2.0

    found: list[Kernel] = []
    for dtype in (f32, bf16):
        for shape in ((65536, 1024), (8192, 4096), (1, 1 << 26), (1000000, 8), (1000000, 5)):
            x = TensorType(dtype, shape)
            for f in (spread, lambda x: ops.argmax(x, axes=(1,))):
                found += kernels_of(lower(function_of(f, x)))
        found += kernels_of(lower(function_of(turned, TensorType(dtype, (4096, 2048)))))
    return list(dict.fromkeys(found))


def _attentions(dtype: DType, width: int, causal: bool, *mask: DType) -> list[Kernel]:
    """Forward and backward."""
    q, masks = TensorType(dtype, (256, 2, width)), [TensorType(d, (2, 256, 256)) for d in mask]
    options = {"causal": causal, "scale": 0.125}
    forward = function_of(lambda *x: attention(*x, **options), q, q, q, *masks)
    out, row = forward.result_types
    backward = function_of(lambda *x: attention_gradient(*x, **options), q, q, q, row, row, out, *masks)
    return [*kernels_of(lower(forward)), *kernels_of(lower(backward))]


def test_attention_that_does_not_fit_says_so() -> None:
    for kernel in _attentions(f64, 64, True):
        need = [launch.shared({}) for launch in compile_kernel(kernel, GpuTarget(86, shared=99 << 10)).launches]
        assert max(need) <= 99 << 10 < compile_kernel(kernel, GpuTarget(shared=227 << 10)).launches[0].shared({})
        with pytest.raises(DeviceError, match=r"attention in f64 takes \d+ KB of shared memory, and this GPU has 48 .* float32"):
            compile_kernel(kernel, GpuTarget(75, shared=48 << 10))


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 86, 90])
def test_attention_does_not_spill(arch: int, tmp_path: Path) -> None:
    kernels = [k for d in (f32, bf16) for causal in (False, True) for k in _attentions(d, 64, causal)]
    kernels += [*_attentions(f32, 128, True, bool_), *_attentions(f32, 256, True), *_attentions(f64, 64, True), *_attentions(f64, 256, False)]
    target = GpuTarget(arch, shared={80: 163, 86: 99, 90: 227}[arch] << 10)
    codes = [compile_kernel(kernel, target) for kernel in kernels]
    said = _nvcc(tmp_path, source(codes), arch)
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spilled) == sum(len(code.launches) for code in codes) and set(spilled) == {("0", "0", "0")}


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_reductions_and_transposes_do_not_spill(arch: int, tmp_path: Path) -> None:
    codes = [compile_kernel(kernel, GpuTarget(arch)) for kernel in _reductions()]
    text = source(codes)
    assert "t % 4*4" in text and "t % 2*8" in text and "tile0" in text
    said = _nvcc(tmp_path, text, arch)
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    assert len(spilled) == sum(len(code.launches) for code in codes) and set(spilled) == {"0"}


@needs_nvcc
@pytest.mark.parametrize("fast", [False, True], ids=["strict", "fast"])
@pytest.mark.parametrize("arch", [80, 90])
def test_products_do_not_spill(arch: int, fast: bool, tmp_path: Path) -> None:
    chosen = _fast_products() if fast else [*_products(), _convolution(f32, 64)][:: 1 if arch == 90 else 3]
    target = GpuTarget(arch, fast=fast, shared=(163 if arch == 80 else 227) << 10)
    codes = [compile_kernel(kernel, target) for kernel in chosen]
    said = _nvcc(tmp_path, source(codes), arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    functions = re.findall(r"Compiling entry function '(\w+)'", said)
    assert len(frames) == len(functions) >= len(codes)
    spilled = {name for name, (_, stores, loads) in zip(functions, frames) if int(stores) or int(loads)}
    assert not spilled
