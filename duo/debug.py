"""Looking inside: `trace_of` shows what is recorded, `statistics` what was compiled, `configure` sets when eager mode flushes."""

from __future__ import annotations

from duo import runtime
from duo.eager.build import Construction
from duo.eager.flush import configure
from duo.eager.trace import state
from duo_ir.core import Function


def recorded() -> Function:
    """What this thread has recorded and not yet run, as a Function of its leaves."""
    entries = state.trace.entries
    node = entries[-1].node
    if node is None or node.parent is None:
        return Function((), (), ())
    construction = Construction(node)
    return construction.function(n for n, v in enumerate(construction.values) if v is not None)


def statistics() -> runtime.Statistics:
    """Programs compiled, compiled as a whole, and found in the cache, since the process started."""
    return runtime.statistics


__all__ = ["configure", "recorded", "statistics"]
