"""Where a graph's operations are to run, in TensorFlow's words: `with tf.device("/gpu:0"):`, `op.device`, and what a Session makes of it.

A Session runs one program on one device: the first GPU that anything of what is run is placed on, else the CPU. The results have the same bits on
either, so a placement is only a matter of speed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from duo.graph.errors import InvalidArgumentError
from duo_ir.core import Loc

_PART = re.compile(r"(?:/?(job|replica|task):([^/]+))|(?:/?(?:device:)?(cpu|gpu)(?::(\d+|\*))?)", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceSpec:
    """A device, or a part of its name: '/job:localhost/replica:0/task:0/device:GPU:0'. What is not said is left open (None)."""

    job: str | None = None
    replica: int | None = None
    task: int | None = None
    device_type: str | None = None
    device_index: int | None = None

    @classmethod
    def from_string(cls, text: str) -> DeviceSpec:
        """Reads '/gpu:0', '/device:GPU:0', 'CPU:0', '/job:localhost/...' or ''. Raises InvalidArgumentError."""
        found: dict[str, Any] = {}
        at = 0
        while at < len(text):
            part = _PART.match(text, at)
            if part is None or (part.end() < len(text) and text[part.end()] != "/"):
                raise InvalidArgumentError(
                    f"{text!r} is no device; it is '/gpu:0' (or '/device:GPU:0'), '/cpu:0', or '' for any"
                )
            at = part.end()
            key, value, kind, index = part.groups()
            if key is None:
                found["device_type"] = kind.upper()
                if index not in (None, "*"):
                    found["device_index"] = int(index)
            elif key.lower() == "job":
                found["job"] = value
            elif value.isdigit():
                found[key.lower()] = int(value)
            else:
                raise InvalidArgumentError(f"{text!r} is no device: {key} is a number, not {value!r}")
        out = cls(**found)
        if out.job not in (None, "localhost") or out.replica or out.task:
            raise InvalidArgumentError(
                f"device {text!r} is of another process; a Session of duo runs in this one: leave out job, replica and task"
            )
        return out

    def merged(self, inner: DeviceSpec) -> DeviceSpec:
        """With what an inner scope says: that wins."""
        said = {k: v for k, v in vars(inner).items() if v is not None}
        if "device_type" in said and said["device_type"] != self.device_type:
            said.setdefault("device_index", None)
        return replace(self, **said)

    def to_string(self) -> str:
        """TensorFlow's full form of what is said."""
        parts = [
            f"/{k}:{v}" for k, v in (("job", self.job), ("replica", self.replica), ("task", self.task)) if v is not None
        ]
        if self.device_type is not None:
            parts.append(f"/device:{self.device_type}:{'*' if self.device_index is None else self.device_index}")
        return "".join(parts)

    @property
    def gpu(self) -> int | None:
        """The GPU's number; None for anything else."""
        return (self.device_index or 0) if self.device_type == "GPU" else None


Scope = DeviceSpec | Callable[[Any], Any] | None  # a function of an operation; None forgets what is around


def scope_of(device: Any) -> Scope:
    """What `tf.device` was given. Raises InvalidArgumentError."""
    if device is None or isinstance(device, DeviceSpec):
        return device
    if isinstance(device, str):
        return DeviceSpec.from_string(device)
    if callable(device):
        return device  # type: ignore[no-any-return]
    return DeviceSpec.from_string(str(device))


def innermost(scopes: list[Scope], operation: Any) -> DeviceSpec:
    """What these scopes, outermost first, say of an operation."""
    spec = DeviceSpec()
    for scope in scopes:
        if scope is None:
            spec = DeviceSpec()
            continue
        if not isinstance(scope, DeviceSpec):
            operation.device = spec.to_string()
            scope = scope_of(scope(operation) or "")
            if not isinstance(scope, DeviceSpec):
                raise InvalidArgumentError(f"a device function gives the name of a device, not {scope!r}")
        spec = spec.merged(scope)
    return spec


@dataclass(frozen=True)
class Place:
    """An operation that a scope has placed: its name or type, the spec, the user's line."""

    name: str
    spec: DeviceSpec
    loc: Loc | None


class Unnamed:
    """What a device function is asked about while an operation is being made: its type is known, its name not yet."""

    name = ""

    def __init__(self, type: str) -> None:
        self.type = type
        self.device = ""
