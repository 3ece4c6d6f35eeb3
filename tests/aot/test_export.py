"""Artefacts are the program they were made of: Python `==` the `.duo` file `==` a C program, for any batch and number of threads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo_ir.errors import ArgumentError, DeviceError, FormatError, IndexOutOfRange, ShapeError
from tests.aot.models import floats, gpt, mlp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")


def test_inputs_and_outputs(tmp_path):
    def both(x, scale):
        return {"sum": (x * scale).sum(1), "same": x, "twice": x * scale, "again": x * scale}

    duo.export(both, "f32[n,k]", "f32[]", path=tmp_path / "both.duo")
    loaded = duo.load_executable(tmp_path / "both.duo")
    assert str(loaded.forward).startswith("forward(x: f32[n,k], scale: f32[]) -> sum: f32[n], same: f32[n,k]")
    x = floats(0, 4, 6)
    total, same, twice, again = loaded(x.T.copy().T, np.float32(2))  # not contiguous
    assert (same == x).all() and (twice == x * 2).all() and (again == twice).all()
    assert total.tobytes() == (duo.tensor(x) * 2).sum(1).numpy().tobytes()
    out = loaded(duo.tensor(x), 2.0)
    assert all(isinstance(t, duo.Tensor) for t in out)
    with pytest.raises(ArgumentError, match="takes 2 inputs"):
        loaded(x)
    with pytest.raises(ArgumentError, match="given as float64"):
        loaded(x.astype("f8"), 1.0)
    with pytest.raises(ShapeError, match="given with shape"):
        loaded(x[0], 1.0)


def test_fixed_sizes_and_those_that_must_agree(tmp_path):
    duo.export(lambda a, b: a @ b, "f32[m,k]", "f32[k,3]", path=tmp_path / "p.duo")
    loaded = duo.load_executable(tmp_path / "p.duo")
    a, b = floats(0, 5, 4), floats(1, 4, 3)
    assert (loaded(a, b) == (duo.tensor(a) @ duo.tensor(b)).numpy()).all()
    with pytest.raises(ShapeError, match=r"b: f32\[k,3\] is given with shape \[5, 3\]: axis 0 is 5, not 4; k=4, as axis 1 of a is"):
        loaded(a, floats(1, 5, 3))
    with pytest.raises(ShapeError, match=r"axis 1 is 2, not 3$"):
        loaded(a, floats(1, 4, 2))
    with pytest.raises(ShapeError, match="which has 1 axes, not 2"):
        loaded(a[0], b)


def test_an_index_out_of_range_names_the_line_and_leaves_the_model_usable(tmp_path):
    duo.export(gpt(), "i64[batch,12]", path=tmp_path / "g.duo")
    loaded = duo.load_executable(tmp_path / "g.duo")
    good = loaded(np.zeros((2, 12), "i8"))
    with pytest.raises(IndexOutOfRange, match=r"models\.py:\d+: index 99 is out of range for axis 0, which has 40"):
        loaded(np.full((2, 12), 99))
    assert (loaded(np.zeros((2, 12), "i8")) == good).all()


def test_states_advance_in_the_artefact_as_in_the_module(tmp_path):
    duo.manual_seed(3)
    model = duo.nn.Sequential(duo.nn.BatchNorm1d(6), duo.nn.Dropout(0.5)).train()
    duo.export(model, "f32[batch,6]", path=tmp_path / "train.duo")
    loaded = duo.load_executable(tmp_path / "train.duo")
    for step in range(3):
        x = floats(step, 4 + step, 6)
        assert (loaded(x) == model(duo.tensor(x)).detach().numpy()).all(), step


def test_a_session_s_fetches(tmp_path):
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [None, 8], name="x")
        y = tf.layers.dense(tf.layers.dense(x, 16, tf.nn.relu), 3, name="out")
        session.run(tf.global_variables_initializer())
        tf.export(session, {"y": y}, [x], tmp_path / "s.duo")
        loaded = duo.load_executable(tmp_path / "s.duo")
        assert repr(loaded.forward) == "forward(x: f32[batch,8]) -> y: f32[batch,3]"
        for b in (1, 2, 5):
            assert (loaded(floats(b, b, 8)) == session.run(y, {x: floats(b, b, 8)})).all()


def test_other_cpus(tmp_path, monkeypatch):
    model = mlp()
    duo.export(model, "f32[batch,20]", path=tmp_path / "m.duo", targets=["x86-64-v3", "aarch64-linux"])
    x = floats(0, 3, 20)
    want = model(duo.tensor(x)).detach().numpy()
    assert (duo.load_executable(tmp_path / "m.duo")(x) == want).all()
    with pytest.raises(DeviceError, match="no code for 'x86-64-v4'"):
        duo.load_executable(tmp_path / "m.duo", target="x86-64-v4")
    monkeypatch.setattr("duo.executable.has_features", lambda needs: False)
    loaded = duo.load_executable(tmp_path / "m.duo")
    assert loaded.target == "compiled here"
    assert (loaded(x) == want).all()


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ArgumentError, match="is not a spec"):
        duo.spec("float32 of 3")
    with pytest.raises(ArgumentError, match="not known"):
        duo.export(mlp(), "f32[2,20]", path=tmp_path / "m.duo", targets=["z80"])
    with pytest.raises(ArgumentError, match="eager tensor"):
        duo.export(lambda x: duo.ones(3), "f32[2]", path=tmp_path / "m.duo")
    with pytest.raises(ArgumentError, match="is int"):
        duo.export(lambda x: 3, "f32[2]", path=tmp_path / "m.duo")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused(tmp_path):
    duo.export(mlp(), "f32[batch,20]", path=tmp_path / "m.duo")
    content = (tmp_path / "m.duo").read_bytes()
    for bad in (b"", content[:40], content[:-1], content[:100] + b"?" + content[101:], b"PK" + content[2:]):
        (tmp_path / "bad.duo").write_bytes(bad)
        with pytest.raises(FormatError, match=r"bad\.duo"):
            duo.load_executable(tmp_path / "bad.duo")


def test_a_missing_output_is_told_before_anything_changes(tmp_path):
    norm = duo.nn.BatchNorm1d(3).train()
    duo.export(lambda x: {"same": x, "y": norm(x)}, "x: f32[n,3]", path=tmp_path / "libnorm.so")
    library = ctypes.CDLL(str(tmp_path / "libnorm.so"))
    library.norm_state.restype = ctypes.c_void_p
    model, x, y = ctypes.c_void_p(), floats(0, 4, 3), np.zeros((4, 3), "f4")
    assert library.norm_create(None, ctypes.byref(model)) == 0
    name = b"norm.running_mean" if library.norm_state(model, b"norm.running_mean", None) else b"running_mean"
    before = ctypes.string_at(library.norm_state(model, name, None), 12)
    given = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
    assert library.norm_forward(model, ctypes.c_int64(4), given[0], None, given[1]) == 1
    assert ctypes.string_at(library.norm_state(model, name, None), 12) == before
    assert (
        library.norm_forward(model, ctypes.c_int64(4), *[ctypes.c_void_p(a.ctypes.data) for a in (x, x.copy(), y)]) == 0
    )
    assert ctypes.string_at(library.norm_state(model, name, None), 12) != before
    library.norm_destroy(model)


PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include "mlp.h"
int main(void) {
    mlp *model;
    float x[9 * 20], y[9 * 10];
    mlp_options options = {0};
    if (mlp_create(NULL, NULL) != MLP_NULL_ARGUMENT) return 1;
    for (options.threads = 1; options.threads <= 2; options.threads++) {
        if (mlp_create(&options, &model) != MLP_OK) return 2;
        for (int64_t b = 1; b <= 9; b++) {
            for (int k = 0; k < b * 20; k++) x[k] = (float)((k * 37 + b) % 101) / 50 - 1;
            if (mlp_forward(model, b, x, y) != MLP_OK) return 3;
            fwrite(y, sizeof *y, b * 10, stdout);
        }
        if (mlp_forward(model, -1, x, y) != MLP_BAD_SIZE) return 4;
        fprintf(stderr, "%s\n", mlp_message(model));
        if (mlp_forward(model, INT64_MAX, x, y) != MLP_BAD_SIZE) return 5;
        if (mlp_forward(model, 3, NULL, y) != MLP_NULL_ARGUMENT) return 6;
        fprintf(stderr, "%s\n", mlp_message(model));
        int64_t bytes = mlp_forward_scratch_bytes(model, 9);
        if (bytes <= 0 || mlp_forward_scratch_bytes(model, -9) != -MLP_BAD_SIZE) return 7;
        void *scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (mlp_set_scratch(model, (char *)scratch + 1, bytes - 1) != MLP_BAD_OPTION) return 8;
        if (mlp_set_scratch(model, scratch, 64) != MLP_OK || mlp_forward(model, 9, x, y) != MLP_SMALL_SCRATCH) return 9;
        if (mlp_set_scratch(model, scratch, bytes) != MLP_OK || mlp_forward(model, 9, x, y) != MLP_OK) return 10;
        fwrite(y, sizeof *y, 90, stdout);
        mlp_destroy(model);
        free(scratch);
    }
    mlp_destroy(NULL);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_c_program(tmp_path):
    model = mlp()
    duo.export(model, "x: f32[batch,20]", path=tmp_path / "libmlp.so")
    (tmp_path / "main.c").write_text(PROGRAM)
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run(["gcc", *flags, str(tmp_path / "main.c"), "-lmlp", "-o", str(tmp_path / "main")], check=True)
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, check=False)
    assert done.returncode == 0, done.returncode
    assert done.stderr.decode().splitlines()[:2] == ["batch is -1; a size must not be negative", "x is NULL"]
    want = []
    for b in range(1, 10):
        k = np.arange(b * 20)
        x = (((k * 37 + b) % 101).astype("f4") / np.float32(50) - np.float32(1)).reshape(b, 20)
        want.append(model(duo.tensor(x)).detach().numpy().tobytes())
    assert done.stdout == b"".join([*want, want[-1]] * 2)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("compiler", [("gcc", "-std=c99"), ("g++", "-std=c++11")], ids=["c99", "c++"])
def test_the_header_is_plain(tmp_path, compiler):
    duo.export(lambda default, x: default @ x, "f32[class_,3]", "f32[3]", path=tmp_path / "libodd.so")
    suffix = ".c" if compiler[0] == "gcc" else ".cpp"
    (tmp_path / f"use{suffix}").write_text('#include "odd.h"\nint main(void) { return odd_message(0) == 0; }\n')
    subprocess.run(
        [
            *compiler,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-c",
            str(tmp_path / f"use{suffix}"),
            "-o",
            str(tmp_path / "use.o"),
        ],
        check=True,
    )


QEMU = shutil.which("qemu-aarch64")
CROSS = shutil.which("aarch64-linux-gnu-gcc")


@pytest.mark.skipif(not QEMU or not CROSS, reason="needs qemu-aarch64 and a C compiler for it")
def test_aarch64_has_the_same_bits(tmp_path):
    model = mlp()
    duo.export(model, "x: f32[batch,20]", path=tmp_path / "libmlp.so", targets=["aarch64-linux"])
    (tmp_path / "main.c").write_text(PROGRAM)
    flags = [f"-I{tmp_path}", f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run([str(CROSS), *flags, str(tmp_path / "main.c"), "-lmlp", "-o", str(tmp_path / "main")], check=True)
    done = subprocess.run(
        [str(QEMU), "-L", "/usr/aarch64-linux-gnu", str(tmp_path / "main")], capture_output=True, check=True
    )
    b = 9
    x = (((np.arange(b * 20) * 37 + b) % 101).astype("f4") / np.float32(50) - np.float32(1)).reshape(b, 20)
    assert done.stdout[-360:] == model(duo.tensor(x)).detach().numpy().tobytes()


def test_sizes_that_a_program_is_not_for_are_refused(tmp_path):
    """Where a rule of types leans on a size of 2 or more, a smaller one must not reach kernels."""
    programs = {
        "last": (lambda x: x[-2:], "f32[n]", {3: "fine", 2: "fine", 1: "n is 1; this program needs 2 at least", 0: "n is 0"}),
        "rest": (lambda x: x[1:], "f32[n]", {2: "fine", 1: "fine", 0: "negative size"}),
        "top": (lambda x: x.topk(2)[0], "f32[n]", {2: "fine", 1: "n is 1"}),
        "best": (lambda x: x.max(), "f32[n]", {1: "fine", 0: "n is 0; this program needs 1 at least"}),
        "inner": (lambda x: x[1:].sum(), "f32[n]", {1: "fine", 0: "n is 0"}),
        "conv": (lambda x: duo.nn.functional.conv1d(x, duo.ones(1, 1, 3)).sum(), "f32[1,1,n]", {8: "fine", 3: "fine", 2: "fine", 1: "n is 1"}),
    }  # fmt: skip
    for name, (program, text, cases) in programs.items():
        duo.export(program, text, path=tmp_path / f"{name}.duo")
        loaded = duo.load_executable(tmp_path / f"{name}.duo")
        for n, wanted in cases.items():
            x = floats(0, *[n if d == "n" else int(d) for d in text[4:-1].split(",")])
            if wanted == "fine":
                assert (
                    (loaded(x) == program(duo.tensor(x)).numpy()).all() if n > 2 or name != "conv" else loaded(x) == 0
                ), (name, n)
                continue
            with pytest.raises(ShapeError, match=wanted):
                loaded(x)


def test_arrays_that_are_aligned_to_nothing(tmp_path):
    duo.export(lambda x: x * 2, "f32[n,2]", path=tmp_path / "b.duo")
    x = np.frombuffer(b"\0" + floats(0, 4, 2).tobytes(), "f4", 8, 1).reshape(4, 2)
    assert (duo.load_executable(tmp_path / "b.duo")(x) == x * 2).all()


def test_a_free_size_that_the_program_fixes_is_told(tmp_path):
    with pytest.raises(ShapeError, match=r"n of x: f32\[n\] can only be 6.*test_export\.py:\d+"):
        duo.export(lambda x: x + duo.ones(6), "f32[n]", path=tmp_path / "b.duo")


def test_tensors_made_of_free_sizes(tmp_path):
    """`duo.zeros(x.shape[0], 4)` and its like belong to the exported program."""
    programs = {
        "zeros": lambda x: duo.cat([x, duo.zeros(x.shape[0], 4), duo.ones((x.shape[0], 1))], 1),
        "full": lambda x: duo.full((x.shape[0], 1), 3.0) * x + x.new_zeros(x.shape[0], x.shape[1]),
        "eye": lambda x: duo.eye(x.shape[0], x.shape[1]) + x,
        "arange": lambda x: x * duo.arange(x.shape[1]) + duo.arange(2, x.shape[1] + 2, dtype=duo.float32),
        "random": lambda x: x + duo.rand(x.shape[0], x.shape[1]),
        "linspace": lambda x: x + duo.linspace(-1, 3, x.shape[1]),
        "positions": lambda x: (duo.arange(x.shape[0])[:, None] >= duo.arange(x.shape[1])).float() * x,
    }
    for name, program in programs.items():
        duo.manual_seed(0)
        duo.export(program, "f32[n,m]", path=tmp_path / f"{name}.duo")
        loaded = duo.load_executable(tmp_path / f"{name}.duo")
        for shape in ((3, 5), (1, 1), (0, 3)):
            x = floats(0, *shape)
            assert loaded(x).tobytes() == program(duo.tensor(x)).numpy().tobytes(), (name, shape)
    for program, match in (
        (lambda x: duo.arange(0, x.shape[0], 2), "multiply by the step"),
        (lambda x: x * float(x.sum()), r"cannot be exported as it is at test_export\.py:\d+"),
    ):
        with pytest.raises(ArgumentError, match=match):
            duo.export(program, "f32[n,m]", path=tmp_path / "no.duo")
