"""Attention kernels in CUDA C: what `attention.cuh` needs to know of one, and its launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from duo_backends.cuda.body import Emitter, Scope, Value, Writer, literal
from duo_backends.cuda.code import (
    GpuTarget,
    KernelCode,
    Launch,
    ceil_div,
    memory,
    parameters,
    points,
    polynomial,
    register,
    symbol,
)
from duo_ir.errors import DeviceError
from duo_ir.kernels.body import BodyBuilder
from duo_ir.kernels.kernel import Access, Affine, AttentionKernel, Body, Instr
from duo_ir.scalar import explog
from duo_ir.types import DimLike, bool_, evaluate

_QUERIES, _BLOCK, _STRIDE = 32, 64, 68  # HALF, SLAB and STRIDE of attention.cuh
_DEPTHS = (64, 32, 16)
_STORED = {"f32": "StoredF32", "f64": "StoredF64", "f16": "StoredF16", "bf16": "StoredBF16"}


def compile_attention(kernel: AttentionKernel, target: GpuTarget) -> KernelCode:
    """CUDA C and launches of an AttentionKernel."""
    return _Attention(kernel, target).compile()


class _Attention:
    def __init__(self, kernel: AttentionKernel, target: GpuTarget) -> None:
        self.kernel, self.target, self.name = kernel, target, symbol(kernel, target)
        self.w = Writer()
        self.e = Emitter(self.w, kernel.args, True)
        self.launches: list[Launch] = []
        self.dtype = kernel.args[kernel.reads[0].buffer].dtype

    def compile(self) -> KernelCode:
        kernel = self.kernel
        with self.w.block(f"struct {self.name}_math", "};"):
            self._function("exp", explog.exp)
            self._function("log", explog.log)
        width, value_width = ceil_div(kernel.width, _BLOCK), ceil_div(kernel.value_width, _BLOCK)
        if not kernel.backward:
            self._depth(1, 2 * _QUERIES)
            for part in self._parts(value_width, 128):
                self._launch("duo_attention", kernel.queries, _QUERIES, 128, part, (*kernel.writes, kernel.sums))
        else:
            self._depth(2, 0)
            dq, dk, dv = kernel.writes
            whole = self._parts(width + value_width, 128)
            cut = [(0, width, 0, value_width)] if len(whole) == 1 else [
                *[(*part, 0, 0) for part in self._parts(width, 128)],
                *[(0, 0, *part) for part in self._parts(value_width, 128)],
            ]  # fmt: skip
            for slabs in cut:
                self._launch("duo_attention_keys", kernel.keys, _BLOCK, 256, slabs, (dk, dv))
            for part in self._parts(width, 96):
                self._launch("duo_attention_queries", kernel.queries, _BLOCK, 256, part, (dq,))
        return KernelCode(self.w.text(), tuple(self.launches), headers=("attention.cuh",))

    def _function(self, name: str, recipe: Callable[..., Any]) -> None:
        """A recipe of the scalar library as a function."""
        dtype = self.kernel.acc
        builder = BodyBuilder()
        result = recipe(builder, builder.acc(dtype))
        body: Body = tuple([Instr(*row) for row in builder.rows])
        type_ = register(dtype)
        with self.w.block(f"static __device__ __forceinline__ {type_} {name}({type_} x)"):
            values = self.e.emit(body, Scope((), acc=Value("x", dtype)))
            self.w.put(f"return {values[result].name};")

    def _depth(self, squares: int, numbers: int) -> None:
        """Chooses how much of what is summed over lies in shared memory: the most that fits beside `squares` blocks and `numbers`."""
        kernel = self.kernel
        for self.depth in _DEPTHS:
            self.shared = ((2 * self.depth + squares * _BLOCK) * _STRIDE + numbers) * kernel.acc.itemsize
            if self.shared <= self.target.shared:
                return
        raise DeviceError(
            f"attention in {kernel.acc.name} takes {self.shared >> 10} KB of shared memory, and this GPU has {self.target.shared >> 10} for a "
            "block; compute it in float32, or from matmul and softmax"
        )

    def _parts(self, slabs: int, registers: int) -> list[tuple[int, int]]:
        """First and last of the slabs of columns that one launch has `registers` for."""
        most = registers * 4 // (16 * self.kernel.acc.itemsize)
        return [(n, min(n + most, slabs)) for n in range(0, slabs, most)]

    def _launch(
        self, what: str, rows: DimLike, block: int, threads: int, slabs: tuple[int, ...], results: tuple[Access | None, ...]
    ) -> None:
        w, kernel, shared = self.w, self.kernel, self.shared
        name = f"{self.name}_{len(self.launches)}"
        # one block a multiprocessor will do: without a word of it ptxas spills for the sake of more
        with w.block(f'extern "C" __global__ void __launch_bounds__({threads}, 1) {name}({parameters(kernel)})'):
            w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
            w.put(f"const long long blocks = (({polynomial(rows)}) + {block - 1}) / {block};")
            w.put("const long long first = blockIdx.x % blocks, rest = blockIdx.x / blocks;")
            batch = self.e.unravel("rest", kernel.batch)
            views = [self._view(a, batch) for a in (*kernel.reads, *kernel.rows)]
            views.append(self._mask(batch))
            views += [self._view(a, batch) for a in results if a is not None]
            options = [_STORED[self.dtype.name], f"{self.name}_math", str(kernel.width), str(kernel.value_width)]
            options += ["true" if kernel.causal else "false", self._mask_kind(), str(self.depth), *map(str, slabs)]
            numbers = [f"first*{block}", polynomial(kernel.queries), polynomial(kernel.keys)]
            numbers.append(literal(kernel.scale, kernel.acc))
            w.put(f"{what}<{', '.join(options)}>(")
            w.put(f"    {', '.join([*views, *numbers])}, duo_shared);")

        def blocks(sizes: Mapping[str, int]) -> int:
            return points(kernel.batch, sizes) * ceil_div(evaluate(rows, sizes), block)

        self.launches.append(Launch(name, threads, blocks, lambda sizes: shared))

    def _view(self, access: Access, batch: list[str]) -> str:
        """The matrix or column of one point of the batch."""
        outer = len(self.kernel.batch)
        base = Affine(access.at.offset, access.at.strides[:outer])
        row, *column = [polynomial(s) for s in access.at.strides[outer:]]
        arg = self.kernel.args[access.buffer]
        const = "" if arg.output else "const "
        type_ = f"View<{const}{memory(arg.dtype)}>"
        return f"{type_}{{a{access.buffer} + {self.e.affine(base, batch)}, {row}, {column[0] if column else '0'}}}"

    def _mask_kind(self) -> str:
        mask = self.kernel.mask
        if mask is None:
            return "NO_MASK"
        return "BOOL_MASK" if self.kernel.args[mask.buffer].dtype is bool_ else "NUMBER_MASK"

    def _mask(self, batch: list[str]) -> str:
        if self.kernel.mask is None:
            return "MaskView{0, 0, 0}"
        text = self._view(self.kernel.mask, batch)
        return f"MaskView{text[text.index('{') :]}"
