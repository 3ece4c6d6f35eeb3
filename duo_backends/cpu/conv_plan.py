"""What the convolution kernel does with given sizes and strides: tile shape, where it reads x, packing, work units, scratch.

The rows of a tile are a rectangle of result positions, at constant distances from each other in memory, so that one micro-kernel serves
all tiles of a shape. Weights that lie in memory as the panels that a micro-kernel reads (`duo_ir/transforms/panels.py`) arrive as groups
that read the same channels of x: here each is a panel. None of this changes a bit. `conv_pixels.py` emits what a `Plan` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duo_backends.cpu.code import Target
from duo_backends.cpu.gemm_plan import CHUNK_BLOCKS, SEQUENTIAL_K
from duo_backends.cpu.gemm_tile import BLOCK, compute_dtype, lanes_of, max_rows, registers_of, tile_cost
from duo_ir.kernels.kernel import ConvKernel, Window
from duo_ir.types import DimLike, DType, evaluate

MOST_ROWS = 14  # of a tile
MOST_VECTORS = 4
SLAB_BYTES = 1 << 18  # the part of x that a unit works on stays in the second-level cache
SHARED_BYTES = 1 << 20  # packed weights up to here are shared by all units, beyond if they are read
REREAD = 8  # so many times: threads would otherwise fetch from each other's caches what they could pack themselves
MOST_SHARED = 1 << 26
UNITS = 8  # that the work is cut into at least, while
UNIT_WORK = 1 << 15  # multiply-adds of a unit are more than this
MOST_RUNS = 4096  # in the table of all blocks, which the code writes out
_ALIGN = 64


@dataclass(frozen=True)
class Axis:
    """A spatial axis with known sizes, and the distances in elements of its positions in x and of its taps in w."""

    count: int
    taps: int
    bound: int
    offset: int
    stride: int
    dilation: int
    x_step: int = 0
    w_step: int = 0

    @property
    def inside(self) -> bool:
        """Whether no tap lies outside x."""
        last = self.offset + self.stride * (self.count - 1) + self.dilation * (self.taps - 1)
        return self.offset >= 0 and last < self.bound

    def covered(self, count: int) -> int:
        """Positions of x that `count` result positions read; only those between taps when there is one tap."""
        return count if self.taps == 1 else (count - 1) * self.stride + (self.taps - 1) * self.dilation + 1

    @property
    def step(self) -> int:
        """From one result position to the next in what `covered` counts."""
        return 1 if self.taps == 1 else self.stride


@dataclass(frozen=True)
class Run:
    """Consecutive k of one block: byte offset in A, element offset in w, and their number."""

    a: int
    w: int
    length: int


class ColumnPanels:
    """What plans have in common: columns are computed in panels of some vectors, several panels to a unit."""

    kernel: ConvKernel
    compute: DType
    lanes: int
    vectors: int  # of a column panel
    unit_panels: int

    @property
    def n(self) -> int:
        """Columns of a group."""
        return _int(self.kernel.n)

    @property
    def groups(self) -> int:
        return _int(self.kernel.groups)

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        return -(-self.n // self.panel)

    @property
    def column_units(self) -> int:
        return -(-self.panels // self.unit_panels)

    @property
    def k_row(self) -> int:
        """Bytes of one k step of packed w."""
        return self.panel * self.compute.itemsize


@dataclass(frozen=True)
class Plan(ColumnPanels):
    kernel: ConvKernel
    compute: DType
    lanes: int
    axes: tuple[Axis, Axis, Axis]  # with axes of size 1 in front where the convolution has fewer
    vectors: int  # of a column panel
    tile_high: int  # result rows of a tile,
    tile_wide: int  # and columns of positions: tiles along a row differ by one at most
    block_high: int  # result rows of a unit
    unit_panels: int
    in_place: bool
    pixel: int  # elements from one position to the next in the slab
    resident: bool  # w is packed once for all units,
    laid_out: bool  # or lies in panels already: the kernel's groups

    # ------------------------------------------------------------------------------------------------------- sizes
    @property
    def c(self) -> int:
        assert isinstance(self.kernel.c, int)
        return self.kernel.c

    @property
    def n(self) -> int:
        """Columns of a group; of all panels where the groups are panels."""
        n = _int(self.kernel.n)
        return n * _int(self.kernel.groups) if self.laid_out else n

    @property
    def groups(self) -> int:
        return 1 if self.laid_out else _int(self.kernel.groups)

    @property
    def k(self) -> int:
        return self.c * math.prod(axis.taps for axis in self.axes)

    @property
    def blocks(self) -> int:
        return -(-self.k // BLOCK)

    @property
    def fetches(self) -> bool:
        """Whether tiles ask for the next block of w, which comes from far: where there are several."""
        return self.laid_out and self.blocks > 1

    @property
    def chunks(self) -> int:
        """Units split a long K too: each chunk's sums are combined afterwards."""
        return -(-self.blocks // CHUNK_BLOCKS) if self.k > SEQUENTIAL_K else 1

    @property
    def tail_vectors(self) -> int:
        """Vectors of the last panel."""
        return -(-(self.n - (self.panels - 1) * self.panel) // self.lanes)

    @property
    def row_units(self) -> int:
        return -(-self.axes[1].count // self.block_high)

    @property
    def wide(self) -> tuple[int, int]:
        """(tiles along a row, how many of them are `tile_wide`, the rest one less)."""
        tiles = -(-self.axes[2].count // self.tile_wide)
        return tiles, self.axes[2].count - tiles * (self.tile_wide - 1)

    # ------------------------------------------------------------------------------------------------------ memory
    @property
    def a_steps(self) -> tuple[int, int, int]:
        """Elements between neighbouring positions of x along the three axes, where tiles read it."""
        if self.in_place:
            d, h, w = self.axes
            return d.x_step, h.x_step, w.x_step
        line = self.axes[2].covered(self.axes[2].count) * self.pixel
        if self.shares_slab and self.pixel % self.lanes:
            line += self.lanes  # a line that another thread fills does not write into the next
        return self.slab_high * line, line, self.pixel

    @property
    def shares_slab(self) -> bool:
        """Whether a phase before fills one slab for each image: several units read the same part of x."""
        one = self.groups == 1 and self.axes[0].count == 1
        few = isinstance(self.kernel.images, int) and self.kernel.images < UNITS
        return not self.in_place and one and few and self.column_units > 1 and self.chunks == 1

    @property
    def slab_high(self) -> int:
        """Lines of the slab."""
        return self.axes[1].covered(self.axes[1].count if self.shares_slab else self.block_high)

    @property
    def line_bytes(self) -> int:
        """From one line of x to the next, where tiles read it."""
        return self.a_steps[1] * self.compute.itemsize

    @property
    def slab_bytes(self) -> int:
        """Its depth axis holds one slice per tap."""
        if self.in_place:
            return 0
        return round_up(
            self.axes[0].taps * self.a_steps[0] * self.compute.itemsize + self.lanes * self.compute.itemsize
        )

    def row_offsets(self, high: int, wide: int) -> tuple[int, ...]:
        """Bytes from a tile's first row to each."""
        _, line, pixel = self.a_steps
        _, h, w = self.axes
        high_step, wide_step = (h.stride * line, w.stride * pixel) if self.in_place else (h.step * line, w.step * pixel)
        size = self.compute.itemsize
        return tuple([(r * high_step + q * wide_step) * size for r in range(high) for q in range(wide)])

    @property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """For each block of K its runs."""
        _, w_c, _ = self.w_steps
        size, steps = self.compute.itemsize, self.a_steps
        spread = [axis.dilation for axis in self.axes]
        if not self.in_place:
            spread[0] = 1
        out: list[list[Run]] = [[] for _ in range(self.blocks)]
        k = 0
        for taps in _places([axis.taps for axis in self.axes]):
            a = sum(t * s * step for t, s, step in zip(taps, spread, steps))
            w = sum(t * axis.w_step for t, axis in zip(taps, self.axes))
            c = 0
            while c < self.c:
                length = min(self.c - c, BLOCK - k % BLOCK)
                block, run = out[k // BLOCK], Run((a + c) * size, w + c * w_c, length)
                if block and _follows(block[-1], run, size, w_c):
                    block[-1] = Run(block[-1].a, block[-1].w, block[-1].length + length)
                else:
                    block.append(run)
                c, k = c + length, k + length
        return tuple([tuple(block) for block in out])

    @property
    def w_steps(self) -> tuple[int, int, int]:
        """Elements of w between groups, channels, columns."""
        *_, group, c, n = self.kernel.b.at.strides
        if self.c == 1 and self.axes[2].taps > 1:
            c = self.axes[2].w_step  # K goes on along the taps
        return _int(group), _int(c), _int(n)

    @property
    def shared_packed_bytes(self) -> int:
        return round_up(self.panels * self.groups * self.k * self.k_row) if self.resident else 0

    @property
    def shared_slab_bytes(self) -> int:
        return _int(self.kernel.images) * self.slab_bytes if self.shares_slab else 0

    @property
    def own_packed_bytes(self) -> int:
        """Of one panel, which some ways of packing do at once."""
        return 0 if self.resident or self.laid_out else round_up(self.k * self.k_row)

    @property
    def own_sums_bytes(self) -> int:
        return self.sums_bytes if self.chunks == 1 else 0

    @property
    def tile_bytes(self) -> int:
        return self.tile_high * self.tile_wide * self.k_row

    @property
    def unit_tiles(self) -> int:
        return -(-self.block_high // self.tile_high) * self.wide[0]

    @property
    def sums_bytes(self) -> int:
        """Of the tiles of one panel; of all panels of a unit where chunks are combined afterwards; of one tile with one block."""
        tiles = 1 if self.blocks == 1 else self.unit_tiles * (self.unit_panels if self.chunks > 1 else 1)
        return round_up(self.tile_bytes * tiles)

    @property
    def own_bytes(self) -> int:
        """Scratch of one thread: slab, packed weights, sums."""
        slab = 0 if self.shares_slab else self.slab_bytes
        return slab + self.own_packed_bytes + self.own_sums_bytes

    @property
    def image_units(self) -> int:
        """Units of one image, in each of its chunks."""
        return self.groups * self.axes[0].count * self.row_units * self.column_units

    def scratch(self, sizes: Mapping[str, int], threads: int) -> int:
        """Packed weights, slabs and the sums of all chunks, then each thread's own part."""
        chunks = self.units(sizes) * self.chunks * self.sums_bytes if self.chunks > 1 else 0
        return self.shared_packed_bytes + self.shared_slab_bytes + chunks + threads * self.own_bytes

    def units(self, sizes: Mapping[str, int]) -> int:
        return evaluate(self.kernel.images, sizes) * self.image_units


def _follows(before: Run, run: Run, size: int, w_c: int) -> bool:
    return run.a == before.a + before.length * size and run.w == before.w + before.length * w_c


def _places(counts: list[int]) -> list[tuple[int, ...]]:
    out: list[tuple[int, ...]] = [()]
    for n in counts:
        out = [(*place, k) for place in out for k in range(n)]
    return out


def round_up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _int(d: object) -> int:
    assert isinstance(d, int)
    return d


def _axis(window: Window, x_step: object, w_step: object) -> Axis:
    return Axis(
        _int(window.count), _int(window.taps), _int(window.bound), _int(window.offset), _int(window.stride),
        _int(window.dilation), _int(x_step), _int(w_step),
    )  # fmt: skip


def is_static(kernel: ConvKernel) -> bool:
    """Whether all but the number of images is known."""
    parts: list[object] = [kernel.groups, kernel.n, kernel.c, *kernel.a.at.strides, *kernel.b.at.strides]
    for w in kernel.windows:
        parts += [w.count, w.taps, w.bound, w.offset, w.stride, w.dilation]
    return all(isinstance(d, int) for d in parts)


def make_plan(kernel: ConvKernel, target: Target) -> Plan | None:
    """The plan for tiles of result positions, or None where the convolution is not one for such tiles."""
    if not is_static(kernel):
        return None
    compute = compute_dtype(kernel.acc)
    lanes, registers = lanes_of(target, compute), registers_of(target)
    dummy = Axis(1, 1, 1, 0, 1, 1)
    axes = [_axis(w, x, t) for w, x, t in zip(kernel.windows, kernel.a.at.strides[1:], kernel.b.at.strides)]
    d, h, w = (*[dummy] * (3 - len(axes)), *axes)
    groups, n, c = _int(kernel.groups), _int(kernel.n), _int(kernel.c)
    k = c * d.taps * h.taps * w.taps
    if k == 0 or 0 in (n, groups, d.count, h.count, w.count) or (n == 1 and groups > 1):
        return None
    vectors, high, wide = _tile(h.count, w.count, -(-n // lanes), registers)
    laid_out = _laid_out(kernel, compute, lanes) and (groups > 1 or vectors * lanes == n)
    if laid_out:
        vectors, high, wide = _tile(h.count, w.count, n // lanes, registers, [n // lanes])
        groups, n = 1, n * groups
    in_place = (
        kernel.args[kernel.a.buffer].dtype is compute
        and kernel.a.at.strides[-1] == 1
        and d.inside and h.inside and w.inside
        and (w.stride * w.x_step * compute.itemsize) % 4096 != 0
    )  # fmt: skip
    pixel = c if (w.step * c * compute.itemsize) % 4096 != 0 else c + lanes
    block, panels = _unit(kernel.images, groups, n, compute, (d, h, w), high, k, vectors * lanes, pixel)
    units = (kernel.images if isinstance(kernel.images, int) else UNITS) * d.count * -(-h.count // block)
    columns = -(-n // (vectors * lanes)) * vectors * lanes
    packed = columns * groups * k * compute.itemsize
    resident = not laid_out and units > 1 and packed <= (MOST_SHARED if units >= REREAD else SHARED_BYTES)
    plan = Plan(
        kernel, compute, lanes, (d, h, w), vectors, high, wide, block, panels, in_place, pixel, resident, laid_out
    )
    if d.taps * h.taps * w.taps > MOST_RUNS and sum(len(runs) for runs in plan.runs) > MOST_RUNS:
        return None
    return plan


def _laid_out(kernel: ConvKernel, compute: DType, lanes: int) -> bool:
    """Whether groups read the same channels of x and lie in memory as panels: [group][taps, channels][columns], whole vectors."""
    n = _int(kernel.n)
    if (kernel.groups != 1 and kernel.a.at.strides[-2] != 0) or n % lanes or n // lanes > MOST_VECTORS:
        return False
    sizes = [_int(s) for s in (kernel.groups, *[w.taps for w in kernel.windows], kernel.c, n)]
    *taps, group, c, column = [_int(s) for s in kernel.b.at.strides]
    step = 1
    for size, found in zip(reversed(sizes), reversed([group, *taps, c, column])):
        if size > 1 and found != step:
            return False
        step *= size
    return kernel.args[kernel.b.buffer].dtype is compute


def panel_columns(high: int, wide: int, n: int, dtype: DType, target: Target) -> int | None:
    """Columns of the panels in which a convolution to high x wide positions and n channels best reads weights; None where panels
    would not be full."""
    compute = compute_dtype(dtype)
    lanes = lanes_of(target, compute)
    if n % lanes or dtype is not compute:
        return None
    full = [v for v in range(1, MOST_VECTORS + 1) if n % (v * lanes) == 0]
    return _tile(high, wide, n // lanes, registers_of(target), full)[0] * lanes


def _tile(
    high: int, wide: int, column_vectors: int, registers: int, widths: Sequence[int] = range(1, MOST_VECTORS + 1)
) -> tuple[int, int, int]:
    """(vectors, result rows, positions along a row) of the fastest tile, of those with as many vectors as `widths` says."""
    best: tuple[float, int, int, int] | None = None
    for vectors in [v for v in widths if v <= column_vectors]:
        most = min(max_rows(vectors, registers), MOST_ROWS)
        if wide >= most:
            th, tw = 1, -(-wide // -(-wide // most))
        else:
            th, tw = min(most // wide, high), wide
        across = -(-wide // tw)
        big = wide - across * (tw - 1)
        cost = 0.0
        for rows, downward in ((th, high // th), (high % th, 1)):
            for length, along in ((tw, big), (tw - 1, across - big)):
                for width, panels in ((vectors, column_vectors // vectors), (column_vectors % vectors, 1)):
                    if rows * length * width:
                        cost += downward * along * panels * tile_cost(rows * length, width)
        cost *= 1 + 0.6 / (th * tw) + 0.1 / vectors
        if best is None or cost < best[0]:
            best = (cost, vectors, th, tw)
    assert best is not None
    return best[1:]


def _unit(
    images: DimLike, groups: int, n: int, compute: DType, axes: tuple[Axis, Axis, Axis], tile_high: int, k: int, panel: int,
    pixel: int,
) -> tuple[int, int]:  # fmt: skip
    """(result rows, panels) of a unit: what the cache holds of x and all columns, cut while there are few units with much work."""
    d, h, w = axes
    line = d.taps * w.covered(w.count) * pixel * compute.itemsize
    high = h.count
    while high > tile_high and h.covered(high) * line > SLAB_BYTES:
        high = -(-high // 2)
    high = min(h.count, -(-high // tile_high) * tile_high)
    panels = all_panels = -(-n // panel)
    outer = (images if isinstance(images, int) else UNITS) * groups * d.count
    while outer * -(-h.count // high) * -(-all_panels // panels) < UNITS:
        if high * w.count * min(n, panels * panel) * k < 2 * UNIT_WORK:
            break
        slab, weights = h.covered(high) * line, k * panels * panel * compute.itemsize
        if panels > 1 and (weights > slab or high <= tile_high):
            panels = -(-panels // 2)
        elif high > tile_high:
            high = -(-high // (2 * tile_high)) * tile_high
        else:
            break
    return _alike(h.count, high, tile_high), panels


def _alike(total: int, high: int, tile_high: int) -> int:
    """The rows of a unit, or down to half of them where that makes all units alike: a thread waits for the one that got a longer last one."""
    if high >= total:
        return high
    halves = range(high, (high - 1) // 2, -1)
    return next((part for part in halves if total % part == 0 and part % tile_high == 0), high)
