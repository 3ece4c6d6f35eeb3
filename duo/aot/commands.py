"""`duo compile`, `duo run`, `duo inspect`, `duo bench`: artefacts from the command line."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duo import nn, optim
from duo.aot.capture import source_of
from duo.aot.export import PRODUCER, identifier, library_target, write_duo, write_file
from duo.aot.training import training_source
from duo.devices import CPU, canonical
from duo.eager.tensor import tensor_of
from duo.executable import Executable, Port, load_executable
from duo.io.checkpoint import load
from duo.numeric_mode import MODES, numerics
from duo.random import manual_seed
from duo.runtime import synchronize
from duo_backends.aot.artefact import Artefact
from duo_backends.aot.container import Manifest, Section, read, section_bytes
from duo_backends.aot.forms import assembly_text, ir_text, llvm_text, object_code
from duo_backends.aot.gpu_targets import CUDA_NAMES
from duo_backends.aot.header import header_text
from duo_backends.aot.launches import read_launches
from duo_backends.aot.pack import unpack_source
from duo_backends.aot.source import Source
from duo_backends.aot.targets import NAMES, target
from duo_ir.errors import ArgumentError
from duo_ir.kernels.program import Step
from duo_ir.kernels.work import describe
from duo_ir.types import dtype

FORMS = ("duo", "so", "header", "obj", "ir", "llvm", "asm")
_OPTIMIZERS = {c.__name__.lower(): c for c in vars(optim).values() if isinstance(c, type) and hasattr(c, "rule")}


def add_commands(commands: Any) -> None:
    """Adds the commands to an argparse parser's."""
    c = commands.add_parser("compile", help="compile a model ahead of time", description=_COMPILE)
    c.add_argument("model", help="file.py:function, file.py:Module (a class or an instance), or a .duo file")
    c.add_argument("-o", "--output", default=".", metavar="DIR", help="folder to write to (default: this one)")
    c.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="'x: f32[batch,784]', in order; a name is a free size",
    )
    c.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="TARGET",
        help=f"{', '.join(NAMES)} (default: native), and for a .duo file GPUs: {', '.join(CUDA_NAMES)}; may be repeated",
    )
    c.add_argument(
        "--emit",
        default="duo",
        metavar="FORMS",
        help=f"of {','.join(FORMS)} (default: duo); NAME.h comes with so and obj",
    )
    c.add_argument("--name", help="what files and C functions are called (default: the model's name)")
    c.add_argument("--weights", metavar="FILE", help="a safetensors file of the module's state dict")
    c.add_argument("--seed", type=int, default=0, help="seed for a class's weights (default: %(default)s)")
    c.add_argument(
        "--train", metavar="LOSS", help="file.py:function or the name of one in nn.functional: compile a training step"
    )
    c.add_argument(
        "--optimizer", default="adam", metavar="NAME", help=f"of {', '.join(sorted(_OPTIMIZERS))} (default: adam)"
    )
    c.add_argument(
        "--forward", action="append", metavar="SPEC",
        help="with --train, an input of `forward`, in order (default: the first inputs of the step)",
    )  # fmt: skip
    c.add_argument("--lr", type=float, help="its learning rate (default: the optimizer's)")
    c.add_argument("--numerics", choices=MODES, default="strict", help="of code for GPUs (default: strict, the CPU's bits)")
    c.add_argument("--json", action="store_true", help="say what was written as JSON")
    c.set_defaults(run=_compile)

    c = commands.add_parser("run", help="run a .duo file")
    c.add_argument("file")
    c.add_argument("--input", action="append", default=[], metavar="FILE", help="x.npy or x=x.npy, in order or by name")
    c.add_argument(
        "--output", action="append", default=[], metavar="FILE", help="y.npy or y=y.npy; without, outputs are printed"
    )
    c.add_argument("--program", help="which program (default: the first)")
    c.add_argument("--threads", type=int)
    c.add_argument("--device", default="cpu", help="cpu or a GPU such as cuda (default: %(default)s)")
    c.set_defaults(run=_run)

    c = commands.add_parser("inspect", help="show what is in a .duo file, without running it")
    c.add_argument("file")
    c.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", help="a free size, for memory and kernels (default: 1)"
    )
    c.add_argument("--threads", type=int, default=1, metavar="N", help="for memory (default: %(default)s)")
    c.add_argument("--json", action="store_true")
    c.set_defaults(run=_inspect)

    c = commands.add_parser("bench", help="time a .duo file on random inputs")
    c.add_argument("file")
    c.add_argument("--size", action="append", default=[], metavar="NAME=N", help="a free size (default: 1)")
    c.add_argument("--program", help="which program (default: the first)")
    c.add_argument("--threads", type=int)
    c.add_argument("--device", default="cpu", help="cpu or a GPU such as cuda (default: %(default)s)")
    c.add_argument("--seconds", type=float, default=2.0, help="how long to measure (default: %(default)s)")
    c.add_argument("--json", action="store_true")
    c.set_defaults(run=_bench)


_COMPILE = "Writes DIR/NAME.duo, or what --emit says: NAME.duo, libNAME.so, NAME.h, NAME.o (with NAME.weights), NAME.ir, NAME.ll, NAME.s."


# ----------------------------------------------------------------------------------------------------------- compile
def _compile(options: argparse.Namespace) -> int:
    forms = [f.strip() for f in options.emit.split(",")]
    unknown = [f for f in forms if f not in FORMS]
    if unknown:
        raise ArgumentError(f"--emit does not know {', '.join(unknown)}; there are {', '.join(FORMS)}")
    targets = options.target or ["native"]
    rest = [f for f in forms if f != "duo"]
    machine = library_target(targets, f"--emit {','.join(rest)}") if rest else None
    started = time.perf_counter()
    source = _source(options)
    os.makedirs(options.output, exist_ok=True)
    folder, name = Path(options.output), source.name
    written: list[Path] = []

    def put(file: str, content: bytes | str) -> None:
        write_file(folder / file, content if isinstance(content, bytes) else content.encode())
        written.append(folder / file)

    _say(options, f"compiling {name} for {', '.join(targets)} ...")
    if "duo" in forms:
        with numerics(options.numerics):
            write_duo(source, folder / f"{name}.duo", targets)
        written.append(folder / f"{name}.duo")
    if rest:
        assert machine is not None
        made = Artefact.of(source, machine)
        if "so" in rest:
            put(f"lib{name}.so", made.library())
        if "obj" in rest:
            put(f"{name}.o", object_code(made))
            put(f"{name}.weights", made.block.content)
        if {"so", "obj", "header"} & set(rest):
            put(f"{name}.h", header_text(source, made.target.name, PRODUCER))
        for form, ending, text in (("ir", "ir", ir_text), ("llvm", "ll", llvm_text), ("asm", "s", assembly_text)):
            if form in rest:
                put(f"{name}.{ending}", text(made))
    seconds = time.perf_counter() - started
    options.progress.end()
    rows = [{"file": str(path), "bytes": path.stat().st_size} for path in written]
    if options.json:
        print(json.dumps({"name": name, "seconds": round(seconds, 3), "files": rows}, indent=2))
    else:
        for row in rows:
            print(f"{row['file']}  {row['bytes']:,} bytes")
        print(f"{seconds:.2f} s")
    return 0


def _source(options: argparse.Namespace) -> Source:
    _say(options, f"reading {options.model} ...")
    if options.model.endswith(".duo"):
        refused = [f"--{name}" for name in ("input", "weights", "train", "lr") if getattr(options, name)]
        if refused:
            raise ArgumentError(f"{', '.join(refused)} is for a model in Python; {options.model} has its programs in it")
        return _again(options.model, options.name)
    found, name = _named(options.model)
    name = options.name or name
    if isinstance(found, type) and issubclass(found, nn.Module):
        manual_seed(options.seed)
        found = found()
    if options.weights:
        if not isinstance(found, nn.Module):
            raise ArgumentError(f"--weights is for a module; {options.model} is not one")
        content = load(options.weights)
        found.load_state_dict(content.get("model", content))
    if not options.train:
        if isinstance(found, nn.Module):
            found.eval()
        return source_of(found, options.input, name)
    if not isinstance(found, nn.Module):
        raise ArgumentError(f"--train is for a module; {options.model} is not one")
    loss = getattr(nn.functional, options.train, None) if ":" not in options.train else _named(options.train)[0]
    kind = _OPTIMIZERS.get(options.optimizer.lower())
    if loss is None or kind is None:
        missing = f"loss {options.train!r}" if loss is None else f"optimizer {options.optimizer!r}"
        raise ArgumentError(
            f"there is no {missing}; optimizers are {', '.join(sorted(_OPTIMIZERS))}, losses those of nn.functional"
        )
    given = {} if options.lr is None else {"lr": options.lr}
    return training_source(found, loss, kind(found.parameters(), **given), options.input, name, options.forward)


def _named(text: str) -> tuple[Any, str]:
    """What "file.py:name" means."""
    path, _, attribute = text.rpartition(":")
    if not path or not attribute:
        raise ArgumentError(f"{text!r} should be file.py:name")
    if not os.path.isfile(path):
        raise ArgumentError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(identifier(path), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if found is None:
        raise ArgumentError(f"{path} has no {attribute!r}")
    return found, identifier(attribute.lower())


def _again(path: str, name: str | None) -> Source:
    """The programs of a `.duo` file, to be compiled for other targets or into other forms."""
    content = Path(path).read_bytes()
    manifest = read(content, path)
    code = next((k for kind in ("code", "launch") for k, s in enumerate(manifest.sections) if s.kind == kind), None)
    if code is None:
        raise ArgumentError(f"{path} has no programs")
    source = unpack_source(manifest, content, path, code)
    if name is None or name == source.name:
        return source
    return Source(name, source.programs, source.weights, source.states, source.training)


# --------------------------------------------------------------------------------------------------------------- run
def _run(options: argparse.Namespace) -> int:
    loaded = load_executable(options.file, device=options.device, threads=options.threads)
    program = _program(loaded, options.program)
    inputs = _by_name(options.input, [p.name for p in program.inputs], "input")
    arrays = []
    for port in program.inputs:
        if port.name not in inputs:
            raise ArgumentError(f"{port} is missing: --input {port.name}=FILE.npy")
        arrays.append(_array(inputs[port.name]))
    out = program(*arrays)
    outputs = out if isinstance(out, tuple) else (out,)
    names = _by_name(options.output, [p.name for p in program.outputs], "output")
    for port, array in zip(program.outputs, outputs):
        if port.name in names:
            np.save(names[port.name], array)
        elif not names:
            print(f"{port.name} = {np.array2string(array, threshold=50)}")
    return 0


def _array(file: str) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]
    except (ValueError, EOFError):
        raise ArgumentError(f"{file} is not an array as numpy.save writes it") from None


def _program(loaded: Executable, name: str | None) -> Any:
    if name is None:
        return next(iter(loaded.programs.values()))
    if name not in loaded.programs:
        raise ArgumentError(f"there is no program {name!r}; there are {', '.join(loaded.programs)}")
    return loaded.programs[name]


def _by_name(given: Sequence[str], names: Sequence[str], what: str) -> dict[str, str]:
    """Name -> file, of FILE in order and NAME=FILE."""
    out: dict[str, str] = {}
    for text in given:
        name, mark, file = text.partition("=")
        if mark and name in names:
            out[name] = file
            continue
        if mark and name.isidentifier():
            raise ArgumentError(f"there is no {what} {name!r}; there are {', '.join(names)}")
        left = [n for n in names if n not in out]
        if not left:
            raise ArgumentError(f"{text} is one {what} too many; there are {', '.join(names)}")
        out[left[0]] = text
    return out


# ----------------------------------------------------------------------------------------------------------- inspect
def _inspect(options: argparse.Namespace) -> int:
    content = Path(options.file).read_bytes()
    manifest = read(content, options.file)
    facts = _facts(options, manifest, content)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{facts['name']}, made by {facts['producer']}; {facts['bytes']:,} bytes")
    for p in facts["programs"]:
        sizes = ", ".join(f"{k}={v}" for k, v in p["sizes"].items())
        print(f"  {p['signature']}")
        threads = f"{p['threads']} thread{'s' * (p['threads'] > 1)}"
        print(
            f"    {len(p['kernels'])} kernels, {p['temporaries']:,} bytes of temporaries for {', '.join([sizes] * bool(sizes) + [threads])}"
        )
        for kernel in p["kernels"]:
            print(f"      {kernel}")
    for c in facts["code"]:
        print(f"  code for {c['target']}: {c['bytes']:,} bytes")
    for g in facts["gpus"]:
        print(
            f"  code for {g['target']}, {g['numerics']} numerics, by {g['compiler']}: {g['bytes']:,} bytes, "
            f"{len(g['launches'])} launches, {g['temporaries']:,} bytes of temporaries"
        )
        for launch in g["launches"]:
            print(f"      {launch}")
    print(f"  weights: {facts['weights']['bytes']:,} bytes, {facts['weights']['count']} tensors")
    if facts["states"]:
        print(f"  states: {', '.join(facts['states'])}")
    return 0


def _facts(options: argparse.Namespace, manifest: Manifest, content: bytes) -> dict[str, Any]:
    codes = [k for kind in ("launch", "code") for k, s in enumerate(manifest.sections) if s.kind == kind]
    if not codes:
        raise ArgumentError(f"{options.file} has no code")
    number = codes[-1]
    about = manifest.sections[number].about
    kind = about["target"] if manifest.sections[number].kind == "code" else "native"
    made = Artefact.of(unpack_source(manifest, content, options.file, number), target(kind))
    rows = []
    _check_sizes(options.size, [d for shown in manifest.programs for d in shown["dims"]])
    numbers = {p.name: k for k, p in enumerate(made.source.programs)}
    for shown in manifest.programs:
        entry = made.entries[numbers[shown["name"]]]
        sizes = _sizes(options.size, entry.dims)
        run = next((k for k, wanted in entry.special if wanted.items() <= sizes.items()), numbers[entry.name])
        program = made.programs[run]
        kernels = [describe(s.kernel, s.bind(sizes)) for s in program.items if isinstance(s, Step)]
        nbytes = made.entries[run].plan.frame_bytes(sizes, options.threads)
        rows.append(
            {"signature": _signature(shown), "sizes": sizes, "kernels": kernels, "temporaries": nbytes, "threads": options.threads}
        )
    weights = [s for s in manifest.sections if s.kind == "weights"]
    return {
        "name": manifest.name,
        "producer": manifest.producer,
        "bytes": len(content),
        "programs": rows,
        "code": [
            {"target": s.about["target"], "bytes": s.size, "needs": s.about["needs"]}
            for s in manifest.sections
            if s.kind == "code"
        ],
        "gpus": [_gpu_facts(options, manifest, content, s) for s in manifest.sections if s.kind == "launch"],
        "weights": {"bytes": sum(s.size for s in weights), "count": len(made.source.weights)},
        "states": [str(Port(s["name"], dtype(s["dtype"]), s["shape"])) for s in manifest.states],
    }


def _gpu_facts(options: argparse.Namespace, manifest: Manifest, content: bytes, section: Section) -> dict[str, Any]:
    """What the code for a GPU launches, for the sizes asked for."""
    about = section.about
    modules = [manifest.sections[n] for n in about["modules"]]
    plans = read_launches(bytes(section_bytes(content, section, options.file)), len(modules))
    shown = {m["name"] for m in manifest.programs}
    launches, temporaries = [], 0
    for plan in plans:
        if plan.name in shown:
            sizes = _sizes(options.size, plan.dims)
            launches += plan.launched(sizes)
            temporaries = max(temporaries, plan.temporaries(sizes))
    return {
        "target": about["target"],
        "numerics": about["numerics"],
        "compiler": about["compiler"],
        "bytes": sum(m.size for m in modules),
        "launches": launches,
        "temporaries": temporaries,
    }


def _signature(row: Any) -> str:
    ports = {k: [str(Port(p["name"], dtype(p["dtype"]), p["shape"])) for p in row[k]] for k in ("inputs", "outputs")}
    return f"{row['name']}({', '.join(ports['inputs'])}) -> {', '.join(ports['outputs'])}"


def _check_sizes(given: Sequence[str], dims: Iterable[str]) -> None:
    """Raises for a --size that none of the programs has."""
    known = list(dict.fromkeys(dims))
    for name in (text.partition("=")[0] for text in given):
        if name not in known:
            raise ArgumentError(f"there is no free size {name!r}; there are {', '.join(known) or 'none'}")


def _sizes(given: Sequence[str], dims: Sequence[str]) -> dict[str, int]:
    sizes = dict.fromkeys(dims, 1)
    for text in given:
        name, _, number = text.partition("=")
        if not number.isdigit():
            raise ArgumentError(f"--size takes NAME=N, not {text!r}")
        if name in sizes:
            sizes[name] = int(number)
    return sizes


# ------------------------------------------------------------------------------------------------------------- bench
def _bench(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    loaded = load_executable(options.file, device=options.device, threads=options.threads)
    load_seconds = time.perf_counter() - start
    program = _program(loaded, options.program)
    _check_sizes(options.size, program.dims)
    sizes = _sizes(options.size, program.dims)
    arrays: list[Any] = [_random(p, sizes) for p in program.inputs]
    device = canonical(options.device)
    if device != CPU:  # copies to and from it are not timed
        arrays = [tensor_of(a, device) for a in arrays]
    start = time.perf_counter()
    program(*arrays)
    synchronize()
    first = time.perf_counter() - start
    times: list[float] = []
    end = time.perf_counter() + options.seconds
    while len(times) < 10 or time.perf_counter() < end:
        start = time.perf_counter()
        program(*arrays)
        if device != CPU:
            synchronize()
        times.append(time.perf_counter() - start)
    times.sort()
    facts = {
        "program": program.name,
        "sizes": sizes,
        "target": loaded.target,
        "load_ms": 1e3 * load_seconds,
        "first_us": 1e6 * first,
        "median_us": 1e6 * times[len(times) // 2],
        "p99_us": 1e6 * times[int(len(times) * 0.99)],
        "calls": len(times),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{program!r} ({loaded.target})")
    print(f"load {facts['load_ms']:.2f} ms, first call {facts['first_us']:.0f} us, then {facts['median_us']:.1f} us")
    print(
        f"(99% below {facts['p99_us']:.1f} us, {len(times)} calls); peak memory of the process {facts['peak_mb']:.0f} MB"
    )
    return 0


def _random(port: Port, sizes: dict[str, int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = [
        d if isinstance(d, int) else sum(c * int(np.prod([sizes[n] for n in names])) for c, *names in d)
        for d in port.shape
    ]
    if port.dtype.is_float:
        return rng.standard_normal(shape).astype(port.dtype.numpy)
    return rng.integers(0, 2, shape).astype(port.dtype.numpy)


def _say(options: argparse.Namespace, text: str) -> None:
    options.progress.now(text)
