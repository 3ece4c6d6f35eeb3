"""What the contraction kernel does with given sizes and strides: tile shape, packing, work units, scratch.

Everything is decided from what is known when the kernel is compiled; none of it changes a bit of the result. `gemm.py` emits what a
`Plan` says, and evaluates the same formulas at run time for symbolic sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from duo_backends.cpu.code import Target
from duo_backends.cpu.gemm_tile import BLOCK, LINE, best_tile, compute_dtype, lanes_of, registers_of
from duo_ir.kernels.kernel import ContractKernel
from duo_ir.types import DimLike, DType, evaluate, product

CHUNK_BLOCKS = 8  # blocks per chunk of a long K
SEQUENTIAL_K = 16384  # up to here blocks are added in order, beyond it chunks combine by the adjacent tree
CACHED_ROWS = 168  # rows of A packed at a time: with K blocks of 512 they stay in the second-level cache
TRANSPOSED_ROWS = 8  # up to here B with contiguous k is transposed on the fly instead of packed
TRANSPOSED_VECTORS = 4  # vectors of columns of a panel of such a B; half as many where its columns share cache sets
B_AHEAD = 8
WAITING_ROWS, BYTES_AHEAD = 4, 4096  # up to so many rows B is asked for so early
PASSED_BYTES = 2 << 20  # bytes of B, more than a second-level cache holds, from which on few rows take a block of K in passes over many columns
PASSED_ROWS = range(2, 9)  # of A; one row has long tiles, and with more rows the arithmetic takes as long as B
PASSED_COLUMNS = 1024  # of a unit of such a product: with its sums it stays in the first-level cache, and reads long runs of each row of B
PASS_STEPS = 32  # k steps of a pass, each a stream that the hardware follows
BYTES_BESIDE = 384  # how far along a row of B is asked for in a pass
OFTEN = 256  # rows of A from which on packing B costs next to nothing
NEAR_PANEL = 40 << 10  # bytes of a panel of B that stays in the first-level cache from tile to tile
FAR_ROWS = 1024  # bytes between rows of B from which one block of them is packed: nothing foresees the next row
SHORT_LINES = 2  # cache lines of a row of a panel of B up to which the hardware does not foresee the next row
UNIT_SIDE = 512  # largest rows and columns of a unit
UNITS = 16  # units that large work is cut into at least
MANY_UNITS = 4  # for each core, from which on a few more do no harm
UNIT_WORK = 1 << 19  # multiply-adds of a unit below which it is not cut further; a quarter where each part packs nothing
AHEAD_CALLS = 8  # micro-kernels of a block from which on the next one's operand is packed between them
STREAMED_ROWS = 48  # with one or two row tiles a unit counts as having these rows: it waits for B's memory
_ALIGN = 64


@dataclass(frozen=True)
class Segment:
    """`count` row tiles of `rows` rows, one after the other; None where the count depends on a symbolic m."""

    rows: int
    count: int | None


@dataclass(frozen=True)
class Plan:
    kernel: ContractKernel
    compute: DType
    lanes: int
    vectors: int  # of a column panel
    tail_vectors: int  # of the last panel; equal to `vectors` where all panels are alike
    segments: tuple[Segment, ...]
    pack_a: bool
    pack_b: bool
    pack_tail: bool  # the last panel is packed although the others are read in place
    unit_tiles: int  # at most
    unit_panels: int
    pass_steps: int  # k steps after which a unit goes on to its next panel, its sums left in memory; 0: only after a block
    row_units: int | None  # that the row tiles are shared out to; None where they are none, or as many as a symbolic m needs

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.lanes

    @property
    def has_tail(self) -> bool:
        """Whether the last panel needs code of its own."""
        return self.tail_vectors != self.vectors or self.pack_tail

    @property
    def group(self) -> int:
        """How many units that lie below each other are gone through before those beside them: their rows read the same columns of B."""
        return max(1, UNIT_SIDE // (self.unit_tiles * self.segments[0].rows))

    @property
    def k_block(self) -> int:
        """K steps of a block, at most."""
        return min(BLOCK, self.kernel.k) if isinstance(self.kernel.k, int) else BLOCK

    @property
    def k_multiple(self) -> int:
        """What the k steps of every micro-kernel are a multiple of; 0 where nothing is known of them."""
        k = self.kernel.k
        return math.gcd(BLOCK, k, self.pass_steps) if isinstance(k, int) and k > 0 else 0

    @property
    def one_block(self) -> bool:
        return isinstance(self.kernel.k, int) and self.kernel.k <= BLOCK

    @property
    def may_be_long(self) -> bool:
        return not isinstance(self.kernel.k, int) or self.kernel.k > SEQUENTIAL_K

    @property
    def cached_tiles(self) -> int:
        """Row tiles of A packed at a time."""
        return min(self.unit_tiles, max(1, CACHED_ROWS // self.segments[0].rows))

    @property
    def ahead(self) -> bool:
        """Whether the one operand that is packed, by plain copies of rows of lanes, is packed a block ahead (`gemm_ahead.py`)."""
        kernel = self.kernel
        if not all(isinstance(d, int) for d in (kernel.m, kernel.n, kernel.k)) or self.may_be_long or self.pack_a == self.pack_b:
            return False
        if kernel.b.at.strides[-1] != 1 or (self.pack_a and (kernel.a.at.strides[-2] != 1 or self.unit_tiles > self.cached_tiles)):
            return False
        return self.unit_tiles * self.unit_panels >= AHEAD_CALLS

    @property
    def ahead_steps(self) -> int:
        """K steps of the next block that are packed before each micro-kernel of a whole unit."""
        return -(-self.k_block // (self.unit_tiles * self.unit_panels)) if self.ahead else 0

    @property
    def ahead_bytes(self) -> int:
        """Bytes of a k step of what is packed ahead, as it lies in memory."""
        access, lanes = self.kernel.b, self.unit_panels * self.panel
        if self.pack_a:
            access, lanes = self.kernel.a, self.unit_tiles * self.segments[0].rows
        return lanes * self.kernel.args[access.buffer].dtype.itemsize

    @property
    def panel_lines(self) -> int:
        """Cache lines of a k step of a panel of B in memory."""
        return -(-self.panel * self.kernel.args[self.kernel.b.buffer].dtype.itemsize // LINE)

    @property
    def b_next(self) -> bool:
        """Whether the row tiles of a panel of B, read in place, ask for the next panel, each for a line of each k step: where its rows are so short
        that the hardware does not, and the tiles enough for all its lines."""
        in_place = not self.pack_b and self.kernel.b.at.strides[-1] == 1 and self.b_ahead == 0 and not self.pass_steps
        return in_place and not self.may_be_long and self.panel_lines <= min(SHORT_LINES, self.unit_tiles)

    @property
    def b_ahead(self) -> int:
        """How many k steps early rows of B are asked for: where B is read once, by few rows, which wait for its memory, or by panels that
        split the pairs of lines that the hardware fetches."""
        if self.pass_steps or len(self.segments) != 1 or self.segments[0].count != 1:
            return 0
        if self.segments[0].rows <= WAITING_ROWS:
            return -(-BYTES_AHEAD // (self.panel * self.compute.itemsize))
        return B_AHEAD if self.vectors == 3 else 0

    @property
    def a_vector(self) -> int:
        """Lanes at once in packing A: no more than its tiles need."""
        rows, lanes = self.segments[0].rows, 16 // self.compute.itemsize
        while lanes < min(rows, self.lanes):
            lanes *= 2
        return lanes

    @property
    def a_stride(self) -> int:
        """Elements between k steps of a packed tile of A."""
        return -(-self.segments[0].rows // self.a_vector) * self.a_vector

    @property
    def tile_elements(self) -> int:
        return self.segments[0].rows * self.panel

    @property
    def strip_bytes(self) -> int:
        """Packed B is laid out in strips, one vector of columns over the k of a block; an odd number of vectors, so that strips
        read side by side do not share cache sets."""
        return (self.k_block | 1) * self.lanes * self.compute.itemsize

    @property
    def b_bytes(self) -> int:
        return self.b_block_bytes * (2 if self.ahead and self.pack_b else 1)

    @property
    def b_block_bytes(self) -> int:
        """Of what is packed of a block of B."""
        panels = self.unit_panels if self.pack_b else 1 if self.pack_tail else 0
        return _round(panels * self.vectors * self.strip_bytes)

    @property
    def a_bytes(self) -> int:
        return self.a_block_bytes * (2 if self.ahead and self.pack_a else 1)

    @property
    def a_block_bytes(self) -> int:
        """Of the tiles of A that are packed at a time."""
        return self.cached_tiles * self.a_tile_bytes if self.pack_a else 0

    @property
    def a_tile_bytes(self) -> int:
        """Of a packed tile of A over a block of k; a cache line more than it needs, so that tiles written side by side do not share
        cache sets."""
        return _round(self.a_stride * self.k_block * self.compute.itemsize) + _ALIGN

    @property
    def sums_bytes(self) -> int:
        """The block sums of a unit, or of one tile where there is one block; with passes, also those of the block that is under way."""
        if self.pass_steps:
            return self.unit_bytes * (1 if self.one_block else 2)
        return _round(self.tile_elements * self.compute.itemsize) if self.one_block else self.unit_bytes

    @property
    def unit_bytes(self) -> int:
        """Of a sum for each element of a unit."""
        return _round(self.unit_tiles * self.unit_panels * self.tile_elements * self.compute.itemsize)

    def tiles(self, sizes: Mapping[str, int]) -> int:
        if isinstance(self.kernel.m, int):
            return sum(s.count or 0 for s in self.segments)
        full, rest = divmod(evaluate(self.kernel.m, sizes), self.segments[0].rows)
        return full + rest.bit_count()

    def panels(self, sizes: Mapping[str, int]) -> int:
        return -(-evaluate(self.kernel.n, sizes) // self.panel)

    def units(self, sizes: Mapping[str, int]) -> int:
        rows, columns = self.row_units, -(-self.panels(sizes) // self.unit_panels)
        if rows is None:
            rows = -(-self.tiles(sizes) // self.unit_tiles)
        return evaluate(product(self.kernel.batch), sizes) * rows * columns

    def scratch(self, sizes: Mapping[str, int]) -> int:
        """Bytes per thread."""
        levels = 1
        k = evaluate(self.kernel.k, sizes)
        if k > SEQUENTIAL_K:
            levels = (-(-k // (BLOCK * CHUNK_BLOCKS)) - 1).bit_length() + 1
        return self.b_bytes + self.a_bytes + levels * self.sums_bytes


def _round(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _known(d: DimLike) -> int | None:
    return d if isinstance(d, int) else None


def make_plan(kernel: ContractKernel, target: Target) -> Plan:
    compute = compute_dtype(kernel.acc)
    lanes, registers = lanes_of(target, compute), registers_of(target)
    m, n = _known(kernel.m), _known(kernel.n)
    column_vectors = None if n is None else -(-n // lanes)
    a_row, a_step = kernel.a.at.strides[-2:]
    side_by_side = a_row == 1 and _conflicts(0, a_row, a_step, compute.itemsize)
    rows, vectors = best_tile(m or None, column_vectors or None, registers, side_by_side)
    a_type, b_type = kernel.args[kernel.a.buffer].dtype, kernel.args[kernel.b.buffer].dtype
    b_step, b_column = kernel.b.at.strides[-2:]
    transposing = b_step == 1 and b_column != 1 and m is not None and 0 < m <= TRANSPOSED_ROWS
    if transposing and m is not None:
        apart = b_column * b_type.itemsize if isinstance(b_column, int) else 0
        vectors = TRANSPOSED_VECTORS if apart % 1024 else TRANSPOSED_VECTORS // 2
        rows, vectors = m, min(column_vectors or vectors, vectors)
    elif m == 1 and b_column == 1:
        rows, vectors = 1, _even(column_vectors or registers, registers // 2)  # long runs of each row of B
    segments = _segments(m, rows)
    tail_vectors = vectors
    if column_vectors and column_vectors % vectors:
        tail_vectors = column_vectors % vectors

    panels = math.inf if column_vectors is None else -(-column_vectors // vectors)
    tiles = math.inf if m is None else -(-m // rows)
    pack_b = (b_column != 1 and not transposing) or (
        tiles > 2
        and (b_type is not compute or _thrashes(m, _known(kernel.k), b_step, vectors * lanes, compute.itemsize))
    )
    pack_a = (not isinstance(a_row, int) and m != 1) or (
        panels > 2 and (a_type is not compute or (_conflicts(rows, a_row, a_step, compute.itemsize) and tiles > 1))
    )
    pack_tail = not pack_b and (n is None or n % lanes != 0)
    unit_tiles, unit_panels = _unit(kernel, rows, vectors * lanes, tiles, panels, pack_a, pack_b)
    passes = tiles == 1 and m in PASSED_ROWS and {a_type, b_type} == {compute} and not (pack_a or pack_b) and _in_passes(kernel, compute.itemsize)
    if passes:
        unit_panels = _even(panels, max(1, min(PASSED_COLUMNS // (vectors * lanes), int(panels) // (2 * target.cores))))
    row_units = None
    if isinstance(tiles, int) and tiles > 0:
        row_units = _shared_out(tiles, unit_tiles, target.cores)
        unit_tiles = -(-tiles // row_units)
    return Plan(
        kernel, compute, lanes, vectors, tail_vectors, segments, pack_a, pack_b, pack_tail, unit_tiles, unit_panels,
        PASS_STEPS if passes else 0, row_units,
    )


def _in_passes(kernel: ContractKernel, itemsize: int) -> bool:
    """Whether one row tile reads a B that is far away and lies in long rows."""
    k, n, (b_step, b_column) = kernel.k, kernel.n, kernel.b.at.strides[-2:]
    if kernel.batch or not (isinstance(k, int) and isinstance(n, int) and isinstance(b_step, int)):
        return False
    return b_column == 1 and b_step >= n >= PASSED_COLUMNS and k <= SEQUENTIAL_K and k * n * itemsize >= PASSED_BYTES


def _segments(m: int | None, rows: int) -> tuple[Segment, ...]:
    """A known m is cut evenly, into tiles of at most two heights; a symbolic one into full tiles and powers of two."""
    if m is None:
        powers = [1 << i for i in reversed(range((rows - 1).bit_length()))]
        return (Segment(rows, None), *(Segment(p, None) for p in powers))
    tiles = -(-m // rows)
    if tiles == 0:
        return (Segment(1, 0),)
    high = -(-m // tiles)
    big = m - tiles * (high - 1)
    return (Segment(high, big), Segment(high - 1, tiles - big)) if tiles > big else (Segment(high, big),)


def _conflicts(rows: int, a_row: DimLike, a_step: DimLike, itemsize: int) -> bool:
    """Whether A read in place would miss the first-level cache: more rows than it has ways on few of its sets, or a line
    and a page for each k step."""
    if a_step == 1:
        return rows > 8 and (not isinstance(a_row, int) or a_row * itemsize >= 2048)
    return not isinstance(a_step, int) or a_step * itemsize >= 2048


def _thrashes(m: int | None, k: int | None, b_step: DimLike, columns: int, itemsize: int) -> bool:
    """Whether rows of B read in place fall into so few cache sets that packing pays, or so far from each other, in panels of so many columns
    that are one block of k and do not stay in the first-level cache: they must also be read often."""
    if m is None or m < OFTEN or not isinstance(b_step, int):
        return False
    apart = b_step * itemsize
    far = k is not None and k <= BLOCK and k * columns * itemsize > NEAR_PANEL and apart >= FAR_ROWS
    return apart % 4096 == 0 or (m >= 2 * OFTEN and far)


def _unit(
    kernel: ContractKernel, rows: int, columns: int, tiles: float, panels: float, pack_a: bool, pack_b: bool
) -> tuple[int, int]:
    """Row tiles and panels of a unit: up to 512 x 512 (any number of columns where neither they nor their sums are kept), cut while
    there are few units with much work; where one operand is packed, which each unit does for itself, rather across the other."""
    k = kernel.k if isinstance(kernel.k, int) else 2 * BLOCK
    batch = math.prod(d for d in kernel.batch if isinstance(d, int))
    side = UNIT_SIDE if isinstance(kernel.k, int) else UNIT_SIDE // 2
    all_tiles = min(tiles, -(-side // rows)) if tiles == math.inf else tiles
    all_panels = min(panels, -(-4 * side // columns)) if panels == math.inf else panels
    wide = all_panels if isinstance(kernel.k, int) and kernel.k <= BLOCK and not pack_b else side // columns
    unit_tiles, unit_panels = max(1, min(all_tiles, -(-side // rows))), max(1, min(all_panels, wide))
    least = STREAMED_ROWS if tiles <= 2 else 1
    work = UNIT_WORK if pack_a or pack_b else UNIT_WORK // 4
    while True:
        units = batch * -(-all_tiles // unit_tiles) * -(-all_panels // unit_panels)
        if units >= UNITS or max(unit_tiles * rows, least) * unit_panels * columns * k < 2 * work:
            break
        across = unit_panels * columns >= unit_tiles * rows if pack_a == pack_b else pack_b
        if (unit_panels if across else unit_tiles) == 1:
            across = not across
            if pack_a != pack_b and units >= UNITS // 2:
                break
        if across and unit_panels > 1:
            unit_panels = -(-unit_panels // 2)
        elif not across and unit_tiles > 1:
            unit_tiles = -(-unit_tiles // 2)
        else:
            break
    return _even(all_tiles, unit_tiles), _even(all_panels, unit_panels)


def _shared_out(tiles: int, most: int, cores: int) -> int:
    """Units of at most so many row tiles each. Where they are many, as many for each core: one that has no rows of its own in every run finds none of
    them in its caches."""
    units = -(-tiles // most)
    return units if units <= MANY_UNITS * cores else min(tiles, -(-units // cores) * cores)


def _even(total: float, part: float) -> int:
    """The part, a little smaller where that makes the parts of the total alike."""
    return int(max(1, -(-total // -(-total // part))) if total else 1)
