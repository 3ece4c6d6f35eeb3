"""`duo.compile`: a function, a Module or a whole training step as one compiled program.

The first call for given argument types records the Python function (duo/jit/capture.py) while watching what it reads
(duo/jit/observe.py); later calls replay the program (duo/jit/replay.py) as long as all of that is unchanged, and record again when it is not.
`explain()` tells what was compiled and why, and what keeps a function from being replayed.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from duo import numeric_mode, runtime
from duo.eager.native import Paused
from duo.eager.tensor import EagerTensor
from duo.eager.trace import END, Trace, state
from duo.eager.watch import Epoch, changed
from duo.jit import guards, nests, opcodes  # noqa: F401  (opcodes fills the table that observe.py reads)
from duo.jit.capture import Capture, tensors_in
from duo.jit.hoisting import offer
from duo.jit.in_place import quicken
from duo.jit.observe import Observer
from duo.jit.recording import Recording, analyse, run
from duo.jit.replay import MISS, Replay, Structure
from duo.nn.module import Module
from duo.tensor import Tensor
from duo_ir.errors import TraceError

MOST_REPLAYS = 64
_EAGER_TRIES = 8  # recordings in a row that are watched before watching gets rarer
_LOG_LINES = 200


class Compiled:
    """A compiled function. Call it like the function; `explain()` says what it did so far."""

    def __init__(self, function: Callable[..., Any], name: str, numerics: str | None = None) -> None:
        functools.update_wrapper(self, function, updated=())
        self.numerics = numerics
        self._function = function
        self._name = name
        self._replays: OrderedDict[int, Replay] = OrderedDict()
        self._last: Replay | None = None
        self._fast: Any = _no_replay  # the last replay's function
        self._keys: dict[Any, int] = {}  # argument types -> recordings in a row without a replay
        self._log: list[str] = []
        self._described = ""
        self._culprits: dict[str, None] = {}
        self._backend: Any = None
        self._serial = 0
        self.recordings = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._fast(args, kwargs)
        return out if out is not MISS else self._slow(args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"<compiled {self._name}>"

    # ------------------------------------------------------------------------------------------------ finding a replay
    def _slow(self, args: tuple, kwargs: dict) -> Any:
        if self.numerics is None:
            return self._found(args, kwargs)
        with numeric_mode.numerics(self.numerics):
            return self._found(args, kwargs)

    def _found(self, args: tuple, kwargs: dict) -> Any:
        if state.capture is not None:
            return self._function(*args, **kwargs)
        if any(isinstance(x, Tensor) and not isinstance(x, EagerTensor) for x in nests.leaves((args, kwargs))):
            return self._function(*args, **kwargs)  # a graph is being built
        self._drop_old()
        for number, replay in reversed(list(self._replays.items())):
            moved = replay.bring()
            if replay is self._last and not moved and not _VERIFY[0]:
                continue
            if _VERIFY[0]:
                if self._would_replay(replay, args, kwargs):
                    return self._verified(replay, args, kwargs)
                continue
            out = replay.run(args, kwargs)
            if out is not MISS:
                self._replays.move_to_end(number)
                self._use(replay)
                return out
        return self._record(args, kwargs)

    def _drop_old(self) -> None:
        """Programs of a backend that has been replaced are not run any more."""
        if self._backend is not _backend[0]:
            self._replays.clear()
            self._use(None)
            self._backend = _backend[0]

    def _use(self, replay: Replay | None) -> None:
        self._last = replay
        run = _no_replay if replay is None or _VERIFY[0] else replay.run
        self._fast = run if self.numerics is None or run is _no_replay else _inside(run, self.numerics)

    def follow(self, replay: Replay) -> None:
        """The replay runs in another form now."""
        if self._last is replay:
            self._use(replay)

    def _would_replay(self, replay: Replay, args: tuple, kwargs: dict) -> bool:
        try:
            return replay.check(args, kwargs) is not MISS
        except Exception:
            return False

    # -------------------------------------------------------------------------------------------------------- recording
    def _record(self, args: tuple, kwargs: dict) -> Any:
        key = nests.key((args, tuple(sorted(kwargs.items(), key=lambda kv: kv[0]))), _leaf_key)
        if any(replay.used[0] for replay in self._replays.values()):
            for replay in self._replays.values():
                replay.used[0] = False
            self._keys = dict.fromkeys(self._keys, 0)
        misses = self._keys.get(key, 0)
        known = key in self._keys
        if not known and len(self._keys) > 1024:
            self._keys.clear()
        self._keys[key] = misses + 1
        self._explain_call(key, known, args, kwargs)
        watched = misses < _EAGER_TRIES or misses & (misses - 1) == 0
        result, recording, capture, observer = self._captured(args, kwargs, watched)
        if observer is not None and recording is not None:
            self._keep(key, recording, capture, observer, args, kwargs)
        return result

    def _captured(
        self, args: tuple, kwargs: dict, watched: bool
    ) -> tuple[Any, Recording | None, Capture, Observer | None]:
        capture = Capture(self._name, tensors_in((args, kwargs)))
        observer = Observer(self._function, capture.outside) if watched else None
        self.recordings += 1
        with Paused(), capture:
            started = False
            try:
                if observer is not None:
                    for x in nests.leaves((args, kwargs)):
                        if not isinstance(x, guards.IMMUTABLE):
                            observer.see_argument(x)
                    observer.calling = getattr(self._function, "__func__", self._function)
                    started = observer.attend()
                    capture.observer = observer if started else None
                try:
                    result = self._function(*args, **kwargs)
                finally:
                    if started:
                        capture.observer = None
                        observer.stop()  # type: ignore[union-attr]
                    elif observer is not None:
                        observer.calling = None
                capture.refresh()
                whole = capture.whole
            except BaseException:
                state.capture = None
                _reopen()
                capture.finish_exports()
                raise
        if not whole:
            capture.finish_exports()
            return result, None, capture, observer
        trace = state.trace
        entries, numbers = run(capture)
        capture.trace.holders = {}  # stamps of the values refer to the trace: old state would stay until the garbage collector came
        state.trace = Trace(state.grad, trace.device)
        capture.finish_exports()
        if observer is None:
            return result, None, capture, None
        return result, analyse(capture, entries, numbers, result, trace), capture, observer

    def _keep(
        self, key: Any, recording: Recording, capture: Capture, observer: Observer, args: tuple, kwargs: dict
    ) -> None:
        reasons = [*recording.reasons, *observer.culprits]
        if Epoch.count != capture.epoch:
            reasons.append(
                "a module, an optimizer's state or a hook was made or changed inside (the first step of an optimizer does)"
            )
        if state.grad != capture.grad_mode:
            reasons.append("the grad mode is changed inside and left so")
        if reasons:
            self._culprits = dict.fromkeys(reasons)
            self._say("  not replayed: " + "; ".join(reasons))
            return
        self._culprits = {}
        structure = Structure(
            list(observer.modules.values()), [o for o, _ in capture.optimizers.values()], recording.leaves
        )
        checks = list(observer.guards.values())
        metas = [m for i, m in observer.metas.items() if not any(m[0] is t for t in capture.tensors)]
        replay = Replay(
            self._name, args, kwargs, capture.tensors, recording, checks, metas, structure, capture.grad_mode
        )
        replay.owner = weakref.ref(self)
        if quicken(replay, self._name, args, kwargs, capture.tensors):
            offer(replay, self._name)
        self._serial += 1
        self._replays[self._serial] = replay
        while len(self._replays) > MOST_REPLAYS:
            self._replays.popitem(last=False)
        self._use(replay)

    def _verified(self, replay: Replay, args: tuple, kwargs: dict) -> Any:
        """Under DUO_VERIFY=1: records although the replay would have done, and compares."""
        result, recording, _, _ = self._captured(args, kwargs, True)
        if recording is None or recording.signature() != replay.recording.signature():
            raise TraceError(
                f"DUO_VERIFY: a replay of {self._name} would have run another program than recording it again does; "
                "please report this with the function's source"
            )
        return result

    # ---------------------------------------------------------------------------------------------------------- explain
    def _say(self, line: str) -> None:
        self._log.append(line)
        del self._log[:-_LOG_LINES]

    def _explain_call(self, key: Any, known: bool, args: tuple, kwargs: dict) -> None:
        mode = " in fast numerics" if numeric_mode.current() == "fast" else ""
        call = f"recorded ({', '.join(_describe(args, kwargs))}){mode}: "
        described = ", ".join(_describe(args, kwargs))
        before, self._described = self._described, described
        if not self._log:
            self._say(call + "first call")
        elif not known:
            self._say(call + f"new argument types {before} -> {described}")
        elif self._culprits:
            self._say(call + "it cannot be replayed")
        elif self._last is not None:
            self._say(call + self._last.why(args, kwargs))
        else:
            self._say(call + "no replay was kept")

    def explain(self) -> str:
        """What was recorded and compiled, with the reason for each, and what keeps the function from being replayed."""
        lines = [f"{self._name}: {self.recordings} recordings, {len(self._replays)} replays kept", *self._log]
        lines += [f"  hoisted: {replay.hoisted}" for replay in list(self._replays.values()) if replay.hoisted]
        if self._culprits:
            lines.append("It is recorded at every call, because of:")
            lines += [f"  {c}" for c in self._culprits]
        return "\n".join(lines)


def _inside(run: Any, mode: str) -> Any:
    """A replay in numerics of its own."""

    def call(args: tuple, kwargs: dict) -> Any:
        with numeric_mode.numerics(mode):
            return run(args, kwargs)

    return call


def _no_replay(args: tuple, kwargs: dict) -> Any:
    return MISS


def _reopen() -> None:
    """After an error in the function: what it recorded so far stays, and runs when someone looks."""
    trace = state.trace
    if trace.entries[-1] is END:
        state.trace = Trace(state.grad, trace.device)


def _leaf_key(x: Any) -> Any:
    if isinstance(x, EagerTensor):
        return (x._val.info, x._leaf is not None)
    if isinstance(x, (int, float, str, bytes, bool, type(None))):
        return x.__class__
    return id(x)


def _describe(args: tuple, kwargs: dict) -> list[str]:
    named = [(("", x)) for x in args] + [(f"{k}=", x) for k, x in kwargs.items()]
    return [f"{name}{_shown(x)}" for name, x in named]


def _shown(x: Any) -> str:
    if isinstance(x, EagerTensor):
        return str(x._val.info)
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_shown, x))}]"
    return guards.brief(x) if isinstance(x, guards.IMMUTABLE) else type(x).__name__


class CompiledModule(Module):
    """A module whose calls are compiled. It shares everything with the module it was made from."""

    def __init__(self, module: Module, numerics: str | None = None) -> None:
        object.__setattr__(self, "__dict__", module.__dict__)
        _compiled_modules[id(self)] = (module, Compiled(module.__call__, type(module).__qualname__, numerics))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled = _compiled_modules[id(self)][1]
        out = compiled._fast(args, kwargs)  # as `Compiled.__call__` does
        return out if out is not MISS else compiled._slow(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _compiled_modules[id(self)][0].forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(_compiled_modules[id(self)][0], name)

    def __del__(self) -> None:
        _compiled_modules.pop(id(self), None)

    def __repr__(self) -> str:
        return f"compiled {_compiled_modules[id(self)][0]!r}"

    def explain(self) -> str:
        """See `Compiled.explain`."""
        return _compiled_modules[id(self)][1].explain()


_compiled_modules: dict[int, tuple[Module, Compiled]] = {}  # not attributes: those are the module's own


def compile(function: Any = None, *, numerics: str | None = None, **options: Any) -> Any:
    """Compiles a function, a Module or a whole training step (forward, backward(), step(), zero_grad() inside) into one program.

    The result is that of the plain call, bit for bit. Use it as a decorator or call it. `numerics`: 'strict' or 'fast' (see `duo.set_numerics`),
    whatever the mode is where it is called; without it, that mode. Other options (fullgraph, dynamic, mode, backend) are accepted for scripts
    written for PyTorch and change nothing. Raises TraceError where the function looks at a tensor's value.
    """
    numerics = None if numerics is None else numeric_mode.checked(numerics)
    if function is None:
        return functools.partial(compile, numerics=numerics)
    if isinstance(function, (Compiled, CompiledModule)):
        return function
    if isinstance(function, Module):
        return CompiledModule(function, numerics)
    return Compiled(function, getattr(function, "__qualname__", type(function).__name__), numerics)


_VERIFY = [os.environ.get("DUO_VERIFY", "0") not in ("", "0")]
_backend: list[Any] = [object()]


def _new_backend() -> None:
    _backend[0] = object()
    changed()


runtime.cache_listeners.append(_new_backend)
