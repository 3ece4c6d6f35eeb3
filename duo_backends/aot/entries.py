"""What callers of a library see, as LLVM text: `Entry` for each program, and the functions around them. `header.py` says the same in C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from duo_backends.aot import checkpoint, runtime
from duo_backends.aot.plan import Plan
from duo_ir.types import Dim


@dataclass(frozen=True)
class Entry:
    """A program as callers see it. `dims`: the free sizes, which are the first parameters. `least`: of each free size; `signed`: sizes computed of them
    that must not be negative; `columns`: those that must not be 1. `given`: names of the pointers that they pass, in order; `sources[k]`: where the
    address of the program's argument k comes from (kind of `runtime`, number); `copies`: results that are copied after a run, (argument, kind and
    number of where to); `swaps`: states whose two places change roles then. `special`: programs that run instead, (number, sizes at which), the one
    with most of them first."""

    name: str
    plan: Plan
    dims: tuple[str, ...]
    least: Mapping[str, int]
    signed: tuple[Dim, ...]
    columns: tuple[Dim, ...]
    given: tuple[str, ...]
    sources: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int, int], ...] = ()
    swaps: tuple[int, ...] = ()
    special: tuple[tuple[int, Mapping[str, int]], ...] = ()

    def label(self, k: int) -> str:
        """What the program's argument k is called."""
        kind, value = self.sources[k]
        return self.given[value] if kind == runtime.GIVEN else f"argument {k}"


@dataclass(frozen=True)
class State:
    """A state's place in a model: `start`, where its first value lies among the weights; `double`: whether its next value needs a place of its own."""

    name: str
    start: int
    nbytes: int
    double: bool


@dataclass(frozen=True)
class Trainer:
    """`Training` (source.py) by numbers: of programs and states; -1: there is none. `rows`: name in a file, dtype as safetensors names it, shape, number of
    the state, whether it is of the optimizer. `headers`: the whole beginning of a checkpoint with the optimizer's states, and without."""

    step: int
    first: int
    init: int
    generator: int
    rows: tuple[tuple[str, str, tuple[int, ...], int, bool], ...]
    headers: tuple[bytes, bytes]


class Texts:
    """Texts one after the other, each with a zero byte behind it."""

    def __init__(self) -> None:
        self.content = bytearray()

    def place(self, text: str) -> tuple[int, int]:
        """Where it stands, and its length in bytes."""
        data = text.encode()
        at = len(self.content)
        self.content += data + b"\0"
        return at, len(data)

    def numbers(self, words: Sequence[int]) -> int:
        """Where these i64s stand."""
        at = len(self.content)
        for word in words:
            self.content += word.to_bytes(8, "little")
        return at


def words_text(name: str, words: Sequence[int]) -> str:
    """A constant of i64s."""
    listed = ", ".join(f"i64 {w}" for w in words or [0])
    return f"@{name} = internal constant [{max(len(words), 1)} x i64] [{listed}], align 64"


def bytes_text(name: str, content: bytes) -> str:
    """A constant of bytes."""
    data = content or b"\0"
    escaped = "".join([f"\\{b:02X}" for b in data])
    return f'@{name} = internal constant [{len(data)} x i8] c"{escaped}", align 64'


def functions_text(prefix: str, entries: Sequence[Entry], nbytes: int, states: int, trainer: Trainer | None) -> str:
    """The functions of every library, and those of its programs; names that begin with `_` are for the library alone."""
    names = {"PREFIX": prefix, "MODEL_BYTES": str(nbytes), "PROGRAMS": str(len(entries)), "STATES": str(states)}
    out = [_filled(_API, names)]
    for n, e in enumerate(entries):
        if e.name.startswith("_"):
            continue
        dims, given = [f"i64 %d{k}" for k in range(len(e.dims))], [f"i64 %g{k}" for k in range(len(e.given))]
        sizes = _array("sizes", "d", len(e.dims))
        picked, which, run, need = _picked("number", e, n), "i64 %number", "call", "scratch"
        if trainer is not None and n == trainer.step:
            first = trainer.first if trainer.first >= 0 else n
            picked += _picked("first", entries[first], first)
            which, run, need = "i64 %first, i64 %number", "train", "train_scratch"
        lines = [*sizes, *_array("given", "g", len(e.given)), *picked]
        lines.append(f"  %r = call i64 @lib.{run}(i64 %model, {which}, i64 %sizes.word, i64 %given.word)")
        out.append(_function(f"{prefix}_{e.name}", ["i64 %model", *dims, *given], lines))
        lines = [*sizes, *picked, f"  %r = call i64 @lib.{need}(i64 %model, {which}, i64 %sizes.word)"]
        out.append(_function(f"{prefix}_{e.name}_scratch_bytes", ["i64 %model", *dims], lines))
    return "\n".join(out)


def trainer_text(prefix: str, trainer: Trainer, states: Sequence[State], texts: Texts) -> str:
    """`init`, `save` and `load`, and the tables that they read."""
    rows: list[int] = []
    for name, code, shape, state, optimizer in trainer.rows:
        rows += [*texts.place(name), *texts.place(code), len(shape), texts.numbers(shape)]
        rows += [state, states[state].nbytes, int(optimizer)]
    names = {
        "PREFIX": prefix, "STATES": str(len(states)), "ROWS": str(len(trainer.rows)), "GENERATOR": str(trainer.generator),
        "INIT": str(trainer.init), "STARTED": str(runtime.STARTED), "WHOLE": str(len(trainer.headers[0])),
        "FRESH": str(len(trainer.headers[1])),
    }  # fmt: skip
    assert len(rows) == checkpoint.TABLE_WORDS * len(trainer.rows)
    headers = [bytes_text(f"duo.header.{k}", h) for k, h in enumerate(trainer.headers)]
    return "\n".join([words_text("duo.tensors", rows), *headers, _filled(_TRAINER, names)])


def _function(name: str, params: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([f"define i64 @{name}({', '.join(params)}) nounwind {{", *lines, "  ret i64 %r", "}"])


def _picked(name: str, entry: Entry, number: int) -> list[str]:
    """Lines that make `%name` the number of the program that runs for the sizes `%d0`, `%d1`, ...: `number`, or a special one."""
    lines, best = [], str(number)
    for k, (other, sizes) in reversed(list(enumerate(entry.special))):
        test = "true"
        for dim, size in sizes.items():
            at = f"%{name}.{k}.{dim}"
            lines.append(f"  {at}.is = icmp eq i64 %d{entry.dims.index(dim)}, {size}")
            lines.append(f"  {at} = and i1 {test}, {at}.is")
            test = at
        lines.append(f"  %{name}.{k} = select i1 {test}, i64 {other}, i64 {best}")
        best = f"%{name}.{k}"
    return [*lines, f"  %{name} = add i64 {best}, 0"]


def _array(name: str, letter: str, count: int) -> list[str]:
    """Lines that put parameters into memory, whose address is `%name.word`."""
    lines = [f"  %{name} = alloca i64, i64 {max(count, 1)}"]
    for k in range(count):
        lines.append(f"  %{letter}{k}.at = getelementptr i64, ptr %{name}, i64 {k}")
        lines.append(f"  store i64 %{letter}{k}, ptr %{letter}{k}.at")
    return [*lines, f"  %{name}.word = ptrtoint ptr %{name} to i64"]


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


_API = """
define i64 @PREFIX_create(i64 %options, i64 %out) nounwind {
  %describe = ptrtoint ptr @duo.describe to i64
  %weights = call i64 @duo.weights()
  %states = ptrtoint ptr @duo.states to i64
  %r = call i64 @lib.create(i64 %options, i64 %out, i64 MODEL_BYTES, i64 PROGRAMS, i64 %describe, i64 %weights, i64 %states, i64 STATES)
  ret i64 %r
}
define void @PREFIX_destroy(i64 %model) nounwind {
  %r = call i64 @lib.destroy(i64 %model)
  ret void
}
define i64 @PREFIX_message(i64 %model) nounwind {
  %r = call i64 @lib.message(i64 %model)
  ret i64 %r
}
define i64 @PREFIX_set_scratch(i64 %model, i64 %memory, i64 %bytes) nounwind {
  %r = call i64 @lib.set_scratch(i64 %model, i64 %memory, i64 %bytes)
  ret i64 %r
}
define i64 @PREFIX_state(i64 %model, i64 %name, i64 %bytes) nounwind {
  %names = ptrtoint ptr @duo.state.names to i64
  %texts = ptrtoint ptr @duo.texts to i64
  %states = ptrtoint ptr @duo.states to i64
  %r = call i64 @lib.state(i64 %model, i64 %name, i64 %bytes, i64 %names, i64 %texts, i64 %states, i64 STATES)
  ret i64 %r
}
"""

_TRAINER = """
define i64 @PREFIX_init(i64 %model, i64 %seed) nounwind {
  %states = ptrtoint ptr @duo.states to i64
  %r = call i64 @lib.init(i64 %model, i64 %states, i64 STATES, i64 GENERATOR, i64 INIT, i64 %seed)
  ret i64 %r
}
define i64 @PREFIX_save(i64 %model, i64 %path) nounwind {
entry:
  %table = ptrtoint ptr @duo.tensors to i64
  %none = icmp eq i64 %model, 0
  br i1 %none, label %null, label %there
null:
  ret i64 1
there:
  %at = add i64 %model, STARTED
  %place = inttoptr i64 %at to ptr
  %started = load i64, ptr %place
  %whole = ptrtoint ptr @duo.header.0 to i64
  %fresh = ptrtoint ptr @duo.header.1 to i64
  %has = icmp ne i64 %started, 0
  %header = select i1 %has, i64 %whole, i64 %fresh
  %bytes = select i1 %has, i64 WHOLE, i64 FRESH
  %r = call i64 @lib.save(i64 %model, i64 %path, i64 %table, i64 ROWS, i64 %header, i64 %bytes, i64 %started)
  ret i64 %r
}
define i64 @PREFIX_load(i64 %model, i64 %path) nounwind {
  %table = ptrtoint ptr @duo.tensors to i64
  %texts = ptrtoint ptr @duo.texts to i64
  %started = add i64 %model, STARTED
  %r = call i64 @lib.load(i64 %model, i64 %path, i64 %table, i64 ROWS, i64 %texts, i64 %started)
  ret i64 %r
}
"""
