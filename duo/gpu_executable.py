"""`duo.load_executable(path, device="cuda")`: a `.duo` file's launch plans on a GPU, with NumPy arrays or duo tensors in and out.

Weights are copied to the device when the file is loaded, inputs that are not there when it is called. Calls with the device's own tensors wait for nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo import runtime
from duo.devices import CPU
from duo.eager.tensor import EagerTensor, tensor_of
from duo.eager.trace import settle, state
from duo.eager.values import material
from duo.executable import Executable, Port, Program, size_of
from duo_backends.aot.container import Manifest, Section, section_bytes
from duo_backends.aot.gpu_targets import PREFIX, CudaTarget, runs_on
from duo_backends.aot.launches import CudaCode, Launches, read_launches
from duo_backends.aot.weights import arrays_of
from duo_ir.errors import ArgumentError, DeviceError, FormatError, TraceError
from duo_ir.types import TensorType


class GpuProgram(Program):
    """A program on a GPU."""

    def __init__(self, model: GpuModel, row: Any) -> None:
        self.describe(row)
        self._gpu = model
        plan = model.code.plans.get(self.name)
        given = [x for kind, x in plan.params if kind == "input"] if plan is not None else []
        outputs = [name for _, kind, name in plan.results if kind == "output"] if plan is not None else []
        if plan is None or plan.dims != self.dims or given != [*range(len(self.inputs))] or len(outputs) != len(self.outputs):
            raise FormatError(f"{model.where} is damaged: the launch plan of {self.name} is that of another program")

    def __call__(self, *inputs: Any) -> Any:
        """The outputs, one or a tuple: tensors of the GPU where an input is one, tensors of the CPU where an input is one, NumPy arrays otherwise.

        Raises ArgumentError for a wrong number of inputs, ShapeError for sizes that do not fit, DeviceError for tensors of another GPU. An index out
        of range is told when somebody waits, as in eager mode; before that, where arrays are asked for."""
        if len(inputs) != len(self.inputs):
            raise ArgumentError(f"{self!r} takes {len(self.inputs)} inputs, not {len(inputs)}")
        model, device = self._gpu, self._gpu.device
        tensors = [x for x in inputs if isinstance(x, EagerTensor)]
        stay = any(x.device.name != CPU for x in tensors)
        given = [self._given(x, port, device) for x, port in zip(inputs, self.inputs)]
        sizes = self._sizes(given)
        buffers: list[Any] = [
            settle(x.detach()._value()) if isinstance(x, EagerTensor) else runtime.from_numpy(x, device=device) for x in given
        ]
        out = model.code.run(self.name, buffers, sizes)
        types = [TensorType(p.dtype, tuple([size_of(d, sizes) for d in p.shape])) for p in self.outputs]
        if stay:
            results: list[Any] = [EagerTensor(material(b, t)) for b, t in zip(out, types)]
        else:
            arrays = [runtime.to_numpy(b, t) for b, t in zip(out, types)]
            results = [tensor_of(a) for a in arrays] if tensors else arrays
        return results[0] if len(results) == 1 else tuple(results)

    def _given(self, x: Any, port: Port, device: str) -> Any:
        """An input as a tensor of the GPU, or as an array."""
        if not isinstance(x, EagerTensor) or x.device.name == CPU:
            return self._array(x.detach()._array(share=True) if isinstance(x, EagerTensor) else x, port)
        if x.device.name != device:
            raise DeviceError(f"{self.name}: {port} is on {x.device}, and the executable on {device}; move it by .to({device!r})")
        if state.capture is not None:
            raise TraceError(state.capture.refusal(x._type))
        if x.dtype is not port.dtype:
            raise ArgumentError(f"{self.name}: {port} is given as {x.dtype.name}; convert it")
        self._check_rank(x._type.static_shape(), port)
        return x

    def scratch_bytes(self, **sizes: int) -> int:
        return self._gpu.code.scratch_bytes(self.name, sizes)


class GpuModel:
    """What an Executable asks of a model: states."""

    def __init__(self, code: CudaCode, device: str, where: str) -> None:
        self.code, self.device, self.where = code, device, where

    def state(self, name: str) -> bytes:
        return self.code.state(name).tobytes()

    def set_state(self, name: str, value: bytes) -> None:
        old = self.code.state(name)
        self.code.set_state(name, np.frombuffer(value, old.dtype).reshape(old.shape))

    def init(self, seed: int) -> None:
        raise self._no("init")

    def save(self, path: str) -> None:
        raise self._no("save")

    def load(self, path: str) -> None:
        raise self._no("load")

    def _no(self, what: str) -> ArgumentError:
        return ArgumentError(f"{self.where} has no training step on {self.device}, and {what} is for one")


def load(manifest: Manifest, content: Any, where: str, device: str, target: str | None, verify: bool) -> Executable:
    """The file's programs on a GPU, by its canonical name. See `duo.load_executable`."""
    backend = runtime.gpu_backend(device)
    arch = backend.driver.properties.arch
    section = _chosen(manifest, where, target, arch)
    if section is None:
        target, plans, modules, arrays = _compiled(manifest, content, where, backend, device)
    else:
        target = section.about["target"]
        text = bytes(section_bytes(content, section, where))
        cubins = _sections(manifest, section, "modules", "cubin", where)
        modules = [bytes(section_bytes(content, s, where)) for s in cubins]
        arrays = {}
        for s in _sections(manifest, section, "weights", "weights", where):
            arrays = {**arrays_of(section_bytes(content, s, where, verify), where), **arrays}
        try:
            plans = read_launches(text, len(modules))
        except FormatError as error:
            raise FormatError(f"{where} is damaged: {error}") from None
    states = [s["name"] for s in manifest.states]
    read = {x for plan in plans for kind, x in plan.params if kind != "input"} | set(states)
    try:
        code = CudaCode(backend.runtime, plans, modules, {n: a for n, a in arrays.items() if n in read}, states)
    except FormatError as error:
        raise FormatError(f"{where} is damaged: {error}") from None
    return Executable(manifest, target, GpuModel(code, device, where), GpuProgram)


def _chosen(manifest: Manifest, where: str, target: str | None, arch: int) -> Section | None:
    """The launch plans of the newest kind of GPU that this one can be used as; None where there are none. Raises DeviceError for a `target` that is not
    there or does not fit."""
    best: tuple[int, Section] | None = None
    for s in manifest.sections:
        made_for = s.about.get("arch")
        if s.kind != "launch" or (target is not None and s.about.get("target") != target):
            continue
        if made_for.__class__ is not int or s.about.get("target") != f"{PREFIX}{made_for}":
            raise FormatError(f"{where} is damaged: its code for a GPU is for {s.about.get('target')!r}")
        if runs_on(made_for, arch) and (best is None or made_for > best[0]):
            best = made_for, s
    if target is not None and best is None:
        raise DeviceError(f"{where} has no code for {target!r} that this GPU, sm_{arch}, can run")
    return None if best is None else best[1]


def _sections(manifest: Manifest, section: Section, what: str, kind: str, where: str) -> list[Section]:
    numbers = section.about.get(what)
    if not isinstance(numbers, list) or any(n.__class__ is not int or not 0 <= n < len(manifest.sections) for n in numbers):
        raise FormatError(f"{where} is damaged: its code for a GPU has no {what}")
    found = [manifest.sections[n] for n in numbers]
    if any(s.kind != kind for s in found):
        raise FormatError(f"{where} is damaged: its code for a GPU has no {what}")
    return found


def _compiled(
    manifest: Manifest, content: Any, where: str, backend: Any, device: str
) -> tuple[str, list[Launches], Sequence[bytes], dict[str, np.ndarray]]:
    """The programs of a file that has no code for this GPU, compiled from their text."""
    numbers = [k for kind in ("launch", "code") for k, s in enumerate(manifest.sections) if s.kind == kind]
    if not numbers:
        raise FormatError(f"{where} is damaged: it has no code")
    unpack = importlib.import_module("duo_backends.aot.pack").unpack_source
    artefact = importlib.import_module("duo_backends.aot.cuda_artefact").CudaArtefact
    about = manifest.sections[numbers[0]].about
    numerics = "fast" if about.get("numerics") == "fast" else "strict"
    wanted = CudaTarget(backend.target.arch, backend.target, numerics)
    try:
        made = artefact.of(unpack(manifest, content, where, numbers[0]), wanted)
    except DeviceError as error:
        raise DeviceError(f"{where} has no code for {device}, which is {wanted.name}, and it cannot be compiled here: {error}") from None
    arrays = {**made.source.weights, **made.source.states}
    return "compiled here", read_launches(made.plan, len(made.modules)), made.modules, arrays
