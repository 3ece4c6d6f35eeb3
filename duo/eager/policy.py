"""What happens after an op is recorded, apart from recording it: set by the room above (flush.py) and by `duo.debug`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hooks:
    """What rooms above this one plug in. flush.py: `flush` closes and runs a trace; `policy`, when set, is asked after every op whether to
    flush now and whether to raise errors here (DUO_SYNC, DUO_FLUSH). tensor.py: `tensor`, the class of eager tensors. native.py:
    `repeated` is called when a program has shown that it comes again. moving.py: `moved` copies a value to a device, `bring` moves a tensor there."""

    __slots__ = ("_placing", "_policy", "bring", "busy", "flush", "moved", "repeated", "tensor")
    flush: Callable[[Any], None]
    tensor: Any
    repeated: Callable[[], None]
    moved: Callable[[Any, str], Any]
    bring: Callable[[Any, str], None]

    def __init__(self) -> None:
        self._policy: Callable[[], tuple[bool, bool]] | None = None
        self._placing = False
        self.busy = False  # whether either is set

    @property
    def policy(self) -> Callable[[], tuple[bool, bool]] | None:
        return self._policy

    @policy.setter
    def policy(self, policy: Callable[[], tuple[bool, bool]] | None) -> None:
        self._policy = policy
        self.busy = policy is not None or self._placing

    @property
    def placing(self) -> bool:
        """Whether every entry keeps its own line (`Node.placed` apart)."""
        return self._placing

    @placing.setter
    def placing(self, placing: bool) -> None:
        self._placing = placing
        self.busy = placing or self._policy is not None
