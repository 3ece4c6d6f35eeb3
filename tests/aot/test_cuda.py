"""Code for GPUs in `.duo` files: on the emulated GPU `==` the CPU's code `==` Python, for any batch; files that lie; real cubins where nvcc is."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import (
    gpu_executable,  # noqa: F401  (so that a test of memory does not count its import)
    nn,
)
from duo.cli import main
from duo_backends.aot import container, cuda_artefact, gpu_targets, launches
from duo_backends.aot.formulas import Formulas
from duo_backends.cuda import compiler
from duo_ir.errors import ArgumentError, DeviceError, DuoError, FormatError, IndexOutOfRange, ShapeError
from tests.aot.models import MODELS, cnn, floats, gpt, mlp
from tests.cuda_emulator import build
from tests.cuda_emulator.support import needs_emulator
from tests.frontends.cuda_support import gpu  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux"), needs_emulator]
BOTH = ["x86-64-v3", "cuda:sm_90"]


class Counting(build.EmulatorCompiler):
    """The emulator's compiler, which counts."""

    runs = 0

    def compile(self, source: str, arch: int) -> bytes:
        Counting.runs += 1
        return super().compile(source, arch)


@pytest.fixture(autouse=True)
def emulated(gpu, monkeypatch):  # noqa: F811
    """'cuda:0' is the emulated GPU, an sm_90, and exporting finds its compiler."""
    monkeypatch.setattr(cuda_artefact, "find_compiler", Counting)


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gpt"])
def test_the_gpu_s_code_computes_what_the_cpu_s_does(tmp_path, name, monkeypatch, gpu):  # noqa: F811
    make, spec, data = MODELS[name]
    model = make()
    duo.export(model, spec, path=tmp_path / "m.duo", targets=BOTH)
    monkeypatch.setattr(compiler, "compile_cached", lambda *given: pytest.fail("something was compiled"))
    before = Counting.runs, gpu.compile_count
    there, here = duo.load_executable(tmp_path / "m.duo", device="cuda"), duo.load_executable(tmp_path / "m.duo")
    assert there.target == "cuda:sm_90" and repr(there.forward) == repr(here.forward)
    for b in (1, 2, 3, 5, 9):
        x = data(b)
        got = there(x)
        assert isinstance(got, np.ndarray) and got.tobytes() == here(x).tobytes(), b
    assert (Counting.runs, gpu.compile_count) == before
    assert got.tobytes() == model(duo.tensor(x)).detach().numpy().tobytes()


def test_tensors_stay_where_they_are(tmp_path):
    model = mlp()
    duo.export(model, "f32[batch,20]", path=tmp_path / "m.duo", targets=BOTH)
    loaded = duo.load_executable(tmp_path / "m.duo", device="cuda:0")
    x = floats(0, 4, 20)
    want = model(duo.tensor(x)).detach().numpy()
    out = loaded(duo.tensor(x).cuda())
    assert out.device == "cuda:0" and (out.cpu().numpy() == want).all()
    assert (loaded(duo.tensor(x).cuda()[1:3]).cpu().numpy() == want[1:3]).all()  # a view
    assert loaded(duo.tensor(x)).device == "cpu"
    with pytest.raises(ShapeError):
        loaded(duo.tensor(x).cuda()[0])
    with pytest.raises(ArgumentError, match="f64"):
        loaded(duo.tensor(x).cuda().double())
    assert loaded.forward.scratch_bytes(batch=4) > 0


def test_outputs_are_buffers_of_their_own(tmp_path):
    duo.export(lambda x: {"same": x, "y": x + 1, "again": x + 1, "row": x[0]}, "x: f32[n,3]", path=tmp_path / "o.duo", targets=BOTH)
    loaded = duo.load_executable(tmp_path / "o.duo", device="cuda")
    x = duo.tensor(floats(0, 4, 3)).cuda()
    before = x.cpu().numpy().copy()
    same, y, again, row = loaded(x)
    same += 1
    y *= 0
    assert (x.cpu().numpy() == before).all() and (again.cpu().numpy() == before + 1).all()
    assert (row.cpu().numpy() == before[0]).all()


def test_sizes_that_make_another_program_or_none(tmp_path):
    duo.export(lambda a, b: a @ b, "f32[m,k]", "f32[k,n]", path=tmp_path / "p.duo", targets=BOTH)
    here, there = (duo.load_executable(tmp_path / "p.duo", device=d) for d in ("cpu", "cuda"))
    for m, k, n in ((1, 1, 1), (3, 700, 1), (4, 700, 2), (1, 5, 3), (0, 4, 2)):
        a, b = floats(0, m, k), floats(1, k, n)
        assert there(a, b).tobytes() == here(a, b).tobytes() == (duo.tensor(a) @ duo.tensor(b)).numpy().tobytes(), (m, k, n)
    duo.export(lambda x: x[2:] + x[:-2], "f32[n]", path=tmp_path / "s.duo", targets=["cuda:sm_90"])
    there = duo.load_executable(tmp_path / "s.duo", device="cuda")
    assert len(there(floats(0, 5))) == 3
    with pytest.raises(ShapeError, match=r"this program needs|negative size"):
        there(floats(0, 1))


F = nn.functional
FREE = {
    "softmax": (lambda x: F.softmax(x, -1), ["f32[m,k,n]"], lambda m, k, n: [(m, k, n)]),
    "product": (lambda a, b: a @ b, ["f32[m,k]", "f32[k,n]"], lambda m, k, n: [(m, k), (k, n)]),
    "sort": (lambda x: x.sort(1)[0], ["f32[m,k]"], lambda m, k, n: [(m, k)]),
    "running": (lambda x: x.cumsum(1), ["f32[m,k]"], lambda m, k, n: [(m, k)]),
    "sum": (lambda x: x.sum(), ["f32[m,k]"], lambda m, k, n: [(m, k)]),
    "convolution": (lambda x: F.conv1d(x, x.new_ones(4, 2, 3) / 7, padding=1), ["f32[m,2,k]"], lambda m, k, n: [(m, 2, k)]),
    "extremum": (lambda x: x.argmax(1), ["f32[m,k]"], lambda m, k, n: [(m, k)]),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), ["f32[m,k,16]"], lambda m, k, n: [(m, k, 16)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_free_sizes_from_none_to_more_than_a_chunk(tmp_path, name):
    function, specs, shapes = FREE[name]
    duo.export(function, *specs, path=tmp_path / "f.duo", targets=BOTH)
    programs = [duo.load_executable(tmp_path / "f.duo", device=d) for d in ("cpu", "cuda")]
    for sizes in ((0, 3, 2), (1, 1, 1), (2, 0, 3), (3, 5, 1), (4, 1, 2), (2, 1100, 3), (7, 33, 2)):
        arrays = [floats(n, *shape) for n, shape in enumerate(shapes(*sizes))]
        found = []
        for program in programs:
            try:
                found.append(program(*arrays).tobytes())
            except ShapeError as error:  # sizes that the program is not for: told alike
                found.append(str(error))
        assert found[0] == found[1], sizes


def test_states_advance_and_failures_leave_them(tmp_path):
    duo.manual_seed(3)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    duo.export(model, "f32[batch,6]", path=tmp_path / "t.duo", targets=BOTH)
    here, there = (duo.load_executable(tmp_path / "t.duo", device=d) for d in ("cpu", "cuda"))
    for step in range(3):
        x = floats(step, 4 + step, 6)
        assert here(x).tobytes() == there(x).tobytes(), step
    assert here.states and all((here.get_state(n) == there.get_state(n)).all() for n in here.states)
    name = next(n for n in there.states if n.endswith("running_mean"))
    there.set_state(name, np.arange(6))
    assert (there.get_state(name) == np.arange(6)).all()
    with pytest.raises(ArgumentError, match="no training step"):
        there.init(0)


def test_control_flow(tmp_path):
    def steps(x, n):
        _, v = duo.while_loop(lambda k, v: k < n, lambda k, v: (k + 1, v * 2 + 1), (n * 0, x))
        return duo.cond(v.sum() > 10, lambda: v, lambda: -v)

    duo.export(steps, "i32[m]", "i64[]", path=tmp_path / "w.duo", targets=["cuda:sm_90"])
    loaded = duo.load_executable(tmp_path / "w.duo", device="cuda")
    for m, n in ((1, 0), (3, 2), (5, 7)):
        x = np.arange(m, dtype="i4")
        assert (loaded(x, np.int64(n)) == steps(duo.tensor(x), duo.tensor(n)).numpy()).all(), (m, n)


def test_an_index_out_of_range_names_the_line(tmp_path):
    duo.export(gpt(), "i64[batch,12]", path=tmp_path / "g.duo", targets=["cuda:sm_90"])
    loaded = duo.load_executable(tmp_path / "g.duo", device="cuda")
    good = loaded(np.zeros((2, 12), "i8"))
    with pytest.raises(IndexOutOfRange, match=r"models\.py:\d+: index 99 is out of range for axis 0, which has 40"):
        loaded(np.full((2, 12), 99))
    assert (loaded(np.zeros((2, 12), "i8")) == good).all()


def test_a_session_s_fetches(tmp_path):
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, 8], name="x")
        y = tf.layers.dense(x, 3, tf.nn.relu)
        session.run(tf.global_variables_initializer())
        tf.export(session, {"y": y}, [x], tmp_path / "s.duo", targets=BOTH)
        loaded = duo.load_executable(tmp_path / "s.duo", device="cuda")
        assert (loaded(floats(5, 5, 8)) == session.run(y, {x: floats(5, 5, 8)})).all()


def test_weights_are_there_once(tmp_path):
    model = nn.Linear(300, 300)
    sizes = {}
    for name, targets in (("one", BOTH[:1]), ("more", [*BOTH, "cuda:sm_80"])):
        duo.export(model, "f32[batch,300]", path=tmp_path / f"{name}.duo", targets=targets)
        sections = container.read((tmp_path / f"{name}.duo").read_bytes(), "m").sections
        sizes[name] = sum(s.size for s in sections if s.kind == "weights")
    assert sizes["one"] == sizes["more"] > 4 * 300 * 300
    assert sum(s.kind == "launch" for s in sections) == 2
    duo.export(cnn(), "f32[batch,1,14,14]", path=tmp_path / "c.duo", targets=BOTH)  # the CPU's convolutions read theirs in panels
    x = floats(0, 2, 1, 14, 14)
    assert (duo.load_executable(tmp_path / "c.duo", device="cuda", verify=True)(x) == duo.load_executable(tmp_path / "c.duo")(x)).all()


def test_which_code_a_gpu_takes(tmp_path, monkeypatch):
    model, x = mlp(), floats(0, 3, 20)
    want = model(duo.tensor(x)).detach().numpy()
    duo.export(model, "f32[batch,20]", path=tmp_path / "m.duo", targets=["cuda:sm_80", "cuda:sm_90", "cuda:sm_100"])
    assert duo.load_executable(tmp_path / "m.duo", target="cuda:sm_90").target == "cuda:sm_90"
    for other in ("cuda:sm_80", "cuda:sm_100", "cuda:sm_1"):
        with pytest.raises(DeviceError, match=f"no code for '{other}' that this GPU, sm_90, can run"):
            duo.load_executable(tmp_path / "m.duo", device="cuda", target=other)
    assert (duo.load_executable(tmp_path / "m.duo")(x) == want).all()  # the CPU compiles it from its text
    duo.export(model, "f32[batch,20]", path=tmp_path / "old.duo", targets=["cuda:sm_80"])
    loaded = duo.load_executable(tmp_path / "old.duo", device="cuda")
    assert loaded.target == "compiled here" and (loaded(x) == want).all()
    monkeypatch.setattr(cuda_artefact, "find_compiler", _none)
    with pytest.raises(DeviceError, match=r"no code for cuda:0, which is cuda:sm_90, and it cannot be compiled here.*NVRTC"):
        duo.load_executable(tmp_path / "old.duo", device="cuda")
    with pytest.raises(DeviceError, match=r"target cuda:sm_90: .*neither is found"):
        duo.export(model, "f32[batch,20]", path=tmp_path / "no.duo", targets=["cuda:sm_90"])
    assert not (tmp_path / "no.duo").exists()


def _none():
    raise DeviceError("compiling for a GPU needs NVRTC (libnvrtc) or nvcc, and neither is found")


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"'cuda:sm_91' is not known; of GPUs there are cuda:sm_80"):
        duo.export(mlp(), "f32[2,20]", path=tmp_path / "m.duo", targets=["cuda:sm_91"])
    with pytest.raises(ArgumentError, match=r"libm\.so is code for a CPU; code for cuda:sm_90 goes into a \.duo file"):
        duo.export(mlp(), "f32[2,20]", path=tmp_path / "libm.so", targets=["cuda:sm_90"])
    model = nn.Linear(4, 2)
    with pytest.raises(ArgumentError, match="target cuda:sm_90: a training step"):
        duo.export_training(
            model, nn.functional.mse_loss, duo.optim.SGD(model.parameters(), lr=0.1), "f32[b,4]", "f32[b,2]",
            path=tmp_path / "t.duo", targets=BOTH,
        )  # fmt: skip
    monkeypatch.setitem(gpu_targets._DEVICES, 86, (84, 20))  # a GPU whose blocks have too little shared memory for attention
    attend = nn.functional.scaled_dot_product_attention
    with pytest.raises(ArgumentError, match=r"test_cuda\.py:\d+ cannot be compiled for cuda:sm_86: attention in f64"):
        duo.export(lambda q: attend(q, q, q), "f64[2,9,16]", path=tmp_path / "a.duo", targets=["cuda:sm_86"])
    assert list(tmp_path.iterdir()) == []


def test_numerics_are_named(tmp_path):
    for mode in ("strict", "fast"):
        with duo.numerics(mode):
            duo.export(nn.Linear(64, 64), "f32[b,64]", path=tmp_path / "n.duo", targets=["cuda:sm_90"])
        (section,) = [s for s in container.read((tmp_path / "n.duo").read_bytes(), "n").sections if s.kind == "launch"]
        assert section.about["numerics"] == mode
    got, want = (duo.load_executable(tmp_path / "n.duo", device=d)(floats(0, 40, 64)) for d in ("cuda", "cpu"))
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)  # tf32 has 10 bits


# ---------------------------------------------------------------------------------------------------------- commands
def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text("import duo\n\ndef scaled(x, w):\n    return (x @ w).relu() * 2\n")
    inputs = ["--input", "x: f32[n,8]", "--input", "w: f32[8,3]"]
    assert main(["compile", "model.py:scaled", *inputs, "--target", "x86-64-v3", "--target", "cuda:sm_90"]) == 0
    np.save("x.npy", floats(0, 4, 8))
    np.save("w.npy", floats(1, 8, 3))
    for device in ("cpu", "cuda"):
        assert main(["run", "scaled.duo", "--device", device, "--input", "x.npy", "--input", "w.npy", "--output", f"{device}.npy"]) == 0
    assert (np.load("cpu.npy") == np.load("cuda.npy")).all()
    capsys.readouterr()
    assert main(["inspect", "scaled.duo", "--size", "n=5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["gpus"]
    assert found["target"] == "cuda:sm_90" and found["numerics"] == "strict" and found["compiler"] == "emulator"
    assert "blocks of" in found["launches"][0] and "model.py:4" in found["launches"][0]
    assert main(["inspect", "scaled.duo"]) == 0 and "code for cuda:sm_90, strict numerics" in capsys.readouterr().out
    assert main(["bench", "scaled.duo", "--device", "cuda", "--size", "n=3", "--seconds", "0.01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "cuda:sm_90"
    assert main(["compile", "model.py:scaled", *inputs, "--target", "cuda:sm_90", "--emit", "so"]) == 1
    assert "code for cuda:sm_90 goes into a .duo file" in capsys.readouterr().err
    assert main(["compile", "model.py:scaled", *inputs, "--target", "cuda:sm_90", "-o", "alone"]) == 0
    capsys.readouterr()
    assert main(["inspect", "alone/scaled.duo"]) == 0 and "cuda:sm_90" in capsys.readouterr().out
    assert main(["compile", "alone/scaled.duo", "--target", "x86-64-v3", "-o", "again"]) == 0
    assert duo.load_executable("again/scaled.duo").target == "x86-64-v3"


# ------------------------------------------------------------------------------------------------------ files that lie
@pytest.fixture(scope="module")
def content(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_artefact, "find_compiler", build.EmulatorCompiler)
        path = tmp_path_factory.mktemp("aot") / "m.duo"
        duo.export(mlp(), "f32[batch,20]", path=path, targets=["cuda:sm_90"])
    return path.read_bytes()


def rewritten(content: bytes, plan=None, about=None) -> bytes:
    """The file with another launch plan, or other things said of it; all digests are right."""
    manifest = container.read(content, "m")
    sections = []
    for s in manifest.sections:
        part, said = bytes(container.section_bytes(content, s, "m")), dict(s.about)
        if s.kind == "launch":
            row = json.loads(part)
            if plan is not None:
                plan(row)
            part = json.dumps(row).encode()
            if about is not None:
                about(said)
        sections.append((s.kind, part, said))
    length = struct.unpack_from("<Q", content, 16)[0]
    whole = json.loads(content[64 : 64 + length])
    return container.write(manifest.name, manifest.producer, whole["programs"], whole["states"], sections)


def first(row):
    return row["programs"][0]


def launch(row):
    return next(e for e in first(row)["code"] if e[0] == "launch")


def put(where, at, value):
    return lambda row: where(row).__setitem__(at, value)


LIES = {
    "no list of programs": lambda row: row.update(programs=7),
    "no programs": lambda row: row.update(programs=[]),
    "another program": put(first, "name", "backward"),
    "other sizes": lambda row: first(row).update(dims=["batch", "more"], least={"batch": 0, "more": 0}),
    "an absurd grid": put(launch, 3, 1 << 40),
    "a negative grid": put(launch, 3, -1),
    "a block too large": put(launch, 4, 4096),
    "no threads": put(launch, 4, 0),
    "shared memory beyond the device's": put(launch, 5, 1 << 30),
    "a kernel that is not there": put(launch, 2, "duo_nothing"),
    "a kernel without a name": put(launch, 2, 7),
    "a module that is not there": put(launch, 1, 99),
    "arguments that are not there": put(launch, 7, 1 << 20),
    "a step that is not there": put(launch, 8, 1 << 20),
    "a launch cut short": lambda row: launch(row).pop(),
    "an unknown instruction": put(launch, 0, "system"),
    "a jump to nowhere": lambda row: first(row)["code"].insert(0, ["jump", 1 << 20]),
    "no end": lambda row: first(row)["code"].pop(),
    "an offset past the end": lambda row: first(row)["words"].__setitem__(0, [1, 1 << 40]),
    "a negative offset": lambda row: first(row)["words"].__setitem__(0, [4, -64]),
    "a base that is not there": lambda row: first(row)["words"].__setitem__(0, [4000, 0]),
    "status beyond its words": lambda row: first(row)["words"].__setitem__(0, [3, 1 << 30]),
    "a copy beyond its memory": lambda row: first(row)["code"].insert(0, ["copy", 0, 0, 1 << 40]),
    "an arena beyond all memory": put(first, "arena", 1 << 50),
    "a negative arena": put(first, "arena", -64),
    "a node of later": lambda row: first(row)["nodes"].insert(0, ["add", [5], 1]),
    "an unknown operation": lambda row: first(row)["nodes"].append(["pow", 10, 100]),
    "an operation without operands": lambda row: first(row)["nodes"].append(["add", 1]),
    "a size of text": put(first, "scratch", "many"),
    "a slot that is not there": lambda row: first(row)["results"][0].__setitem__(0, 1 << 20),
    "a weight that is not there": lambda row: next(p for p in first(row)["params"] if p[0] == "weight").__setitem__(1, "zzz"),
    "a weight of another shape": lambda row: next(t for t, p in zip(first(row)["inputs"], first(row)["params"]) if p[0] == "weight").__setitem__(1, [1 << 30]),
    "an input of another number": lambda row: next(p for p in first(row)["params"] if p[0] == "input").__setitem__(1, 5),
    "an input of more": lambda row: next(t for t, p in zip(first(row)["inputs"], first(row)["params"]) if p[0] == "input").__setitem__(1, [1 << 20, 1 << 10]),
    "a dtype": lambda row: first(row)["inputs"][0].__setitem__(0, "f128"),
    "a state": lambda row: first(row)["results"][0].__setitem__(1, "state"),
    "nesting": put(first, "nodes", json.loads("[" * 500 + "]" * 500)),
}  # fmt: skip
ABOUT = {
    "modules beyond": {"modules": [99]},
    "modules of another kind": {"modules": [0]},
    "no modules": {"modules": None},
    "weights beyond": {"weights": [-1]},
    "weights of another kind": {"weights": [1]},
    "another name than arch": {"arch": 80},
    "arch of text": {"arch": "90"},
}


@pytest.mark.parametrize("name", [*LIES, *ABOUT])
def test_plans_that_lie(tmp_path, content, name, gpu):  # noqa: F811
    """Refused before a kernel runs, and without memory for what they say."""
    if name in LIES:
        bad = rewritten(content, plan=LIES[name])
    else:
        bad = rewritten(content, about=lambda said: said.update(ABOUT[name]))
    (tmp_path / "bad.duo").write_bytes(bad)
    gpu.runtime.synchronize()
    before, held = gpu.runtime.launches + gpu.runtime.replays, gpu.runtime.pool.statistics.reserved
    tracemalloc.start()
    with pytest.raises((FormatError, ShapeError, DeviceError, ArgumentError)):
        duo.load_executable(tmp_path / "bad.duo", device="cuda")(floats(0, 3, 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert gpu.runtime.launches + gpu.runtime.replays == before
    assert peak < 8 * len(bad) + (1 << 20) and gpu.runtime.pool.statistics.reserved - held < 8 * len(bad) + (8 << 20)


def test_the_file_rewritten_as_it_is_runs(tmp_path, content):
    (tmp_path / "m.duo").write_bytes(rewritten(content))
    assert (duo.load_executable(tmp_path / "m.duo", device="cuda")(floats(0, 3, 20)) == mlp()(duo.tensor(floats(0, 3, 20))).detach().numpy()).all()


def test_damage_is_seen_before_anything_is_loaded(tmp_path, content, monkeypatch):
    sections = container.read(content, "m").sections
    monkeypatch.setattr(launches.CudaCode, "_load", lambda *given: pytest.fail("it was loaded"))
    for kind in ("launch", "cubin"):
        where = next(s for s in sections if s.kind == kind)
        for at in (0, where.size // 2, where.size - 1):
            out = bytearray(content)
            out[where.offset + at] ^= 1
            (tmp_path / "bad.duo").write_bytes(out)
            with pytest.raises(FormatError, match=rf"bad\.duo is damaged: its {kind} is not what was written"):
                duo.load_executable(tmp_path / "bad.duo", device="cuda")


def test_a_plan_mutated_at_random_is_refused_or_read(content):
    rng = np.random.default_rng(0)
    (where,) = [s for s in container.read(content, "m").sections if s.kind == "launch"]
    text = bytes(container.section_bytes(content, where, "m"))
    read = 0
    for _ in range(400):
        out = bytearray(text)
        at = int(rng.integers(len(out)))
        out[at : at + int(rng.integers(3))] = rng.choice(np.frombuffer(b'[]{},:"0123456789-x', "u1"), int(rng.integers(4))).tobytes()
        try:
            for plan in launches.read_launches(bytes(out), 1):
                plan.bind(dict.fromkeys(plan.dims, 3), dict.fromkeys(plan.symbols), 1 << 17)
            read += 1
        except DuoError:
            continue
    assert 0 < read < 400


def test_numbers_that_explode_have_no_value():
    nodes = [["dim", "n"], *[["mul", [k], [k]] for k in range(90)], ["floordiv", 1, [0]]]
    values = Formulas(nodes, ["n"]).values({"n": 10})
    assert values.of([1]) == 100 and values.of([91]) == 0
    with pytest.raises(ShapeError, match="too large"):
        values.of([90])
    with pytest.raises(ShapeError, match="too large"):
        Formulas(nodes, ["n"]).values({"n": 0}).of([91])


# ------------------------------------------------------------------------------------------------------------ real nvcc
@pytest.mark.skipif(compiler.find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gpt"])
def test_nvcc_makes_the_cubins_of_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(cuda_artefact, "find_compiler", lambda: compiler.Nvcc(compiler.find_nvcc()))
    make, spec, _ = MODELS[name]
    duo.export(make(), spec, path=tmp_path / "m.duo", targets=["cuda:sm_80", "cuda:sm_90"])
    content = (tmp_path / "m.duo").read_bytes()
    manifest = container.read(content, "m")
    for s in [s for s in manifest.sections if s.kind == "launch"]:
        modules = [bytes(container.section_bytes(content, manifest.sections[n], "m")) for n in s.about["modules"]]
        assert "nvcc" in s.about["compiler"] and modules
        for module in modules:
            assert module[:4] == b"\x7fELF" and struct.unpack_from("<H", module, 18)[0] == 190  # EM_CUDA
            assert s.about["arch"] in struct.unpack_from("<4B", module, 48)  # of e_flags: sm_80 or sm_90
        plans = launches.read_launches(bytes(container.section_bytes(content, s, "m")), len(modules))
        for plan in plans:
            assert all(symbol.encode() in modules[n] for n, symbol in plan.symbols)


def test_loading_takes_nothing_of_llvm(tmp_path):
    duo.export(mlp(), "f32[batch,20]", path=tmp_path / "m.duo", targets=["cuda:sm_90"])
    program = f"""
import sys
import duo
from duo import runtime
from duo_backends.cuda.backend import CudaBackend
from tests.cuda_emulator.support import driver
class No:
    unit, version = 1, "none"
    def compile(self, source, arch): raise SystemExit("something was compiled")
runtime.use_backend("cuda:0", CudaBackend(driver=driver(), compiler=No()))
net = duo.load_executable({str(tmp_path / "m.duo")!r}, device="cuda")
import numpy as np
assert net(np.zeros((2, 20), "f4")).shape == (2, 10)
assert "llvmlite" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
