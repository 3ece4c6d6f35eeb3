"""A path of the trie as a Function: the steps' bodies are run on SSA values, macros build themselves.

This is where a recorded program becomes IR. A Construction also answers what only the ops can tell: which leaves a gradient reaches,
and whether one would read a value that has been overwritten or freed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

from duo.dispatch import distinct
from duo.eager.infer import scalar_types
from duo.eager.trie import Info, Macro, Node
from duo_ir.core import Builder, Function, Loc, Op, Value
from duo_ir.errors import GradientError
from duo_ir.opdef import Movement, Reshape
from duo_ir.ops import stop_gradient
from duo_ir.transforms.autodiff import reverse
from duo_ir.types import DType, TensorType


class Construction:
    """The Function of the path to `node`, under construction.

    values[n] is value number n (None for the root and notes). inputs lists where the parameters come from, in order:
    (entry number, None) for a leaf, (entry number, k) for the k-th Python number of that entry. places: where entries were recorded,
    of those that were not recorded where the path was first.
    """

    def __init__(self, node: Node, places: Mapping[int, Loc] | None = None) -> None:
        self.places = places or {}
        self.builder = Builder("eager")
        self.values: list[Value | None] = [None]
        self.infos: list[Info] = [node.infos[0]]
        self.leaf_like: list[bool] = [False]  # leaves and marks: gradients end there
        self.ends: list[int] = [0]  # number of ops after entry n
        self.inputs: list[tuple[int, int | None]] = []
        self.scalar_dtypes: list[DType] = []
        self.overwritten: dict[int, int] = {}  # number of the value -> of what replaced it, or -1
        self.freed: set[Op] = set()
        self._numbers: dict[Value | None, list[int]] = {}
        self._numbered = 0
        with self.builder:
            for step in node.path():
                self._step(step)

    def _step(self, node: Node) -> None:
        self.builder.loc = self.places.get(node.first, node.loc)
        body = node.key[0]
        if isinstance(body, Macro):
            made = body.build(self, node)
        else:
            made = self._apply(node)
        self.values.extend(made)
        self.infos.extend(node.infos)
        self.leaf_like.extend([isinstance(body, Macro) and body.name in ("leaf", "mark", "optimize")] * len(made))
        self.ends.extend([len(self.builder.ops)] * len(made))

    def _apply(self, node: Node) -> tuple[Value, ...]:
        refs = node.refs
        operand_types = tuple([self.infos[r].type if r.__class__ is int else r for r in refs])
        dtypes = iter(scalar_types(operand_types))
        operands: list[Value] = []
        k = 0
        for r in refs:
            if r.__class__ is int:
                operands.append(self.value(r))
            else:
                operands.append(self.scalar(k, next(dtypes)))
                k += 1
        out = node.key[0](*operands, *node.attrs)
        results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        if node.grad:
            return distinct(results, operands)
        needs = any(r.__class__ is int and self.infos[r].requires_grad for r in refs)
        return tuple(stop_gradient(v) if needs and v.type.dtype.is_float else v for v in results)

    def value(self, number: int) -> Value:
        """The SSA value of that number."""
        value = self.values[number]
        assert value is not None
        return value

    def at(self, point: int | tuple[int, int]) -> Value:
        """The SSA value of that number, or result r of op i for (i, r)."""
        return self.value(point) if isinstance(point, int) else self.builder.ops[point[0]].results[point[1]]

    def number_at(self, position: tuple[int, int]) -> int | None:
        """The number of the value that is result r of op i, if it has one."""
        value = self.at(position)
        return next((n for n, v in enumerate(self.values) if v is value), None)

    def numbers(self) -> Mapping[Value | None, list[int]]:
        """The numbers that each SSA value has, of those that entries have."""
        for n in range(self._numbered, len(self.values)):
            self._numbers.setdefault(self.values[n], []).append(n)
        self._numbered = len(self.values)
        return self._numbers

    def entry_of(self, op: int) -> int:
        """The number of the entry that emitted that op."""
        return next(n for n, end in enumerate(self.ends) if op < end)

    def leaf(self, type: TensorType) -> Value:
        self.inputs.append((len(self.values), None))
        return self.builder.parameter(type)

    def scalar(self, k: int, dtype: DType) -> Value:
        """The k-th Python number of the entry that is being built."""
        self.inputs.append((len(self.values), k))
        self.scalar_dtypes.append(dtype)
        return self.builder.parameter(TensorType(dtype, ()))

    def stop(self, value: Value) -> Value:
        """`value` without history, where it could have one."""
        return stop_gradient(value) if value.type.dtype.is_float else value

    def cut(self, number: int) -> Value:
        """Value `number` as a leaf of its own."""
        return stop_gradient(self.value(number))

    def stale(self) -> dict[Value, frozenset[Op]]:
        """The values that in-place ops have replaced wherever they were, each with the ops that may go on reading it: the in-place op
        itself computed with the old value."""
        numbers = self.numbers()
        out: dict[Value, frozenset[Op]] = {}
        for n in self.overwritten:
            value = self.value(n)
            if all(other in self.overwritten for other in numbers[value]):
                out[value] = frozenset(op for other in numbers[value] for op in self._ops_of(self.overwritten[other]))
        return out

    def moved(self, value: Value) -> Value:
        """The value of an entry that `value`, made inside a later one, is a transpose, slice or the like of; else `value`."""
        held, found = self.numbers(), value
        while found not in held and found.op is not None and isinstance(found.op.definition.kind, Movement | Reshape):
            found = found.op.operands[0]
        return found if found in held else value

    def _ops_of(self, number: int) -> list[Op]:
        return self.builder.ops[self.ends[number - 1] : self.ends[number]] if number > 0 else []

    def free(self) -> set[Value]:
        """The inner values of entries that were computed from Python numbers and constants alone: cheap to compute again, so nothing to
        save. What a tensor held is not among them, since where a flush came must make no difference to what is saved."""
        held = set(self.values)
        out = {p for p, (_, k) in zip(self.builder.params, self.inputs) if k is not None} - held
        for op in self.builder.ops:
            if out.issuperset(op.operands) and held.isdisjoint(op.results):
                out.update(op.results)
        return out

    def function(self, results: Iterable[int], name: str = "eager") -> Function:
        """The Function with the values of these numbers as results."""
        return self.builder.build([self.value(n) for n in results], name)

    # ------------------------------------------------------------------------------------------------ gradients
    def backward(
        self, low: int, start: dict[Value, Value], wanted: Iterable[int], watch: Watch
    ) -> tuple[tuple[int, ...], tuple[Value, ...]]:
        """Reverse pass over the entries after `low`: (numbers that a gradient reaches, their gradients).

        start: value -> cotangent. The gradient stops at leaves and marks and at values of entries up to `low`; those,
        and the values `wanted`, are the candidates, in order of number.
        """
        wanted = set(wanted)
        numbers: list[int] = []
        wrt: list[Value] = []
        for n, (value, info) in enumerate(zip(self.values, self.infos)):
            if value is None or not info.requires_grad:
                continue
            if self.leaf_like[n] or n <= low or n in wanted:
                numbers.append(n)
                wrt.append(value)
        ops = tuple(self.builder.ops[self.ends[low] :])
        reached = [(n, g) for n, g in zip(numbers, reverse(ops, start, wrt, watch.visit)) if g is not None]
        return tuple(n for n, _ in reached), tuple(g for _, g in reached)


class Watch:
    """Sees each op that a reverse pass goes through with the ops its rule emitted, and so knows what the rule reads.

    touched: the ops whose rules read a forward value. Raises GradientError for one in `freed` or one that reads a value of `stale`, also
    through `moved`, and is not listed there with it. Reading a value of `free` does not count."""

    def __init__(
        self,
        freed: Container[Op] = (),
        stale: Mapping[Value, Container[Op]] | None = None,
        free: Container[Value] = (),
        moved: Callable[[Value], Value] | None = None,
    ) -> None:
        self.freed, self.stale, self.free, self.moved = freed, stale or {}, free, moved
        self.touched: list[Op] = []
        self.readers: dict[Value, Op] = {}

    def visit(self, op: Op, emitted: list[Op]) -> None:
        mine = set(op.operands) | set(op.results)
        reads = [v for e in emitted for v in e.operands if v in mine and v not in self.free]
        if not reads:
            return
        if op in self.freed:
            raise freed_error(op)
        if self.stale:
            bases = [self.moved(v) for v in reads] if self.moved is not None else reads
            if any(v in self.stale and op not in self.stale[v] for v in bases):
                raise overwritten_error(op)
        self.touched.append(op)
        self.readers.update((v, op) for v in reads)


def freed_error(op: Op, loc: Loc | None = None) -> GradientError:
    """`loc`: where the op is, if it does not say."""
    error = GradientError(
        f"backward goes a second time through {op.definition.name}{_at(loc or op.loc)}, whose saved values were freed by the "
        "first; call the first backward with retain_graph=True"
    )
    error.op = op  # type: ignore[attr-defined]
    return error


def overwritten_error(op: Op) -> GradientError:
    return GradientError(
        f"the gradient of {op.definition.name}{_at(op.loc)} needs a value that an in-place op has overwritten since; "
        "write into a clone, or use the op that returns a new tensor"
    )


def _at(loc: Loc | None) -> str:
    return f" ({loc.full()})" if loc is not None else ""
