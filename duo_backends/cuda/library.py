"""Which contraction kernels cuBLASLt computes as a whole: its epilogue has to be one of the library's, found by comparing scalar SSA.

The library's epilogues are written as functions in duo's ops, lowered as any program is, and what comes out is compared with a kernel's body
instruction by instruction, from what is stored backwards. So a recipe that changes changes here as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from duo_backends.binding import kernels_of
from duo_backends.cuda.blas import Layout, Problem
from duo_ir import ops
from duo_ir.core import Value, function_of
from duo_ir.kernels.kernel import Access, Body, ContractKernel, Kernel, LoopKernel
from duo_ir.kernels.program import Step
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import lower
from duo_ir.types import DType, TensorType, bf16, evaluate, f16, f32

DTYPES = (bf16, f16, f32)
LEAST_WORK = 1 << 24  # products from which the library's kernels are expected to be the quicker ones
LEAST_SIDE = 64
ALIGNED = 16  # bytes
_COMMUTE = ("add", "mul")


@dataclass(frozen=True)
class LibraryCall:
    """A kernel as the library computes it: its epilogue, and the accesses of a, b, d, c (added), bias, aux. Of "relu slope" aux is the activation, in
    whose place the library wants a mask: only together with the product that writes it (`together.py`)."""

    kernel: ContractKernel
    epilogue: str
    accesses: Mapping[str, Access] = field(hash=False)

    def problem(self, sizes: Mapping[str, int]) -> tuple[Problem, dict[str, tuple[int, int]]] | None:
        """For these sizes the problem, and for each operand its argument and where it starts there in bytes; None where duo's kernel is expected
        to be quicker, or the operands do not lie as the library wants them."""
        kernel = self.kernel
        m, n, k = (evaluate(d, sizes) for d in (kernel.m, kernel.n, kernel.k))
        extents = [evaluate(d, sizes) for d in kernel.batch]
        layouts: dict[str, Layout] = {}
        places: dict[str, tuple[int, int]] = {}
        batch = 1
        for extent in extents:
            batch *= extent
        if m * n * k * batch < LEAST_WORK or min(m, n, k) < LEAST_SIDE:
            return None
        for role, access in self.accesses.items():
            *outer, row, column = [evaluate(s, sizes) for s in access.at.strides]
            itemsize = kernel.args[access.buffer].dtype.itemsize
            start = evaluate(access.at.offset, sizes) * itemsize
            stride = _one_stride(extents, outer)
            if role == "bias":
                fits = (row, column, stride) == (0, 1, 0)
            else:
                turned = column != 1 and role in ("a", "b")
                far, near = (column, row) if turned else (row, column)
                rows, columns = {"a": (m, k), "b": (k, n)}.get(role, (m, n))
                fits = near == 1 and stride is not None and far >= (rows if turned else columns)
                fits = fits and far * itemsize % ALIGNED == 0 and stride * itemsize % ALIGNED == 0  # type: ignore[operator]
                layouts[role] = Layout(far, stride or 0, turned)
            if not fits or start % ALIGNED:
                return None
            places[role] = access.buffer, start
        dtype, result = [kernel.args[self.accesses[role].buffer].dtype for role in ("a", "d")]
        return Problem(dtype, result, batch, m, n, k, epilogue=self.epilogue, **layouts), places  # type: ignore[arg-type]


def _one_stride(extents: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance between neighbours of a batch of several axes; None where it is not the same for all."""
    found, inner = None, 1
    for extent, stride in zip(reversed(extents), reversed(strides)):
        if extent == 1:
            continue
        if found is None:
            found = stride
        elif stride != found * inner:
            return None
        inner *= extent
    return found or 0


def library_call(kernel: Kernel) -> LibraryCall | None:
    """How the library computes the kernel; None where it has no such product."""
    if not isinstance(kernel, ContractKernel):
        return None
    a, b = kernel.args[kernel.a.buffer].dtype, kernel.args[kernel.b.buffer].dtype
    if a is not b or a not in DTYPES or kernel.acc is not f32 or len(kernel.stores) != 1:
        return None
    (store,) = kernel.stores
    if store.access.guards or store.access.index_strides or kernel.a.guards or kernel.b.guards:
        return None
    accesses = {"a": kernel.a, "b": kernel.b, "d": store.access}
    if kernel.body[store.value].op == "acc" and kernel.result in (a, f32):
        return LibraryCall(kernel, "none", accesses)
    if kernel.result is not a:
        return None
    for epilogue in epilogues(a):
        found: dict[str, Access] = {}
        if _matches(epilogue, kernel.body, store.value, found):
            return LibraryCall(kernel, epilogue.name, accesses | found)
    return None


# ------------------------------------------------------------------------------------------------------------- epilogues
@dataclass(frozen=True)
class Epilogue:
    """Value number `value` of the body; `roles`: what the buffers are that it loads."""

    name: str
    body: Body
    value: int
    roles: tuple[str, ...]


def _relu(x: Value) -> Value:
    zero = nd.zeros_like(x)
    return ops.where(ops.le(x, zero), zero, x)


def _gelu(x: Value) -> Value:
    return nd.cast_to(ops.gelu_tanh(nd.cast_to(x, f32))[0], x.type.dtype)


def _slope(x: Value) -> Value:
    return nd.cast_to(ops.gelu_tanh(nd.cast_to(x, f32))[1], x.type.dtype)


# the sum z first, then what else is read, by name
_FORMS: tuple[tuple[str, tuple[str, ...], Callable[..., Value]], ...] = (
    ("bias", ("bias",), lambda z, b: z + b),
    ("none", ("c",), lambda z, c: z + c),
    ("bias", ("bias", "c"), lambda z, b, c: z + b + c),
    ("relu", (), _relu),
    ("relu", (), lambda z: nd.maximum(z, nd.zeros_like(z))),
    ("relu bias", ("bias",), lambda z, b: _relu(z + b)),
    ("relu bias", ("bias",), lambda z, b: nd.maximum(z + b, nd.zeros_like(z))),
    ("gelu", (), _gelu),
    ("gelu bias", ("bias",), lambda z, b: _gelu(z + b)),
    ("gelu slope", ("aux",), lambda z, x: z * _slope(x)),
    ("relu slope", ("aux",), lambda z, y: ops.where(ops.le(y, nd.zeros_like(y)), nd.zeros_like(z), z)),
)


@functools.cache
def epilogues(dtype: DType) -> tuple[Epilogue, ...]:
    """The library's epilogues for results of `dtype`."""
    made = []
    for name, others, form in _FORMS:
        types = [TensorType(dtype, (6, 8)), *[TensorType(dtype, (8,) if role == "bias" else (6, 8)) for role in others]]
        program = lower(function_of(form, *types))
        (kernel,) = kernels_of(program)
        (step,) = [item for item in program.items if isinstance(item, Step)]
        assert isinstance(kernel, LoopKernel)
        (stage,) = kernel.stages
        (store,) = stage.stores
        names = ("acc", *others)
        roles = tuple(names[slot] if slot < len(names) else "" for slot in step.slots)
        made.append(Epilogue(name, stage.body, store.value, roles))
    return tuple(made)


def _matches(e: Epilogue, body: Body, value: int, found: dict[str, Access]) -> bool:
    """Whether value number `value` of `body` is the epilogue's. found: gets the accesses by role."""
    same: dict[tuple[int, int], bool] = {}

    def equal(x: int, y: int) -> bool:
        if (x, y) not in same:
            same[x, y] = compare(x, y)
        return same[x, y]

    def compare(x: int, y: int) -> bool:
        want, have = e.body[x], body[y]
        if want.dtype is not have.dtype:
            return False
        if want.op == "load":
            role = e.roles[want.attr.buffer]  # type: ignore[attr-defined]
            if role == "acc" or have.op != "load":
                return role == "acc" and have.op == "acc"
            access: Access = have.attr  # type: ignore[assignment]
            along_rows = all(stride == 0 for stride in access.at.strides[:-1])
            if access.guards or access.index_strides or along_rows != (role == "bias"):
                return False
            return found.setdefault(role, access) == access
        if (want.op, want.attr, len(want.args)) != (have.op, have.attr, len(have.args)):
            return False
        orders = [have.args, have.args[::-1]] if want.op in _COMMUTE else [have.args]
        return any(all(equal(p, q) for p, q in zip(want.args, order)) for order in orders)

    return equal(e.value, value)
