"""Every op of the vocabulary goes into an artefact, control flow too; what would call back into Python is refused with the line that asks for it."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import duo
from duo.aot.capture import source_of
from duo_backends.aot.pack import pack
from duo_backends.aot.source import Port, ProgramSource, Source
from duo_backends.aot.targets import target
from duo_ir.errors import DuoError
from duo_ir.interpret import interpret
from duo_ir.opdef import REGISTRY
from tests.aot.models import floats
from tests.aot.programs import Library, same_bits

sys.path.append(str(Path(__file__).parents[1] / "ir"))
from op_table import TABLE, Case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")


def one_case(row) -> Case:
    """The op's case with most elements, of the widest of its dtypes."""
    shapes, attrs = max(row.variants, key=lambda v: sum(int(np.prod(s)) for s in v[0]))
    return Case(row, row.dtypes[min(2, len(row.dtypes) - 1)], shapes, attrs)


def test_every_op(tmp_path):
    """One artefact with a program for each op; an op that comes new is in it as soon as it has its row in the op table."""
    made = {row.name: one_case(row) for row in TABLE}
    assert set(made) >= set(REGISTRY), set(REGISTRY) - set(made)
    programs = []
    for name, case in made.items():
        function = case.function()
        params = tuple([Port("input", f"x{k}") for k in range(len(function.params))])
        results = tuple([Port("output", f"y{k}") for k in range(len(function.results))])
        programs.append(ProgramSource(f"run_{name}", function, params, results))
    (tmp_path / "ops.duo").write_bytes(pack(Source("ops", tuple(programs), {}, {}), [target()], "a test"))
    loaded = duo.load_executable(tmp_path / "ops.duo")
    for name, case in made.items():
        arrays = case.arrays()
        got = loaded.programs[f"run_{name}"](*arrays)
        want = interpret(case.function(), *arrays)
        for a, b in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
            assert same_bits(a, b), str(case)


def newton(x, steps):
    """A loop whose length its data decide, with a branch in it."""

    def test(k, v, before):
        return (k < steps) & ((v - before).abs().max() > 1e-3)

    def body(k, v, before):
        after = (v + x / v) * 0.5
        return k + 1, duo.cond(k % 2 == 0, lambda: after, lambda: after + 0.0), v

    k, v, _ = duo.while_loop(test, body, (steps * 0, x, x * 0))
    return k, v


def nested(x, limit):
    """A loop in a loop, in a branch."""

    def rows():
        def outer(k, total):
            _, inner = duo.while_loop(lambda j, t: j < k, lambda j, t: (j + 1, t + x.sum(0)), (k * 0, total))
            return k + 1, inner.tanh()

        return duo.while_loop(lambda k, total: k < limit, outer, (limit * 0, x.mean(0)))[1]

    return duo.cond(x.sum() > 0, rows, lambda: duo.cond(limit > 2, lambda: x[0], lambda: -x[0]))


def scanned(x):
    """Running folds."""
    return x.cumsum(0), x.cumsum(1).cummax(0)[0], x.logcumsumexp(0)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_control_flow(tmp_path):
    count = lambda k: np.array(k)  # noqa: E731
    for program, specs, makers in (
        (newton, ["f32[n]", "i64[]"], [lambda n, k=k: [abs(floats(n, n)) + 1, count(k)] for k in (0, 1, 20)]),
        (nested, ["f32[n,40]", "i64[]"], [lambda n, k=k, s=s: [abs(floats(n, n, 40)) * s, count(k)] for k in (0, 1, 4) for s in (1, -1)]),
        (scanned, ["f32[n,40]"], [lambda n: [floats(n, n, 40)]]),
    ):  # fmt: skip
        library = Library.of(source_of(program, specs, "flow"), tmp_path)
        jobs = [(threads, {"n": n}, make(n)) for n in (1, 2, 50) for make in makers for threads in (1, 2)]
        for (threads, sizes, arrays), out in zip(jobs, library.run(jobs)):
            want = program(*map(duo.tensor, arrays))
            for a, b in zip(out, want if isinstance(want, tuple) else (want,), strict=True):
                assert same_bits(a, b.numpy()), (program.__name__, threads, sizes, arrays[1:])


def reads_item(x):
    return x * x.sum().item()


def reads_array(x):
    return x * duo.tensor(x.numpy())


def reads_list(x):
    return x * duo.tensor(x.tolist())


def decides(x):
    return x if x.sum() > 0 else -x


def counts(x):
    return x * int(x.sum())


def loops(x):
    return sum(row.sum() for row in x)


def asks_numpy(x):
    return duo.tensor(np.asarray(x))


def selects(x):
    return x[x > 0]


def distinct(x):
    return duo.unique(x)


def moves(x):
    return x.to("cuda")


REFUSED = {
    reads_item: "value", reads_array: "value", reads_list: "value", decides: r"duo\.cond", counts: "value", loops: "known only at run time",
    asks_numpy: "value", selects: "depend on the mask's values", distinct: "depend on values", moves: "cuda",
}  # fmt: skip


@pytest.mark.parametrize("program", REFUSED, ids=lambda f: f.__name__)
def test_what_asks_python_while_it_runs_is_refused_with_its_line(tmp_path, program):
    line = inspect.getsourcelines(program)[1] + 1
    with pytest.raises(DuoError, match=REFUSED[program]) as caught:
        duo.export(program, "f32[n,3]", path=tmp_path / "no.duo")
    assert f"test_vocabulary.py:{line}" in str(caught.value), str(caught.value)
    assert "session" not in str(caught.value).lower()
    assert list(tmp_path.iterdir()) == []
