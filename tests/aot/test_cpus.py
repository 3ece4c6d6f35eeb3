"""Libraries on CPUs that they are not for say so, and on others have the same bits: provoked by a feature that no CPU of today has, and under QEMU."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest

import duo
from duo.aot.capture import source_of
from duo_backends.aot import targets
from duo_backends.aot.artefact import Artefact
from duo_backends.aot.pack import pack
from duo_ir.errors import DeviceError
from tests.aot.models import floats, mlp

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux"),
    pytest.mark.skipif(targets.target().arch != "x86_64", reason="AArch64 code needs what every such CPU has"),
]
SPEC = "x: f32[batch,20]"


@pytest.fixture
def odd(monkeypatch) -> targets.AotTarget:
    """A target whose code asks for a feature of cpuid that no CPU has any more (LWP: leaf 0x80000001, ecx, bit 15)."""
    monkeypatch.setitem(targets._BITS, "lwp", (0x80000001, 2, 15))
    plain = targets.target("x86-64-v3")
    return dataclasses.replace(plain, name="x86-64-odd", features=f"{plain.features},+lwp")


def test_a_library_for_another_cpu_answers_with_a_code_and_a_message(tmp_path, odd):
    (tmp_path / "libmlp.so").write_bytes(Artefact.of(source_of(mlp(), [SPEC], "mlp"), odd).library())
    library = ctypes.CDLL(str(tmp_path / "libmlp.so"))
    library.mlp_message.restype = ctypes.c_char_p
    model = ctypes.c_void_p(1)
    assert library.mlp_create(None, ctypes.byref(model)) == 6 and model.value is None
    said = library.mlp_message(None).decode()
    assert said.startswith("this CPU lacks what the code was made for: x86-64-odd needs ") and said.endswith(", lwp")
    x = floats(0, 1, 20)
    assert library.mlp_forward(None, ctypes.c_int64(1), ctypes.c_void_p(x.ctypes.data), None) == 1


def test_a_file_for_another_cpu_is_compiled_here(tmp_path, odd, monkeypatch):
    model = mlp()
    (tmp_path / "m.duo").write_bytes(pack(source_of(model, [SPEC], "m"), [odd], "a test"))
    x = floats(0, 3, 20)
    loaded = duo.load_executable(tmp_path / "m.duo")
    assert loaded.target == "compiled here"
    assert loaded(x).tobytes() == model(duo.tensor(x)).detach().numpy().tobytes()
    monkeypatch.setattr("duo.executable.has_features", lambda needs: True)  # as a file that says too little of its needs
    with pytest.raises(DeviceError, match=r"lacks what the code was made for: x86-64-odd needs .*lwp"):
        duo.load_executable(tmp_path / "m.duo")


PROGRAM = r"""
#include <stdio.h>
#include "mlp.h"
int main(void) {
    mlp *model;
    float x[9 * 20], y[9 * 10];
    int code = mlp_create(NULL, &model);
    if (code) {
        fprintf(stderr, "%s", mlp_message(model));
        return code == MLP_WRONG_CPU && model == NULL ? 60 : 1;
    }
    for (int k = 0; k < 9 * 20; k++) x[k] = (float)(k * 37 % 101) / 50 - 1;
    if (mlp_forward(model, 9, x, y)) return 2;
    fwrite(y, sizeof y, 1, stdout);
    mlp_destroy(model);
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("qemu-x86_64") or not shutil.which("gcc"), reason="needs qemu-x86_64 and gcc")
def test_real_cpus_that_lack_something(tmp_path):
    model = mlp()
    k = np.arange(9 * 20)
    x = ((k * 37 % 101).astype("f4") / np.float32(50) - np.float32(1)).reshape(9, 20)
    want = model(duo.tensor(x)).detach().numpy().tobytes()
    for level, cpu, missing in (
        ("x86-64-v4", "Haswell", "avx512f"), ("x86-64-v3", "Nehalem", "avx2"), ("x86-64-v3", "Haswell", ""), ("x86-64-v3", "EPYC", ""),
    ):  # fmt: skip
        folder = tmp_path / level
        if not folder.exists():
            folder.mkdir()
            duo.export(model, SPEC, path=folder / "libmlp.so", targets=[level])
            (folder / "main.c").write_text(PROGRAM)
            flags = [f"-I{folder}", f"-L{folder}", f"-Wl,-rpath,{folder}", str(folder / "main.c"), "-lmlp"]
            subprocess.run(["gcc", *flags, "-o", str(folder / "main")], check=True)
        command = ["qemu-x86_64", "-cpu", cpu, str(folder / "main")]
        done = subprocess.run(command, capture_output=True, check=False, timeout=300)
        said = done.stderr.decode()
        if missing:
            assert done.returncode == 60 and f"made for: {level} needs" in said and missing in said, (level, cpu, said)
        else:
            assert done.returncode == 0 and done.stdout == want, (level, cpu, done.returncode, said)
