"""C programs that use libraries: the bits of Python for every model and batch, no access beside an array, clean under memcheck and sanitizers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import numpy as np
import pytest

import duo
from duo.aot.capture import source_of
from tests.aot.models import MODELS, floats
from tests.aot.programs import HERE, Library

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
]


@pytest.mark.parametrize("name", MODELS)
def test_python_file_and_c_agree(tmp_path, name):
    """Batches of 1 to 9 on one and two threads: eager mode, the loaded file, and a C program in a process without Python have the same bits."""
    make, text, data = MODELS[name]
    model = make()
    wanted = {b: model(duo.tensor(data(b))).detach().numpy().tobytes() for b in range(1, 10)}
    jobs = [(threads, {"batch": b}, [data(b)]) for b in wanted for threads in (1, 2)]
    duo.export(model, text, path=tmp_path / "m.duo")
    files = {threads: duo.load_executable(tmp_path / "m.duo", threads=threads) for threads in (1, 2)}
    library = Library.of(source_of(model, [text], "m"), tmp_path)
    for (threads, sizes, (x,)), (y,) in zip(jobs, library.run(jobs)):
        assert y.tobytes() == wanted[sizes["batch"]] == files[threads](x).tobytes(), (threads, sizes)
    assert files[1](data(0)).size == 0
    assert files[2](data(9)[:1]).tobytes() == files[2](data(9))[:1].tobytes()
    assert dependencies(library.path) <= LIBC


# What a library may need; which of them there are depends on the C library's version.
LIBC = {"libc", "libm", "linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64"}


def dependencies(path) -> set[str]:
    """Names of what the dynamic linker loads for a file, without versions."""
    done = subprocess.run(["ldd", str(path)], capture_output=True, check=True, text=True)
    return {line.split()[0].rsplit("/", 1)[-1].split(".")[0] for line in done.stdout.splitlines()}


def test_libraries_and_their_programs_need_libc_alone(tmp_path):
    """Also what trains and what runs on several threads, and the program around them."""
    model = duo.nn.Linear(4, 3)
    optimizer = duo.optim.Adam(model.parameters())
    loss = duo.nn.functional.mse_loss
    duo.export_training(model, loss, optimizer, "f32[batch,4]", "f32[batch,3]", path=tmp_path / "libtrain.so")
    stress(tmp_path)
    for name in ("libtrain.so", "libone.so", "libtwo.so", "stress"):
        assert dependencies(tmp_path / name) <= {*LIBC, "libone", "libtwo", "libpthread"}, name
    assert ctypes.CDLL(str(tmp_path / "libtrain.so")).train_create


@pytest.mark.parametrize("target", ["native", "x86-64-v3"])
def test_under_sanitizers(tmp_path, target):
    make, text, data = MODELS["cnn"]
    library = Library.of(source_of(make(), [text], "m"), tmp_path, target)
    jobs = [(threads, {"batch": b}, [data(b)]) for b in (0, 1, 5) for threads in (1, 2)]
    for y, z in zip(library.run(jobs, "sanitized"), library.run(jobs)):
        assert y[0].tobytes() == z[0].tobytes()


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_under_memcheck(tmp_path, name):
    make, text, data = MODELS[name]
    library = Library.of(source_of(make(), [text], "m"), tmp_path, "x86-64-v3")
    jobs = [(threads, {"batch": b}, [data(b)]) for b, threads in ((1, 1), (3, 2))]
    checks = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--fair-sched=yes"]
    for y, z in zip(library.run(jobs, "plain", checks), library.run(jobs)):
        assert np.array_equal(y[0], z[0])


def stress(folder, flags=()) -> str:
    """The program `stress.c`, built."""
    duo.manual_seed(0)
    one = duo.nn.Sequential(duo.nn.Linear(64, 200), duo.nn.ReLU(), duo.nn.Linear(200, 64), duo.nn.LayerNorm(64))
    duo.export(one, "x: f32[rows,64]", path=folder / "libone.so", targets=["x86-64-v3" if flags else "native"])
    two = duo.nn.Sequential(duo.nn.Linear(64, 300), duo.nn.GELU(), duo.nn.Linear(300, 1), duo.nn.Flatten(0))
    duo.export(two, "x: f32[rows,64]", path=folder / "libtwo.so")
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", *flags, f"-I{folder}", f"-L{folder}"]
    options += [
        f"-Wl,-rpath,{folder}",
        str(HERE / "stress.c"),
        "-lone",
        "-ltwo",
        "-lpthread",
        "-o",
        str(folder / "stress"),
    ]
    subprocess.run(["gcc", *options], check=True)
    return str(folder / "stress")


@pytest.mark.parametrize("flags", [(), ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")], ids=["", "asan"])
def test_models_in_one_process(tmp_path, flags):
    quick = {"ASAN_OPTIONS": "quarantine_size_mb=1"}  # memory that is free counts as free
    done = subprocess.run([stress(tmp_path, flags)], capture_output=True, timeout=500, check=False, env=quick)
    assert done.returncode == 0, (done.stdout.decode()[-500:], done.stderr.decode()[-3000:])


@pytest.mark.parametrize("target", ["x86-64-v3", "native"])
def test_whole_vectors_that_do_not_fill_the_last_panel(tmp_path, target):
    """Strips wholly beyond the last row of a transposed matrix once read the rows behind it."""
    for n in (40, 80):
        text = ["f32[m,32]", f"f32[{n},32]", f"f32[{n}]"]
        library = Library.of(source_of(duo.nn.functional.linear, text, "p"), tmp_path, target)
        inputs = [floats(0, 5, 32), floats(1, n, 32), floats(2, n)]
        (out,) = library.run([(1, {"m": 5}, inputs)])
        assert out[0].tobytes() == duo.nn.functional.linear(*map(duo.tensor, inputs)).numpy().tobytes()
