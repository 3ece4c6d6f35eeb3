"""`duo compile`, `duo run`, `duo inspect`, `duo bench`, as a shell would call them."""

from __future__ import annotations

import ctypes
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import duo
from duo.aot.progress import Progress
from duo.cli import main
from tests.aot.models import MODELS, floats

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")
MODEL = """
import duo
from duo import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(nn.functional.dropout(self.a(x).relu(), 0.5, self.training))

def scaled(x, factor):
    return {"big": x * factor, "total": (x * factor).sum()}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def net():
    space: dict = {}
    exec(MODEL, space)
    duo.manual_seed(0)
    return space["Net"]().eval()


def test_compile_and_run(folder, capsys):
    assert main(["compile", "model.py:Net", "--input", "x: f32[batch,8]", "-o", "out", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [f["file"] for f in said["files"]] == ["out/net.duo"] and said["files"][0]["bytes"] > 1000
    np.save("x.npy", floats(0, 4, 8))
    assert main(["run", "out/net.duo", "--input", "x=x.npy", "--output", "y.npy"]) == 0
    assert (np.load("y.npy") == net()(duo.tensor(floats(0, 4, 8))).detach().numpy()).all()
    assert main(["run", "out/net.duo", "--input", "x.npy"]) == 0
    assert capsys.readouterr().out.startswith("output = [[")


def test_weights_from_a_checkpoint(folder):
    duo.manual_seed(9)
    model = net()
    duo.save(model.state_dict(), "w.safetensors")
    args = ["compile", "model.py:Net", "--input", "f32[2,8]", "--weights", "w.safetensors", "--name", "small"]
    assert main(args) == 0
    x = floats(1, 2, 8)
    assert (duo.load_executable("small.duo")(x) == model(duo.tensor(x)).detach().numpy()).all()


def test_inspect_and_bench(folder, capsys):
    main(["compile", "model.py:scaled", "--input", "f32[n,4]", "--input", "f32[]", "--target", "x86-64-v3"])
    capsys.readouterr()
    assert main(["inspect", "scaled.duo", "--size", "n=5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (program,) = facts["programs"]
    assert program["signature"] == "forward(x: f32[n,4], factor: f32[]) -> big: f32[n,4], total: f32[]"
    assert program["sizes"] == {"n": 5} and program["kernels"] and facts["code"][0]["target"] == "x86-64-v3"
    assert main(["inspect", "scaled.duo"]) == 0
    assert "kernels" in capsys.readouterr().out
    assert main(["bench", "scaled.duo", "--size", "n=3", "--seconds", "0.01", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["calls"] >= 10 and facts["sizes"] == {"n": 3} and facts["median_us"] > 0


@pytest.mark.parametrize("name", ["mlp", "lstm", "gpt"])
def test_the_memory_that_inspect_shows_is_what_a_call_takes(folder, capsys, name):
    """A caller's scratch memory of that size is enough, and one byte less is not."""
    make, spec, data = MODELS[name]
    model = make()
    duo.export(model, spec, path="m.duo")
    duo.export(model, spec, path="libm.so")
    library, loaded = ctypes.CDLL(str(folder / "libm.so")), [duo.load_executable("m.duo", threads=t) for t in (1, 2)]
    library.m_message.restype = ctypes.c_char_p
    shown = {}
    for threads, batch in itertools.product((1, 2), (1, 9)):
        x = data(batch)
        out = np.empty_like(loaded[0](x))
        assert main(["inspect", "m.duo", "--size", f"batch={batch}", "--threads", str(threads), "--json"]) == 0
        (program,) = json.loads(capsys.readouterr().out)["programs"]
        need = shown[threads, batch] = program["temporaries"]
        assert program["threads"] == threads and loaded[threads - 1].forward.scratch_bytes(batch=batch) == need
        handle, options = ctypes.c_void_p(), (ctypes.c_int64 * 5)(threads)
        assert library.m_create(options, ctypes.byref(handle)) == 0
        memory = np.full(need + 128, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        arguments = handle, ctypes.c_int64(batch), ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        for nbytes, code in ((need - 1, 5), (need, 0)):
            place = ctypes.c_void_p(memory.ctypes.data + start)
            assert library.m_set_scratch(handle, place, ctypes.c_int64(nbytes)) == 0
            assert library.m_forward(*arguments) == code
        assert f"these sizes need {need}" in library.m_message(handle).decode()  # of the first try
        assert (memory[start + need :] == 0xA5).all() and (memory[:start] == 0xA5).all()
        assert out.tobytes() == loaded[0](x).tobytes()
        library.m_destroy(handle)
    assert shown[1, 9] > shown[1, 1] and shown[2, 9] > shown[1, 9]


def test_training_and_a_file_compiled_again(folder):
    specs = ["--input", "x: f32[batch,8]", "--input", "y: i64[batch]"]
    assert (
        main(["compile", "model.py:Net", *specs, "--train", "cross_entropy", "--optimizer", "sgd", "--lr", "0.5"]) == 0
    )
    assert main(["compile", "net.duo", "--target", "x86-64-v3", "-o", "again"]) == 0
    first, second = duo.load_executable("net.duo"), duo.load_executable("again/net.duo", target="x86-64-v3")
    for k in range(2):
        x, y = floats(k, 6, 8), np.arange(6) % 3
        assert first.train_step(x, y) == second.train_step(x, y)
    first.save("c.safetensors")
    second.load("c.safetensors")
    assert first.get_state("lr") == 0.5


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_an_object_links_into_a_program(folder):
    main(["compile", "model.py:Net", "--input", "x: f32[batch,8]", "--emit", "obj,ir,llvm,asm"])
    assert "matmul" in (folder / "net.ir").read_text() and "@net_forward" in (folder / "net.ll").read_text()
    assert "net_forward:" in (folder / "net.s").read_text()
    (folder / "main.c").write_text(
        '#include <stdio.h>\n#include "net.h"\nstatic _Alignas(64) char weights[1 << 16];\nint main(void) {\n'
        '  FILE *f = fopen("net.weights", "rb");\n  if (!f || !fread(weights, 1, sizeof weights, f)) return 1;\n'
        "  net_options options = {0};\n  net *model;\n  float x[16], y[6];\n  for (int k = 0; k < 16; k++) x[k] = k / 8.f;\n"
        "  if (net_create(&options, &model) != NET_BAD_OPTION) return 2;\n  options.weights = weights;\n"
        "  if (net_create(&options, &model) || net_forward(model, 2, x, y)) return 3;\n"
        "  fwrite(y, sizeof y, 1, stdout);\n  net_destroy(model);\n  return 0;\n}\n"
    )
    subprocess.run(["gcc", "-std=c11", "-Wall", "-Werror", "main.c", "net.o", "-o", "main", "-lpthread"], check=True)
    done = subprocess.run(["./main"], capture_output=True, check=True)
    x = (np.arange(16) / 8).astype("f4").reshape(2, 8)
    assert done.stdout == net()(duo.tensor(x)).detach().numpy().tobytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "nowhere.py:f"], "no file 'nowhere.py'"),
        (["compile", "model.py"], "should be file.py:name"),
        (["compile", "model.py:Nothing"], "has no 'Nothing'"),
        (["compile", "model.py:Net", "--emit", "exe"], "does not know exe"),
        (["compile", "model.py:Net", "--input", "x: f32[batch,9]"], "needs as many elements"),
        (["compile", "model.py:Net", "--input", "f32[b,8]", "--train", "no_loss"], "no loss 'no_loss'"),
        (["compile", "model.py:scaled", "--train", "mse_loss", "--input", "f32[3]"], "is for a module"),
        (["compile", "model.py:Net"], "Net(x) needs a spec for each input, such as 'x: f32[batch,784]'; given: none"),
        (["compile", "model.py:scaled", "--input", "f32[3]"], "missing a required argument: 'factor'"),
        (["compile", "model.py:Net", "--input", "f32[b,8]", "--input", "f32[b]"], "too many positional arguments"),
        (["compile", "no.duo"], "no.duo: No such file"),
        (["compile", "no.duo", "--train", "mse_loss", "--lr", "1"], "--train, --lr is for a model in Python"),
        (["compile", "model.py:Net", "--input", "f32[b,8]", "--weights", "no.safetensors"], "no.safetensors: No such file"),
        (["compile", "model.py:Net", "--input", "f32[b,8]", "-o", "model.py"], "model.py: File exists"),
        (["inspect", "no.duo"], "no.duo: No such file"),
        (["run", "no.duo"], "no.duo: No such file"),
        (["bench", "no.duo"], "no.duo: No such file"),
        (["inspect", "model.py"], "not a .duo file"),
        (["run", "model.py"], "not a .duo file"),
    ],
)
def test_mistakes(folder, capsys, arguments, said):
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_mistakes_with_a_file(folder, capsys):
    duo.export(net(), "x: f32[batch,8]", path="net.duo")
    np.save("x.npy", floats(0, 4, 8))
    np.save("other.npy", floats(0, 4, 9))
    for arguments, said in (
        (["run", "net.duo"], "x: f32[batch,8] is missing: --input x=FILE.npy"),
        (["run", "net.duo", "--input", "no.npy"], "no.npy: No such file"),
        (["run", "net.duo", "--input", "model.py"], "model.py is not an array"),
        (["run", "net.duo", "--input", "other.npy"], "given with shape [4, 9]"),
        (["run", "net.duo", "--input", "y=x.npy"], "there is no input 'y'; there are x"),
        (["run", "net.duo", "--input", "x.npy", "--input", "x.npy"], "x.npy is one input too many; there are x"),
        (["run", "net.duo", "--input", "x.npy", "--output", "logits=y.npy"], "there is no output 'logits'; there are output"),
        (["run", "net.duo", "--input", "x.npy", "--threads", "-3"], "there must be one at least"),
        (["run", "net.duo", "--input", "x.npy", "--program", "back"], "there is no program 'back'; there are forward"),
        (["inspect", "net.duo", "--size", "btch=3"], "there is no free size 'btch'; there are batch"),
        (["bench", "net.duo", "--size", "batch=many"], "--size takes NAME=N, not 'batch=many'"),
    ):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and not out, (arguments, err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_long_work(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(after=60) as progress:
        progress.now("compiling net ...")
    assert screen.getvalue() == ""
    with Progress(after=0.01) as progress:
        progress.now("compiling net ...")
        while " s" not in screen.getvalue():
            time.sleep(0.001)
    shown = re.search(r"\r(compiling net \.\.\. \d+ s)\r( +)\r$", screen.getvalue())
    assert shown is not None and len(shown[1]) == len(shown[2])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(after=0.001) as progress:
        progress.now("compiling net ...")
        time.sleep(0.02)
    assert sys.stderr.getvalue() == ""
