"""What the CUDA emitters are given and what they hand back: `GpuTarget` in, `KernelCode` out.

A kernel becomes CUDA C with one `__global__` function per launch. Launches run one after the other on a stream; within one, any order of
blocks and threads gives the same bits. Every function takes the same parameters, all of eight bytes (`parameters`): the kernel's
buffers, `scratch`, `status` (the words that `duo_check` of `device.cuh` writes), and one i64 for each of its `dims`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from duo_ir.kernels.kernel import Arg, ContractKernel, ConvKernel, Kernel
from duo_ir.types import Dim, DimLike, DType, evaluate

STATUS_WORDS = 5  # lock, point + 1, site + 1, index, bound
MEMORY = {
    "f16": "unsigned short", "bf16": "unsigned short", "f32": "float", "f64": "double", "i8": "signed char", "i16": "short",
    "i32": "int", "i64": "long long", "u8": "unsigned char", "bool": "unsigned char",
}  # fmt: skip
REGISTER = MEMORY | {"bool": "bool"}


@dataclass(frozen=True)
class GpuTarget:
    """The device to emit for: `arch` 80 or 90 (compute capability times ten), its multiprocessors, whether `fast` numerics
    (tensor cores) are allowed, and the most dynamic shared memory of a block in bytes."""

    arch: int = 90
    multiprocessors: int = 132
    fast: bool = False
    shared: int = 227 << 10


@dataclass(frozen=True)
class Launch:
    """One `__global__` function: threads per block (one-dimensional), blocks for given sizes (one-dimensional grid; none: not launched),
    bytes of dynamic shared memory for given sizes."""

    symbol: str
    threads: int
    blocks: Callable[[Mapping[str, int]], int]
    shared: Callable[[Mapping[str, int]], int] = lambda sizes: 0


@dataclass(frozen=True)
class KernelCode:
    """`text`: functions that need `device.cuh`, and then `headers`, before them. `scratch`: bytes that all launches share, for given sizes."""

    text: str
    launches: tuple[Launch, ...]
    scratch: Callable[[Mapping[str, int]], int] = lambda sizes: 0
    headers: tuple[str, ...] = ()


def symbol(kernel: Kernel, target: GpuTarget) -> str:
    """A name that depends on the kernel and target alone."""
    return "duo_" + hashlib.sha256(f"{replace(kernel, sites=())!r} {target!r}".encode()).hexdigest()[:16]


def parameters(kernel: Kernel) -> str:
    """The parameter list of every function of the kernel. Where an output may take the memory of an input (same dtype and size), nothing is
    said of aliasing."""
    apart = (kernel.a.buffer, kernel.b.buffer) if isinstance(kernel, ContractKernel | ConvKernel) else ()
    parts = []
    for n, arg in enumerate(kernel.args):
        alone = n in apart or not any(b is not arg and b.output != arg.output and _alike(arg, b) for b in kernel.args)
        const, restrict = "" if arg.output else "const ", " __restrict__" if alone else ""
        parts.append(f"{const}{MEMORY[arg.dtype.name]} *{restrict} a{n}")
    parts += ["char * scratch", "long long * status"]
    parts += [f"long long d_{name}" for name in kernel.dims]
    return ", ".join(parts)


def _alike(a: Arg, b: Arg) -> bool:
    return a.dtype is b.dtype and a.size == b.size


def polynomial(d: DimLike) -> str:
    """A size as a C expression of type long long or int."""
    if isinstance(d, int):
        return integer(d)
    return " + ".join(
        ["*".join([integer(c)] * (c != 1 or not names) + [f"d_{n}" for n in names]) for names, c in d.terms]
    )


def integer(value: int) -> str:
    """A literal. The least i64 has none of its own."""
    if value == -(1 << 63):
        return "(-9223372036854775807LL - 1)"
    text = str(value) if -(1 << 31) < value < 1 << 31 else f"{value}LL"
    return text if value >= 0 else f"({text})"


def wide_positions(kernel: Kernel, *others: Sequence[DimLike]) -> bool:
    """Whether positions need 64 bits: a size is not known, or an argument or one of the index spaces `others` is large."""
    products: list[DimLike] = [a.size for a in kernel.args]
    for sizes in others:
        total: DimLike = 1
        for d in sizes:
            total = total * d
        products.append(total)
    return any(isinstance(p, Dim) or p >= 1 << 30 for p in products)


def points(sizes: Sequence[DimLike], values: Mapping[str, int]) -> int:
    total = 1
    for d in sizes:
        total *= evaluate(d, values)
    return total


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def memory(dtype: DType) -> str:
    """The C type of an element in memory; f16 and bf16 are their bits, a bool is a byte."""
    return MEMORY[dtype.name]


def register(dtype: DType) -> str:
    """The C type of a value in a register."""
    return REGISTER[dtype.name]
