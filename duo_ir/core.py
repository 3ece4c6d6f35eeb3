"""SSA: Value, Op, Function, and the Builder that makes them.

A Function has typed parameters, ops in order and results; it is immutable once built, flat (control flow holds nested
Functions as attributes, closed: they capture nothing), and keeps no use-lists. Ops come from `opdef.OpDef` definitions; while a
Builder is active (`with builder:`) calling a definition emits into it, so op rules, passes and composites all read alike.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

from duo_ir.errors import DuoError
from duo_ir.types import DimLike, TensorType

if TYPE_CHECKING:
    from duo_ir.opdef import OpDef


class Loc:
    """A place in the user's source: file and line, resolved when asked for (a code object and an instruction offset
    are what a frame gives cheaply)."""

    __slots__ = ("_code", "_file", "_lasti", "_line")

    def __init__(self, code: CodeType | None, lasti: int = -1, file: str = "", line: int = 0) -> None:
        self._code, self._lasti, self._file, self._line = code, lasti, file, line

    @staticmethod
    def of(file: str, line: int) -> Loc:
        return Loc(None, -1, file, line)

    @property
    def code(self) -> CodeType | None:
        """The code object, where it is known by one; `lasti` is the instruction's offset in it."""
        return self._code

    @property
    def lasti(self) -> int:
        return self._lasti

    @property
    def file(self) -> str:
        return self._code.co_filename if self._code is not None else self._file

    @property
    def line(self) -> int:
        if self._code is None:
            return self._line
        for start, end, line in self._code.co_lines():
            if start <= self._lasti < end and line is not None:
                return line
        return self._code.co_firstlineno

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"

    def full(self) -> str:
        return f"{self.file}:{self.line}"


class Value:
    """One SSA value: its type, and the op that made it (None for a parameter) with its result number."""

    __slots__ = ("index", "op", "type")

    def __init__(self, type: TensorType, op: Op | None, index: int) -> None:
        self.type, self.op, self.index = type, op, index

    def __repr__(self) -> str:
        return f"<{self.op.definition.name if self.op else 'parameter'} {self.type}>"

    def __bool__(self) -> bool:
        raise DuoError("an SSA value has no truth value; use where or cond")

    if TYPE_CHECKING:  # the operators are hung on this class by duo_ir/ops/broadcasting.py

        def __add__(self, other: Any) -> Value: ...
        def __radd__(self, other: Any) -> Value: ...
        def __sub__(self, other: Any) -> Value: ...
        def __rsub__(self, other: Any) -> Value: ...
        def __mul__(self, other: Any) -> Value: ...
        def __rmul__(self, other: Any) -> Value: ...
        def __truediv__(self, other: Any) -> Value: ...
        def __rtruediv__(self, other: Any) -> Value: ...
        def __floordiv__(self, other: Any) -> Value: ...
        def __rfloordiv__(self, other: Any) -> Value: ...
        def __mod__(self, other: Any) -> Value: ...
        def __rmod__(self, other: Any) -> Value: ...
        def __pow__(self, other: Any) -> Value: ...
        def __rpow__(self, other: Any) -> Value: ...
        def __matmul__(self, other: Value) -> Value: ...
        def __and__(self, other: Any) -> Value: ...
        def __rand__(self, other: Any) -> Value: ...
        def __or__(self, other: Any) -> Value: ...
        def __ror__(self, other: Any) -> Value: ...
        def __xor__(self, other: Any) -> Value: ...
        def __rxor__(self, other: Any) -> Value: ...
        def __neg__(self) -> Value: ...
        def __abs__(self) -> Value: ...
        def __invert__(self) -> Value: ...


class Op:
    """One application of an op definition. Attributes are static and hashable."""

    __slots__ = ("attrs", "definition", "loc", "operands", "results")

    def __init__(
        self,
        definition: OpDef,
        operands: tuple[Value, ...],
        attrs: Mapping[str, Any],
        types: Sequence[TensorType],
        loc: Loc | None,
    ) -> None:
        self.definition, self.operands, self.attrs, self.loc = definition, operands, attrs, loc
        self.results = tuple([Value(t, self, i) for i, t in enumerate(types)])

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    def __repr__(self) -> str:
        args = ", ".join(str(v.type) for v in self.operands)
        return f"<{self.definition.name}({args}) {dict(self.attrs)}>"

    @property
    def regions(self) -> tuple[Function, ...]:
        """Nested Functions among the attributes."""
        return tuple(a for a in self.attrs.values() if isinstance(a, Function))


class Function:
    """Typed parameters, ops in order, results. `names` label parameters for people and are not part of its identity."""

    __slots__ = ("__weakref__", "_hash", "name", "names", "ops", "params", "results")

    def __init__(
        self,
        params: Iterable[Value],
        ops: Iterable[Op],
        results: Iterable[Value],
        name: str = "main",
        names: Iterable[str] = (),
    ) -> None:
        self.params, self.ops, self.results, self.name = tuple(params), tuple(ops), tuple(results), name
        self.names = tuple(names) or ("",) * len(self.params)
        self._hash: str | None = None

    @property
    def param_types(self) -> tuple[TensorType, ...]:
        return tuple(p.type for p in self.params)

    @property
    def result_types(self) -> tuple[TensorType, ...]:
        return tuple(r.type for r in self.results)

    @property
    def dims(self) -> tuple[str, ...]:
        """Named sizes of its parameters, in order of first appearance."""
        seen: dict[str, None] = {}
        for p in self.params:
            for d in p.type.shape:
                if not isinstance(d, int):
                    seen.update(dict.fromkeys(d.names))
        return tuple(seen)

    @property
    def hash(self) -> str:
        """Canonical hash: sha256 of structure, types and attributes; names and locations do not enter."""
        if self._hash is None:
            self._hash = hashlib.sha256(repr(self.key()).encode()).hexdigest()
        return self._hash

    def key(self) -> tuple:
        """A nested tuple equal for equal programs (same ops in the same order, same numbering)."""
        number: dict[Value, int] = {}
        for v in self.params:
            number[v] = len(number)
        rows = []
        for op in self.ops:
            rows.append((
                op.definition.name,
                tuple([number[v] for v in op.operands]),
                tuple([(k, attr_key(op.attrs[k])) for k in sorted(op.attrs)]),
                tuple([str(r.type) for r in op.results]),
            ))  # fmt: skip
            for r in op.results:
                number[r] = len(number)
        return tuple(str(p.type) for p in self.params), tuple(rows), tuple(number[r] for r in self.results)

    def walk(self) -> Iterator[Op]:
        """All ops, those of nested Functions after the op that holds them."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()

    printer: ClassVar[Callable[[Function], str] | None] = None  # set by text.py, which builds on this file

    def __str__(self) -> str:
        return Function.printer(self) if Function.printer is not None else repr(self)

    def __repr__(self) -> str:
        return (
            f"<Function {self.name}: {len(self.params)} parameters, {len(self.ops)} ops, {len(self.results)} results>"
        )


def attr_key(value: Any) -> Any:
    """An attribute as something with an exact, stable repr (floats keep every bit, -0.0 differs from 0.0)."""
    if isinstance(value, float):
        return "nan" if value != value else value.hex()
    if isinstance(value, Function):
        return ("function", value.key())
    if isinstance(value, tuple):
        return tuple(attr_key(v) for v in value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)  # DType, Dim


class Builder:
    """Collects ops into a Function under construction. `with builder:` makes it current for this thread."""

    def __init__(self, name: str = "main") -> None:
        self.name = name
        self.params: list[Value] = []
        self.names: list[str] = []
        self.ops: list[Op] = []
        self.loc: Loc | None = None  # given to the ops emitted next

    def parameter(self, type: TensorType, name: str = "") -> Value:
        value = Value(type, None, len(self.params))
        self.params.append(value)
        self.names.append(name)
        return value

    def emit(self, definition: OpDef, operands: tuple[Value, ...], attrs: Mapping[str, Any]) -> tuple[Value, ...]:
        """Appends one op; its types are inferred here, so a misuse raises here."""
        types = definition.infer_types(operands, attrs)
        op = Op(definition, operands, attrs, types, self.loc)
        self.ops.append(op)
        return op.results

    def inline(self, function: Function, arguments: Sequence[Value]) -> tuple[Value, ...]:
        """Copies `function`'s ops here with its parameters replaced; returns its results."""
        env = dict(zip(function.params, arguments))
        loc = self.loc
        for op in function.ops:
            self.loc = op.loc or loc
            results = self.emit(op.definition, tuple([env[v] for v in op.operands]), op.attrs)
            env.update(zip(op.results, results))
        self.loc = loc
        return tuple(env[r] for r in function.results)

    def build(self, results: Iterable[Value], name: str | None = None) -> Function:
        return Function(self.params, self.ops, results, name or self.name, self.names)

    def __enter__(self) -> Builder:
        _active().append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active().pop()


class _Stack(threading.local):
    def __init__(self) -> None:
        self.builders: list[Builder] = []


_stack = _Stack()


def _active() -> list[Builder]:
    return _stack.builders


def current_builder() -> Builder:
    """The Builder that calls of op definitions emit into."""
    builders = _stack.builders
    if not builders:
        raise DuoError("no Builder is active: ops on SSA values are emitted inside `with builder:`")
    return builders[-1]


def function_of(fn: Any, *types: TensorType, name: str = "", names: Sequence[str] = ()) -> Function:
    """The Function that `fn` builds when it is called on parameters of these types."""
    builder = Builder(name or getattr(fn, "__name__", "main"))
    with builder:
        params = [builder.parameter(t, names[i] if i < len(names) else "") for i, t in enumerate(types)]
        out = fn(*params)
    return builder.build(out if isinstance(out, (tuple, list)) else (out,))


def bind_dims(types: Sequence[TensorType], shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The sizes that make `types` fit `shapes`. Raises DuoError naming the first that does not."""
    sizes: dict[str, int] = {}
    pending: list[tuple[int, int, DimLike, int]] = []
    for n, (t, shape) in enumerate(zip(types, shapes, strict=True)):
        if len(shape) != t.rank:
            raise DuoError(f"argument {n} has shape {list(shape)}, but the program takes {t}")
        for axis, (d, size) in enumerate(zip(t.shape, shape)):
            if not isinstance(d, int) and len(d.terms) == 1 and len(d.terms[0][0]) == 1 and d.terms[0][1] == 1:
                sizes.setdefault(d.terms[0][0][0], size)
            pending.append((n, axis, d, size))
    for n, axis, d, size in pending:
        want = d if isinstance(d, int) else d.evaluate(sizes)
        if want != size:
            raise DuoError(f"argument {n} has {size} elements along axis {axis}, but the program takes {d} = {want}")
    return sizes
