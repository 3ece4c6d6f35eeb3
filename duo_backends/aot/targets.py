"""What artefacts are made for: a CPU and an operating system, which need not be those at hand.

`target(name)` knows the psABI levels of x86-64 (`x86-64-v3`, `x86-64-v4`), `aarch64-linux` and `native`, the highest of them that this machine has.
Linux only: the library sleeps on futexes, and its file format is ELF.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from duo_backends.cpu import jit, os_linux
from duo_backends.cpu.code import Target
from duo_ir.errors import ArgumentError

# Bits of cpuid: (leaf, register a b c d, bit). Intel SDM volume 2A, CPUID; lzcnt: AMD APM volume 3, appendix E.
_BITS = {
    "fma": (1, 2, 12), "movbe": (1, 2, 22), "osxsave": (1, 2, 27), "avx": (1, 2, 28), "f16c": (1, 2, 29), "bmi": (7, 1, 3),
    "avx2": (7, 1, 5), "bmi2": (7, 1, 8), "avx512f": (7, 1, 16), "avx512dq": (7, 1, 17), "avx512cd": (7, 1, 28),
    "avx512bw": (7, 1, 30), "avx512vl": (7, 1, 31), "lzcnt": (0x80000001, 2, 5), "popcnt": (1, 2, 23), "cx16": (1, 2, 13),
    "sse3": (1, 2, 0), "ssse3": (1, 2, 9), "sse4.1": (1, 2, 19), "sse4.2": (1, 2, 20),
}  # fmt: skip
LEVELS = ("x86-64-v3", "x86-64-v4")  # v2 has no fused multiply-add, by which duo's arithmetic is defined
NAMES = (*LEVELS, "aarch64-linux", "native")


@dataclass(frozen=True)
class AotTarget:
    """`name` without 'native'. `code`: what emitters see; `needs`: features of x86-64 that are looked for when a model is made."""

    name: str
    arch: str
    triple: str
    cpu: str
    features: str
    code: Target

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple([f[1:] for f in self.features.split(",") if f[1:] in _BITS]) if self.arch == "x86_64" else ()

    @property
    def machine(self) -> jit.Machine:
        """What `jit.object_codes` generates code for."""
        return jit.Machine(self.name, self.cpu, self.features, self.code, self.triple)

    def wait_text(self) -> str:
        return os_linux.wait_text(self.arch)

    def clock_text(self) -> str:
        return os_linux.clock_text()

    @property
    def sig_setmask(self) -> int:
        return os_linux.SIG_SETMASK

    def system_text(self) -> str:
        """`duo.cpu_lacks`, 0 where this CPU has what the code needs, `duo.needs`, where a text about that lies, and `duo.cores`, how many the process
        may use."""
        said = f"this CPU lacks what the code was made for: {self.name} needs {', '.join(self.needs)}".encode() + b"\0"
        return _CORES + _NEEDS.format(len(said), said.decode().replace("\0", "\\00")) + (_x86_check(self.needs) if self.arch == "x86_64" else _NO_CHECK)


def target(name: str = "native") -> AotTarget:
    """The target of that name. Raises ArgumentError for one that is not known."""
    if name == "native":
        name = _native()
    if name not in NAMES:
        raise ArgumentError(f"target {name!r} is not known; there are {', '.join(NAMES)}")
    return _target(name)


@cache
def _native() -> str:
    machine = jit.machine("native")
    if machine.target.arch == "aarch64":
        return "aarch64-linux"
    found = [level for level in LEVELS if machine.target.vector_bytes >= jit.LEVELS[level][1]]
    if machine.target.arch != "x86_64" or not found:
        raise ArgumentError("this machine's CPU is none that artefacts are made for; name a target")
    return found[-1]


@cache
def _target(name: str) -> AotTarget:
    if name == "aarch64-linux":
        arch, triple, cpu, features, width = "aarch64", "aarch64-unknown-linux-gnu", "generic", "+neon,+fp-armv8", 16
    else:
        features, width = jit.LEVELS[name]
        arch, triple, cpu = "x86_64", "x86_64-unknown-linux-gnu", name
    attributes = f'nounwind "no-trapping-math"="true" "prefer-vector-width"="{width * 8}" "target-cpu"="{cpu}" "target-features"="{features}"'
    return AotTarget(name, arch, triple, cpu, features, Target(width, True, arch, attributes, 8))


def initialise() -> Any:
    """LLVM with every target in it."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()  # for the instruction that asks the CPU what it has
    return llvm


_CORES = """
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i64 @llvm.ctpop.i64(i64)
define internal i64 @duo.cores() nounwind {
entry:
  %set = alloca [16 x i64]
  br label %clear
clear:
  %k0 = phi i64 [ 0, %entry ], [ %k1, %clear ]
  %at0 = getelementptr i64, ptr %set, i64 %k0
  store i64 0, ptr %at0
  %k1 = add i64 %k0, 1
  %more0 = icmp ult i64 %k1, 16
  br i1 %more0, label %clear, label %ask
ask:
  %r = call i32 @sched_getaffinity(i32 0, i64 128, ptr %set)
  br label %count
count:
  %k = phi i64 [ 0, %ask ], [ %k2, %count ]
  %sum = phi i64 [ 0, %ask ], [ %sum2, %count ]
  %at = getelementptr i64, ptr %set, i64 %k
  %word = load i64, ptr %at
  %bits = call i64 @llvm.ctpop.i64(i64 %word)
  %sum2 = add i64 %sum, %bits
  %k2 = add i64 %k, 1
  %more = icmp ult i64 %k2, 16
  br i1 %more, label %count, label %done
done:
  %none = icmp eq i64 %sum2, 0
  %out = select i1 %none, i64 1, i64 %sum2
  ret i64 %out
}
"""
_NEEDS = """
@duo.needs.text = internal constant [{} x i8] c"{}"
define internal i64 @duo.needs() nounwind {{
  %at = ptrtoint ptr @duo.needs.text to i64
  ret i64 %at
}}
"""
_NO_CHECK = """
define internal i64 @duo.cpu_lacks() nounwind {
  ret i64 0
}
"""


def _x86_check(needs: tuple[str, ...]) -> str:
    masks: dict[tuple[int, int], int] = {}
    for name in ("osxsave", *needs):
        leaf, register, bit = _BITS[name]
        masks[leaf, register] = masks.get((leaf, register), 0) | 1 << bit
    state = (
        0xE6 if "avx512f" in needs else 6
    )  # what the system saves: SSE and AVX, and for AVX-512 masks and upper halves
    lines = ["define internal i64 @duo.cpu_lacks() nounwind {", "entry:"]
    total = "0"
    for n, ((leaf, register), mask) in enumerate(masks.items()):
        lines += [
            f'  %r{n} = call {{ i32, i32, i32, i32 }} asm sideeffect "cpuid", "={{ax}},={{bx}},={{cx}},={{dx}},{{ax}},{{cx}}"(i32 {_signed(leaf)}, i32 0)',
            f"  %w{n} = extractvalue {{ i32, i32, i32, i32 }} %r{n}, {register}",
            f"  %m{n} = and i32 %w{n}, {_signed(mask)}",
            f"  %x{n} = xor i32 %m{n}, {_signed(mask)}",
            f"  %t{n} = or i32 {total}, %x{n}",
        ]
        total = f"%t{n}"
    lines += [
        f"  %missing = icmp ne i32 {total}, 0",
        "  br i1 %missing, label %bad, label %system",  # xgetbv is there where OSXSAVE is
        "system:",
        '  %saved = call { i32, i32 } asm sideeffect "xgetbv", "={ax},={dx},{cx}"(i32 0)',
        "  %low = extractvalue { i32, i32 } %saved, 0",
        f"  %has = and i32 %low, {state}",
        f"  %all = icmp eq i32 %has, {state}",
        "  br i1 %all, label %good, label %bad",
        "good:",
        "  ret i64 0",
        "bad:",
        "  ret i64 1",
        "}",
    ]
    return "\n" + "\n".join(lines) + "\n"


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
