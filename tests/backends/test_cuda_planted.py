"""Faults planted in generated CUDA C are caught by what the conformance tests do: comparing bits under three schedules, and the emulator's checks.

Each kind of kernel loses its barriers one by one, and gets wrong bounds, strides, orders of sums, K padded with zeros. The text as it was
generated passes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import cuda_conformance as cuda
import numpy as np
from test_cuda_conformance_products import attention_cases, product_case, product_of
from test_cuda_conformance_reductions import softmax, statistics
from test_cuda_fast import LITTLE, MIDDLE, convolutions, whole

from duo_backends.binding import kernels_of
from duo_backends.cuda.code import GpuTarget, KernelCode
from duo_backends.cuda.emit import compile_kernel, header
from duo_ir import ops
from duo_ir.kernels.kernel import Kernel
from duo_ir.ops import broadcasting as nd
from duo_ir.types import DType, TensorType, bf16, f32, f64
from tests.cuda_emulator.support import needs_emulator

pytestmark = needs_emulator
BARRIER = "__syncthreads();"


def _one(f: Callable[..., Any], *shapes: tuple[int, ...], seed: int = 0) -> cuda.Case:
    (case,) = cuda.cases("planted", f, cuda.numbers(*[TensorType(f32, s) for s in shapes], seed=seed))
    return case


def _underflow() -> cuda.Case:
    """Every sum is -0.0: a product of +0 and a negative number more makes it +0.0."""
    x, y = np.full((3, 13), 1e-30, "f4"), np.full((13, 4), -1e-30, "f4")
    (case,) = cuda.cases("planted", product_of(False, False), [x, y])
    return case


def _conv() -> cuda.Case:
    def f(x: Any, w: Any) -> Any:
        return ops.conv(x, w, strides=(2,), padding=((1, 2),), x_dilation=(1,), w_dilation=(3,), groups=1)

    return _one(f, (2, 9, 3), (3, 3, 10))


def _indexed(name: str) -> cuda.Case:
    x, u = cuda.numbers(TensorType(f32, (5, 4)), TensorType(f32, (20, 4)))
    i = np.random.default_rng(0).integers(0, 5, 20)
    bad = i.copy()
    bad[[7, 3]] = 5, -1

    def f(x: Any, u: Any, i: Any) -> Any:
        return ops.gather(x, i, axes=(0,)) * u if name == "gather" else ops.scatter(x, u, i, axes=(0,), mode="add")

    (case,) = cuda.cases("planted", f, [x, u, i], [x, u, bad])
    return case


def _attention(causal_gradient: bool) -> cuda.Case:
    """Forward: scores are negative, so that keys that are not there would be the largest. Gradient: what no key may see is infinite."""
    if causal_gradient:
        case = next(attention_cases(f32, 70, 70, 8, 8, True, "", True))
        (arrays,) = case.runs
        infinite = [a.copy() for a in arrays]
        infinite[5][5, 0, 0] = np.inf
        return replace(case, runs=[arrays, infinite])
    case = next(attention_cases(f32, 33, 70, 70, 70, False, "", False))
    ((q, k, v),) = case.runs
    return replace(case, runs=[[np.abs(q), -np.abs(k), v]])


def _sort(dtype: DType, shape: tuple[int, ...], count: int, descending: bool) -> cuda.Case:
    """Few distinct numbers, zeros of both signs, NaN of both: the order of equal ones shows."""
    some = [0.0, -0.0, 1.0, -1.0, 2.5, np.nan, -np.nan, np.inf, -3.0]
    x = np.random.default_rng(7).choice(some, shape).astype(dtype.numpy)
    (case,) = cuda.cases("planted", lambda v: ops.sort(v, axis=1, descending=descending, count=count), [x])
    return case


@functools.cache
def case_of(name: str) -> tuple[cuda.Case, GpuTarget]:
    """A program of one kernel of each kind, and the device it is made for."""
    little = GpuTarget(multiprocessors=1)
    made: dict[str, Callable[[], tuple[cuda.Case, GpuTarget]]] = {
        "map": lambda: (_one(lambda x, y: x * y + 1.0, (1003,), (1003,)), GpuTarget()),
        "transposed": lambda: (_one(lambda x, y: ops.transpose(x, permutation=(1, 0)) * y, (5, 40), (40, 5)), GpuTarget()),
        "tiles": lambda: (_one(lambda x, y: ops.transpose(x, permutation=(1, 0)) * y, (33, 40), (40, 33)), GpuTarget()),
        "rows": lambda: (_one(softmax(1), (5, 40)), GpuTarget()),
        "vector rows": lambda: (_one(softmax(1), (5, 40)), GpuTarget(multiprocessors=0)),
        "chunked vector rows": lambda: (_one(softmax(1), (3, 2500)), GpuTarget(multiprocessors=0)),
        "short rows": lambda: (_one(softmax(1), (50, 5)), GpuTarget()),
        "vector passes": lambda: (_one(lambda x: nd.sum(x, (1,)), (1, 200_004)), GpuTarget()),
        "chunked rows": lambda: (_one(softmax(1), (3, 2500)), GpuTarget()),
        "columns": lambda: (_one(statistics(0), (40, 35)), GpuTarget()),
        "passes": lambda: (_one(lambda x: nd.sum(x, (1,)), (5, 40_001)), GpuTarget()),
        "two passes": lambda: (_one(lambda x: (nd.sum(x, (1,)), nd.max(x, (1,))), (1, 100_003)), GpuTarget()),
        "passes of columns": lambda: (_one(lambda x: nd.sum(x, (0,)), (5000, 35)), GpuTarget()),
        "product": lambda: (next(product_case(f32, 9, 6, 1051)), GpuTarget()),
        "short product": lambda: (_underflow(), GpuTarget()),
        "large tile": lambda: (next(product_case(f32, 250, 140, 13, epilogue="bias")), little),
        "chunked product": lambda: (next(product_case(f32, 2, 3, 28_700)), GpuTarget()),
        "convolution": lambda: (_conv(), GpuTarget()),
        "scan": lambda: (_one(lambda x: ops.cumsum(x, axis=1), (3, 40)), GpuTarget()),
        "two folds": lambda: (_one(lambda x: ops.cummax(x, axis=1)[1], (3, 40)), GpuTarget()),
        "sort": lambda: (_sort(f32, (2, 1100), 1100, False), GpuTarget()),
        "first few": lambda: (_sort(f64, (2, 70), 9, True), GpuTarget()),
        "gather": lambda: (_indexed("gather"), GpuTarget()),
        "scatter": lambda: (_indexed("scatter"), GpuTarget()),
        "attention": lambda: (_attention(False), GpuTarget()),
        "causal": lambda: (next(attention_cases(f32, 70, 70, 8, 8, True, "", False)), GpuTarget()),
        "gradient": lambda: (next(attention_cases(f32, 70, 130, 70, 70, False, "", True)), GpuTarget()),
        "causal gradient": lambda: (_attention(True), GpuTarget()),
        "fast": lambda: (next(whole(product_case(bf16, 70, 56, 164, epilogue="bias"))), LITTLE),
        "fast words": lambda: (next(whole(product_case(f32, 70, 52, 37, ta=True))), LITTLE),
        "fast across": lambda: (next(whole(product_case(bf16, 66, 56, 60, ta=True, tb=True))), LITTLE),
        "fast chunks": lambda: (next(whole(product_case(bf16, 3, 16, 1090, epilogue="bias"))), MIDDLE),
        "fast convolution": lambda: (next(convolutions(bf16)), LITTLE),
    }  # fmt: skip
    return made[name]()


@functools.cache
def generated(name: str) -> tuple[cuda.Case, dict[Kernel, KernelCode]]:
    """The case with the text of its kernels; what the text of attention includes is part of it."""
    case, target = case_of(name)
    codes = {}
    for kernel in kernels_of(case.program):
        code = compile_kernel(kernel, target)
        codes[kernel] = replace(code, text="\n".join([*map(header, code.headers), code.text]), headers=())
    return case, codes


@dataclass(frozen=True)
class Planted:
    """Occurrence number `which` of `old` in the text of a case's kernels, replaced (all of them where -1)."""

    name: str
    old: str
    new: str
    which: int = -1

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new or 'nothing'}" + (f" (number {self.which})" if self.which >= 0 else "")


FAULTS = (
    ("map", "unit*4 + 4 <= 1003", "unit*4 + 4 <= 1004"),
    ("map", "i < 1003", "i <= 1003"),
    ("map", "a0[i]", "a0[i - 1]"),
    ("map", "(a0 + (unit*4))", "(a0 + (unit*4 + 4))"),
    ("map", "p1.v[l] * p2.v[l]", "p1.v[l] * p1.v[l]"),
    ("transposed", "a1[q2 + at*5]", "a1[q2 + at*4]"),
    ("transposed", "unit >= (int)(50)", "unit >= (int)(49)"),
    ("tiles", "p >= FAR", "p > FAR"),
    ("tiles", "tile0[x*33", "tile0[x*32"),
    ("tiles", "far0 + y + s, q", "far0 + y, q"),
    ("rows", "int d = 8; d; d /= 2", "int d = 1; d < 16; d *= 2"),  # lanes: neighbours first
    ("rows", "const bool live = row < 5", "const bool live = row < 4"),
    ("rows", "const bool live = row < 5", "const bool live = row <= 5"),
    ("rows", "j < 40", "j < 39"),
    ("rows", "int j = lane; j < 40; j += 16", "int j = 39 - lane; j >= 0; j -= 16"),
    ("rows", "duo_first(acc4, 16)", "acc4"),
    ("vector rows", "t % 4*4", "t % 4*2"),
    ("vector rows", "acc4[l], 2)", "acc4[l], 3)"),
    ("vector rows", "acc4[l + 2]", "acc4[l + 1]"),
    ("vector rows", "acc4[l] + v21", "acc4[0] + v21"),
    ("vector rows", "duo_first(acc4[0], 4)", "duo_first(acc4[0], 16)"),
    ("vector rows", "j = t*4; j < 40; j += 16", "j = t*4; j < 40; j += 32"),
    ("chunked vector rows", "c*16 + lane + l", "c*16 + lane"),
    ("chunked vector rows", "c = t / 4;", "c = t / 2;"),
    ("short rows", "int d = 4; d; d /= 2", "int d = 2; d; d /= 2"),
    ("vector passes", "part*64 + set", "part*32 + set"),
    ("vector passes", "threadIdx.x*4 + l]", "threadIdx.x*4]"),
    ("vector passes", "< 64 ? (int)(chunks - part*64) : 64", "< 64 ? (int)(chunks - part*64) : 32"),
    ("chunked rows", "a = k / 16 * 32 + k % 16, b = a + 16", "a = k, b = k + (m + 1) / 2*16"),  # not neighbours
    ("chunked rows", "1024", "512"),
    ("chunked rows", "(c + 1)*1024 < 2500 ?", "(c + 1)*1024 < 3100 ?"),
    ("chunked rows", "if (b < m*16)", "if (b <= m*16)"),
    ("columns", "j += 16", "j += 15"),
    ("columns", "int d = 8; d; d /= 2", "int d = 1; d < 1; d /= 2"),
    ("columns", "row + j*35", "row + j*34"),
    ("passes", "chunk*1024 + lane", "chunk*1000 + lane"),
    ("passes", "if (b < m*16)", "if (true)"),
    ("passes", "int d = 8; d; d /= 2", "int d = 1; d < 16; d *= 2"),
    ("two passes", "at += (2*rows*", "at += (0*rows*"),  # partial sums of two reductions in one place
    ("passes of columns", "*32 + threadIdx.x % 32", "*33 + threadIdx.x % 32"),
    ("passes of columns", "row < rows", "row <= rows"),
    ("passes of columns", "*parts + chunk)", "*parts + chunk + 1)"),
    ("product", "% 512 == 504", "% 1024 == 1016"),
    ("product", "k0 - k_begin < 512", "k0 - k_begin < 1024"),
    ("product", "row < M", "row <= M"),
    ("product", "col < k_end", "col <= k_end"),
    ("product", "(k0 + 8) + kk", "(k0 + 7) + kk"),
    ("product", "(now ^ 1)", "now"),
    ("short product", "k < (int)(k_end - k0)", "k < 8"),  # K padded with zeros
    ("large tile", "row < N", "row <= N"),
    ("large tile", "i / 4*64 + ty*4", "i / 4*64 + ty*8"),
    ("large tile", "as + (now*8 + k)*132", "as + (now*8 + k)*128"),
    ("large tile", "__fmaf_rn(a[i], b[j], sum[i][j])", "a[i] * b[j] + sum[i][j]"),
    ("chunked product", "4096", "8192"),
    ("chunked product", "part[c*size]", "part[c]"),
    ("chunked product", "for (; c >> at & 1; ++at)", "if (c) "),  # added in order
    ("chunked product", "unit >= 1*size", "unit > 1*size"),
    ("convolution", "col / (3)", "col / (2)"),
    ("convolution", "*(2) + q", "*(1) + q"),
    ("convolution", "*(3);", "*(2);"),
    ("convolution", "if ((unsigned)y", "if (true || (unsigned)y"),
    ("scan", "i < 40", "i <= 40"),
    ("scan", "a0[line*40 + i]", "a0[line*40 + 39 - i]"),
    ("two folds", "s1 = v", "s1 = s1; // v"),
    ("sort", "(magnitude == 0u)", "(false)"),
    ("sort", "magnitude > infinity", "false"),
    ("sort", "a.word < b.word", "(a.word >> 32) < (b.word >> 32)"),  # not by position
    ("sort", "first + t < n", "first + t < n - 1"),
    ("sort", "blockIdx.x % tiles * 1024", "blockIdx.x % tiles * 1000"),
    ("sort", "i < left && duo_before", "duo_before"),
    ("sort", "k > right ? k - right : 0", "0"),
    ("sort", "scratch)[1] ^= 1", "scratch)[1] = 0"),
    ("sort", "(i & size) == 0", "true"),
    ("first few", "~duo_key_f64", "duo_key_f64"),
    ("first few", "a.key == b.key && a.place < b.place", "false"),
    ("first few", "t >= count", "t > count"),
    ("gather", "status, (long long)unit*4", "status, 100 - (long long)unit*4"),
    ("scatter", "int u = 0; u < 20; ++u", "int u = 19; u >= 0; --u"),
    ("scatter", "if (i < 20 &&", "if (i < 19 &&"),
    ("scatter", "2, 5)", "2, 6)"),
    ("attention", "query < queries && tx * 4 + j < n", "query < queries"),
    ("attention", "total * shrink[threadIdx.x] + added", "total + added"),
    ("attention", "o[e][i][j] * a[i] + sum[i][j]", "duo_fma(o[e][i][j], a[i], sum[i][j])"),
    ("attention", "if (query >= queries) continue;", ""),
    ("attention", "for (int j = 0; j < n; ++j) added", "for (int j = n - 1; j >= 0; --j) added"),
    ("causal", "key > query", "key >= query"),
    ("causal", "? i0 + HALF : keys", "? i0 + HALF - 1 : keys"),
    ("gradient", "r < rows && c < columns", "c < columns"),
    ("gradient", "if (ty * 4 + i >= columns) continue;", ""),
    ("gradient", "weight * (dp[i][j] - slope)", "weight * dp[i][j] - weight * slope"),
    ("causal gradient", "i0 == j0 && ty * 4 >= HALF ? HALF : 0", "false ? HALF : 0"),
    ("causal gradient", "j0 + c > i0 + r", "j0 + c >= i0 + r"),
    ("fast", "duo_arrived<2>", "duo_arrived<3>"),
    ("fast", "duo_commit();", "", 0),
    ("fast", "duo_commit();", "", 1),
    ("fast", "step + 3 < steps", "step + 4 < steps"),
    ("fast", "int now = 0, next = 3;", "int now = 0, next = 0;"),  # a stage that is still read
    ("fast", "row < M", "row <= M"),
    ("fast", "row < N", "row <= N"),
    ("fast", "col < k_end", "col <= k_end"),
    ("fast", "m >= M", "m > M"),
    ("fast", ", there);", ", true);"),
    ("fast", "lane % 16, step * 32 + lane / 16 * 16", "lane % 16, step * 32 + lane / 8 % 2 * 16"),
    ("fast", "step * 16 + lane % 16, (first", "step * 16 + lane % 8, (first"),
    ("fast", "(byte ^ ((row / ROWS & MASK) << 4))", "byte"),  # right, but a row of units in the same banks
    ("fast", "stage + duo_unit<64>", "stage + duo_unit<128>"),
    ("fast", "t / 32*640", "t / 32*320"),
    ("fast", "lane % 4*2) = {{sum[i][j][2], sum[i][j][3]}}", "lane % 4*2) = {{sum[i][j][3], sum[i][j][2]}}"),
    ("fast words", "k + i / 2 * 4, (row + i % 2 * 8) * 4", "k + i % 2 * 4, (row + i / 2 * 8) * 4"),
    ("fast words", "stage + duo_word<256>", "stage + duo_unit<256>"),
    ("fast across", "lane / 16 * 8 + lane % 8, (first + lane / 8 % 2 * 8)", "lane / 8 % 2 * 8 + lane % 8, (first + lane / 16 * 8)"),
    ("fast chunks", "chunk*320", "chunk*288"),
    ("fast chunks", "group*chunks + chunk", "group*chunks"),
    ("fast chunks", "unit >= 1*size", "unit > 1*size - 16"),
    ("fast convolution", "col < k_end && (", "col < k_end || ("),
)  # fmt: skip


def barriers() -> Iterator[Planted]:
    """Every barrier of these kernels, and those of a warp; of attention's header those of the functions that the kernel calls."""
    backward = header("attention.cuh").split("// p and ds of")[0].count(BARRIER)
    for name in (
        "tiles", "chunked rows", "vector passes", "columns", "passes", "product", "large tile", "convolution", "sort", "attention", "gradient",
        "fast", "fast chunks",
    ):  # fmt: skip
        _, codes = generated(name)
        count = "".join(code.text for code in codes.values()).count(BARRIER)
        for n in range(backward if name == "gradient" else 0, backward if name == "attention" else count):
            yield Planted(name, BARRIER, "", n)
    for n in (0, 1):
        yield Planted("fast", "__syncwarp();", "", n)


def plant(code: KernelCode, fault: Planted, number: int) -> KernelCode:
    """The code with the fault, in a namespace and under names of its own."""
    text = code.text
    if fault.which < 0:
        text = text.replace(fault.old, fault.new)
    else:
        parts = text.split(fault.old)
        head, tail = parts[: fault.which + 1], parts[fault.which + 1 :]
        text = fault.old.join(head) + fault.new + fault.old.join(tail)
    assert text != code.text, f"the text has no {fault}:\n{code.text}"
    text = re.sub(r"\b(duo_[0-9a-f]{16})", rf"\1x{number}", text)
    launches = tuple([replace(x, symbol=re.sub(r"^(duo_[0-9a-f]{16})", rf"\1x{number}", x.symbol)) for x in code.launches])
    return replace(code, text=f"namespace planted_{number} {{\n{text}}}\nusing namespace planted_{number};\n", launches=launches)


def survivors(faults: list[Planted]) -> list[str]:
    """Faults that nothing notices. All are compiled together."""
    planted = []
    for number, fault in enumerate(faults):
        case, codes = generated(fault.name)
        (kernel,) = [k for k, code in codes.items() if fault.old in code.text]
        planted.append((case, {**codes, kernel: plant(codes[kernel], fault, number)}))
    gpu = cuda.Gpu([code for _, codes in planted for code in codes.values()])
    alive = []
    for fault, (case, codes) in zip(faults, planted):
        for order in cuda.ORDERS:
            tally = cuda.Tally()
            gpu.compare(case, codes, tally, (order,))
            if tally.wrong:
                break
        else:
            alive.append(str(fault))
    gpu.close()
    return alive


def test_planted_faults_are_caught() -> None:
    faults = [Planted(*fault) for fault in FAULTS]
    names = dict.fromkeys(fault.name for fault in faults)
    for name in names:  # without a fault nothing is wrong
        case, codes = generated(name)
        gpu, tally = cuda.Gpu(codes.values()), cuda.Tally()
        gpu.compare(case, codes, tally)
        gpu.close()
        assert not tally.wrong, tally.wrong[0]
    assert not survivors(faults)


def test_dropped_barriers_are_caught() -> None:
    assert not survivors(list(barriers()))
