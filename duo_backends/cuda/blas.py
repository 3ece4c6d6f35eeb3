"""cuBLASLt by ctypes: matrix products with the epilogues that it has. One small interface: a `Problem` in, a `Plan` that runs on a stream out.

The library is the user's (CUDA toolkit, or NVIDIA's wheels); without it duo's own kernels do the work (`mma.py`). Numbers of enumerations are
those of NVIDIA's `cublasLt.h` and `cublas_api.h`. It thinks in columns: a row-major D = A B is its D' = B' A', so its first operand is our B.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Mapping
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duo_backends.cuda.compiler import toolkits
from duo_ir.types import DType, bf16, f16, f32

_TYPES = {f32: 0, f16: 2, bf16: 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_TF32 = 68, 77
_TRANS_A, _TRANS_B, _EPILOGUE, _BIAS, _AUX, _AUX_LD, _AUX_STRIDE = 3, 4, 7, 8, 11, 12, 13  # of a product
_BATCH_COUNT, _BATCH_STRIDE = 5, 6  # of a layout
_WORKSPACE, _LEAST_ALIGNMENT = 1, (5, 6, 7, 8)  # of a preference
_ALIGNMENT = 16  # bytes that every operand's address is a multiple of
_HEURISTIC = 96  # bytes of cublasLtMatmulHeuristicResult_t: the algorithm, then its workspace at byte 64
EPILOGUES = {
    "none": 1, "relu": 2, "bias": 4, "relu bias": 6, "gelu": 32, "gelu bias": 36, "relu mask": 130, "relu bias mask": 134,
    "relu slope": 136, "relu slope sums": 152, "gelu slope": 192, "gelu slope sums": 208, "b sums": 256, "a sums": 512,
}  # fmt: skip
MASK_LINE = 128  # bits that a row of a mask is a multiple of
MOST_WORKSPACE = {8: 4 << 20, 9: 32 << 20}  # bytes by compute capability, as NVIDIA recommends


@dataclass(frozen=True)
class Layout:
    """Rows of a matrix lie `ld` elements apart, or its columns where it is `turned`; matrices of a batch `stride`."""

    ld: int
    stride: int = 0
    turned: bool = False


@dataclass(frozen=True)
class Problem:
    """d[batch, m, n] = epilogue(a[batch, m, k] b[batch, k, n] + c), operands of `dtype`, d and c of `result`. f32 is computed as tf32.

    `epilogue`: see EPILOGUES. A bias has n elements. `aux` is the matrix of which "gelu slope" takes the slopes that it multiplies by; or the mask, a bit
    for each result (`ld`: bits), that a "relu" with "mask" writes, set where what goes into it is positive, and that "relu slope" multiplies by. "slope sums"
    also adds up the rows of d, "a sums" a[m, k] over k, "b sums" b[k, n] over k, into vectors of `result`."""

    dtype: DType
    result: DType
    batch: int
    m: int
    n: int
    k: int
    a: Layout
    b: Layout
    d: Layout
    c: Layout | None = None
    aux: Layout | None = None
    epilogue: str = "none"


class Blas:
    """The library. Raises OSError where it does not load or has none of the functions."""

    def __init__(self, path: str, arch: int) -> None:
        try:
            self.library = ctypes.CDLL(path)
            self._multiply = self.library.cublasLtMatmul
        except AttributeError as error:
            raise OSError(str(error)) from None
        self._handle: c_void_p | None = None
        self._most = MOST_WORKSPACE.get(arch // 10, MOST_WORKSPACE[9])
        self._plans: dict[Problem, Plan | None] = {}

    def plan(self, problem: Problem) -> Plan | None:
        """How to compute it; None where the library has no way. The device's context is current."""
        if problem not in self._plans:
            try:
                self._plans[problem] = self._make(problem)
            except OSError:  # an older library lacks an epilogue, say
                self._plans[problem] = None
        return self._plans[problem]

    def _make(self, p: Problem) -> Plan | None:
        if self._handle is None:
            handle = c_void_p()
            self.call("cublasLtCreate", byref(handle))
            self._handle = handle
        made = Plan(self, p)
        preference = self.object("cublasLtMatmulPreferenceCreate")
        try:
            self.put("cublasLtMatmulPreferenceSetAttribute", preference, _WORKSPACE, c_size_t(self._most))
            for attribute in _LEAST_ALIGNMENT:
                self.put("cublasLtMatmulPreferenceSetAttribute", preference, attribute, ctypes.c_uint32(_ALIGNMENT))
            count = c_int()
            code = self.library.cublasLtMatmulAlgoGetHeuristic(
                self._handle, *made.descriptors, preference, c_int(1), made.found, byref(count)
            )
        finally:
            self.library.cublasLtMatmulPreferenceDestroy(preference)
        return made if code == 0 and count.value else None

    # ---------------------------------------------------------------------------------------------------- its functions
    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise OSError(f"cuBLASLt reports for {name}: status {code}")

    def object(self, create: str, *arguments: Any) -> c_void_p:
        """A new descriptor."""
        made = c_void_p()
        self.call(create, byref(made), *arguments)
        return made

    def put(self, setter: str, what: c_void_p, attribute: int, value: Any) -> None:
        self.call(setter, what, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)))

    def multiply(self, plan: Plan, pointers: Mapping[str, int], workspace: int, stream: int) -> None:
        zero, one = c_float(0.0), c_float(1.0)
        product, b, a, c, d = plan.descriptors
        accumulated = pointers.get("c", pointers["d"])
        code = self._multiply(
            self._handle, product, byref(one), c_void_p(pointers["b"]), b, c_void_p(pointers["a"]), a,
            byref(one if "c" in pointers else zero), c_void_p(accumulated), c, c_void_p(pointers["d"]), d,
            plan.found, c_void_p(workspace), c_size_t(plan.workspace), c_void_p(stream),
        )  # fmt: skip
        if code:
            raise OSError(f"cuBLASLt reports for cublasLtMatmul: status {code}")


class Plan:
    """A problem with the algorithm that the library's heuristics chose. `workspace`: bytes that it needs."""

    def __init__(self, blas: Blas, p: Problem) -> None:
        self._blas, self.problem = blas, p
        self.found = ctypes.create_string_buffer(_HEURISTIC)
        compute = _COMPUTE_TF32 if p.dtype is f32 else _COMPUTE_32F
        product = blas.object("cublasLtMatmulDescCreate", c_int(compute), c_int(_TYPES[f32]))
        self._set(product, _TRANS_A, c_int32(p.b.turned))
        self._set(product, _TRANS_B, c_int32(p.a.turned))
        self._set(product, _EPILOGUE, c_int32(EPILOGUES[p.epilogue]))
        if p.aux is not None:
            self._set(product, _AUX_LD, c_int64(p.aux.ld))
            self._set(product, _AUX_STRIDE, c_int64(p.aux.stride))
        c, d = p.c or p.d, p.d
        self.descriptors = (
            product,
            self._layout(p.dtype, p.n, p.k, p.b),
            self._layout(p.dtype, p.k, p.m, p.a),
            self._layout(p.result, p.n, p.m, c),
            self._layout(p.result, p.n, p.m, d),
        )
        # the heuristics look whether there are addresses
        self._pointers(product, {"bias": 256, "sums": 256, "aux": 256})

    @property
    def workspace(self) -> int:
        return c_uint64.from_buffer(self.found, 64).value

    def run(self, pointers: Mapping[str, int], workspace: int, stream: int) -> None:
        """Gives the stream the product. pointers: of a, b, d, and those of c, bias, sums, aux that the problem has. One thread at a time."""
        self._pointers(self.descriptors[0], pointers)
        self._blas.multiply(self, pointers, workspace, stream)

    def _pointers(self, product: c_void_p, pointers: Mapping[str, int]) -> None:
        vector = next((role for role in ("bias", "sums") if role in self.problem.epilogue), None)
        if vector is not None:
            self._set(product, _BIAS, c_uint64(pointers[vector]))
        if self.problem.aux is not None:
            self._set(product, _AUX, c_uint64(pointers["aux"]))

    def _set(self, product: c_void_p, attribute: int, value: Any) -> None:
        self._blas.put("cublasLtMatmulDescSetAttribute", product, attribute, value)

    def _layout(self, dtype: DType, rows: int, columns: int, at: Layout) -> c_void_p:
        """rows x columns as the library counts them, unturned."""
        if at.turned:
            rows, columns = columns, rows
        p, blas = self.problem, self._blas
        made = blas.object("cublasLtMatrixLayoutCreate", c_int(_TYPES[dtype]), c_uint64(rows), c_uint64(columns), c_int64(at.ld))
        if p.batch > 1:
            blas.put("cublasLtMatrixLayoutSetAttribute", made, _BATCH_COUNT, c_int32(p.batch))
            blas.put("cublasLtMatrixLayoutSetAttribute", made, _BATCH_STRIDE, c_int64(at.stride))
        return made

    def __del__(self) -> None:
        try:
            product, *layouts = self.descriptors
            self._blas.library.cublasLtMatmulDescDestroy(product)
            for layout in layouts:
                self._blas.library.cublasLtMatrixLayoutDestroy(layout)
        except (AttributeError, TypeError):  # not made, or at the interpreter's end
            pass


def find_blas(arch: int) -> Blas | None:
    """cuBLASLt where it is installed."""
    for path in _libraries():
        try:
            return Blas(path, arch)
        except OSError:
            continue
    return None


def _libraries() -> Iterator[str]:
    """Where it may be: the wheels of NVIDIA, the CUDA toolkit, the system's path."""
    spec = importlib.util.find_spec("nvidia")
    for folder in list(spec.submodule_search_locations or ()) if spec else []:
        for place in ("cu*/lib", "cublas/lib"):
            yield from map(str, sorted(Path(folder).glob(f"{place}/libcublasLt.so*"), reverse=True))
    for root in toolkits():
        yield from map(str, sorted(root.glob("lib64/libcublasLt.so*"), reverse=True))
    yield from ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "cublasLt64_13.dll", "cublasLt64_12.dll")
