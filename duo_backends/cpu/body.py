"""Scalar SSA bodies as LLVM text at any vector width.

A `Scope` says which SSA name each loop index has, which axis (if any) runs over the vector's lanes, and where text that
depends on few indices may be hoisted to. Values that are the same in every lane stay scalar until they meet a vector.
Addresses are touched only where guards and the lane mask allow it. Conversions are in `convert.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from duo_backends.cpu.code import Target
from duo_backends.cpu.convert import convert
from duo_backends.cpu.llvm import (
    Function,
    Region,
    is_literal,
    literal,
    mangle,
    memory_type,
    register_type,
    scalef,
    splat_literal,
    vector,
)
from duo_ir.kernels.body import BodyBuilder, finish
from duo_ir.kernels.kernel import Access, Affine, Arg, Body, Instr, Store
from duo_ir.scalar.common import ldexp_by_powers
from duo_ir.types import Dim, DimLike, DType, bool_, i64

_FLOAT_BINARY = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
_INT_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "and_": "and", "or_": "or", "xor": "xor",
    "shl": "shl", "lshr": "lshr", "ashr": "ashr",
}  # fmt: skip
_FLOAT_UNARY = {
    "fabs": "fabs", "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "roundeven",
}  # fmt: skip
_FLOAT_COMPARE = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}
_LINE = 64  # bytes of a line of the caches
_LEAST_STREAMED = 16  # bytes of a store past the caches
_SPARE_BYTES = 512  # where accesses that a scalar guard forbids are redirected: room for one vector of any width


@cache
def _ldexp(dtype: DType) -> Body:
    """The instruction ldexp by others, of saved values 0 and 1; the last value is the result."""
    builder = BodyBuilder()
    ldexp_by_powers(builder, *[builder.put("saved", (), dtype, k) for k in range(2)])
    return finish(builder.rows, [len(builder.rows) - 1], lambda row: row[3])[0]


class Value(NamedTuple):
    """An SSA name or literal. `lanes` is False for a scalar that is the same in every lane; `level` tells the innermost
    hoisting region it needs."""

    name: str
    dtype: DType
    lanes: bool
    level: int


@dataclass(frozen=True)
class Scope:
    """Loop indices in scope (outer axes, then the stage's): `indices[k]` is the i64 of axis k, for the vector axis
    that of lane 0. `levels[k]` is the hoisting region from which it is available: a value that needs indices up to level
    L is emitted in `regions[L]`; `regions[-1]` None stands for wherever the builder is. `vector` is the axis of the
    lanes or None. `mask`: <width x i1> of live lanes, None for all."""

    indices: tuple[str, ...]
    levels: tuple[int, ...]
    regions: tuple[Region | None, ...]
    vector: int | None = None
    width: int = 1
    mask: str | None = None

    @staticmethod
    def flat(indices: Sequence[str], vector: int | None = None, width: int = 1, mask: str | None = None) -> Scope:
        """Without hoisting: all text goes where the builder is."""
        return Scope(tuple(indices), (0,) * len(indices), (None,), vector, width, mask)


class Emitter:
    """Emits bodies into `f`. `args` and `pointers`: the kernel's arguments and the SSA names of their addresses."""

    def __init__(
        self,
        f: Function,
        target: Target,
        args: Sequence[Arg],
        pointers: Sequence[str],
        dims: Sequence[str] = (),
        dims_pointer: str = "%dims",
        status: str = "%status",
        streams: frozenset[int] = frozenset(),
    ) -> None:
        self.streams = streams  # arguments whose whole vectors are aligned and go past the caches
        self.f, self.target, self.args, self.pointers, self.status = f, target, args, pointers, status
        self._dims, self._dims_pointer = tuple(dims), dims_pointer
        self._sizes: dict[DimLike, str] = {}
        self._spare = ""

    # --------------------------------------------------------------------------------------------------- basics
    def dim(self, d: DimLike) -> str:
        """The i64 value of a size, computed once at the top of the function."""
        if isinstance(d, int):
            return str(d)
        known = self._sizes.get(d)
        if known is None:
            known = self._sizes[d] = self._polynomial(d)
        return known

    def _polynomial(self, d: Dim) -> str:
        f, top, total = self.f, self.f.top, "0"
        for names, coefficient in d.terms:
            product = str(coefficient)
            for name in names:
                address = f.gep("i64", self._dims_pointer, str(self._dims.index(name)), top)
                product = f.mul(product, f.pure(f"load i64, ptr {address}, align 8", top), top)
            total = f.add(total, product, top)
        return total

    def _region(self, scope: Scope, level: int) -> Region | None:
        return scope.regions[level]

    def splat(self, scope: Scope, v: Value) -> str:
        """`v` as a vector of the scope's width (its name as it is for width 1)."""
        if v.lanes or scope.width == 1:
            return v.name
        element = register_type(v.dtype)
        if is_literal(v.name):
            return splat_literal(scope.width, element, v.name)
        return self.splat_scalar(v.name, element, scope.width, self._region(scope, v.level))

    def splat_scalar(self, name: str, element: str, width: int, region: Region | None = None) -> str:
        if is_literal(name):
            return splat_literal(width, element, name)
        type_ = vector(width, element)
        one = self.f.pure(f"insertelement {type_} poison, {element} {name}, i64 0", region)
        return self.f.pure(f"shufflevector {type_} {one}, {type_} poison, <{width} x i32> zeroinitializer", region)

    def spare(self) -> str:
        if not self._spare:
            self._spare = self.f.alloca("i8", _SPARE_BYTES)
        return self._spare

    def affine(self, scope: Scope, a: Affine, skip_vector: bool = True) -> tuple[str, int, DimLike]:
        """(i64 name, level, stride of the vector axis): the position at lane 0, summed level by level so that each
        part is hoisted as far as it goes."""
        f, name, level = self.f, self.dim(a.offset), 0
        stride: DimLike = 0
        for axis in sorted(range(len(a.strides)), key=lambda k: scope.levels[k]):
            if a.strides[axis] == 0 or scope.indices[axis] == "0":
                if axis == scope.vector:
                    stride = a.strides[axis]
                continue
            level = max(level, scope.levels[axis])
            region = self._region(scope, level)
            name = f.add(name, f.mul(scope.indices[axis], self.dim(a.strides[axis]), region), region)
            if axis == scope.vector:
                stride = a.strides[axis]
        if stride != 0:
            level = max(level, scope.levels[scope.vector])  # type: ignore[index]
        return name, level, stride if scope.width > 1 else 0

    def ramp(self, scope: Scope, start: str, stride: DimLike, level: int) -> str:
        """<width x i64> start + stride * lane."""
        f, width, region = self.f, scope.width, self._region(scope, level)
        type_ = f"<{width} x i64>"
        if isinstance(stride, int):
            steps = f"<{', '.join(f'i64 {stride * lane}' for lane in range(width))}>"
        else:
            lanes = f"<{', '.join(f'i64 {lane}' for lane in range(width))}>"
            steps = f.pure(f"mul {type_} {self.splat_scalar(self.dim(stride), 'i64', width)}, {lanes}", region)
        if start == "0":
            return steps
        return f.pure(f"add {type_} {self.splat_scalar(start, 'i64', width, region)}, {steps}", region)

    # --------------------------------------------------------------------------------------------------- bodies
    def emit(
        self,
        body: Body,
        scope: Scope,
        reduced: Callable[[int, int], Value] | None = None,
        acc: Value | None = None,
        saved: Callable[[int], Value] | None = None,
    ) -> list[Value]:
        """Emits every instruction; the values, numbered as in the body. `reduced(stage, n)`, `acc` and `saved(slot)`
        (see `reuse.py`) give those operands of the surrounding kernel."""
        values: list[Value] = []
        for instr in body:
            if instr.op == "saved":
                assert saved is not None
                values.append(saved(instr.attr))  # type: ignore[arg-type]
                continue
            values.append(self._instr(instr, [values[k] for k in instr.args], scope, reduced, acc))
        return values

    def _instr(
        self,
        instr: Instr,
        args: list[Value],
        scope: Scope,
        reduced: Callable[[int, int], Value] | None,
        acc: Value | None,
    ) -> Value:
        op, attr = instr.op, instr.attr
        if op == "const":
            return Value(literal(attr, instr.dtype), instr.dtype, False, 0)  # type: ignore[arg-type]
        if op == "load":
            return self.load(attr, args, instr.dtype, scope)  # type: ignore[arg-type]
        if op == "index":
            name, level, stride = self.affine(scope, attr)  # type: ignore[arg-type]
            if stride == 0:
                return Value(name, i64, False, level)
            return Value(self.ramp(scope, name, stride, level), i64, True, level)
        if op == "dim":
            return Value(self.dim(attr), i64, False, 0)  # type: ignore[arg-type]
        if op == "reduced":
            assert reduced is not None
            return reduced(*attr)  # type: ignore[misc]
        if op == "acc":
            assert acc is not None
            return acc
        if op == "check":
            return self._check(attr, args[0], scope)  # type: ignore[arg-type]
        return self._arithmetic(instr, args, scope)

    def _arithmetic(self, instr: Instr, args: list[Value], scope: Scope) -> Value:
        f, op, dtype = self.f, instr.op, instr.dtype
        lanes = any(a.lanes for a in args)
        level = max(a.level for a in args)
        width = scope.width if lanes else 1
        region = self._region(scope, level)
        # a select may keep a scalar condition: every other operand takes the result's form
        names = [
            self.splat(scope, a) if lanes and not (op == "select" and k == 0) else a.name for k, a in enumerate(args)
        ]
        source = args[0].dtype
        element = register_type(source)
        type_ = vector(width, element)
        is_float = source.kind == "f"

        def done(text: str) -> Value:
            return Value(f.pure(text, region), dtype, lanes, level)

        if op == "convert":
            return Value(convert(f, self.target, names[0], source, dtype, width, region), dtype, lanes, level)
        if op == "bitcast":
            return self._bitcast(args[0], dtype, width, region)
        if op == "select":
            condition = vector(width, "i1") if args[0].lanes else "i1"
            type_ = vector(width, register_type(dtype))
            return done(f"select {condition} {names[0]}, {type_} {names[1]}, {type_} {names[2]}")
        if op == "fma":
            return done(f.intrinsic("fma", type_, [(type_, n) for n in names]))
        if op == "ldexp":
            if self.target.arch == "x86_64" and self.target.vector_bytes == 64 and width * dtype.itemsize % 64 == 0:
                return done(scalef(self.f, type_, names, dtype, width))
            (value,) = self.emit(_ldexp(dtype), scope, saved=args.__getitem__)[-1:]
            return value
        if op == "copysign":
            return done(f.intrinsic("copysign", type_, [(type_, n) for n in names]))
        if op == "neg":
            return done(f"fneg {type_} {names[0]}" if is_float else f"sub {type_} zeroinitializer, {names[0]}")
        if op == "not_":
            return done(f"xor {type_} {names[0]}, {splat_literal(width, element, '-1' if element != 'i1' else 'true')}")
        if op in _FLOAT_UNARY:
            return done(f.intrinsic(_FLOAT_UNARY[op], type_, [(type_, names[0])]))
        if op in _FLOAT_COMPARE:
            sign = "" if op in ("eq", "ne") else "u" if source.kind in "ub" else "s"
            code = f"fcmp {_FLOAT_COMPARE[op]}" if is_float else f"icmp {sign}{op}"
            return done(f"{code} {type_} {names[0]}, {names[1]}")
        if op in ("idiv", "irem"):
            code = ("u" if source.kind == "u" else "s") + op[1:]
            return done(f"{code} {type_} {names[0]}, {names[1]}")
        table = _FLOAT_BINARY if is_float else _INT_BINARY
        return done(f"{table[op]} {type_} {names[0]}, {names[1]}")

    def _bitcast(self, v: Value, dtype: DType, width: int, region: Region | None) -> Value:
        old, new = vector(width, register_type(v.dtype)), vector(width, register_type(dtype))
        name = v.name
        if old == new:
            return v._replace(dtype=dtype)
        if v.dtype is bool_:
            name = self.f.pure(f"zext {old} {name} to {new}", region)
        elif dtype is bool_:
            name = self.f.pure(f"icmp ne {old} {name}, zeroinitializer", region)
        else:
            name = self.f.pure(f"bitcast {old} {name} to {new}", region)
        return Value(name, dtype, v.lanes, v.level)

    # --------------------------------------------------------------------------------------------------- memory
    def _guards(self, scope: Scope, access: Access) -> tuple[list[str], list[str], int]:
        """Conditions that are the same in every lane, those that are not, and the level of all."""
        f = self.f
        scalar: list[str] = []
        lanes: list[str] = []
        deepest = 0
        for guard in access.guards:
            name, level, stride = self.affine(scope, guard.position)
            deepest = max(deepest, level)
            region = self._region(scope, level)
            bound = self.dim(guard.bound)
            if stride == 0:
                scalar.append(f.pure(f"icmp ult i64 {name}, {bound}", region))
                if guard.step > 1:
                    rest = f.pure(f"urem i64 {name}, {guard.step}", region)
                    scalar.append(f.pure(f"icmp eq i64 {rest}, 0", region))
                continue
            type_ = f"<{scope.width} x i64>"
            position = self.ramp(scope, name, stride, level)
            limit = self.splat_scalar(bound, "i64", scope.width, f.top)
            lanes.append(f.pure(f"icmp ult {type_} {position}, {limit}", region))
            if guard.step > 1:
                rest = f.pure(f"urem {type_} {position}, splat (i64 {guard.step})", region)
                lanes.append(f.pure(f"icmp eq {type_} {rest}, zeroinitializer", region))
        return scalar, lanes, deepest

    def _all(self, type_: str, conditions: Sequence[str], region: Region | None) -> str | None:
        if not conditions:
            return None
        total = conditions[0]
        for other in conditions[1:]:
            total = self.f.pure(f"and {type_} {total}, {other}", region)
        return total

    def _address(self, scope: Scope, access: Access, indices: Sequence[Value]) -> tuple[str, int, DimLike, str | None]:
        """(position at lane 0 from everything that is uniform, level, vector stride, varying part or None)."""
        f = self.f
        name, level, stride = self.affine(scope, access.at)
        varying: str | None = None
        for value, step in zip(indices, access.index_strides, strict=True):
            level = max(level, value.level)
            region = self._region(scope, level)
            if not value.lanes:
                name = f.add(name, f.mul(value.name, self.dim(step), region), region)
                continue
            type_ = f"<{scope.width} x i64>"
            part = value.name
            if step != 1:
                part = f.pure(f"mul {type_} {part}, {self.splat_scalar(self.dim(step), 'i64', scope.width)}", region)
            varying = part if varying is None else f.pure(f"add {type_} {varying}, {part}", region)
        return name, level, stride, varying

    def prefetch(self, body: Body, scope: Scope, axis: int, ahead: int, near: int = 3) -> None:
        """Asks for the cache lines that the body's plain contiguous loads will read `ahead` steps of `axis` later.
        `near`: 3 for the first cache, 2 for the second."""
        f = self.f
        for instr in body:
            if instr.op != "load":
                continue
            access: Access = instr.attr  # type: ignore[assignment]
            if access.guards or access.index_strides or access.at.strides[axis] == 0:
                continue
            name, _, stride = self.affine(scope, access.at)
            if stride != 1:
                continue
            further = f.mul(self.dim(access.at.strides[axis]), str(ahead), f.top)
            first = f.add(name, further)
            for lane in range(0, max(scope.width, 1), max(_LINE // instr.dtype.itemsize, 1)):
                address = f.gep(memory_type(instr.dtype), self.pointers[access.buffer], f.add(first, str(lane)))
                f.emit(
                    f.intrinsic(
                        "prefetch", "void", [("ptr", address), ("i32", "0"), ("i32", str(near)), ("i32", "1")], "p0"
                    )
                )

    def load(self, access: Access, args: Sequence[Value], dtype: DType, scope: Scope) -> Value:
        """The element(s) of an access; `args`: its index values, then the fill value when it has guards."""
        f = self.f
        indices = args[: len(access.index_strides)]
        scalar, lane_guards, guard_level = self._guards(scope, access)
        name, level, stride, varying = self._address(scope, access, indices)
        level = max(level, guard_level)
        # a masked access exists only where the mask does: in the innermost region
        mask_needed = stride != 0 or varying is not None or bool(lane_guards)
        if mask_needed and scope.mask is not None:
            level = len(scope.regions) - 1
        region = self._region(scope, level)
        allowed = self._all("i1", scalar, region)
        mask_type = f"<{scope.width} x i1>"
        masks = ([scope.mask] if scope.mask is not None and mask_needed else []) + lane_guards
        mask = self._all(mask_type, masks, region)
        pointer = self.pointers[access.buffer]
        element, align = memory_type(dtype), dtype.itemsize
        if not mask_needed:
            address = f.gep(element, pointer, name, region)
            if allowed is not None:
                address = f.pure(f"select i1 {allowed}, ptr {address}, ptr {self.spare()}", region)
            loaded = f.pure(f"load {element}, ptr {address}, align {align}", region)
            lanes = False
        else:
            loaded = self._load_lanes(scope, region, element, align, pointer, name, stride, varying, mask, allowed)
            lanes = True
        type_ = vector(scope.width if lanes else 1, element)
        if dtype is bool_:
            loaded = f.pure(f"icmp ne {type_} {loaded}, zeroinitializer", region)
        value = Value(loaded, dtype, lanes, level)
        if access.guards:
            value = self._fill(value, args[-1], allowed, lane_guards, scope)
        return value

    def _fill(self, value: Value, fill: Value, allowed: str | None, lane_guards: list[str], scope: Scope) -> Value:
        f, level = self.f, max(value.level, fill.level)
        region = self._region(scope, level)
        lanes = value.lanes or fill.lanes
        type_ = vector(scope.width if lanes else 1, register_type(value.dtype))
        name = self.splat(scope, value) if lanes else value.name
        other = self.splat(scope, fill) if lanes else fill.name
        if lane_guards:
            condition = self._all(f"<{scope.width} x i1>", lane_guards, region)
            name = f.pure(f"select <{scope.width} x i1> {condition}, {type_} {name}, {type_} {other}", region)
        if allowed is not None:
            name = f.pure(f"select i1 {allowed}, {type_} {name}, {type_} {other}", region)
        return Value(name, value.dtype, lanes, level)

    def _load_lanes(
        self,
        scope: Scope,
        region: Region | None,
        element: str,
        align: int,
        pointer: str,
        name: str,
        stride: DimLike,
        varying: str | None,
        mask: str | None,
        allowed: str | None,
    ) -> str:
        f, width = self.f, scope.width
        type_, mask_type = vector(width, element), f"<{width} x i1>"
        if varying is None and stride in (1, -1):
            if stride == -1:
                name = f.add(name, str(1 - width), region)
                mask = self._reverse(mask_type, mask, width, region) if mask is not None else None
            address = f.gep(element, pointer, name, region)
            if allowed is not None:
                address = f.pure(f"select i1 {allowed}, ptr {address}, ptr {self.spare()}", region)
            if mask is None:
                loaded = f.pure(f"load {type_}, ptr {address}, align {align}", region)
            else:
                loaded = self._masked_load(type_, address, align, mask, mask_type, region)
            return self._reverse(type_, loaded, width, region) if stride == -1 else loaded
        if allowed is not None:
            every = self.splat_scalar(allowed, "i1", width, region)
            mask = every if mask is None else f.pure(f"and {mask_type} {mask}, {every}", region)
        addresses = self._addresses(scope, region, element, pointer, name, stride, varying)
        live = mask if mask is not None else "splat (i1 true)"
        pointers = f"<{width} x ptr>"
        return self._memory_call(
            "masked.gather", type_, f"{mangle(type_)}.v{width}p0",
            [(pointers, addresses)], align, (mask_type, live), [(type_, "zeroinitializer")], region,
        )  # fmt: skip

    def _masked_load(
        self, type_: str, address: str, align: int, mask: str, mask_type: str, region: Region | None
    ) -> str:
        return self._memory_call(
            "masked.load", type_, f"{mangle(type_)}.p0",
            [("ptr", address)], align, (mask_type, mask), [(type_, "zeroinitializer")], region,
        )  # fmt: skip

    def _memory_call(
        self,
        base: str,
        result: str,
        suffix: str,
        before: list[tuple[str, str]],
        align: int,
        mask: tuple[str, str],
        after: list[tuple[str, str]],
        region: Region | None,
    ) -> str:
        """A masked intrinsic in the form with an explicit alignment operand, which every LLVM from 15 on reads."""
        f = self.f
        text = f.intrinsic(base, result, [*before, ("i32", str(align)), mask, *after], suffix)
        if result == "void":
            f.emit(text, region)
            return ""
        return f.pure(text, region)

    def _addresses(
        self,
        scope: Scope,
        region: Region | None,
        element: str,
        pointer: str,
        name: str,
        stride: DimLike,
        varying: str | None,
    ) -> str:
        """<width x ptr>. A constant stride keeps 32-bit offsets, for which gathers take half the instructions."""
        f, width = self.f, scope.width
        if varying is None and isinstance(stride, int) and abs(stride) * width < 1 << 27:
            base = f.gep(element, pointer, name, region)
            offsets = f"<{', '.join(f'i32 {stride * lane}' for lane in range(width))}>"
            return f.pure(f"getelementptr {element}, ptr {base}, <{width} x i32> {offsets}", region)
        level = len(scope.regions) - 1
        if stride != 0:
            offsets = self.ramp(scope, name, stride, level)
            if varying is not None:
                offsets = f.pure(f"add <{width} x i64> {offsets}, {varying}", region)
            return f.pure(f"getelementptr {element}, ptr {pointer}, <{width} x i64> {offsets}", region)
        base = f.gep(element, pointer, name, region)
        return f.pure(f"getelementptr {element}, ptr {base}, <{width} x i64> {varying}", region)

    def _reverse(self, type_: str, name: str, width: int, region: Region | None) -> str:
        lanes = ", ".join(f"i32 {width - 1 - lane}" for lane in range(width))
        return self.f.pure(f"shufflevector {type_} {name}, {type_} poison, <{width} x i32> <{lanes}>", region)

    def store(self, store: Store, values: Sequence[Value], scope: Scope, instead: int | None = None) -> None:
        """Writes `values[store.value]` (or `values[instead]`) in the live lanes whose guards hold."""
        f, access, v = self.f, store.access, values[store.value if instead is None else instead]
        dtype = self.args[access.buffer].dtype
        element, align, width = memory_type(dtype), dtype.itemsize, scope.width
        scalar, lane_guards, _ = self._guards(scope, access)
        name, _, stride, varying = self._address(scope, access, [values[k] for k in store.indices])
        allowed = self._all("i1", scalar, None)
        pointer = self.pointers[access.buffer]
        if stride == 0 and varying is None and not lane_guards:
            one = v.name
            if v.lanes:
                one = f.op(f"extractelement {vector(width, register_type(dtype))} {one}, i64 0")
            if dtype is bool_:
                one = f.op(f"zext i1 {one} to i8")
            address = f.gep(element, pointer, name)
            if allowed is not None:
                address = f.op(f"select i1 {allowed}, ptr {address}, ptr {self.spare()}")
            f.emit(f"store {element} {one}, ptr {address}, align {align}")
            return
        type_, mask_type = vector(width, element), f"<{width} x i1>"
        whole = self.splat(scope, v)
        if dtype is bool_:
            whole = f.op(f"zext {mask_type} {whole} to {type_}")
        mask = self._all(mask_type, ([scope.mask] if scope.mask is not None else []) + lane_guards, None)
        if varying is None and stride in (1, -1):
            if stride == -1:
                name = f.add(name, str(1 - width))
                whole = self._reverse(type_, whole, width, None)
                mask = self._reverse(mask_type, mask, width, None) if mask is not None else None
            address = f.gep(element, pointer, name)
            if allowed is not None:
                address = f.op(f"select i1 {allowed}, ptr {address}, ptr {self.spare()}")
            if mask is None:
                past = ""
                if access.buffer in self.streams and width * align % _LEAST_STREAMED == 0:
                    align, past = min(width * align, self.target.vector_bytes), ", !nontemporal !{i32 1}"
                f.emit(f"store {type_} {whole}, ptr {address}, align {align}{past}")
                return
            self._memory_call(
                "masked.store", "void", f"{mangle(type_)}.p0",
                [(type_, whole), ("ptr", address)], align, (mask_type, mask), [], None,
            )  # fmt: skip
            return
        if allowed is not None:
            every = self.splat_scalar(allowed, "i1", width)
            mask = every if mask is None else f.op(f"and {mask_type} {mask}, {every}")
        addresses = self._addresses(scope, None, element, pointer, name, stride, varying)
        self._memory_call(
            "masked.scatter", "void", f"{mangle(type_)}.v{width}p0",
            [(type_, whole), (f"<{width} x ptr>", addresses)], align, (mask_type, mask or "splat (i1 true)"), [], None,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------------- checks
    def _check(self, attr: tuple[DimLike, int], v: Value, scope: Scope) -> Value:
        """0 <= index < bound, else the first bad index is reported and 0 used. The first report of a run stays."""
        f, (bound, site) = self.f, attr
        limit = self.dim(bound)
        level = v.level
        if not v.lanes:
            region = self._region(scope, level)
            bad = f.pure(f"icmp uge i64 {v.name}, {limit}", region)
            safe = Value(f.pure(f"select i1 {bad}, i64 0, i64 {v.name}", region), i64, False, level)
            self._report(bad, v.name, limit, site, region)
            return safe
        if scope.mask is not None:
            level = len(scope.regions) - 1
        width, region = scope.width, self._region(scope, level)
        type_, mask_type = f"<{width} x i64>", f"<{width} x i1>"
        bad = f.pure(f"icmp uge {type_} {v.name}, {self.splat_scalar(limit, 'i64', width, f.top)}", region)
        if scope.mask is not None:
            bad = f.pure(f"and {mask_type} {bad}, {scope.mask}", region)
        bits = f.pure(f"bitcast {mask_type} {bad} to i{width}", region)
        some = f.pure(f"icmp ne i{width} {bits}, 0", region)
        safe = Value(
            f.pure(f"select {mask_type} {bad}, {type_} zeroinitializer, {type_} {v.name}", region), i64, True, level
        )
        with f.when(some, region):
            # the bit count is at most the width, and 1 is set: the lane exists
            lane = f.op(f.intrinsic("cttz", f"i{width}", [(f"i{width}", bits), ("i1", "true")]))
            first = f.op(f"extractelement {type_} {v.name}, i{width} {lane}")
            self._write_report(first, limit, site)
        return safe

    def _report(self, bad: str, index: str, limit: str, site: int, region: Region | None) -> None:
        with self.f.when(bad, region):
            self._write_report(index, limit, site)

    def _write_report(self, index: str, limit: str, site: int) -> None:
        f = self.f
        pair = f.op(f"cmpxchg ptr {self.status}, i64 0, i64 {site + 1} monotonic monotonic")
        first = f.op(f"extractvalue {{ i64, i1 }} {pair}, 1")
        with f.when(first):
            for k, value in ((1, index), (2, limit)):
                f.emit(f"store i64 {value}, ptr {f.gep('i64', self.status, str(k))}, align 8")
