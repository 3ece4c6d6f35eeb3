"""The module of an artefact: LLVM text of the tables of its programs, of what prepares and runs them, and of the functions that callers see.

Kernels are modules of their own (their emitters' text), so that their object code is made in parallel and kept in the disk cache. There are no
addresses in the data: `bind` and `describe` put them where they belong when a model is made, so nothing has to be relocated when the code is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duo_backends.aot import checkpoint, runtime
from duo_backends.aot.emit import HELPERS, SizeText
from duo_backends.aot.entries import Entry, State, Texts, Trainer, bytes_text, functions_text, trainer_text, words_text
from duo_backends.aot.plan import THREADS, Argument
from duo_backends.aot.sizes import Size, dim
from duo_backends.aot.subset import Unit
from duo_backends.aot.targets import AotTarget
from duo_backends.cpu.code import SIGNATURE
from duo_backends.cpu.pool_text import pool_text
from duo_backends.cpu.runner_text import BRANCH, CODE_WORDS, JUMP, PHASE, interpreter_text
from duo_backends.cpu.table import THREAD_LIMITS
from duo_ir.types import evaluate

MOST_BYTES = float(1 << 46)  # of what a call touches; far above any machine's memory, far below what overflows


def module_text(
    prefix: str,
    entries: Sequence[Entry],
    target: AotTarget,
    states: Sequence[State] = (),
    trainer: Trainer | None = None,
) -> str:
    """The module. `prefix` begins the names of the functions that callers see; `states`: those of a model."""
    unit = Unit()
    unit.add(runtime.FUNCTIONS if trainer is None else (*runtime.FUNCTIONS, *checkpoint.FUNCTIONS))
    parts = [target.system_text(), HELPERS, _internal(pool_text(target.arch, target.wait_text(), target.sig_setmask))]
    parts += [target.clock_text(), interpreter_text(), _BRIDGE]
    symbols = sorted({row.symbol for e in entries for row in e.plan.rows if row.symbol is not None})
    parts += [f"declare hidden void @{symbol}({SIGNATURE})" for symbol in symbols]
    parts.append(_COPY)
    parts += [_Program(n, e, unit).text() for n, e in enumerate(entries)]
    parts.append(_describe(len(entries)))
    parts.append(functions_text(prefix, entries, _model_bytes(entries, len(states)), len(states), trainer))
    parts.append(words_text("duo.states", [w for s in states for w in (s.start, s.nbytes, int(s.double))]))
    texts = Texts()
    parts.append(words_text("duo.state.names", [w for s in states for w in texts.place(s.name)]))
    if trainer is not None:
        parts.append(trainer_text(prefix, trainer, states, texts))
    parts.append(bytes_text("duo.texts", bytes(texts.content)))
    return _declared_once("\n".join([*parts, unit.text()]))


def _declared_once(text: str) -> str:
    """A text made of parts that declare the same functions."""
    seen: set[str] = set()
    lines = []
    for line in text.split("\n"):
        if line.startswith("declare "):
            name = line[line.index("@") : line.index("(")]
            if name in seen:
                continue
            seen.add(name)
        lines.append(line)
    return "\n".join(lines)


def _internal(text: str) -> str:
    """A text whose functions are seen within the module only."""
    return text.replace("define void @duo_", "define internal void @duo_")


def _model_bytes(entries: Sequence[Entry], states: int) -> int:
    total = runtime.HEADER + runtime.RECORD * len(entries)
    for e in entries:
        plan = e.plan
        for count in (CODE_WORDS * len(plan.rows), len(plan.dims), len(plan.words), len(e.sources), len(e.dims)):
            total += _up(8 * count)
    return total + _up(16 * states)


def _up(n: int) -> int:
    return -(-n // runtime.LINE) * runtime.LINE


class _Program:
    """Constants and functions of program number `n`."""

    def __init__(self, n: int, entry: Entry, unit: Unit) -> None:
        self.n, self.entry, self.unit, self.plan = n, entry, unit, entry.plan
        self.parts: list[str] = []

    def text(self) -> str:
        n, entry, plan = self.n, self.entry, self.plan
        starts, patches = self.users()
        code = self.bind()
        tables = {
            runtime.TEMPLATE: self.table("code", code.ravel().tolist()),
            runtime.KINDS: self.table("kinds", [w for pair in entry.sources for w in pair]),
            runtime.STARTS: self.table("starts", starts),
            runtime.PATCHES: self.table("patches", patches),
            runtime.COPIES: self.table("copies", [w for row in entry.copies for w in row]),
            runtime.SWAPS: self.table("swaps", list(entry.swaps)),
        }
        self.check()
        self.names("name", [entry.label(k) for k in range(len(entry.sources))])
        self.names("small", [_small(name, entry.least[name]) for name in entry.dims])
        self.notes()
        functions = {
            runtime.BIND: f"duo.p{n}.bind", runtime.CHECK: f"duo.p{n}.check", runtime.NOTE: f"duo.p{n}.note",
            runtime.NAME: f"duo.p{n}.name", runtime.SMALL_SIZE: f"duo.p{n}.small",
        }  # fmt: skip
        numbers = {
            runtime.CODE_COUNT: code.size, runtime.DIM_COUNT: len(plan.dims), runtime.WORD_COUNT: len(plan.words),
            runtime.SIZE_COUNT: len(entry.dims), runtime.ARGUMENT_COUNT: len(entry.sources),
            runtime.COPY_COUNT: len(entry.copies), runtime.SWAP_COUNT: len(entry.swaps),
        }  # fmt: skip
        lines = [f"define internal i64 @duo.p{n}.describe(i64 %record) nounwind {{"]
        values = {at: f"ptrtoint (ptr @{name} to i64)" for at, name in (tables | functions).items()}
        for at, value in (values | {at: str(v) for at, v in numbers.items()}).items():
            lines += _store("%record", at, value)
        self.parts.append("\n".join([*lines, "  ret i64 0", "}"]))
        return "\n".join(self.parts)

    def users(self) -> tuple[list[int], list[int]]:
        """Numbers of the pointer words that hold each argument's address, one after the other, and where each argument's begin."""
        users: list[list[int]] = [[] for _ in self.entry.sources]
        for number, place in enumerate(self.plan.words):
            if isinstance(place, Argument):
                users[place.k].append(number)
        starts = [0]
        for user in users:
            starts.append(starts[-1] + len(user))
        return starts, [word for user in users for word in user]

    def table(self, name: str, words: list[int]) -> str:
        full = f"duo.p{self.n}.{name}"
        listed = ", ".join(f"i64 {w}" for w in words or [0])
        self.parts.append(f"@{full} = internal constant [{max(len(words), 1)} x i64] [{listed}], align 64")
        return full

    def names(self, name: str, texts: Sequence[str]) -> None:
        """A function from a number to the address of a text."""
        self.parts.append(self.switch(name, "i64 %k", "%k", {k: self.unit.string(t) for k, t in enumerate(texts)}))

    def switch(self, name: str, params: str, on: str, strings: dict[int, str]) -> str:
        cases = " ".join(f"i64 {k}, label %l{k}" for k in strings)
        lines = [f"define internal i64 @duo.p{self.n}.{name}({params}) nounwind {{"]
        lines.append(f"  switch i64 {on}, label %none [{cases}]")
        for k, s in strings.items():
            lines += [f"l{k}:", f"  %r{k} = ptrtoint ptr @{s} to i64", f"  ret i64 %r{k}"]
        lines += [
            "none:",
            f"  %r = ptrtoint ptr @{self.unit.string('an index is out of range')} to i64",
            "  ret i64 %r",
            "}",
        ]
        return "\n".join(lines)

    def notes(self) -> None:
        """What an index error says, by instruction and check: a format for the index and the axis' size. Both in one number for the switch."""
        forms: dict[int, str] = {}
        for k, row in enumerate(self.plan.rows):
            for s, site in enumerate(row.sites):
                forms[k * 64 + s + 1] = self.unit.string(_form(row.where, site))
        head = [
            f"define internal i64 @duo.p{self.n}.note(i64 %row, i64 %site) nounwind {{",
            "  %high = shl i64 %row, 6", "  %both = add i64 %high, %site",
            f"  %r = call i64 @duo.p{self.n}.form(i64 %both)", "  ret i64 %r", "}",
        ]  # fmt: skip
        self.parts.append(self.switch("form", "i64 %k", "%k", forms))
        self.parts.append("\n".join(head))

    # ------------------------------------------------------------------------------------------------ sizes
    def bind(self) -> np.ndarray:
        """Writes `bind`, and gives the code table's constant words."""
        plan, program = self.plan, self.plan.program
        code = np.zeros((len(plan.rows), CODE_WORDS), np.int64)
        lines = [
            f"define internal i64 @duo.p{self.n}.bind(i64 %sizes, i64 %threads, i64 %code, i64 %dims, i64 %words, i64 %bytes, i64 %out) nounwind {{"
        ]
        sizes, names = self.sizes()
        lines += sizes
        text = SizeText({**names, THREADS: "%threads"}, THREAD_LIMITS)
        for k, row in enumerate(plan.rows):
            code[k, 0] = row.kind
            if row.kind == PHASE:
                code[k, 2] = 64 + 8 * row.words
                at = 8 * CODE_WORDS * k
                symbol = row.symbol or "duo.copy"
                text.lines += _store("%code", at + 8, f"ptrtoint (ptr @{symbol} to i64)")
                place = text.new(f"add i64 %dims, {8 * row.dims}")
                text.lines += _store("%code", at + 24, place)
                for word, number in ((4, row.units), (5, row.threads[0]), (6, row.threads[1])):
                    if isinstance(number, Size):
                        text.lines += _store("%code", at + 8 * word, text.value(number))
                    else:
                        code[k, word] = number
            elif row.kind == BRANCH:
                code[k, 1], code[k, 2] = 64 + 8 * row.words, row.target
            elif row.kind == JUMP:
                code[k, 1] = row.target
        for k, number in enumerate(plan.dims):
            text.lines += _store("%dims", 8 * k, text.value(number))
        for k, pointer in enumerate(plan.words):
            text.lines += _store("%words", 8 * k, "0" if isinstance(pointer, Argument) else text.value(pointer))
        known = {name: dim(name) for name in program.dims}
        for k, t in enumerate([*program.inputs, *program.outputs]):
            text.lines += _store("%bytes", 8 * k, text.value(evaluate(t.nbytes, known)))  # type: ignore[arg-type]
        text.lines += _store("%out", 0, text.value(plan.arena))
        text.lines += _store("%out", 8, text.value(plan.scratch))
        self.parts.append("\n".join([*lines, *text.lines, "  ret i64 0", "}"]))
        return code

    def sizes(self) -> tuple[list[str], dict[str, str]]:
        """Lines that load the free dims, and the names of their values."""
        lines = ["  %sizes.at = inttoptr i64 %sizes to ptr"]
        names = {}
        for k, name in enumerate(self.entry.dims):
            lines += [f"  %s{k}.at = getelementptr i64, ptr %sizes.at, i64 {k}", f"  %s{k} = load i64, ptr %s{k}.at"]
            names[name] = f"%s{k}"
        return lines, names

    def check(self) -> None:
        """0 if the sizes are possible, the number of one (from 1 on) that is too small, -1 if together they are too large, or -2 if one that is computed
        of them is negative, or -3 if a matrix product has a single column."""
        program = self.plan.program
        lines, names = self.sizes()
        lines.insert(0, f"define internal i64 @duo.p{self.n}.check(i64 %sizes) nounwind {{")
        for k, name in enumerate(self.entry.dims):
            lines += [
                f"  %n{k} = icmp slt i64 %s{k}, {self.entry.least[name]}",
                f"  br i1 %n{k}, label %bad{k}, label %good{k}",
            ]
            lines += [f"bad{k}:", f"  ret i64 {k + 1}", f"good{k}:"]
        text = SizeText({**names, THREADS: "1"}, THREAD_LIMITS, real=True)
        known = {name: dim(name) for name in program.dims}
        total = text.value(self.plan.arena)
        for t in [*program.inputs, *program.outputs]:
            for d in t.shape:  # each dim too: another one may be zero
                total = text.new(f"fadd double {total}, {text.value(evaluate(d, known))}")  # type: ignore[arg-type]
            total = text.new(f"fadd double {total}, {text.value(evaluate(t.nbytes, known))}")  # type: ignore[arg-type]
        for name in self.entry.dims:
            total = text.new(f"fadd double {total}, {text.value(dim(name))}")
        fits = text.new(f"fcmp olt double {total}, {MOST_BYTES!r}")
        out = text.new(f"select i1 {fits}, i64 0, i64 -1")
        for d in self.entry.signed:
            negative = text.new(f"fcmp olt double {text.value(evaluate(d, known))}, {0.0!r}")  # type: ignore[arg-type]
            out = text.new(f"select i1 {negative}, i64 -2, i64 {out}")
        for n in self.entry.columns:
            single = text.new(f"fcmp oeq double {text.value(evaluate(n, known))}, {1.0!r}")  # type: ignore[arg-type]
            out = text.new(f"select i1 {single}, i64 -3, i64 {out}")
        self.parts.append("\n".join([*lines, *text.lines, f"  ret i64 {out}", "}"]))


def _store(base: str, offset: int, value: str) -> list[str]:
    """Stores an i64 at an address."""
    n = _numbers[0] = _numbers[0] + 1
    lines = [f"  %a{n} = add i64 {base}, {offset}", f"  %p{n} = inttoptr i64 %a{n} to ptr"]
    if value.startswith("ptrtoint ("):  # position-independent code has no constant expression for it
        inner = value[len("ptrtoint (") : -1]
        lines.append(f"  %v{n} = ptrtoint {inner}")
        value = f"%v{n}"
    return [*lines, f"  store i64 {value}, ptr %p{n}"]


_numbers = [0]


def _small(name: str, least: int) -> str:
    """A format of printf for a size that is below its least."""
    return f"{name} is %lld; " + (f"this program needs {least} at least" if least else "a size must not be negative")


def _form(where: str, site: str) -> str:
    """A format of printf for an index error, which has the words of `calls.index_error`."""

    def plain(s: str) -> str:
        return s.replace("%", "%%")

    if "{index}" in site:
        return plain(site).replace("{index}", "%lld")
    return f"{plain(where)}{': ' if where else ''}{plain(site)}: index %lld is out of range for an axis of size %lld"


def _describe(programs: int) -> str:
    cases = " ".join(f"i64 {k}, label %l{k}" for k in range(programs))
    lines = [
        "define internal i64 @duo.describe(i64 %k, i64 %record) nounwind {",
        f"  switch i64 %k, label %end [{cases}]",
    ]
    for k in range(programs):
        lines += [f"l{k}:", f"  %r{k} = call i64 @duo.p{k}.describe(i64 %record)", "  br label %end"]
    return "\n".join([*lines, "end:", "  ret i64 0", "}"])


_COPY = f"""
define internal void @duo.copy({SIGNATURE}) nounwind {{
  call void @duo_copy(ptr %args, ptr %dims, i64 %begin, i64 %end, i64 %tid, ptr %scratch, ptr %status)
  ret void
}}"""

# Between the library's functions, all of i64, and the pool and runner. The pool has as many threads as the model that wants most, and none while there
# is no model. `duo.own` comes before each use of it: in a child its workers do not exist and its lock may be held by a thread that does not either. Of
# several threads of the child that see so one puts it right, and the others get 0: they go on alone. It leaves `duo.owner` for last, so that a
# further fork in between finds that it has to begin again.
_BRIDGE = """
@duo.models = internal global i64 0, align 8
@duo.owner = internal global i32 0, align 4
@duo.taking = internal global i32 0, align 4
declare i32 @getpid()
define internal i64 @duo.own(i64 %threads) nounwind {
entry:
  %me = call i32 @getpid()
  %owner = load atomic i32, ptr @duo.owner acquire, align 4
  %mine = icmp eq i32 %owner, %me
  br i1 %mine, label %want, label %foreign
foreign:
  %taker = load atomic i32, ptr @duo.taking seq_cst, align 4
  %taken = icmp eq i32 %taker, %me
  br i1 %taken, label %no, label %take
take:
  %got = cmpxchg ptr @duo.taking, i32 %taker, i32 %me seq_cst seq_cst
  %ok = extractvalue { i32, i1 } %got, 1
  br i1 %ok, label %forget, label %no
forget:
  call void @duo_forget()
  store atomic i32 %me, ptr @duo.owner release, align 4
  br label %want
want:
  %wanted = load atomic i64, ptr @duo.wanted monotonic, align 8
  %fewer = icmp slt i64 %wanted, %threads
  br i1 %fewer, label %raise, label %yes
raise:
  %before = atomicrmw max ptr @duo.wanted, i64 %threads seq_cst
  br label %yes
yes:
  ret i64 1
no:
  ret i64 0
}
define internal i64 @duo.walk(i64 %frame, i64 %code, i64 %flags) nounwind {
  %f = inttoptr i64 %frame to ptr
  %c = inttoptr i64 %code to ptr
  %r = call i64 @duo.run(ptr %f, ptr %c, i64 %flags)
  ret i64 %r
}
define internal i64 @duo.join() nounwind {
  %others = atomicrmw add ptr @duo.models, i64 1 seq_cst
  ret i64 0
}
define internal i64 @duo.leave() nounwind {
entry:
  %models = atomicrmw sub ptr @duo.models, i64 1 seq_cst
  %last = icmp eq i64 %models, 1
  br i1 %last, label %ours, label %done
ours:
  %own = call i64 @duo.own(i64 1)
  %can = icmp ne i64 %own, 0
  br i1 %can, label %end, label %done
end:
  call void @duo_resize(i64 1, i64 1000000000)
  br label %done
done:
  ret i64 0
}
"""
