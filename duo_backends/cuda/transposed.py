"""Maps that read across what they write, a transpose say: square tiles go through shared memory, so that both sides touch whole sectors.

A block has a tile of the last axis, along which results are neighbours, by the axis along which the operands are that are read across. It reads
those line by line, and computes from shared memory. Lines are an odd number of words apart there: a column lies in as many banks as a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from duo_backends.cuda.body import Emitter, Scope, Value, Writer
from duo_backends.cuda.code import KernelCode, Launch, ceil_div, memory, parameters, points, polynomial, wide_positions
from duo_ir.kernels.kernel import Access, LoopKernel
from duo_ir.types import DimLike, bool_, evaluate, product

SIDE = 32
_ROWS = 8  # lines that the block's threads take at once
_THREADS = SIDE * _ROWS
_LEAST = 16  # points of an axis that is worth tiles
_MOST_TILES = 4


@dataclass(frozen=True)
class Across:
    """The axis along which loads are neighbours, and those loads, by number of instruction."""

    axis: int
    loads: tuple[int, ...]


def reads_across(kernel: LoopKernel) -> Across | None:
    """What the map reads across its last axis; None where that is nothing, or not worth tiles."""
    if len(kernel.stages) != 1 or len(kernel.axes) < 2 or not _long(kernel.axes[-1]):
        return None
    found: dict[int, list[int]] = {}
    for number, instr in enumerate(kernel.stages[0].body):
        access = instr.attr
        if instr.op != "load" or not isinstance(access, Access) or access.guards or access.index_strides:
            continue
        near = [k for k, stride in enumerate(access.at.strides) if stride == 1]
        if access.at.strides[-1] not in (0, 1, -1) and len(near) == 1 and _long(kernel.axes[near[0]]):
            found.setdefault(near[0], []).append(number)
    if not found:
        return None
    axis = max(found, key=lambda k: (len(found[k]), -k))
    return Across(axis, tuple(found[axis][:_MOST_TILES]))


def _long(size: DimLike) -> bool:
    return not isinstance(size, int) or size >= _LEAST


def compile_across(kernel: LoopKernel, across: Across, name: str) -> KernelCode:
    """One launch."""
    (stage,) = kernel.stages
    others = [d for k, d in enumerate(kernel.axes[:-1]) if k != across.axis]
    far, near = kernel.axes[across.axis], kernel.axes[-1]
    w = Writer()
    e = Emitter(w, kernel.args, wide_positions(kernel, kernel.axes))
    index = e.index_type
    pitches = [_pitch(stage.body[n].dtype.itemsize) for n in across.loads]
    starts, shared = [], 0
    for n, pitch in zip(across.loads, pitches):
        starts.append(shared)
        shared += ceil_div(SIDE * pitch * stage.body[n].dtype.itemsize, 16) * 16

    with w.block(f'extern "C" __global__ void __launch_bounds__({_THREADS}) {name}({parameters(kernel)})'):
        w.put("extern __shared__ __align__(16) unsigned char duo_shared[];")
        for k, (n, start) in enumerate(zip(across.loads, starts)):
            type_ = memory(stage.body[n].dtype)
            w.put(f"{type_} *const tile{k} = ({type_} *)(duo_shared + {start});")
        w.put(f"const {index} FAR = {polynomial(far)}, NEAR = {polynomial(near)};")
        w.put(f"const {index} tiles_far = (FAR + {SIDE - 1}) / {SIDE}, tiles_near = (NEAR + {SIDE - 1}) / {SIDE};")
        w.put(f"const int x = threadIdx.x % {SIDE}, y = threadIdx.x / {SIDE};")
        w.put(f"const {index} far0 = ({index})(blockIdx.x % tiles_far)*{SIDE};")
        w.put(f"const {index} near0 = ({index})(blockIdx.x / tiles_far % tiles_near)*{SIDE};")
        w.put(f"const {index} rest = ({index})(blockIdx.x / tiles_far / tiles_near);")
        outer = e.unravel("rest", others)

        def indices(p: str, q: str) -> tuple[str, ...]:
            """All of the kernel's, with those of the far and near axis."""
            return (*outer[: across.axis], p, *outer[across.axis :], q)

        w.put("#pragma unroll")
        with w.block(f"for (int s = 0; s < {SIDE}; s += {_ROWS})"):
            w.put(f"const {index} p = far0 + x, q = near0 + y + s;")
            w.put("if (p >= FAR || q >= NEAR) continue;")
            for k, n in enumerate(across.loads):
                access = stage.body[n].attr
                assert isinstance(access, Access)
                w.put(f"tile{k}[(y + s)*{pitches[k]} + x] = a{access.buffer}[{e.address(access, indices('p', 'q'))}];")
        w.put("__syncthreads();")
        w.put("#pragma unroll")
        with w.block(f"for (int s = 0; s < {SIDE}; s += {_ROWS})"):
            w.put(f"const {index} p = far0 + y + s, q = near0 + x;")
            w.put("if (p >= FAR || q >= NEAR) continue;")
            loaded = {}
            for k, n in enumerate(across.loads):
                dtype = stage.body[n].dtype
                text = f"tile{k}[x*{pitches[k]} + y + s]"
                loaded[n] = Value(f"({text} != 0)" if dtype is bool_ else text, dtype)
            place = "0"
            for size, at in zip(kernel.axes, indices("p", "q")):
                place = at if place == "0" else f"({place})*({polynomial(size)}) + {at}"
            scope = Scope(indices("p", "q"), f"(long long)({place})", loaded)
            values = e.emit(stage.body, scope)
            for store in stage.stores:
                e.store(store, values, scope)

    def blocks(sizes: Mapping[str, int]) -> int:
        tiles = ceil_div(evaluate(far, sizes), SIDE) * ceil_div(evaluate(near, sizes), SIDE)
        return tiles * points((product(others),), sizes)

    return KernelCode(w.text(), (Launch(name, _THREADS, blocks, lambda sizes: shared),))


def _pitch(itemsize: int) -> int:
    """Elements from one line of a tile to the next."""
    return SIDE + max(1, 4 // itemsize)
