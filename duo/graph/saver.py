"""`tf.train.Saver`: checkpoints as safetensors, the format of `duo.save`, under the names of the variables.

`save(sess, path)` writes `path.safetensors`, a flat file of named arrays: `duo.load` reads it as a dict of tensors, and `restore` reads
what `duo.save(module.state_dict(), file)` wrote. `var_list` may be a dict of names, or a module: then the names are its state dict's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from duo.eager.tensor import EagerTensor
from duo.graph.errors import InvalidArgumentError, NotFoundError
from duo.graph.graph import get_default_graph
from duo.graph.states import SharedState
from duo.graph.tensor import GraphElement
from duo.graph.variables import global_variables
from duo.io.checkpoint import load_arrays, save_arrays
from duo.random import default_generator
from duo_ir.errors import DTypeError, ShapeError

_ENDING = ".safetensors"
_INDEX = "checkpoint"


class Saver:
    """Saves and restores variables of a Session and shared cells.

    var_list: variables and eager tensors; a dict from names to them; a module; None for all variables, and the module parameters that
    the graph uses. max_to_keep: how many of the last checkpoints stay on disk (None or 0: all)."""

    def __init__(self, var_list: Any = None, max_to_keep: int | None = 5, **ignored: Any) -> None:
        self._names = _named(var_list)
        if not self._names:
            raise InvalidArgumentError(
                "a Saver needs something to save: the graph has no variables, and var_list is empty"
            )
        self._keep = max_to_keep
        self.last_checkpoints: list[str] = []

    def save(
        self, sess: Any, save_path: str, global_step: Any = None, latest_filename: str = _INDEX, **ignored: Any
    ) -> str:
        """Writes a checkpoint; gives its path, `save_path` or `save_path-step`, without the file's ending."""
        path = os.fspath(save_path).removesuffix(_ENDING)
        if global_step is not None:
            step = sess.run(global_step) if isinstance(global_step, GraphElement) else global_step
            path = f"{path}-{int(step)}"
        arrays: dict[str, np.ndarray] = {}
        for name, target in self._names.items():
            array = _read(sess, target)
            if array is None:
                sess.run(target)  # raises, naming the variable
            arrays[name] = array  # type: ignore[assignment]
        folder = os.path.dirname(path)
        if folder:
            os.makedirs(folder, exist_ok=True)
        save_arrays(path + _ENDING, arrays)
        self._note(path, latest_filename)
        return path

    def _note(self, path: str, latest_filename: str) -> None:
        """Keeps the list of checkpoints, and removes the oldest beyond max_to_keep."""
        self.last_checkpoints = [p for p in self.last_checkpoints if p != path] + [path]
        while self._keep and len(self.last_checkpoints) > self._keep:
            oldest = self.last_checkpoints.pop(0)
            if os.path.exists(oldest + _ENDING):
                os.unlink(oldest + _ENDING)
        index = os.path.join(os.path.dirname(path), latest_filename)
        with open(index, "w", encoding="utf-8") as file:
            file.write("\n".join(os.path.basename(p) for p in self.last_checkpoints) + "\n")

    def restore(self, sess: Any, save_path: str) -> None:
        """Reads a checkpoint into the Session's variables and the shared cells. Raises NotFoundError for a missing file or name."""
        file = _file(save_path)
        if file is None:
            raise NotFoundError(f"there is no checkpoint {os.fspath(save_path)!r} (nor with {_ENDING})")
        arrays, _ = load_arrays(file)
        missing = [name for name in self._names if name not in arrays]
        if missing:
            raise NotFoundError(
                f"checkpoint {file!r} has no {', '.join(map(repr, missing))}; it holds {', '.join(map(repr, list(arrays)[:10]))}"
            )
        for name, target in self._names.items():
            kind, array = target._type, arrays[name]
            if array.shape != kind.shape:
                raise ShapeError(f"checkpoint {file!r}: {name!r} has shape {list(array.shape)}, the variable is {kind}")
            if array.dtype != kind.dtype.numpy:
                raise DTypeError(f"checkpoint {file!r}: {name!r} has dtype {array.dtype}, the variable is {kind}")
        for name, target in self._names.items():
            state = SharedState(name, target) if isinstance(target, EagerTensor) else target._state
            sess.put(state, np.ascontiguousarray(arrays[name]))


def _named(var_list: Any) -> dict[str, Any]:
    if var_list is None:
        graph = get_default_graph()
        shared = [s for s in graph.shared.values() if s.tensor is not default_generator.cell]
        return {v.op.name: v for v in global_variables()} | {s.name: s.tensor for s in shared if s.tensor.requires_grad}
    if hasattr(var_list, "state_dict"):
        var_list = var_list.state_dict()
    if isinstance(var_list, Mapping):
        return dict(var_list)
    return {_name(v): v for v in var_list}


def _name(v: Any) -> str:
    if isinstance(v, EagerTensor):
        return get_default_graph().share(v).name
    return v.op.name


def _read(sess: Any, target: Any) -> np.ndarray | None:
    if isinstance(target, EagerTensor):
        return target.detach()._array(share=False)
    array: np.ndarray | None = sess.get(sess.element(target)._state)
    return array


def _file(path: Any) -> str | None:
    plain = os.fspath(path)
    return next((p for p in (plain, plain + _ENDING) if os.path.isfile(p)), None)


def checkpoint_exists(path: Any) -> bool:
    return _file(path) is not None


class CheckpointState:
    """model_checkpoint_path: the newest; all_model_checkpoint_paths: oldest first."""

    def __init__(self, paths: list[str]) -> None:
        self.model_checkpoint_path = paths[-1]
        self.all_model_checkpoint_paths = paths


def get_checkpoint_state(checkpoint_dir: Any, latest_filename: str = _INDEX) -> CheckpointState | None:
    """The checkpoints that a Saver keeps in a folder, or None."""
    index = os.path.join(os.fspath(checkpoint_dir), latest_filename)
    if not os.path.isfile(index):
        return None
    with open(index, encoding="utf-8") as file:
        names = [line.strip() for line in file if line.strip()]
    return CheckpointState([os.path.join(os.fspath(checkpoint_dir), n) for n in names]) if names else None


def latest_checkpoint(checkpoint_dir: Any, latest_filename: str = _INDEX) -> str | None:
    """The path of the newest checkpoint in a folder, or None."""
    found = get_checkpoint_state(checkpoint_dir, latest_filename)
    return found.model_checkpoint_path if found is not None else None
