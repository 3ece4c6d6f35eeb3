"""`duo.load_executable(path)`: a `.duo` file as a callable, with NumPy arrays or duo tensors in and out."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from duo.devices import CPU, canonical
from duo.eager.tensor import EagerTensor, tensor_of
from duo_backends.aot.container import Manifest, Section, read, section_bytes
from duo_backends.aot.loaded import Code, Model, has_features
from duo_backends.cpu.bound import array_data
from duo_backends.cpu.threads import get_num_threads
from duo_ir.errors import ArgumentError, DeviceError, FormatError, ShapeError
from duo_ir.types import DType, dtype


class Port(NamedTuple):
    """An input, output or state. A size is an int or terms (coefficient, names...), which are added."""

    name: str
    dtype: DType
    shape: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype.name}[{','.join(map(_size_text, self.shape))}]"


def _size_text(d: Any) -> str:
    if isinstance(d, int):
        return str(d)
    return "+".join("*".join([str(c)] * (c != 1 or not names) + list(names)) for c, *names in d)


class Program:
    """One program of an executable: call it with its inputs in order. `dims`: its free sizes."""

    def __init__(self, model: Model, row: Any) -> None:
        self.describe(row)
        self._model = model
        self._run = model.program(self.name, len(self.dims) + len(self.inputs) + len(self.outputs))
        self._quick = _quick_call(self, model) if not self.dims else None

    def describe(self, row: Any) -> None:
        """Name, sizes, inputs and outputs, as the manifest has them."""
        self.name: str = row["name"]
        self.dims: tuple[str, ...] = row["dims"]
        self.inputs = tuple([Port(p["name"], dtype(p["dtype"]), p["shape"]) for p in row["inputs"]])
        self.outputs = tuple([Port(p["name"], dtype(p["dtype"]), p["shape"]) for p in row["outputs"]])

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.inputs))}) -> {', '.join(map(str, self.outputs))}"

    def __call__(self, *inputs: Any) -> Any:
        """The outputs: a tensor or array if there is one, else a tuple; duo tensors where an input is one, NumPy arrays otherwise.

        Raises ArgumentError for a wrong number of inputs, ShapeError for sizes that do not fit, DTypeError for other dtypes."""
        if self._quick is not None:
            out = self._quick(inputs)
            if out is not None:
                return out
        if len(inputs) != len(self.inputs):
            raise ArgumentError(f"{self!r} takes {len(self.inputs)} inputs, not {len(inputs)}")
        tensors = False
        arrays = []
        for x, port in zip(inputs, self.inputs):
            if isinstance(x, EagerTensor):
                tensors = True
                x = x.detach()._array(share=True)
            arrays.append(self._array(x, port))
        sizes = self._sizes(arrays)
        shapes = [[size_of(d, sizes) for d in p.shape] for p in self.outputs]
        if any(n < 0 for shape in shapes for n in shape):
            known = ", ".join(f"{k}={v}" for k, v in sizes.items())
            raise ShapeError(f"{self!r}: with {known} an output would have a negative size")
        out = [np.empty(shape, p.dtype.numpy) for shape, p in zip(shapes, self.outputs)]
        self._run(*sizes.values(), *[a.__array_interface__["data"][0] for a in (*arrays, *out)])
        results = tuple([tensor_of(a) for a in out]) if tensors else tuple(out)
        return results[0] if len(results) == 1 else results

    def _array(self, x: Any, port: Port) -> np.ndarray:
        array = np.asarray(x)
        if array.dtype != port.dtype.numpy:
            if isinstance(x, np.ndarray) or array.dtype.kind not in "biuf":
                raise ArgumentError(f"{self.name}: {port} is given as {array.dtype}; convert it")
            array = array.astype(port.dtype.numpy)
        self._check_rank(array.shape, port)
        return array if array.flags.c_contiguous and array.flags.aligned else array.copy(order="C")

    def _check_rank(self, shape: Sequence[int], port: Port) -> None:
        if len(shape) != len(port.shape):
            raise ShapeError(
                f"{self.name}: {port} is given with shape {list(shape)}, which has {len(shape)} axes, not {len(port.shape)}"
            )

    def _sizes(self, arrays: Sequence[Any]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        told: dict[str, str] = {}  # where a size comes from
        for array, port in zip(arrays, self.inputs):
            for axis, (n, d) in enumerate(zip(array.shape, port.shape)):
                if not isinstance(d, int) and len(d) == 1 and d[0][0] == 1 and len(d[0]) == 2 and d[0][1] not in sizes:
                    sizes[d[0][1]], told[d[0][1]] = n, f"axis {axis} of {port.name}"
        missing = [name for name in self.dims if name not in sizes]
        if missing:
            raise ShapeError(f"{self.name}: {', '.join(missing)} cannot be told from the inputs' shapes")
        for array, port in zip(arrays, self.inputs):
            for axis, (n, d) in enumerate(zip(array.shape, port.shape)):
                if n != size_of(d, sizes):
                    names = [] if isinstance(d, int) else sorted({name for _, *names in d for name in names})
                    why = "".join([f"; {name}={sizes[name]}, as {told[name]} is" for name in names])
                    raise ShapeError(
                        f"{self.name}: {port} is given with shape {list(array.shape)}: axis {axis} is {n}, not {size_of(d, sizes)}{why}"
                    )
        return {name: sizes[name] for name in self.dims}

    def scratch_bytes(self, **sizes: int) -> int:
        """Bytes of temporaries that a call with these free sizes needs."""
        return self._model.scratch_bytes(self.name, [sizes[name] for name in self.dims])


def _quick_call(program: Program, model: Model) -> Callable[[tuple], Any] | None:
    """`program(*inputs)` for contiguous NumPy arrays of the very types of a program whose sizes are all fixed; it gives None for anything else."""
    at = array_data()
    if at is None:
        return None
    run, handle = model.direct(program.name, len(program.inputs) + len(program.outputs))
    wanted = tuple([(np.ndarray, p.dtype.numpy, p.shape) for p in program.inputs])
    made = [(p.shape, p.dtype.numpy) for p in program.outputs]
    place, empty, single = ctypes.c_int64.from_address, np.empty, len(made) == 1

    def quick(inputs: tuple) -> Any:
        if tuple([(x.__class__, getattr(x, "dtype", None), getattr(x, "shape", None)) for x in inputs]) != wanted:
            return None
        addresses = []
        for x in inputs:
            if not x.flags.carray:
                return None
            addresses.append(place(id(x) + at).value)
        out = [empty(shape, dtype) for shape, dtype in made]
        for x in out:
            addresses.append(place(id(x) + at).value)
        with model.lock:
            code = run(handle, *addresses)
            if code:
                model.check(code)
        return out[0] if single else tuple(out)

    return quick


def size_of(d: Any, sizes: Mapping[str, int]) -> int:
    """A size of a Port, for these free sizes."""
    if isinstance(d, int):
        return d
    total = 0
    for coefficient, *names in d:
        term = coefficient
        for name in names:
            term *= sizes[name]
        total += term
    return total


class Executable:
    """A loaded artefact. Calling it runs its first program; the others are attributes. `target`: what its code was made for, 'compiled here' where
    none of the file's fits this CPU or GPU."""

    def __init__(
        self, manifest: Manifest, target: str, model: Any, program: Callable[[Any, Any], Program] = Program
    ) -> None:
        self.states = {p["name"]: Port(p["name"], dtype(p["dtype"]), p["shape"]) for p in manifest.states}
        self.name, self.producer, self.target = manifest.name, manifest.producer, target
        self._model = model
        self.programs = {row["name"]: program(model, row) for row in manifest.programs}
        self._first = next(iter(self.programs.values()))

    def __call__(self, *inputs: Any) -> Any:
        return self._first(*inputs)

    def init(self, seed: int) -> None:
        """All states as they were at first, with weights drawn anew from this seed (artefacts of `duo.export_training`)."""
        self._model.init(seed)

    def save(self, path: Any) -> None:
        """Writes a checkpoint, as `duo.save({"model": ..., "optimizer": ..., "generator": ...}, path)` (artefacts of `duo.export_training`)."""
        self._model.save(os.fspath(path))

    def load(self, path: Any) -> None:
        """Reads a checkpoint. Raises FormatError for a file that is not one of this model, which stays as it is then."""
        self._model.load(os.fspath(path))

    def get_state(self, name: str) -> np.ndarray:
        """A copy of a state: "model.0.weight", or a hyperparameter such as "lr"."""
        port = self._state(name)
        return np.frombuffer(self._model.state(name), port.dtype.numpy).reshape(port.shape).copy()

    def set_state(self, name: str, value: Any) -> None:
        """Replaces a state's value. Raises ShapeError."""
        port = self._state(name)
        array = np.array(value, port.dtype.numpy, order="C")
        if array.shape != port.shape:
            raise ShapeError(f"{self.name}: {port} is given with shape {list(array.shape)}")
        self._model.set_state(name, array.tobytes())

    def _state(self, name: str) -> Port:
        if name not in self.states:
            raise ArgumentError(f"{self.name} has no state {name!r}; it has {', '.join(self.states) or 'none'}")
        return self.states[name]

    def __getattr__(self, name: str) -> Program:
        try:
            return self.__dict__["programs"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('name', 'an executable')} has no program {name!r}") from None

    def __repr__(self) -> str:
        return f"<duo executable {self.name} ({self.target}): {'; '.join(map(repr, self.programs.values()))}>"


def load_executable(
    path: Any, *, device: Any = None, threads: int | None = None, target: str | None = None, verify: bool = False
) -> Executable:
    """Loads a `.duo` file's code, which is native code: load files that you trust only.

    device: where it runs, 'cpu' (the default) or a GPU such as 'cuda', whose tensors it takes and gives as well. threads: at most so many
    (default: `duo.get_num_threads()`). target: which code to take; by default the best that this CPU or GPU has what it takes for; if there is none,
    the programs are compiled here (for a GPU by NVRTC or nvcc). verify: weights are compared with their digest too (everything else always is).
    Weights stay in the file and are read when they are needed, so it must not be changed meanwhile. Raises FormatError, DeviceError."""
    where = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    manifest = read(content, where)
    place = canonical(device if device is not None else "cuda" if str(target).startswith("cuda:") else CPU)
    if place != CPU:
        return importlib.import_module("duo.gpu_executable").load(manifest, content, where, place, target, verify)  # type: ignore[no-any-return]
    number = choose(manifest, where, target)
    count = threads if threads is not None else get_num_threads()
    if count < 1:
        raise ArgumentError(f"load_executable({where!r}, threads={threads}): there must be one at least")
    if number is None:
        return _compiled(manifest, content, where, count)
    section = manifest.sections[number]
    weights = _weights_of(manifest, section, where)
    code = Code(section_bytes(content, section, where), manifest.name)
    part = np.frombuffer(section_bytes(content, weights, where, verify), np.uint8)
    address = part.__array_interface__["data"][0]
    return Executable(manifest, section.about["target"], Model(code, address, count, (content, part)))


def choose(manifest: Manifest, where: str, target: str | None = None) -> int | None:
    """The number of the code to load: the last that fits this machine, as targets are listed from the least to the most. Raises DeviceError for a `target`
    that is not there or does not fit."""
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    best: tuple[int, int] | None = None
    for k, s in enumerate(manifest.sections):
        if s.kind != "code" or (target is not None and s.about.get("target") != target):
            continue
        needs = s.about.get("needs", ())
        if s.about.get("arch") == arch and isinstance(needs, list) and has_features([str(n) for n in needs]):
            best = max(best or (-1, 0), (len(needs), k))
    if target is not None and best is None:
        raise DeviceError(f"{where} has no code for {target!r} that this machine can run")
    return None if best is None else best[1]


def _weights_of(manifest: Manifest, section: Section, where: str) -> Section:
    number = section.about.get("weights")
    if isinstance(number, int) and 0 <= number < len(manifest.sections) and manifest.sections[number].kind == "weights":
        return manifest.sections[number]
    raise FormatError(f"{where} is damaged: its code has no weights")


def _compiled(manifest: Manifest, content: Any, where: str, threads: int) -> Executable:
    """The programs of a file that has no code for this machine, compiled from their text."""
    numbers = [k for kind in ("code", "launch") for k, s in enumerate(manifest.sections) if s.kind == kind]
    if not numbers:
        raise FormatError(f"{where} is damaged: it has no code")
    unpack = importlib.import_module("duo_backends.aot.pack").unpack_source
    artefact = importlib.import_module("duo_backends.aot.artefact").Artefact
    target = importlib.import_module("duo_backends.aot.targets").target()
    made = artefact.of(unpack(manifest, content, where, numbers[0]), target)
    block = np.frombuffer(made.block.content, np.uint8)
    aligned = np.empty(len(block) + 64, np.uint8)
    start = -aligned.__array_interface__["data"][0] % 64
    aligned[start : start + len(block)] = block
    code = Code(made.library(embed=False), manifest.name)
    model = Model(code, aligned.__array_interface__["data"][0] + start, threads, aligned)
    return Executable(manifest, "compiled here", model)
