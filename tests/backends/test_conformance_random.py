"""Random programs with shapes that fill and overrun vectors and tiles: mixed dtypes, movements before and after reductions and
contractions, several results. DUO_EXAMPLES=1000 tries more of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import conformance as c
import numpy as np
import pytest

from duo_ir import ops
from duo_ir.core import Builder, Function, Value, function_of
from duo_ir.interpret import interpret
from duo_ir.kernels.evaluate import evaluate
from duo_ir.ops import broadcasting as nd
from duo_ir.pipeline import compile as compile_function
from duo_ir.pipeline import lower
from duo_ir.transforms.derivatives import vjp_function
from duo_ir.types import Dim, DimLike, Shape, TensorType, bf16, bool_, f16, f32, f64, i32, i64, product, u8
from duo_ir.types import evaluate as size_of

EXAMPLES = int(os.environ.get("DUO_EXAMPLES", "60"))
SIZES: list[DimLike] = [1, 1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 65, 100]
NAMED: list[DimLike] = [Dim.symbol("n"), Dim.symbol("n"), Dim.symbol("m"), 1, 3, 17]
BOUND = ({"n": 33, "m": 18}, {"n": 2, "m": 2}, {"n": 16, "m": 5}, {"n": 5, "m": 64})
MOST = 40_000  # elements of a value
FLOATS = (f32, f32, f32, f64, bf16, f16)
UNARY = ["neg", "abs", "exp", "tanh", "sqrt", "sigmoid", "floor", "sin", "erf", "log", "rsqrt"]


class Maker:
    """Draws one program; the pool holds the values made so far."""

    def __init__(self, seed: int, smooth: bool = False, sizes: list[DimLike] = SIZES, ranks: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.smooth, self.sizes, self.ranks = smooth, sizes, ranks
        self.builder = Builder("random")
        self.pool: list[Value] = []

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def pick(self, values: list) -> object:
        return values[self.number(0, len(values) - 1)]

    def size(self, shape: Shape) -> int:
        """Number of elements, for the first of the sizes that names stand for."""
        return size_of(product(shape), BOUND[0])

    def function(self, count: int) -> Function:
        with self.builder:
            for _ in range(self.number(1, 3)):
                shape = tuple(self.pick(self.sizes) for _ in range(self.number(0, self.ranks)))
                dtype = f32 if self.smooth else self.pick([*FLOATS, i32, i64, u8])
                self.pool.append(
                    self.builder.parameter(TensorType(dtype, shape if self.size(shape) <= MOST else shape[:2]))
                )
            while len(self.pool) < count:
                made = self.step()
                if made is not None and self.size(made.type.shape) <= MOST:
                    self.pool.append(made)
            results = [self.pool[-1], *[self.pick(self.pool) for _ in range(self.number(0, 3))]]
        return self.builder.build(results)

    def arrays(self, types: Sequence[TensorType], sizes: dict[str, int] | None = None) -> list[np.ndarray]:
        out = []
        for t in types:
            values = np.asarray(self.rng.normal(0, 2, t.static_shape(sizes)))
            array = np.asarray(np.abs(values) if t.dtype is u8 else values).astype(t.dtype.numpy)
            out.append(array if self.smooth or self.chance(0.6) else c.salted(array, self.rng, 0.1))
        return out

    def step(self) -> Value | None:
        recent = self.pool[-4:] if self.chance(0.7) else self.pool
        x = self.pick(recent)
        moves: list[Callable[[Value], Value | None]] = [
            self.unary, self.unary, self.binary, self.binary, self.binary, self.reduce, self.reduce, self.transpose, self.reshape,
            self.slice, self.flip, self.broadcast, self.pad, self.concat, self.matmul, self.matmul, self.gather, self.scatter,
            self.cumsum, self.softmax, self.cast, self.where, self.control,
        ]  # fmt: skip
        return self.pick(moves)(x)

    # ------------------------------------------------------------------------------------------------------ elementwise
    def unary(self, x: Value) -> Value | None:
        if not x.type.dtype.is_float:
            return ops.neg(x) if x.type.dtype is not bool_ else ops.not_(x)
        return getattr(ops, self.pick(UNARY[:4] if self.smooth else UNARY))(x)

    def partner(self, x: Value) -> Value | None:
        """Something that broadcasts with x."""
        found = []
        for y in self.pool:
            if y.type.dtype is bool_:
                continue
            pairs = zip(x.type.shape[::-1], y.type.shape[::-1])
            if all(a == b or a == 1 or b == 1 for a, b in pairs):
                found.append(y)
        return self.pick(found) if found else None

    def binary(self, x: Value) -> Value | None:
        y = self.partner(x)
        if y is None or x.type.dtype is bool_:
            return None
        names = ["add", "sub", "mul", "maximum"] + (
            [] if self.smooth else ["minimum", "floor_divide", "remainder", "lt", "eq", "div"]
        )
        return getattr(nd, self.pick(names))(x, y if self.chance(0.9) else self.scalar(x))

    def scalar(self, x: Value) -> Value | int:
        """A number beside x: one of its sizes where that has a name."""
        named = [d for d in x.type.shape if isinstance(d, Dim)]
        return nd.size_of(named[0], x.type.dtype) if named else 3

    def where(self, x: Value) -> Value | None:
        y = self.partner(x)
        if y is None or x.type.dtype is bool_:
            return None
        return nd.where(nd.ge(x, y), x, y * 2 if self.chance(0.5) else 1)

    def cast(self, x: Value) -> Value | None:
        if self.smooth:
            return None
        return nd.cast_to(x, self.pick([f32, f64, f16, bf16, i32, i64, u8]))

    # --------------------------------------------------------------------------------------------------------- movement
    def transpose(self, x: Value) -> Value | None:
        return nd.transpose(x, [int(a) for a in self.rng.permutation(x.type.rank)])

    def reshape(self, x: Value) -> Value | None:
        n, shape = product(x.type.shape), x.type.shape
        choices = [(n,), (1, n), (n, 1), (*shape, 1), shape[::-1]]
        if len(shape) >= 2:
            choices += [(shape[0], product(shape[1:])), (product(shape[:-1]), shape[-1])]
        if isinstance(n, int):
            choices += [(d, n // d) for d in (2, 3, 4) if n and n % d == 0]
        return nd.reshape(x, self.pick(choices))

    def slice(self, x: Value) -> Value | None:
        start: list[DimLike] = []
        stop: list[DimLike] = []
        step: list[int] = []
        for d in x.type.shape:
            if isinstance(d, int):
                first = self.number(0, d // 2)
                last, by = self.number(first + (d > first), d), self.pick([1, 1, 2, 3])
            else:
                first, last, by = self.number(0, 1), d - self.number(0, 1), 1
            start.append(first)
            stop.append(last)
            step.append(by)
        return ops.slice(x, start=tuple(start), stop=tuple(stop), step=tuple(step))

    def flip(self, x: Value) -> Value | None:
        return ops.flip(x, axes=tuple(a for a in range(x.type.rank) if self.chance(0.5)))

    def broadcast(self, x: Value) -> Value | None:
        shape = tuple(self.pick([2, 7, 16]) if d == 1 and self.chance(0.6) else d for d in x.type.shape)
        return nd.broadcast_to(x, (self.number(1, 3), *shape) if x.type.rank < 3 and self.chance(0.5) else shape)

    def pad(self, x: Value) -> Value | None:
        if x.type.dtype is bool_:
            return None
        low, high, interior = (tuple(self.number(0, most) for _ in x.type.shape) for most in (2, 3, 1))
        return ops.pad(x, nd.constant_of(1, x.type.dtype), low=low, high=high, interior=interior)

    def concat(self, x: Value) -> Value | None:
        if x.type.rank == 0:
            return None
        axis = self.number(0, x.type.rank - 1)
        rest = [y for y in self.pool if y.type.dtype is x.type.dtype and y.type.rank == x.type.rank
                and all(a == axis or p == q for a, (p, q) in enumerate(zip(x.type.shape, y.type.shape)))]  # fmt: skip
        return ops.concat(x, *[self.pick(rest) for _ in range(self.number(1, 2))], axis=axis)

    # ------------------------------------------------------------------------------------- reductions, contractions, places
    def axes(self, x: Value) -> tuple[int, ...]:
        return tuple(a for a in range(x.type.rank) if self.chance(0.5))

    def reduce(self, x: Value) -> Value | None:
        axes = self.axes(x)
        if x.type.dtype is bool_:
            return ops.any(x, axes=axes) if self.chance(0.5) else ops.all(x, axes=axes)
        empty = any(x.type.shape[a] == 0 for a in axes)
        if not self.smooth and not empty and len(axes) == 1 and self.chance(0.2):
            return ops.argmax(x, axes=axes) if self.chance(0.5) else ops.argmin(x, axes=axes)
        names = ["sum", "sum", "sum"] if empty else ["sum", "sum", "sum", "max", "min", "prod"]
        return getattr(nd, self.pick(names))(x, axes, self.chance(0.5))

    def softmax(self, x: Value) -> Value | None:
        if not x.type.dtype.is_float or x.type.rank == 0 or 0 in x.type.shape:
            return None
        axis = self.number(0, x.type.rank - 1)
        e = ops.exp(x - nd.max(x, (axis,), True))
        return e / nd.sum(e, (axis,), True)

    def matmul(self, x: Value) -> Value | None:
        if x.type.dtype is bool_ or x.type.rank < 1:
            return None
        fits = [y for y in self.pool if y.type.rank and y.type.dtype is not bool_
                and y.type.shape[-2 if y.type.rank > 1 else -1] == x.type.shape[-1] and (y.type.rank < 3 or x.type.rank < 3)]  # fmt: skip
        y = self.pick(fits) if fits else (nd.swap_last(x) if x.type.rank > 1 else x)
        if self.size((*x.type.shape, y.type.shape[-1])) > 1_000_000 or x.type.rank + y.type.rank > 5:
            return None
        return nd.matmul(x, y)

    def index(self, n: int, bound: DimLike) -> Value:
        return nd.remainder(nd.iota((n,), 0) * self.number(1, 7) + self.number(0, 50), nd.size_of(bound, i64))

    def gather(self, x: Value) -> Value | None:
        if x.type.rank == 0 or 0 in x.type.shape:
            return None
        axis = self.number(0, x.type.rank - 1)
        return ops.gather(x, self.index(self.pick([1, 4, 20]), x.type.shape[axis]), axes=(axis,))

    def scatter(self, x: Value) -> Value | None:
        if x.type.rank == 0 or 0 in x.type.shape or x.type.dtype is bool_:
            return None
        axis, n = self.number(0, x.type.rank - 1), self.pick([1, 4, 20])
        rest = tuple(d for a, d in enumerate(x.type.shape) if a != axis)
        updates = nd.cast_to(nd.iota((n, *rest), 0) + 1, x.type.dtype)
        return ops.scatter(x, updates, self.index(n, x.type.shape[axis]), axes=(axis,), mode=self.pick(["add", "set"]))

    def cumsum(self, x: Value) -> Value | None:
        if x.type.rank == 0 or x.type.dtype is bool_:
            return None
        return ops.cumsum(x, axis=self.number(0, x.type.rank - 1))

    def control(self, x: Value) -> Value | None:
        """A branch on data, or a loop of one or two rounds."""
        if x.type.dtype is bool_:
            return None
        flag = nd.gt(nd.sum(nd.cast_to(self.pick(self.pool), f32)), 0.0)
        if self.smooth or self.chance(0.5):
            then = function_of(lambda a: (a * a, a + 1), x.type)
            orelse = function_of(lambda a: (a, a - 1), x.type)
            return self.pick(ops.cond(flag, x, then=then, orelse=orelse))
        state = (TensorType(i64), x.type, x.type)
        test = function_of(lambda i, a, b: nd.lt(i, 2), *state)
        body = function_of(lambda i, a, b: (i + 1, *((b, a + b) if self.chance(0.5) else (a * 2, b))), *state)
        start = nd.cast_to(flag, i64)
        return self.pick(ops.while_(start, x, x, test=test, body=body, carried=3)[1:])


def check_kernels(function: Function, arrays: list[np.ndarray]) -> None:
    """The kernels read by NumPy give the interpreter's bits too: tells a fault of fusion from one of the backend."""
    want = interpret(function, *arrays)
    for fusion in (True, False):
        for got, expected in zip(evaluate(lower(function, fusion), *arrays), want, strict=True):
            assert c.same(got, expected), f"fusion {fusion}: {c.difference(got, expected)}\n{function}"


@pytest.mark.parametrize("seed", range(EXAMPLES))
def test_programs(seed: int) -> None:
    maker = Maker(seed)
    function = maker.function(12)
    arrays = maker.arrays(function.param_types)
    c.check(function, arrays)
    check_kernels(function, arrays)


@pytest.mark.parametrize("seed", range(EXAMPLES // 2))
def test_gradients(seed: int) -> None:
    maker = Maker(seed, smooth=True)
    backward = vjp_function(maker.function(9))
    arrays = maker.arrays(backward.param_types)
    c.check(backward, arrays)
    check_kernels(backward, arrays)


@pytest.mark.parametrize("seed", range(EXAMPLES // 2))
def test_named_sizes(seed: int) -> None:
    """Compiled once, run at several sizes."""
    maker = Maker(seed, sizes=NAMED, ranks=2)
    function = maker.function(9)
    names = function.dims
    runs = [maker.arrays(function.param_types, sizes) for sizes in (BOUND if names else BOUND[:1])]
    c.check(function, *runs)


@pytest.mark.parametrize("seed", range(EXAMPLES // 2))
def test_python_numbers(seed: int) -> None:
    """0-d parameters given as Python numbers: the bits of 0-d arrays."""
    maker = Maker(seed, sizes=[1, 3, 33], ranks=2)
    with maker.builder:
        dtypes = [f32, f64, f16, bf16, i32, i64, u8, bool_]
        maker.pool += [maker.builder.parameter(TensorType(d)) for d in dtypes if maker.chance(0.5)]
    scalars = range(len(maker.pool))
    function = maker.function(10)
    arrays = maker.arrays(function.param_types)
    want = interpret(function, *arrays)
    machine = c.backend()
    numbers = [a.astype(np.float64).item() if k in scalars and a.dtype.kind not in "iub" else a.item() if k in scalars else a for k, a in enumerate(arrays)]  # fmt: skip
    for fusion in (True, False):
        bound = compile_function(function, machine, fusion=fusion, scalars=scalars).bind()
        for donated in ((), range(len(arrays))):
            for got, expected in zip(c.run_once(machine, function, bound, numbers, donated), want):
                assert c.same(got, expected), f"fusion {fusion}: {c.difference(got, expected)}\n{function}"
