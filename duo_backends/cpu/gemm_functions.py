"""The functions that the driver of a contraction calls (`gemm.py`): micro-kernels, packers, the epilogue, each emitted when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable

from duo_backends.cpu.code import Target
from duo_backends.cpu.gemm_epilogue import ask_every, emit_asks, emit_epilogue
from duo_backends.cpu.gemm_pack import emit_copy, emit_copy_tiles, emit_gather, emit_transpose, emit_turn
from duo_backends.cpu.gemm_plan import BYTES_BESIDE, Plan
from duo_backends.cpu.gemm_rows import emit_rows_kernel
from duo_backends.cpu.gemm_tile import BLOCK, Tile, emit_micro_kernel
from duo_backends.cpu.llvm import Module
from duo_ir.kernels.kernel import ContractKernel
from duo_ir.types import DimLike, DType

_FORESEEN_ROWS = 256  # rows of A from which on each tile asks for the next one's


class GemmFunctions:
    """Those of one contraction; each method gives a function's name, and emits it the first time."""

    def __init__(
        self,
        module: Module,
        kernel: ContractKernel,
        target: Target,
        plan: Plan,
        name: str,
        streams: frozenset[int],
    ) -> None:
        self.module, self.kernel, self.target, self.plan = module, kernel, target, plan
        self.name, self.streams = name, streams
        self.a_type = kernel.args[kernel.a.buffer].dtype
        self.b_type = kernel.args[kernel.b.buffer].dtype
        self.made: dict[object, str] = {}

    def _function(self, key: object, kind: str, emit: Callable[[str], None]) -> str:
        if key not in self.made:
            self.made[key] = f"{self.name}_{kind}{len(self.made)}"
            emit(self.made[key])
        return self.made[key]

    def micro_kernel(self, rows: int, vectors: int, packed_b: bool) -> str:
        plan, a_row = self.plan, self.kernel.a.at.strides[-2]
        if plan.pack_a:
            a, row_bytes = plan.compute, plan.compute.itemsize
        else:
            a, row_bytes = self.a_type, a_row * self.a_type.itemsize if isinstance(a_row, int) else 0
        b = plan.compute if packed_b else self.b_type
        b_vector = plan.strip_bytes if packed_b else plan.lanes * b.itemsize
        b_column = self.kernel.b.at.strides[-1]
        spread: int | None = 0
        if not packed_b and b_column != 1:
            spread = b_column * b.itemsize if isinstance(b_column, int) else None
        ahead = plan.b_ahead if spread == 0 and not packed_b else 0
        asks = ask_every(plan, self.streams)
        # packed tiles and few rows are near; in other tiles a row is too short for the hardware to foresee the next one
        many = not isinstance(self.kernel.m, int) or self.kernel.m >= _FORESEEN_ROWS
        a_ahead = many and spread == 0 and not plan.pack_a and self.kernel.a.at.strides[-1] == 1 and row_bytes > 0
        tile = Tile(
            rows, vectors, a, row_bytes, b, b_vector, plan.compute, spread, not (plan.one_block or plan.pass_steps), ahead,
            BYTES_BESIDE if plan.pass_steps and not packed_b else 0, plan.pass_steps > 0, asks, plan.b_next, a_ahead,
            plan.k_multiple,
        )  # fmt: skip
        emit = emit_rows_kernel if spread != 0 else emit_micro_kernel
        return self._function(tile, "tile", lambda name: emit(self.module, self.target, name, tile))

    def packer(
        self, dtype: DType, lane: DimLike, step: DimLike, lanes: int, vectors: int, apart: int, filled: bool
    ) -> tuple[str, int]:
        """(packing function for those strides, lanes it packs at once), with `vectors` vectors of `lanes` lanes, `apart` bytes from
        each other, a k step. `filled`: it never meets fewer than all lanes of a vector."""
        module, target, compute = self.module, self.target, self.plan.compute
        if lane == 1:
            copy = self._function(
                ("copy", dtype, lanes, vectors, apart),
                "copy",
                lambda name: emit_copy(module, target, name, dtype, compute, lanes, vectors, apart),
            )
            return copy, lanes * vectors
        k = self.kernel.k
        gather = None
        if step != 1 or not isinstance(k, int) or 0 < k % BLOCK < 4:
            gather = self._function(
                ("gather", dtype), "gather", lambda name: emit_gather(module, target, name, dtype, compute)
            )
        if gather is not None and step != 1:
            return gather, lanes

        def transpose() -> str:
            return self._function(
                ("transpose", dtype, lanes),
                "transpose",
                lambda name: emit_transpose(module, target, name, gather, dtype, compute, lanes),
            )

        if lanes < self.plan.lanes or not isinstance(lane, int):
            return transpose(), lanes
        whole = filled and isinstance(k, int) and not 0 < k % BLOCK < lanes
        rest, apart = None if whole else transpose(), lane * dtype.itemsize
        turn = self._function(
            ("turn", dtype), "turn", lambda name: emit_turn(module, target, name, rest, dtype, compute, apart)
        )
        return turn, lanes

    def tile_copier(self, rows: int) -> str:
        """The function that packs tiles of `rows` rows of A that lie side by side."""
        module, target, plan, dtype = self.module, self.target, self.plan, self.a_type
        return self._function(
            ("copy tiles", rows),
            "copy",
            lambda name: emit_copy_tiles(
                module, target, name, dtype, plan.compute, rows, plan.a_stride, plan.a_tile_bytes
            ),
        )

    def epilogue(self) -> str:
        return self._function(
            "epilogue", "epilogue", lambda name: emit_epilogue(self.module, self.target, self.plan, name, self.streams)
        )

    def asks(self) -> str:
        return self._function(
            "asks", "asks", lambda name: emit_asks(self.module, self.target, self.plan, name, self.streams)
        )
