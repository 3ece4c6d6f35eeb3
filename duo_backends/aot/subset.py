"""A small subset of Python as LLVM text, in which the library's own code is written (`runtime.py`).

Every value is an i64, addresses too. There are assignments, `if`, `while`, `break`, `continue`, `return`, calls, arithmetic, comparisons (signed), `and`, `or`,
`not`, ints, strings (the address of a constant that ends with a zero byte), and ints of the module around. `load64(address)` and the like reach
memory. Calls of functions that are not of the subset are calls of C functions, declared in `EXTERNALS`. Division truncates, as C's does.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from duo_ir.errors import DuoError

# C functions: type of the result, then of the arguments; "..." for variadic ones, whose further arguments are i64.
EXTERNALS: dict[str, tuple[str, ...]] = {
    "aligned_alloc": ("ptr", "i64", "i64"),
    "free": ("void", "ptr"),
    "memcpy": ("ptr", "ptr", "ptr", "i64"),
    "memset": ("ptr", "ptr", "i32", "i64"),
    "memcmp": ("i32", "ptr", "ptr", "i64"),
    "strlen": ("i64", "ptr"),
    "snprintf": ("i32", "ptr", "i64", "ptr", "..."),
    "open": ("i32", "ptr", "i32", "..."),
    "close": ("i32", "i32"),
    "read": ("i64", "i32", "ptr", "i64"),
    "write": ("i64", "i32", "ptr", "i64"),
    "lseek": ("i64", "i32", "i64", "i32"),
    "rename": ("i32", "ptr", "ptr"),
    "unlink": ("i32", "ptr"),
    "fsync": ("i32", "i32"),
    "mmap": ("ptr", "ptr", "i64", "i32", "i32", "i32", "i64"),
    "munmap": ("i32", "ptr", "i64"),
    "sched_getaffinity": ("i32", "i32", "i64", "ptr"),
    "getpid": ("i32",),
}
_LOADS = {"load8": "i8", "load32": "i32", "load64": "i64"}
_STORES = {"store8": "i8", "store32": "i32", "store64": "i64"}
_BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.FloorDiv: "sdiv", ast.Mod: "srem", ast.BitAnd: "and",
    ast.BitOr: "or", ast.BitXor: "xor", ast.LShift: "shl", ast.RShift: "lshr",
}  # fmt: skip
_COMPARED = {ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "slt", ast.LtE: "sle", ast.Gt: "sgt", ast.GtE: "sge"}


def _elsewhere(*_: int | str) -> NoReturn:
    raise DuoError("this function runs inside an artefact only")


def load8(address: int) -> int:
    """The byte at an address, 0 to 255."""
    _elsewhere(address)


def load32(address: int) -> int:
    """The i32 at an address."""
    _elsewhere(address)


def load64(address: int) -> int:
    """The i64 at an address."""
    _elsewhere(address)


def store8(address: int, value: int) -> None:
    """Stores a byte."""
    _elsewhere(address, value)


def store32(address: int, value: int) -> None:
    """Stores an i32."""
    _elsewhere(address, value)


def store64(address: int, value: int) -> None:
    """Stores an i64."""
    _elsewhere(address, value)


def invoke(function: int, *arguments: int) -> int:
    """Calls the C function at an address with these i64s; its result is an i64."""
    _elsewhere(function, *arguments)


def c(name: str, *arguments: int | str) -> int:
    """Calls a C function of `EXTERNALS`."""
    _elsewhere(name, *arguments)


def native(name: str, *arguments: int) -> int:
    """Calls a function of the module's LLVM text, all of i64."""
    _elsewhere(name, *arguments)


class Unit:
    """LLVM text of functions, with the constants and declarations that they need. `prefix` goes before each name; they are internal."""

    def __init__(self, prefix: str = "lib.") -> None:
        self.prefix = prefix
        self.lines: list[str] = []
        self.externals: set[str] = set()
        self.strings: dict[str, str] = {}
        self.known: set[str] = set()

    def add(self, functions: Iterable[Callable[..., Any]]) -> None:
        """Writes these functions, which may call each other."""
        listed = list(functions)
        self.known.update(f.__name__ for f in listed)
        for f in listed:
            self.lines.append(_Function(self, f).text())

    def text(self) -> str:
        """All of it, but what `native` calls."""
        out = [f"declare {t[0]} @{n}({', '.join(t[1:])})" for n, t in sorted(EXTERNALS.items()) if n in self.externals]
        for text, name in self.strings.items():
            data = text.encode() + b"\0"
            escaped = "".join(f"\\{b:02X}" for b in data)
            out.append(f'@{name} = internal constant [{len(data)} x i8] c"{escaped}"')
        return "\n".join([*out, *self.lines]) + "\n"

    def string(self, text: str) -> str:
        """The name of the constant that holds the text."""
        return self.strings.setdefault(text, f"{self.prefix}s{len(self.strings)}")


class _Function:
    def __init__(self, unit: Unit, function: Callable[..., Any]) -> None:
        self.unit, self.name = unit, function.__name__
        self.globals: Mapping[str, Any] = function.__globals__
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        self.tree = tree
        self.params = [a.arg for a in tree.args.args]
        self.body: list[str] = []
        self.count = 0
        self.loops: list[tuple[str, str]] = []  # where `continue` and `break` go
        self.names: dict[str, None] = dict.fromkeys(self.params)

    def text(self) -> str:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.names.setdefault(node.id)
        for p in self.params:
            self.emit(f"store i64 %a.{p}, ptr %{p}")
        ended = self.block(self.tree.body)
        if not ended:
            self.emit("ret i64 0")
        head = [f"  %{n} = alloca i64" for n in self.names]
        given = ", ".join(f"i64 %a.{p}" for p in self.params)
        return "\n".join(
            [f"define internal i64 @{self.unit.prefix}{self.name}({given}) nounwind {{", *head, *self.body, "}"]
        )

    # ---------------------------------------------------------------------------------------------------- statements
    def block(self, statements: list[ast.stmt]) -> bool:
        """Whether it ends with a jump."""
        return any(self.statement(s) for s in statements)

    def statement(self, s: ast.stmt) -> bool:
        if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name):
            self.emit(f"store i64 {self.value(s.value)}, ptr %{s.targets[0].id}")
        elif isinstance(s, ast.AugAssign) and isinstance(s.target, ast.Name):
            old = self.new(f"load i64, ptr %{s.target.id}")
            self.emit(f"store i64 {self.binary(s.op, old, self.value(s.value))}, ptr %{s.target.id}")
        elif isinstance(s, ast.Expr):
            if not isinstance(s.value, ast.Constant):  # a docstring
                self.value(s.value)
        elif isinstance(s, ast.If):
            return self.choice(s)
        elif isinstance(s, ast.While) and not s.orelse:
            self.loop(s)
        elif isinstance(s, ast.Return):
            self.emit(f"ret i64 {self.value(s.value) if s.value is not None else 0}")
            return True
        elif isinstance(s, ast.Break | ast.Continue):
            self.emit(f"br label %{self.loops[-1][isinstance(s, ast.Break)]}")
            return True
        else:
            self.refuse(s)
        return False

    def choice(self, s: ast.If) -> bool:
        yes, no, onward = self.label(), self.label(), self.label()
        self.test(s.test, yes, no)
        self.here(yes)
        ended = self.block(s.body)
        if not ended:
            self.emit(f"br label %{onward}")
        self.here(no)
        ended_else = self.block(s.orelse)
        if not ended_else:
            self.emit(f"br label %{onward}")
        if ended and ended_else:
            return True
        self.here(onward)
        return False

    def loop(self, s: ast.While) -> None:
        top, inside, after = self.label(), self.label(), self.label()
        self.emit(f"br label %{top}")
        self.here(top)
        self.test(s.test, inside, after)
        self.here(inside)
        self.loops.append((top, after))
        if not self.block(s.body):
            self.emit(f"br label %{top}")
        self.loops.pop()
        self.here(after)

    def test(self, e: ast.expr, yes: str, no: str) -> None:
        """Jumps to `yes` or `no`; of `and` and `or` only what is needed is evaluated."""
        if isinstance(e, ast.BoolOp):
            for part in e.values[:-1]:
                after = self.label()
                self.test(part, *((after, no) if isinstance(e.op, ast.And) else (yes, after)))
                self.here(after)
            self.test(e.values[-1], yes, no)
        elif isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.Not):
            self.test(e.operand, no, yes)
        elif isinstance(e, ast.Compare):
            flag = self.compared(e)
            self.emit(f"br i1 {flag}, label %{yes}, label %{no}")
        else:
            flag = self.new(f"icmp ne i64 {self.value(e)}, 0")
            self.emit(f"br i1 {flag}, label %{yes}, label %{no}")

    def compared(self, e: ast.Compare) -> str:
        if len(e.ops) != 1 or type(e.ops[0]) not in _COMPARED:
            self.refuse(e)
        a, b = self.value(e.left), self.value(e.comparators[0])
        return self.new(f"icmp {_COMPARED[type(e.ops[0])]} i64 {a}, {b}")

    # --------------------------------------------------------------------------------------------------- expressions
    def value(self, e: ast.expr) -> str:
        if isinstance(e, ast.Constant) and isinstance(e.value, int):
            return str(int(e.value))
        if isinstance(e, ast.Constant) and isinstance(e.value, str):
            return self.new(f"ptrtoint ptr @{self.unit.string(e.value)} to i64")
        if isinstance(e, ast.Name):
            if e.id in self.names:
                return self.new(f"load i64, ptr %{e.id}")
            known = self.globals.get(e.id)
            if isinstance(known, int):
                return str(int(known))
            if isinstance(known, str):
                return self.new(f"ptrtoint ptr @{self.unit.string(known)} to i64")
        if isinstance(e, ast.BinOp):
            return self.binary(e.op, self.value(e.left), self.value(e.right))
        if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
            return self.new(f"sub i64 0, {self.value(e.operand)}")
        if isinstance(e, ast.Compare):
            return self.new(f"zext i1 {self.compared(e)} to i64")
        if isinstance(e, ast.BoolOp) or (isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.Not)):
            return self.truth(e)
        if isinstance(e, ast.IfExp):
            return self.chosen(e)
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and not e.keywords:
            return self.call(e.func.id, e.args)
        return self.refuse(e)

    def truth(self, e: ast.expr) -> str:
        yes, no = ast.Constant(1), ast.Constant(0)
        return self.chosen(ast.IfExp(e, yes, no))

    def chosen(self, e: ast.IfExp) -> str:
        self.count += 1
        cell = f"c.{self.count}"
        self.names[cell] = None
        yes, no, onward = self.label(), self.label(), self.label()
        self.test(e.test, yes, no)
        for label, part in ((yes, e.body), (no, e.orelse)):
            self.here(label)
            self.emit(f"store i64 {self.value(part)}, ptr %{cell}")
            self.emit(f"br label %{onward}")
        self.here(onward)
        return self.new(f"load i64, ptr %{cell}")

    def binary(self, op: ast.operator, a: str, b: str) -> str:
        if type(op) not in _BINARY:
            self.refuse(op)
        return self.new(f"{_BINARY[type(op)]} i64 {a}, {b}")

    def call(self, name: str, args: list[ast.expr]) -> str:
        if name in ("c", "native"):
            first = args[0]
            assert isinstance(first, ast.Constant) and isinstance(first.value, str)
            values = [self.value(a) for a in args[1:]]
            if name == "c":
                return self.external(first.value, values)
            return self.new(f"call i64 @{first.value}({_typed(values)})")
        values = [self.value(a) for a in args]
        if name in _LOADS:
            at = self.address(values[0])
            got = self.new(f"load {_LOADS[name]}, ptr {at}, align 1")
            if name == "load64":
                return got
            return self.new(f"{'zext' if name == 'load8' else 'sext'} {_LOADS[name]} {got} to i64")
        if name in _STORES:
            at, kind = self.address(values[0]), _STORES[name]
            cut = values[1] if kind == "i64" else self.new(f"trunc i64 {values[1]} to {kind}")
            self.emit(f"store {kind} {cut}, ptr {at}, align 1")
            return "0"
        if name == "invoke":
            return self.new(f"call i64 {self.address(values[0])}({_typed(values[1:])})")
        if name not in self.unit.known:
            raise DuoError(f"{self.name} calls {name}, which is not part of the library")
        return self.new(f"call i64 @{self.unit.prefix}{name}({_typed(values)})")

    def external(self, name: str, values: list[str]) -> str:
        self.unit.externals.add(name)
        kind, *kinds = EXTERNALS[name]
        variadic = kinds[-1:] == ["..."]
        fixed = kinds[:-1] if variadic else kinds
        given = []
        for n, v in enumerate(values):
            wanted = fixed[n] if n < len(fixed) else "i64"
            if wanted == "ptr":
                v = self.address(v)
            elif wanted == "i32":
                v = self.new(f"trunc i64 {v} to i32")
            given.append(f"{wanted} {v}")
        written = f"{kind} ({', '.join(kinds)})" if variadic else kind
        text = f"call {written} @{name}({', '.join(given)})"
        if kind == "void":
            self.emit(text)
            return "0"
        got = self.new(text)
        if kind == "ptr":
            return self.new(f"ptrtoint ptr {got} to i64")
        return got if kind == "i64" else self.new(f"sext {kind} {got} to i64")

    # ------------------------------------------------------------------------------------------------------- writing
    def address(self, value: str) -> str:
        return self.new(f"inttoptr i64 {value} to ptr")

    def new(self, text: str) -> str:
        self.count += 1
        self.emit(f"%v.{self.count} = {text}")
        return f"%v.{self.count}"

    def label(self) -> str:
        self.count += 1
        return f"l.{self.count}"

    def here(self, label: str) -> None:
        self.body.append(f"{label}:")

    def emit(self, line: str) -> None:
        self.body.append(f"  {line}")

    def refuse(self, node: ast.AST) -> NoReturn:
        raise DuoError(f"{self.name}, line {getattr(node, 'lineno', 0)}: {ast.dump(node)[:80]} is not of the subset")


def _typed(values: Iterable[str]) -> str:
    return ", ".join(f"i64 {v}" for v in values)
