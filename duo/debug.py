"""Looking inside: `recorded` shows what eager mode has recorded, `statistics` what was compiled, `check_nan` finds the first NaN;
`configure` sets when eager mode flushes, `set_fusion` and `set_backend` how programs run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from duo import runtime
from duo.eager.build import Construction
from duo.eager.flush import configure, synchronize
from duo.eager.trace import hooks, state
from duo_ir.core import Function


def recorded() -> Function:
    """What this thread has recorded and not yet run, as a Function of its leaves."""
    entries = state.trace.entries
    node = entries[-1].node
    if node is None or node.parent is None:
        return Function((), (), ())
    construction = Construction(node)
    return construction.function(n for n, v in enumerate(construction.values) if v is not None)


@contextmanager
def check_nan() -> Iterator[None]:
    """`with duo.debug.check_nan():` finds the op that makes the first NaN, or the first infinity from finite operands, in eager and
    graph mode and compiled functions: NanError names it, its types, and the line of the program. Slow: programs run op by op."""
    runtime.set_check_nan(True)
    hooks.placing = True
    try:
        yield
        synchronize()
    finally:
        hooks.placing = False
        runtime.set_check_nan(False)


def set_fusion(enabled: bool) -> None:
    """Whether programs compiled from now on are fused (the default) or run one kernel per op; the bits are the same."""
    runtime.set_fusion(enabled)


def set_backend(name: str) -> None:
    """'cpu' (compiled code) or 'interpret' (the reference interpreter); the bits are the same."""
    runtime.set_backend(name)


def statistics() -> runtime.Statistics:
    """Programs compiled, compiled as a whole, and found in the cache, since the process started."""
    return runtime.statistics


__all__ = ["check_nan", "configure", "recorded", "set_backend", "set_fusion", "statistics"]
