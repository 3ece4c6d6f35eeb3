"""Builds the emulator's libcuda.so.1 and compiles CUDA C for it, with g++; both cached by the hash of all they are made of.

`python build.py --cubin -o out.cubin in.cu` stands in for nvcc, flags that it does not know are ignored.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
_SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(
    r"__global__\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\("
)


def missing() -> str | None:
    """Why there is no emulator on this machine; None where there is."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the CUDA emulator is written for Linux on x86-64 and aarch64"
    return None if shutil.which("g++") else "the CUDA emulator needs g++"


@functools.cache
def folder() -> Path:
    """Where built files are kept: beside duo's own cache."""
    named = os.environ.get("DUO_CACHE_DIR", "")
    if named.lower() == "off":
        named = ""
    base = Path(named).expanduser() if named else Path.home() / ".cache" / "duo"
    out = base / "cuda-emulator"
    out.mkdir(parents=True, exist_ok=True)
    return out


def kept(key: Sequence[str | bytes], suffix: str, make: object) -> Path:
    """The file that `make(path)` writes, made once for equal keys, also by several processes at once."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    path = folder() / f"{digest.hexdigest()[:32]}{suffix}"
    if path.exists():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            handle, temporary = tempfile.mkstemp(dir=folder(), suffix=suffix)
            os.close(handle)
            make(Path(temporary))  # type: ignore[operator]
            os.replace(temporary, path)
    path.with_suffix(".lock").unlink(missing_ok=True)
    return path


@functools.cache
def _flags() -> tuple[str, ...]:
    """Flags for kernels: IEEE arithmetic as written; fma and f16 conversions by instructions where the CPU has them."""
    flags = [
        "-std=c++17",
        "-O1",
        "-g0",
        "-w",
        "-fPIC",
        "-shared",
        "-fno-strict-aliasing",
        "-fno-exceptions",
        "-fno-rtti",
    ]
    flags += ["-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    if platform.machine() == "x86_64" and {"fma", "f16c", "avx2"} <= set(Path("/proc/cpuinfo").read_text().split()):
        flags.append("-march=x86-64-v3")
    return tuple(flags)


@functools.cache
def _sources() -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(HERE.glob("*")) if path.suffix in (".h", ".cpp", ".py"))


def _gxx(arguments: Sequence[str], text: str | None = None) -> None:
    done = subprocess.run(["g++", *arguments], input=text, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:8000]}")


def library(stubs: Sequence[str] = ()) -> Path:
    """The folder of libcuda.so.1 (and libcuda.so, to link with). `stubs`: names that it has as well, which only report that they are not there."""

    def build(path: Path) -> None:
        path.unlink()
        path.mkdir()
        rest = "".join(
            f'extern "C" __attribute__((weak, visibility("default"))) int {n}() {{ return 801; }}\n' for n in stubs
        )
        (path / "rest.cpp").write_text(rest)
        flags = [
            "-std=c++17",
            "-O1",
            "-g",
            "-fPIC",
            "-shared",
            "-fvisibility=hidden",
            "-pthread",
            "-Wl,-soname,libcuda.so.1",
        ]
        _gxx([*flags, str(HERE / "libcuda.cpp"), str(path / "rest.cpp"), "-o", str(path / "libcuda.so.1"), "-ldl"])
        (path / "libcuda.so").symlink_to("libcuda.so.1")

    return kept(["library", _sources(), *stubs], "", build)


def blas_library() -> Path:
    """A libcublasLt that runs on the emulated GPU."""

    def build(path: Path) -> None:
        _gxx(["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", str(HERE / "libcublaslt.cpp"), "-o", str(path)])

    return kept(["blas", (HERE / "libcublaslt.cpp").read_bytes()], ".so", build)


def compile_text(text: str) -> bytes:
    """A module for the emulated driver from CUDA C. Raises RuntimeError with the compiler's messages."""
    names = dict.fromkeys(_KERNEL.findall(_COMMENT.sub("", text)))
    code = _SHARED.sub(r"\1 *\2 = (\1 *)emu_block->shared;", text) + "\n" + "".join(f"EMU_KERNEL({n})\n" for n in names)

    def build(path: Path) -> None:
        flags = [*_flags(), "-include", str(HERE / "device.h"), "-x", "c++", "-", "-o", str(path)]
        _gxx(flags, f'#line 1 "kernels.cu"\n{code}')

    headers = b"".join((HERE / name).read_bytes() for name in ("block.h", "device.h"))
    return kept([" ".join(_flags()), headers, code], ".so", build).read_bytes()


class EmulatorCompiler:
    """What `duo_backends.cuda.compiler` asks of a compiler."""

    version = "emulator"
    unit = 1000

    def compile(self, source: str, arch: int) -> bytes:
        return compile_text(source)


def main(arguments: Sequence[str]) -> None:
    """Stands in for nvcc."""
    if "--version" in arguments or "-V" in arguments:
        print("duo's CUDA emulator, release 13.0")
        return
    text = Path(next(a for a in arguments if a.endswith((".cu", ".cpp")))).read_text()
    if "--preprocess" in arguments or "-E" in arguments:
        print(text)
        return
    text = re.sub(r"#include\s*<[^>]*>", "", text)
    try:
        Path(arguments[arguments.index("-o") + 1]).write_bytes(compile_text(text))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
