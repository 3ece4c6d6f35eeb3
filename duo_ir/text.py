"""The text form of a Function: `to_text` prints it, `parse` reads it back to an equal Function.

    func @main(%x: f32[b,784], %w: f32[784,512]) -> f32[b,512] {
      %2: f32[b,512] = matmul %x, %w   # train.py:14
      return %2
    }

Values are numbered by position (parameters first); a parameter goes by its name where that is unique. Attributes are
floats (shortest form that reads back to the same bits, -0.0, inf and nan among them), ints, booleans, None, strings, dtypes,
symbolic sizes, tuples and nested functions. A comment of the form file:line at an op's end is its location.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from duo_ir.core import Function, Loc, Op, Value
from duo_ir.errors import DuoError, TextError
from duo_ir.opdef import REGISTRY
from duo_ir.types import DTYPES, Dim, DimLike, DType, TensorType

_NAME = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_WORDS = {"None": None, "True": True, "False": False, "inf": float("inf"), "nan": float("nan")}
_LONGEST, _DEEPEST = 1000, 50  # digits of an integer, and nesting, that a text may have
_RESERVED = {*_WORDS, *DTYPES, "dim"}


# --------------------------------------------------------------------------------------------------------- printing
def to_text(function: Function, locations: bool = True) -> str:
    """The text of `function`; with `locations`, each op ends with the user's file:line as a comment."""
    return "func " + "\n".join(_Printer(function, locations).function()) + "\n"


def op_lines(function: Function, locations: bool = True) -> list[str]:
    """One entry per op of `function` (several lines where it holds nested functions), as `to_text` prints them. Never fails
    on a broken function: a value that it does not define prints as %undefined."""
    printer = _Printer(function, locations)
    return ["\n".join(printer.op(op)) for op in function.ops]


def value_names(function: Function) -> dict[Value, str]:
    """Every value of `function` (not of nested ones) with the name it has in its text, `%` included."""
    labels = function.names
    usable = [n if _NAME.fullmatch(n) and labels.count(n) == 1 else "" for n in labels]
    out: dict[Value, str] = {}
    position = 0
    for i, p in enumerate(function.params):
        label = usable[i] if i < len(usable) else ""
        out[p] = f"%{label or position}"
        position += 1
    for op in function.ops:
        for r in op.results:
            out[r] = f"%{position}"
            position += 1
    return out


class _Printer:
    def __init__(self, function: Function, locations: bool, indent: str = "") -> None:
        self.f, self.locations, self.indent = function, locations, indent
        self.names = value_names(function)

    def name(self, v: Value) -> str:
        return self.names.get(v, "%undefined")

    def function(self) -> list[str]:
        """The lines of the function, without the word `func`; the first carries no indent."""
        params = ", ".join(f"{self.name(p)}: {p.type}" for p in self.f.params)
        types = ", ".join(str(r.type) for r in self.f.results)
        if len(self.f.results) != 1:
            types = f"({types})"
        lines = [f"{_function_name(self.f.name)}({params}) -> {types} {{"]
        for op in self.f.ops:
            lines += self.op(op)
        returned = ", ".join(self.name(r) for r in self.f.results)
        lines += [f"{self.indent}  return {returned}".rstrip(), self.indent + "}"]
        return lines

    def op(self, op: Op) -> list[str]:
        results = ", ".join(f"{self.name(r)}: {r.type}" for r in op.results)
        operands = ", ".join(self.name(v) for v in op.operands)
        text = f"{self.indent}  {results} = {op.definition.name}"
        if operands:
            text += f" {operands}"
        if op.attrs:
            text += " {" + ", ".join(f"{k}={self.attribute(op.attrs[k])}" for k in sorted(op.attrs)) + "}"
        if self.locations and op.loc is not None:
            text += f"   # {op.loc}"
        return text.split("\n")

    def attribute(self, value: Any) -> str:
        if isinstance(value, Function):
            return "\n".join(_Printer(value, self.locations, self.indent + "  ").function())
        if isinstance(value, tuple):
            inner = ", ".join(self.attribute(v) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, str):
            return json.dumps(value)
        if isinstance(value, DType):
            return value.name
        if isinstance(value, Dim):
            text = str(value)
            return f"dim({text})" if text in _RESERVED or any(n in _RESERVED for n in value.names) else text
        return repr(value)


def _function_name(name: str) -> str:
    return f"@{name}" if _NAME.fullmatch(name) else f"@{json.dumps(name)}"


# ---------------------------------------------------------------------------------------------------------- reading
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+) | (?P<comment>\#[^\n]*) | (?P<newline>\n) | (?P<arrow>->)
      | (?P<value>%[\w.]+) | (?P<func>@[A-Za-z_][\w.]*) | (?P<at>@) | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<number>(?:\d+\.\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+))
      | (?P<word>[A-Za-z_]\w*) | (?P<punct>[(){}\[\],:=*+\-])""",
    re.VERBOSE | re.ASCII,
)


@dataclass(slots=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str) -> Function:
    """The Function whose text this is.

    Every recorded type is checked against the one its op infers. Raises TextError with the line's number, what was
    expected and the line.
    """
    parser = _Parser(text)
    parser.skip()
    parser.expect("func")
    function = parser.function()
    parser.skip()
    if parser.token.kind != "end":
        parser.fail("expected the end of the text after the function")
    return function


class _Parser:
    """Recursive descent over the tokens; `self.token` is the next one."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.tokens = list(self._tokenize(text))
        self.at = 0
        self.depth = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def _tokenize(self, text: str) -> list[_Token]:
        out, at, line = [], 0, 1
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                self._fail_at(line, f"unexpected character {text[at]!r}")
            kind = str(match.lastgroup)
            if kind != "space":
                out.append(_Token(kind, match.group(), line))
            line += kind == "newline"
            at = match.end()
        out.append(_Token("end", "", line))
        return out

    def _fail_at(self, line: int, message: str) -> NoReturn:
        source = self.lines[line - 1].strip() if line <= len(self.lines) else ""
        raise TextError(f"line {line}: {message}\n    {source}")

    def fail(self, message: str, token: _Token | None = None) -> NoReturn:
        self._fail_at((token or self.token).line, message)

    def next(self) -> _Token:
        token = self.token
        if token.kind != "end":
            self.at += 1
        return token

    def accept(self, text: str) -> bool:
        if self.token.text != text or self.token.kind in ("string", "end"):
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.fail(f"expected {text!r}, found {self._found()}")

    def take(self, kind: str, what: str) -> _Token:
        if self.token.kind != kind:
            self.fail(f"expected {what}, found {self._found()}")
        return self.next()

    def _found(self) -> str:
        token = self.token
        return {"end": "the end of the text", "newline": "the end of the line"}.get(token.kind, repr(token.text))

    def skip(self) -> None:
        """Past line ends and comments."""
        while self.token.kind in ("newline", "comment"):
            self.at += 1

    def function(self) -> Function:
        self.deeper()
        if self.token.kind == "at":
            self.next()
            name = self.string("a function's name in quotes")
        else:
            name = self.take("func", "a function's name such as @main").text[1:]
        env: dict[str, Value] = {}
        params: list[Value] = []
        names: list[str] = []
        self.expect("(")
        while not self.accept(")"):
            if params:
                self.expect(",")
            token, type = self.typed_value()
            params.append(Value(type, None, len(params)))
            names.append("" if token.text[1:].isdigit() else token.text[1:])
            self.define(env, token, params[-1])
        self.expect("->")
        result_types = self.result_types()
        self.expect("{")
        ops: list[Op] = []
        while True:
            self.skip()
            if self.accept("return"):
                break
            ops.append(self.op(env))
        line = self.token
        results = [self.use(env)] if self.token.kind == "value" else []
        while results and self.accept(","):
            results.append(self.use(env))
        if [r.type for r in results] != result_types:
            listed = ", ".join(str(r.type) for r in results)
            self.fail(f"returns ({listed}), but the function's head says ({', '.join(map(str, result_types))})", line)
        self.skip()
        self.expect("}")
        self.depth -= 1
        return Function(params, ops, results, name, names)

    def result_types(self) -> list[TensorType]:
        if not self.accept("("):
            return [self.type()]
        types: list[TensorType] = []
        while not self.accept(")"):
            if types:
                self.expect(",")
            types.append(self.type())
        return types

    def typed_value(self) -> tuple[_Token, TensorType]:
        token = self.take("value", "a value such as %2")
        self.expect(":")
        return token, self.type()

    def define(self, env: dict[str, Value], token: _Token, value: Value) -> None:
        if token.text in env:
            self.fail(f"{token.text} is defined twice", token)
        env[token.text] = value

    def use(self, env: dict[str, Value]) -> Value:
        token = self.take("value", "a value such as %2")
        value = env.get(token.text)
        if value is None:
            self.fail(f"{token.text} is used before it is defined", token)
        return value

    def type(self) -> TensorType:
        token = self.take("word", "a type such as f32[b,3]")
        if token.text not in DTYPES:
            self.fail(f"{token.text!r} is not a dtype; there are {', '.join(DTYPES)}", token)
        self.expect("[")
        dims: list[DimLike] = []
        while not self.accept("]"):
            if dims:
                self.expect(",")
            dims.append(self.dim())
        return TensorType(DTYPES[token.text], tuple(dims))

    def dim(self) -> DimLike:
        """A polynomial over named sizes."""
        total: DimLike = 0
        sign = -1 if self.accept("-") else 1
        while True:
            term: DimLike = sign
            while True:
                while self.accept("-"):
                    term = -term
                if self.token.kind == "word":
                    term = term * Dim.symbol(self.next().text)
                else:
                    token = self.take("number", "a size: an integer or a name")
                    if not token.text.isdigit():
                        self.fail(f"a size is an integer or a name, not {token.text}", token)
                    term = term * self.integer(token)
                if not self.accept("*"):
                    break
            total = total + term
            if self.accept("+"):
                sign = 1
            elif self.accept("-"):
                sign = -1
            else:
                return total

    def integer(self, token: _Token) -> int:
        if len(token.text) > _LONGEST:
            self.fail(f"a number of {len(token.text)} digits; duo's have at most {_LONGEST}", token)
        return int(token.text)

    def string(self, what: str) -> str:
        token = self.take("string", what)
        try:
            return str(json.loads(token.text))
        except ValueError as error:
            self.fail(f"not a string: {error}", token)

    def deeper(self) -> None:
        """One nesting down; the caller takes it back."""
        self.depth += 1
        if self.depth > _DEEPEST:
            self.fail(f"nested more than {_DEEPEST} deep")

    def op(self, env: dict[str, Value]) -> Op:
        start = self.token
        targets = [self.typed_value()]
        while self.accept(","):
            targets.append(self.typed_value())
        self.expect("=")
        name = self.take("word", "an op's name")
        definition = REGISTRY.get(name.text)
        if definition is None:
            self.fail(f"there is no op {name.text!r} (import duo_ir.ops for duo's own)", name)
        operands: list[Value] = []
        if self.token.kind == "value":
            operands.append(self.use(env))
            while self.accept(","):
                operands.append(self.use(env))
        attrs = self.attributes() if self.accept("{") else {}
        loc = self.location()
        recorded = tuple(t for _, t in targets)
        try:
            inferred = definition.infer_types(operands, attrs)
        except Exception as error:  # the text is anyone's, and a type rule may assume anything of its attributes
            self.fail(str(error) if isinstance(error, DuoError) else f"{name.text}: {error}", start)
        if inferred != recorded:
            says, gives = (", ".join(map(str, types)) for types in (recorded, inferred))
            self.fail(f"the line says {says}, but {name.text} gives {gives}", start)
        op = Op(definition, tuple(operands), attrs, recorded, loc)
        for (token, _), value in zip(targets, op.results):
            self.define(env, token, value)
        return op

    def location(self) -> Loc | None:
        """The comment that ends the line, where it is one of the form file:line."""
        if self.token.kind == "newline":
            return None
        match = re.fullmatch(r"#\s*(.+):(\d{1,9})\s*", self.take("comment", "the end of the line").text)
        return Loc.of(match[1], int(match[2])) if match else None

    def attributes(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        while not self.accept("}"):
            if attrs:
                self.expect(",")
            self.skip()
            token = self.take("word", "an attribute's name")
            self.expect("=")
            if token.text in attrs:
                self.fail(f"attribute {token.text} is given twice", token)
            attrs[token.text] = self.attribute()
            self.skip()
        return attrs

    def attribute(self) -> Any:
        token = self.token
        if token.kind in ("func", "at"):
            return self.function()
        if token.kind == "string":
            return self.string("a string")
        if self.accept("("):
            return self.tuple()
        if token.kind == "word" and token.text in DTYPES:
            return DTYPES[self.next().text]
        if token.kind == "word" and token.text in _WORDS:
            return _WORDS[self.next().text]
        if self.accept("dim"):
            self.expect("(")
            size = self.dim()
            self.expect(")")
            return size
        return self.number_or_dim()

    def tuple(self) -> tuple[Any, ...]:
        self.deeper()
        out: list[Any] = []
        while not self.accept(")"):
            if out:
                self.expect(",")
                if self.accept(")"):
                    break
            out.append(self.attribute())
        self.depth -= 1
        return tuple(out)

    def number_or_dim(self) -> Any:
        at = self.at
        negative = self.accept("-")
        token = self.token
        if token.text == "inf":
            self.next()
            return float("-inf")
        if token.kind == "number" and not token.text.isdigit():
            self.next()
            return -float(token.text) if negative else float(token.text)
        if token.kind not in ("number", "word"):
            self.fail(f"expected an attribute's value, found {self._found()}")
        self.at = at
        return self.dim()


Function.printer = to_text
