"""Programs found on disk: a new process runs them without passes, emitters or LLVM, gives the same bits, and never takes a stale one."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from duo_backends.cache import disk_cache
from duo_backends.cpu import fingerprint as fingerprints
from duo_backends.cpu import saved
from duo_backends.cpu.backend import CpuBackend
from duo_ir import pipeline
from duo_ir.core import Builder, Loc
from duo_ir.errors import IndexOutOfRange
from duo_ir.ops import gather, matmul, mul
from duo_ir.ops import sum as reduce_sum
from duo_ir.types import TensorType, f32, i64

pytestmark = pytest.mark.skipif(fingerprints.fingerprint() is None, reason="programs are not kept on this system")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUO_CACHE_DIR", str(tmp_path / "cache"))


def build(line=7, rows=5):
    """sum over the columns of (x @ w) times a number, and rows of x by index."""
    builder = Builder("program")
    with builder:
        builder.loc = Loc.of("model.py", line)
        x, w = builder.parameter(TensorType(f32, (rows, 4))), builder.parameter(TensorType(f32, (4, 6)))
        index, scale = builder.parameter(TensorType(i64, (3,))), builder.parameter(TensorType(f32, ()))
        y = reduce_sum(matmul(x, w), axes=(1,))
        picked = gather(x, index, axes=(0,))
        return builder.build([y, picked, mul(scale, scale)])


SCALARS = (3,)


def compiled(function):
    return pipeline.compile(function, CpuBackend(), scalars=SCALARS).bind({})


def inputs(index=(0, 4, 2)):
    r = np.random.default_rng(0)
    arrays = [r.standard_normal((5, 4)), r.standard_normal((4, 6))]
    machine = CpuBackend()
    return [
        *[machine.from_numpy(a.astype(np.float32)) for a in arrays],
        machine.from_numpy(np.asarray(index, np.int64)),
        1.5,
    ]


def outputs(bound, given):
    return [
        b.read(t.dtype, t.static_shape()).tolist() for b, t in zip(bound.run(given), build().result_types, strict=True)
    ]


def test_a_stored_program_gives_the_same():
    function = build()
    assert saved.load(function, True, SCALARS) is None
    bound = compiled(function)
    saved.store(function, True, SCALARS, bound)
    found = saved.load(build(), True, SCALARS)
    assert found is not None and outputs(found, inputs()) == outputs(bound, inputs())
    assert found.givable == bound.givable and found.program.results == bound.program.results
    for n in (1, 2, 3, 64, 256):
        assert found.table.scratch(n) == bound.table.scratch(n)
    assert all(found.table.scratch(n) >= bound.table.scratch(n) for n in range(1, 257))
    for ours, theirs in zip(found.table.notes, bound.table.notes, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.description, ours.flops, ours.traffic) == (theirs.description, theirs.flops, theirs.traffic)


def test_a_program_without_kernels():
    builder = Builder("same")
    with builder:
        x = builder.parameter(TensorType(f32, (5, 4)))
        function = builder.build([x, x])
    saved.store(function, True, (), pipeline.compile(function, CpuBackend()).bind({}))
    given = inputs()[:1]
    assert saved.load(function, True, ()).run(given) == [*given, *given]


def test_lines_are_those_of_the_program_at_hand():
    saved.store(build(7), True, SCALARS, compiled(build(7)))
    for line in (7, 23):
        found = saved.load(build(line), True, SCALARS)
        assert {n.where for n in found.table.notes if n is not None} == {f"model.py:{line}"}
        with pytest.raises(IndexOutOfRange, match=f"model.py:{line}") as error:
            found.run(inputs(index=(0, 9, 2)))
        with pytest.raises(IndexOutOfRange) as wanted:
            compiled(build(line)).run(inputs(index=(0, 9, 2)))
        assert str(error.value) == str(wanted.value)


def test_what_differs_is_not_found(monkeypatch):
    function = build()
    saved.store(function, True, SCALARS, compiled(function))
    assert saved.load(build(rows=6), True, SCALARS) is None
    assert saved.load(function, False, SCALARS) is None
    assert saved.load(function, True, ()) is None
    with monkeypatch.context() as m:
        m.setenv("DUO_CPU", "x86-64-v3")
        assert saved.load(function, True, SCALARS) is None
    with monkeypatch.context() as m:
        m.setattr(saved, "fingerprint", lambda: "another version of duo")
        assert saved.load(function, True, SCALARS) is None
    for name, value in (("DUO_DUMP", "fuse"), ("DUO_VERIFY", "1"), ("DUO_CACHE_DIR", "off")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            assert saved.load(function, True, SCALARS) is None
            saved.store(function, True, SCALARS, compiled(function))
    assert saved.load(function, True, SCALARS) is not None


def test_a_missing_or_damaged_part_counts_as_absent(tmp_path):
    function = build()
    saved.store(function, True, SCALARS, compiled(function))
    objects = sorted((tmp_path / "cache").glob("??/*.o"))
    assert len(objects) > 2
    for path in objects:
        kept = path.read_bytes()
        for damage in (None, kept[:-1], kept[:60] + bytes([kept[60] ^ 1]) + kept[61:]):
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            found = saved.load(function, True, SCALARS)  # of files that it does not need: there
            if found is not None:
                assert outputs(found, inputs()) == outputs(compiled(function), inputs())
            path.write_bytes(kept)
    assert saved.load(function, True, SCALARS) is not None
    names = json.loads(disk_cache().get(saved._key(function, True, SCALARS)))["objects"]
    for name, _ in names:
        disk_cache()._path(name).unlink()
        assert saved.load(function, True, SCALARS) is None
        saved.store(function, True, SCALARS, compiled(function))


def test_sources_younger_than_the_process_are_not_trusted(monkeypatch):
    read = fingerprints.fingerprint.__wrapped__
    assert read() == fingerprints.fingerprint()
    monkeypatch.setattr(fingerprints, "_STARTED", 0.0)
    assert read() is None


SCRIPT = """
import sys
import numpy as np
import duo
from duo import nn, optim
duo.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))
opt = optim.Adam(model.parameters(), lr=0.01)
x, y = duo.randn(32, 8), duo.randint(0, 3, (32,))
@duo.compile
def step(x, y):
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    return loss
losses = [step(x, y).item().hex() for _ in range(5)]
losses.append(nn.functional.cross_entropy(model(x), y).item().hex())
compilers = ("llvmlite", "duo_ir.pipeline", "duo_backends.cpu.emit", "duo_backends.cpu.backend", "duo_backends.cpu.jit")
loaded = sorted(m for m in sys.modules if m in compilers)
print(losses, duo.debug.statistics().from_disk > 0, loaded)
"""


def test_a_second_process_needs_no_compiler(tmp_path):
    def run():
        script = tmp_path / "train.py"
        script.write_text(textwrap.dedent(SCRIPT))
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "DUO_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, str(script)], env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    first, second = run(), run()
    losses = first[: first.index("]") + 1]
    assert second == f"{losses} True []"
    assert first != second
