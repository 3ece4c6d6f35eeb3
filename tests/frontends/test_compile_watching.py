"""What `duo.compile` sees of a function while it records: every instruction of this Python, each with the stack that it leaves."""

from __future__ import annotations

import dis
import subprocess
import sys
from types import SimpleNamespace

import pytest

import duo
from duo.jit import hooks, observe, opcodes

TABLE = [1.0, 2.0, 3.0]
HOLDER = SimpleNamespace(weight=2.0, items=[1, 2, 3], table={"a": 1.0})
DEPTH = 24


class Base:
    gain = 2.0

    def scale(self, x, by=1.0, *, more=0.0):
        return x * by + more


class Derived(Base):
    def scale(self, x, *args, **kwargs):
        return super().scale(x, *args, **kwargs) * self.gain


def many_instructions(x, flag=True):
    """Comprehensions, keywords, unpacking, closures, slices, formats, matches, exceptions, generators, classes and decorators."""
    scale = HOLDER.weight

    def inner(y, by=3.0, *, plus: float = 0.5):
        return y * by + plus * scale

    class Local:
        kept = scale

    values = [v * 2 for v in TABLE if v > 1.0]
    more = {k: v + 0.0 for k, v in HOLDER.table.items()}
    some = {v + 1 for v in HOLDER.items}
    first, *rest = HOLDER.items
    a, b = (1.0, 2.0)
    a, b = b, a
    part = TABLE[0:2]
    part[0:1] = [7.0, 8.0]
    part += [9.0]
    arguments, keywords = (2.0,), {"plus": 1.0}
    x = inner(x, *arguments, **keywords) + inner(x, by=2.0) + Derived().scale(x, 3.0, more=1.0)
    x = x + sum(v for v in values) + len(some) + more["a"] + first + len(rest) + a - b + Local.kept
    text = f"{a!r:>10} {b:.2f} {a}"
    for k in range(2):
        if (not flag and k) or k is None:
            continue
        x = x * +x if k else -x
    try:
        raise ValueError(text)
    except (TypeError, ValueError) as error:
        x = x + len(str(error))
    match HOLDER.items:
        case [one, *_]:
            x = x + one
    match HOLDER.table:
        case {"a": found}:
            x = x + found
    assert len(part) == 4 and (0 < len(part) < 9)
    with duo.no_grad():
        x = x * (lambda y, z=2.0: y * z)(x)
    g = duo.tanh
    return g(x)[1:], (x[0] if flag else x)


def test_the_shadow_is_as_deep_as_the_stack(monkeypatch):
    wrong, seen, expected = [], set(), {}
    original = observe.Observer.step

    def step(self, frame, event):
        shadow = self.frames.get(frame)
        if event == "exception":
            expected.pop(frame, None)
        if shadow is not None and event == "opcode":
            if shadow.after is not None:
                after, shadow.after = shadow.after, None
                after(frame.f_lasti)
            instruction, depth = expected.get(frame, (None, 0))
            if instruction is not None:
                jump = frame.f_lasti != shadow.last
                argument = instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None
                effect = dis.stack_effect(instruction.opcode, argument, jump=jump)
                if instruction.opname == "CALL" and "PRECALL" in dis.opmap:
                    effect -= argument  # counted for PRECALL
                if len(shadow.stack) != depth + effect:
                    wrong.append((instruction.opname, instruction.arg, jump, len(shadow.stack) - depth, effect))
            shadow.stack[:0] = [observe.UNKNOWN] * (DEPTH - len(shadow.stack))
            instruction = shadow.table[frame.f_lasti][0]
            depth = len(shadow.stack)
            known = instruction.opname not in (*opcodes._OPAQUE, "FOR_ITER", "PRECALL", "YIELD_VALUE")
            expected[frame] = (instruction if known else None, depth)
            seen.add(instruction.opname)
        original(self, frame, event)

    monkeypatch.setattr(observe.Observer, "step", step)
    x = duo.tensor([0.1, 0.2, 0.3])
    f = duo.compile(many_instructions)
    out = f(x)
    assert not wrong
    assert {"LOAD_GLOBAL", "MAKE_FUNCTION", "CALL_FUNCTION_EX", "LOAD_ATTR", "FOR_ITER"} <= seen
    plain = many_instructions(x)
    assert [t.tolist() for t in out] == [t.tolist() for t in plain] == [t.tolist() for t in f(x)]


@pytest.mark.skipif(sys.version_info[:2] > observe.NEWEST, reason="nothing is replayed on this Python")
def test_every_instruction_is_known():
    internal = {"RESERVED", "INTERPRETER_EXIT", "ENTER_EXECUTOR", "EXIT_INIT_CHECK"}
    elsewhere = {"PRINT_EXPR", "IMPORT_STAR"}  # at the top of a file
    asynchronous = {"ASYNC_GEN_WRAP", "BEFORE_ASYNC_WITH", "END_ASYNC_FOR", "GET_AITER", "GET_ANEXT", "GET_AWAITABLE"}
    real = {n for n, code in dis.opmap.items() if code < 256 and not n.startswith("INSTRUMENTED")}
    assert real - set(observe._HANDLERS) <= internal | elsewhere | asynchronous


def test_a_python_that_is_not_known_is_never_replayed(monkeypatch):
    monkeypatch.setattr(observe, "NEWEST", (3, 10))
    f = duo.compile(lambda x: x * HOLDER.weight)
    x = duo.ones(2)
    assert [f(x).tolist() for _ in range(3)] == [[2.0, 2.0]] * 3
    assert f._last is None and "is not known to duo" in f.explain()


def test_frames_whose_instructions_are_not_told_are_not_replayed(monkeypatch):
    monkeypatch.setattr(hooks.Hooks, "_step", lambda self, frame, event, arg: None)
    f = duo.compile(lambda x: x * HOLDER.weight)
    x = duo.ones(2)
    assert [f(x).tolist() for _ in range(3)] == [[2.0, 2.0]] * 3
    assert f._last is None and "does not tell of the instructions" in f.explain()


def test_the_first_recording_of_a_process_sees_what_is_read():
    script = (
        "import duo\n"
        "settings = {'scale': 2.0}\n"
        "factor = 3.0\n"
        "def scaled(x):\n"
        "    return x * settings['scale'] * factor\n"
        "f = duo.compile(scaled)\n"
        "x = duo.ones(1)\n"
        "print([f(x).item(), f(x).item()])\n"
        "settings['scale'], factor = 5.0, 7.0\n"
        "print(f(x).item(), f.recordings)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[6.0, 6.0]", "35.0 2"]


def _slice_assigned(x):
    TABLE[0:1] = [TABLE[0] + 1.0]
    return x * TABLE[0]


def _slice_deleted(x):
    del HOLDER.items[0:1]
    return x * len(HOLDER.items)


def _class_pattern(x):
    match HOLDER:
        case SimpleNamespace(weight=weight):
            return x * weight


@pytest.mark.parametrize("function", [_slice_assigned, _slice_deleted, _class_pattern])
def test_changes_and_reads_without_a_name_are_culprits(function):
    f = duo.compile(function)
    for _ in range(2):
        f(duo.ones(2))
    assert f._last is None and "test_compile_watching.py:" in f.explain()


def _closures(factor):
    def set_factor(value):
        nonlocal factor
        factor = value

    def class_body(x):
        class Local:
            gain = factor * HOLDER.weight

        return x * Local.gain

    def made_function(x):
        return (lambda y: y * factor * HOLDER.weight)(x)

    def comprehension(x):
        return x * sum(factor * HOLDER.weight for _ in range(1))

    return [class_body, made_function, comprehension], set_factor


@pytest.mark.parametrize("k", range(3))
def test_what_is_made_inside_reads_a_closure(k):
    functions, set_factor = _closures(3.0)
    f = duo.compile(functions[k])
    x = duo.ones(1)
    assert [f(x).item() for _ in range(3)] == [6.0] * 3
    assert f.recordings == 1
    set_factor(5.0)
    assert f(x).item() == 10.0


def test_what_is_made_inside_assigns_a_closure():
    count = 0

    def function(x):
        def add():
            nonlocal count
            count += 1

        add()
        return x * 2

    f = duo.compile(function)
    for _ in range(3):
        f(duo.ones(1))
    assert count == 3 and "'count' of the enclosing function is assigned" in f.explain()


@pytest.fixture(autouse=True)
def _restored():
    table, items = TABLE[:], HOLDER.items[:]
    yield
    TABLE[:], HOLDER.items[:] = table, items
