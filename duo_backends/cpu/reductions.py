"""Reductions at any vector width: what one step, one merge and the last halving of lanes emit.

Order (numerics contract, rule 3): element i goes to lane i mod 16 of chunk i div 1024; lanes accumulate in ascending i;
chunks combine per lane by the adjacent tree; then lanes by halving. sum, prod and dot of floats are `ordered`; the other
kinds give the same bits in any order, so they need neither chunks nor lanes. The tree is run as a binary counter: a
partial of level j stands for 2^j chunks, equal levels merge at once, and what is left merges from the lowest level up,
which is the adjacent tree with an odd one moving up unchanged.

IEEE maximum and minimum take five or six instructions on x86. `BitReducer` takes three, of one cycle each: of the bits of all elements it keeps
the largest and the smallest, read as unsigned numbers, and the largest, read as signed ones, which tell the rest at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from duo_backends.cpu.llvm import Function, literal, memory_type, register_type, splat_literal, vector
from duo_ir.kernels.kernel import Reduce
from duo_ir.types import DType, bool_, f32, f64, i32, i64

LANES = 16
CHUNK = 1024
_NO_POSITION = str((1 << 63) - 1)  # of a lane without elements: loses against every real one


def _lowest(d: DType) -> str:
    if d.kind == "f":
        return literal(float("-inf"), d)
    return "false" if d.kind == "b" else "0" if d.kind == "u" else str(-(1 << (d.bits - 1)))


def _highest(d: DType) -> str:
    if d.kind == "f":
        return literal(float("inf"), d)
    if d.kind == "b":
        return "true"
    return "-1" if d.kind == "u" else str((1 << (d.bits - 1)) - 1)


class Reducer:
    """One `Reduce`. Its state is one register per part: the accumulator and, for argmax and argmin, the position.

    `value_dtype` is the dtype of what is reduced; `parts` the dtypes of the state."""

    def __init__(self, reduce: Reduce, value_dtype: DType) -> None:
        self.kind, self.args, self.result_dtype, self.value_dtype = reduce.kind, reduce.args, reduce.dtype, value_dtype
        self.is_arg = self.kind in ("argmax", "argmin")
        self.ordered = self.kind in ("sum", "prod", "dot") and value_dtype.kind == "f"
        self.parts: tuple[DType, ...] = (value_dtype, i64) if self.is_arg else (value_dtype,)

    def types(self, width: int) -> list[str]:
        return [vector(width, register_type(d)) for d in self.parts]

    def identity(self, width: int) -> list[str]:
        """The state before any element."""
        d = self.value_dtype
        if self.kind in ("sum", "dot"):
            start = literal(0, d)
        elif self.kind == "prod":
            start = literal(1, d)
        elif self.kind in ("any", "all"):
            start = "false" if self.kind == "any" else "true"
        else:
            start = _lowest(d) if self.kind in ("max", "argmax") else _highest(d)
        state = [splat_literal(width, register_type(d), start)]
        if self.is_arg:
            state.append(splat_literal(width, "i64", _NO_POSITION))
        return state

    def step(
        self, f: Function, width: int, state: Sequence[str], values: Sequence[str], position: str, live: str | None
    ) -> list[str]:
        """The state after one more element per lane; `live`: <width x i1> of lanes that have one."""
        element = register_type(self.value_dtype)
        type_ = vector(width, element)
        if self.is_arg:
            new = self._step_arg(f, width, state, values[0], position)
        elif self.kind == "dot" and self.value_dtype.kind == "f":
            operands = [(type_, values[0]), (type_, values[1]), (type_, state[0])]
            new = [f.op(f.intrinsic("fma", type_, operands))]
        elif self.kind == "dot":
            product = f.op(f"mul {type_} {values[0]}, {values[1]}")
            new = [f.op(f"add {type_} {state[0]}, {product}")]
        else:
            new = self.merge(f, width, state, values)
        if live is None:
            return new
        condition = vector(width, "i1")
        return [
            f.op(f"select {condition} {live}, {t} {n}, {t} {o}")
            for t, n, o in zip(self.types(width), new, state, strict=True)
        ]

    def merge(self, f: Function, width: int, x: Sequence[str], y: Sequence[str]) -> list[str]:
        """The state of x's elements and y's."""
        d = self.value_dtype
        type_ = vector(width, register_type(d))
        if self.is_arg:
            return self._merge_arg(f, width, x, y)
        if self.kind in ("sum", "dot"):
            return [f.op(f"{'fadd' if d.kind == 'f' else 'add'} {type_} {x[0]}, {y[0]}")]
        if self.kind == "prod":
            return [f.op(f"{'fmul' if d.kind == 'f' else 'mul'} {type_} {x[0]}, {y[0]}")]
        if self.kind in ("any", "all") or d is bool_:
            return [f.op(f"{'or' if self.kind in ('any', 'max') else 'and'} {type_} {x[0]}, {y[0]}")]
        if d.kind == "f":
            name = "maximum" if self.kind == "max" else "minimum"
        else:
            name = ("u" if d.kind == "u" else "s") + self.kind
        return [f.op(f.intrinsic(name, type_, [(type_, x[0]), (type_, y[0])]))]

    def _step_arg(self, f: Function, width: int, state: Sequence[str], value: str, position: str) -> list[str]:
        """Positions only grow, so that ties keep the state's; a state that no element beat stays without a position."""
        type_, condition = vector(width, register_type(self.value_dtype)), vector(width, "i1")
        largest = self.kind == "argmax"
        if self.value_dtype.kind == "f":
            beats = f.op(f"fcmp {'ugt' if largest else 'ult'} {type_} {value}, {state[0]}")
            number = f.op(f"fcmp ord {type_} {state[0]}, {state[0]}")
            take = f.op(f"and {condition} {beats}, {number}")
        else:
            sign = "s" if self.value_dtype.kind == "i" else "u"
            take = f.op(f"icmp {sign}{'gt' if largest else 'lt'} {type_} {value}, {state[0]}")
        return [
            f.op(f"select {condition} {take}, {t} {n}, {t} {o}")
            for t, n, o in zip(self.types(width), (value, position), state, strict=True)
        ]

    def _merge_arg(self, f: Function, width: int, x: Sequence[str], y: Sequence[str]) -> list[str]:
        """NaN before numbers, then the better value, then the lower position."""
        d = self.value_dtype
        type_, condition, where = vector(width, register_type(d)), vector(width, "i1"), vector(width, "i64")
        largest = self.kind == "argmax"
        earlier = f.op(f"icmp slt {where} {y[1]}, {x[1]}")
        if d.kind == "f":
            better = f.op(f"fcmp {'ogt' if largest else 'olt'} {type_} {y[0]}, {x[0]}")
            equal = f.op(f"fcmp oeq {type_} {y[0]}, {x[0]}")
            x_nan, y_nan = (f.op(f"fcmp uno {type_} {v[0]}, {v[0]}") for v in (x, y))
            only_y = f.op(f"icmp ugt {condition} {y_nan}, {x_nan}")
            better = f.op(f"or {condition} {better}, {only_y}")
            both = f.op(f"and {condition} {x_nan}, {y_nan}")
            equal = f.op(f"or {condition} {equal}, {both}")
        else:
            sign = "s" if d.kind == "i" else "u"
            better = f.op(f"icmp {sign}{'gt' if largest else 'lt'} {type_} {y[0]}, {x[0]}")
            equal = f.op(f"icmp eq {type_} {y[0]}, {x[0]}")
        tie = f.op(f"and {condition} {equal}, {earlier}")
        take = f.op(f"or {condition} {better}, {tie}")
        return [
            f.op(f"select {condition} {take}, {t} {n}, {t} {o}")
            for t, n, o in zip(self.types(width), y, x, strict=True)
        ]

    def halve(self, f: Function, state: Sequence[str]) -> list[str]:
        """16 lanes to a scalar state: l + (l + 8), then 4, 2, 1."""
        width = LANES
        current = list(state)
        while width > 1:
            half = width // 2
            low, high = (
                [self._part(f, t, s, width, start, half) for t, s in zip(self.types(width), current, strict=True)]
                for start in (0, half)
            )
            current = self.merge(f, half, low, high)
            width = half
        return current

    @staticmethod
    def _part(f: Function, type_: str, name: str, width: int, start: int, count: int) -> str:
        if count == 1:
            return f.op(f"extractelement {type_} {name}, i64 {start}")
        lanes = ", ".join(f"i32 {start + k}" for k in range(count))
        return f.op(f"shufflevector {type_} {name}, {type_} poison, <{count} x i32> <{lanes}>")

    def result(self, f: Function, state: Sequence[str], width: int) -> str:
        """The reduction's value. Where no element beat the start, all are equal to it and the first is meant."""
        if not self.is_arg:
            return state[0]
        type_ = vector(width, "i64")
        none = f.op(f"icmp eq {type_} {state[1]}, {splat_literal(width, 'i64', _NO_POSITION)}")
        zero = splat_literal(width, "i64", "0")
        return f.op(f"select {vector(width, 'i1')} {none}, {type_} {zero}, {type_} {state[1]}")


class BitReducer(Reducer):
    """max or min of f32 or f64 elements by their bits: a non-negative float is larger the larger its bits are, as a signed number and as an
    unsigned one; a negative float is smaller the larger they are, and as an unsigned number larger than all non-negative ones.

    The state is the largest signed, the largest unsigned and the smallest unsigned number. The maximum is the first if that has no
    sign, else (all are negative) the third; the minimum is the second if that has a sign, else the third; and there was a NaN if
    the first exceeds +inf or the second -inf."""

    rules = "smax", "umax", "umin"

    def __init__(self, reduce: Reduce, value_dtype: DType) -> None:
        super().__init__(reduce, value_dtype)
        self.bits = i32 if value_dtype is f32 else i64
        self.parts = (self.bits,) * 3
        fraction = 23 if value_dtype is f32 else 52
        top = 1 << (self.bits.bits - 1)
        self.lowest, self.highest = -top, top - 1
        self.infinity = self.highest >> fraction << fraction

    @staticmethod
    def serves(reduce: Reduce, value_dtype: DType) -> bool:
        return reduce.kind in ("max", "min") and value_dtype in (f32, f64)

    def identity(self, width: int) -> list[str]:
        return [splat_literal(width, self._type(1), str(x)) for x in (self.lowest, 0, -1)]

    def _type(self, width: int) -> str:
        return vector(width, register_type(self.bits))

    def step(
        self, f: Function, width: int, state: Sequence[str], values: Sequence[str], position: str, live: str | None
    ) -> list[str]:
        type_ = self._type(width)
        bits = f.op(f"bitcast {vector(width, register_type(self.value_dtype))} {values[0]} to {type_}")
        new = self.merge(f, width, state, [bits] * 3)
        if live is None:
            return new
        return [f.op(f"select {vector(width, 'i1')} {live}, {type_} {n}, {type_} {o}") for n, o in zip(new, state)]

    def merge(self, f: Function, width: int, x: Sequence[str], y: Sequence[str]) -> list[str]:
        type_ = self._type(width)
        return [
            f.op(f.intrinsic(rule, type_, [(type_, a), (type_, b)]))
            for rule, a, b in zip(self.rules, x, y, strict=True)
        ]

    def halve(self, f: Function, state: Sequence[str]) -> list[str]:
        """Of each lane's state one signed number that grows with its float (NaN beyond all, towards the result), then by halving."""
        type_, condition = self._type(LANES), vector(LANES, "i1")
        largest = self.kind == "max"

        def splat(x: int) -> str:
            return splat_literal(LANES, self._type(1), str(x))

        signed, unsigned, smallest = state
        positive = f.op(f"icmp sgt {type_} {signed}, {splat(self.infinity)}")
        negative = f.op(f"icmp ugt {type_} {unsigned}, {splat(self.infinity + self.lowest)}")
        nan = f.op(f"or {condition} {positive}, {negative}")
        if largest:
            found, some = signed, f.op(f"icmp sge {type_} {signed}, {splat(0)}")
        else:
            found, some = unsigned, f.op(f"icmp slt {type_} {unsigned}, {splat(0)}")
            smallest = f.op(f"and {type_} {smallest}, {splat(self.highest)}")  # of a lane without elements: loses
        bits = f.op(f"select {condition} {some}, {type_} {found}, {type_} {smallest}")
        key = self._turned(f, LANES, bits)
        beyond = splat(self.highest if largest else self.lowest)  # turned back, they are NaNs
        key = f.op(f"select {condition} {nan}, {type_} {beyond}, {type_} {key}")
        width = LANES
        while width > 1:
            half = width // 2
            low, high = (self._part(f, self._type(width), key, width, start, half) for start in (0, half))
            name = "smax" if largest else "smin"
            key = f.op(f.intrinsic(name, self._type(half), [(self._type(half), low), (self._type(half), high)]))
            width = half
        bits = self._turned(f, 1, key)
        return [f.op(f"bitcast {self._type(1)} {bits} to {register_type(self.value_dtype)}")]

    def _turned(self, f: Function, width: int, bits: str) -> str:
        """A float's bits as a signed number in the order of floats, or the other way round."""
        type_, one = self._type(width), self._type(1)
        sign = f.op(f"ashr {type_} {bits}, {splat_literal(width, one, str(self.bits.bits - 1))}")
        flip = f.op(f"and {type_} {sign}, {splat_literal(width, one, str(self.highest))}")
        return f.op(f"xor {type_} {bits}, {flip}")


# ------------------------------------------------------------------------------------------------ states in memory
def state_bytes(reducers: Sequence[Reducer], width: int) -> int:
    """Bytes of all their states at a vector width, bools as bytes."""
    return sum(d.itemsize * width for r in reducers for d in r.parts)


def _parts(reducers: Sequence[Reducer]) -> list[DType]:
    return [d for r in reducers for d in r.parts]


def load_state(f: Function, reducers: Sequence[Reducer], width: int, address: str) -> list[str]:
    """States laid one behind another from `address`, flat."""
    names, at = [], 0
    for d in _parts(reducers):
        type_ = vector(width, memory_type(d))
        pointer = f.gep("i8", address, str(at))
        name = f.op(f"load {type_}, ptr {pointer}, align {d.itemsize}")
        names.append(f.op(f"icmp ne {type_} {name}, zeroinitializer") if d is bool_ else name)
        at += d.itemsize * width
    return names


def store_state(f: Function, reducers: Sequence[Reducer], width: int, address: str, state: Sequence[str]) -> None:
    at = 0
    for d, name in zip(_parts(reducers), state, strict=True):
        if d is bool_:
            name = f.op(f"zext {vector(width, 'i1')} {name} to {vector(width, 'i8')}")
        pointer = f.gep("i8", address, str(at))
        f.emit(f"store {vector(width, memory_type(d))} {name}, ptr {pointer}, align {d.itemsize}")
        at += d.itemsize * width


def split_states(reducers: Sequence[Reducer], flat: Sequence[str]) -> list[list[str]]:
    out, at = [], 0
    for r in reducers:
        out.append(list(flat[at : at + len(r.parts)]))
        at += len(r.parts)
    return out


def merge_all(f: Function, reducers: Sequence[Reducer], width: int, x: Sequence[str], y: Sequence[str]) -> list[str]:
    pairs = zip(reducers, split_states(reducers, x), split_states(reducers, y), strict=True)
    return [name for r, a, b in pairs for name in r.merge(f, width, a, b)]


def identities(reducers: Sequence[Reducer], width: int) -> list[str]:
    return [name for r in reducers for name in r.identity(width)]


def all_types(reducers: Sequence[Reducer], width: int) -> list[str]:
    return [t for r in reducers for t in r.types(width)]


def typed(reducers: Sequence[Reducer], width: int, state: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(all_types(reducers, width), state, strict=True))


# ---------------------------------------------------------------------------------------- the tree of chunk partials
def push(
    f: Function,
    reducers: Sequence[Reducer],
    width: int,
    stack: str,
    state: Sequence[str],
    finished: str,
    layer: int = 0,
) -> None:
    """Adds the state of chunk number `finished` (an i64 counting from 0): merges once per trailing one bit of it.
    `layer`: bytes from one level of the stack to the next, when others share it."""
    size = layer or state_bytes(reducers, width)
    inverse = f.op(f"xor i64 {finished}, -1")
    ones = f.op(f.intrinsic("cttz", "i64", [("i64", inverse), ("i1", "false")]))
    with f.loop("0", ones, carried=typed(reducers, width, state)) as levels:
        slot = f.gep("i8", stack, f.mul(levels.index, str(size)))
        levels.next = merge_all(f, reducers, width, load_state(f, reducers, width, slot), levels.values)
    slot = f.gep("i8", stack, f.mul(ones, str(size)))
    store_state(f, reducers, width, slot, levels.results)


def drain(f: Function, reducers: Sequence[Reducer], width: int, stack: str, finished: str, layer: int = 0) -> list[str]:
    """The state of all `finished` >= 1 chunks pushed."""
    size = layer or state_bytes(reducers, width)
    lowest = f.op(f.intrinsic("cttz", "i64", [("i64", finished), ("i1", "false")]))
    first = load_state(f, reducers, width, f.gep("i8", stack, f.mul(lowest, str(size))))
    rest = f.op(f"lshr i64 {finished}, {lowest}")
    rest = f.op(f"lshr i64 {rest}, 1")
    carried = [("i64", rest), ("i64", lowest), *typed(reducers, width, first)]
    remaining = f.op(f.intrinsic("ctpop", "i64", [("i64", rest)]))
    with f.loop("0", remaining, carried=carried) as levels:
        bits, level, *state = levels.values
        gap = f.op(f.intrinsic("cttz", "i64", [("i64", bits), ("i1", "false")]))
        above = f.op(f"add i64 {level}, {gap}")
        above = f.op(f"add i64 {above}, 1")
        slot = f.gep("i8", stack, f.mul(above, str(size)))
        merged = merge_all(f, reducers, width, load_state(f, reducers, width, slot), state)
        left = f.op(f"lshr i64 {bits}, {gap}")
        levels.next = [f.op(f"lshr i64 {left}, 1"), above, *merged]
    return levels.results[2:]


def tree_levels(chunks: int) -> int:
    """Levels the counter needs for that many chunks."""
    return max(chunks, 1).bit_length()
