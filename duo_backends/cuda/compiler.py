"""CUDA C to machine code of a GPU: NVRTC by ctypes where its library is, else nvcc. Neither needs a GPU.

What comes out is kept on disk like the CPU's object code (`duo_backends/cache.py`), under the hash of the source, the flags, the architecture
and the compiler's version. Every source is compiled with the flags that the numerics contract asks for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from duo_backends.cache import DiskCache
from duo_backends.cuda.code import ceil_div
from duo_ir.errors import DeviceError, DuoError

FLAGS = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "--std=c++17")
WAY_OUT = (
    "install NVRTC by `pip install 'duo[gpu]'` (the wheel nvidia-cuda-nvrtc), or the CUDA toolkit, and set CUDA_HOME if it is not in "
    "/usr/local/cuda"
)


class CompileError(DuoError, RuntimeError):
    """The CUDA compiler refused a source: a fault of duo, which says what to report."""


class Compiler(Protocol):
    """Makes machine code of CUDA C. `version` names the compiler and its release; `unit`: how many kernels it is best given at once, as what
    every source costs anew is weighed against what is kept on disk together."""

    unit: int

    @property
    def version(self) -> str: ...

    def compile(self, source: str, arch: int) -> bytes:
        """A cubin for compute capability `arch` (times ten). Raises CompileError."""
        ...


def balanced(weights: Sequence[int], unit: int) -> list[list[int]]:
    """Numbers of kernels in groups of about `unit`, to be compiled side by side on all CPUs, so that all are done at about the same time."""
    if not weights:
        return []
    workers = os.cpu_count() or 1
    count = min(len(weights), ceil_div(ceil_div(len(weights), unit), workers) * workers)
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for n in sorted(range(len(weights)), key=lambda n: -weights[n]):
        least = totals.index(min(totals))
        groups[least].append(n)
        totals[least] += weights[n]
    return groups


def compile_cached(sources: Sequence[str], arch: int, compiler: Compiler, disk: DiskCache) -> list[bytes]:
    """The cubin of each source: from disk where an earlier process has made it, the others side by side on all CPUs."""
    keys = [
        hashlib.sha256("\0".join(["cubin", compiler.version, str(arch), *FLAGS, source]).encode()).hexdigest()
        for source in sources
    ]
    found = [disk.get(key) for key in keys]
    missing = [n for n, cubin in enumerate(found) if cubin is None]

    def build(n: int) -> bytes:
        cubin = compiler.compile(sources[n], arch)
        disk.put(keys[n], cubin)
        return cubin

    workers = min(len(missing), os.cpu_count() or 1)
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(build, missing))
    else:
        made = [build(n) for n in missing]
    fresh = dict(zip(missing, made))
    return [fresh[n] if cubin is None else cubin for n, cubin in enumerate(found)]


@functools.cache
def find_compiler() -> Compiler:
    """NVRTC, else nvcc. Raises DeviceError where there is neither."""
    for path in _nvrtc_libraries():
        try:
            return Nvrtc(path)
        except OSError:
            continue
    nvcc = find_nvcc()
    if nvcc is not None:
        return Nvcc(nvcc)
    raise DeviceError(f"compiling for a GPU needs NVRTC (libnvrtc) or nvcc, and neither is found: {WAY_OUT}")


def _failed(tool: str, arch: int, log: str) -> CompileError:
    return CompileError(
        f"{tool} does not compile CUDA C that duo made for sm_{arch}; please report this:\n{log[:4000]}"
    )


def disassembled(cubin: bytes) -> str | None:
    """Machine code as text, by `cuobjdump` of the CUDA toolkit; None where that is not installed."""
    tool = _tool("cuobjdump")
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "duo.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True)
    return None if done.returncode else done.stdout


# ------------------------------------------------------------------------------------------------------------------- NVRTC
def _nvrtc_libraries() -> Iterator[str]:
    """Where libnvrtc may be: the wheels of NVIDIA, the CUDA toolkit, the system's path."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for place in ("cu*/lib", "cuda_nvrtc/lib", "cu*/bin", "cuda_nvrtc/bin"):
            yield from _newest(Path(folder), place)
    for root in toolkits():
        yield from _newest(root, "lib64")
        yield from _newest(root, "lib")
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def _newest(root: Path, place: str) -> list[str]:
    pattern = "nvrtc64_*.dll" if os.name == "nt" else "libnvrtc.so*"
    found = [p for p in root.glob(f"{place}/{pattern}") if "alt" not in p.name]
    return [str(p) for p in sorted(found, reverse=True)]


def toolkits() -> Iterator[Path]:
    """Where CUDA may be installed."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    yield Path("/usr/local/cuda")


class Nvrtc:
    """NVIDIA's run-time compiler, a library. Raises OSError when it does not load."""

    unit = 6  # a source costs 17 ms, a kernel 1 to 100

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"nvrtc {major.value}.{minor.value}"

    def compile(self, source: str, arch: int) -> bytes:
        library, program = self._library, ctypes.c_void_p()
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"duo.cu", 0, None, None)
        try:
            flags = [f"--gpu-architecture=sm_{arch}".encode(), *[flag.encode() for flag in FLAGS]]
            if library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags)):
                raise _failed(self.version, arch, self._read(program, "ProgramLog").decode(errors="replace"))
            return self._read(program, "CUBIN")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self._library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw[: size.value]


# -------------------------------------------------------------------------------------------------------------------- nvcc
def find_nvcc() -> str | None:
    """The path of nvcc: on PATH, or in the toolkit."""
    return _tool("nvcc")


def _tool(name: str) -> str | None:
    on_path = shutil.which(name)
    if on_path:
        return on_path
    name = f"{name}.exe" if sys.platform == "win32" else name
    return next((str(root / "bin" / name) for root in toolkits() if (root / "bin" / name).exists()), None)


class Nvcc:
    """The compiler driver of the CUDA toolkit; every run starts several processes."""

    unit = 16

    def __init__(self, path: str) -> None:
        self.path = path

    @functools.cached_property
    def version(self) -> str:
        done = subprocess.run([self.path, "--version"], capture_output=True, text=True)
        return "nvcc " + (done.stdout.strip().splitlines() or ["of an unknown release"])[-1]

    def compile(self, source: str, arch: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            text, out = Path(folder) / "duo.cu", Path(folder) / "duo.cubin"
            text.write_text(source)
            command = [self.path, "--cubin", f"-arch=sm_{arch}", *FLAGS, "-o", str(out), str(text)]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise DeviceError(f"nvcc does not run: {error}; {WAY_OUT}") from None
            if done.returncode or not out.exists():
                raise _failed(self.version, arch, done.stderr)
            return out.read_bytes()
