"""CUDA C to machine code: the cache, what is said where no compiler is, and the real compilers where there is one."""

from __future__ import annotations

import stat
import sys
from importlib import resources
from pathlib import Path

import pytest

from duo_backends.cache import DiskCache
from duo_backends.cuda import compiler, driver
from duo_backends.cuda.streams import SCALARS_TEXT
from duo_ir.errors import DeviceError
from tests.cuda_emulator import build
from tests.cuda_emulator.support import needs_emulator

SOURCE = (
    resources.files("duo_backends.cuda").joinpath("device.cuh").read_text()
    + r"""
extern "C" __global__ void k(const float *x, float *y, long long n) { if (n) y[0] = duo_from_f16(duo_to_f16(x[0])); }
"""
)


class Counting:
    version = "counting 1"
    unit = 1

    def __init__(self) -> None:
        self.sources: list[str] = []

    def compile(self, source: str, arch: int) -> bytes:
        self.sources.append(source)
        return f"{arch} {source}".encode()


def test_cubins_are_kept_by_source_architecture_and_version(tmp_path):
    one = Counting()
    for _ in range(2):  # the second time from disk
        disk = DiskCache(tmp_path)
        assert compiler.compile_cached(["a"], 90, one, disk) == [b"90 a"]
        assert compiler.compile_cached(["b", "a", "c"], 90, one, disk) == [b"90 b", b"90 a", b"90 c"]
        assert compiler.compile_cached(["a"], 80, one, disk) == [b"80 a"]
        assert compiler.compile_cached([], 80, one, disk) == []
    assert sorted(one.sources) == ["a", "a", "b", "c"]
    one.version = "counting 2"
    compiler.compile_cached(["a"], 90, one, DiskCache(tmp_path))
    assert len(one.sources) == 5


def test_a_fault_in_one_of_many_sources_is_told(tmp_path):
    class Failing(Counting):
        def compile(self, source: str, arch: int) -> bytes:
            if source == "b":
                raise compiler.CompileError("no b")
            return super().compile(source, arch)

    with pytest.raises(compiler.CompileError, match="no b"):
        compiler.compile_cached(["a", "b", "c"], 90, Failing(), DiskCache(tmp_path))


def test_a_machine_without_compiler_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(compiler, "_nvrtc_libraries", lambda: iter(["libnvrtc-of-nobody.so"]))
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    with pytest.raises(DeviceError, match=r"libnvrtc.*nvcc.*duo\[gpu\].*CUDA_HOME"):
        compiler.find_compiler.__wrapped__()


def test_a_machine_without_pycuda_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setattr(driver, "load_library", lambda: None)
    with pytest.raises(DeviceError, match=r"PyCUDA.*duo\[gpu\]"):
        driver.PycudaDriver()


@needs_emulator
def test_nvcc_is_called_as_it_wants_to_be(tmp_path):
    """The emulator's nvcc takes the same command line."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\nPYTHONPATH="{Path(build.HERE).parent.parent}" exec "{sys.executable}" "{build.HERE}/build.py" "$@"\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    tool = compiler.Nvcc(str(nvcc))
    assert "release 13.0" in tool.version
    assert tool.compile(SOURCE, 90)[:4] == b"\x7fELF"
    with pytest.raises(compiler.CompileError, match=r"sm_90(.|\n)*nonsense"):
        tool.compile(SOURCE + "nonsense", 90)


def real_compiler() -> compiler.Compiler | None:
    try:
        return compiler.find_compiler()
    except DeviceError:
        return None


@pytest.mark.skipif(real_compiler() is None, reason="neither NVRTC nor nvcc is here")
def test_the_real_compiler():
    found = real_compiler()
    cubin = found.compile(SOURCE + SCALARS_TEXT, 90)
    assert cubin[:4] == b"\x7fELF" and int.from_bytes(cubin[18:20], "little") == 190  # EM_CUDA
    with pytest.raises(compiler.CompileError, match=r"please report(.|\n)*nonsense"):
        found.compile(SOURCE + "nonsense", 90)
