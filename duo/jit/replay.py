"""Replays: a Recording and its guards as one generated Python function.

The function checks that everything is as it was (types of arguments, what the recorded code read, hyperparameters), hands buffers to the
program, and puts its outputs where the recorded call had put them. It gives MISS, having changed nothing, when anything differs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from duo import devices, numeric_mode
from duo.eager.autograd import GradLeaf
from duo.eager.creation import get_default_dtype
from duo.eager.flush import _segment
from duo.eager.moving import bring
from duo.eager.segments import Origin
from duo.eager.tensor import DATA, EagerTensor, Storage
from duo.eager.trace import END, Val, alias, roaming, settle, state
from duo.eager.trie import NOTHING, Info
from duo.eager.watch import Epoch
from duo.jit import donation, guards, nests
from duo.jit.guards import Guard, brief
from duo.jit.lending import aliased, close_open_trace, holder, lent, put, shares, stale, storage_of
from duo.jit.recording import Fresh, Recording, Same, Source
from duo.nn.module import Module
from duo.optim.known import structure_of
from duo.optim.optimizer import Optimizer

MISS = object()


class Structure:
    """Modules, optimisers and settings as they were: what is looked at when the epoch has moved on."""

    def __init__(self, roots: list[Module], optimizers: list[Optimizer], leaves: list[tuple[GradLeaf, tuple]]) -> None:
        modules = {id(m): m for root in roots for m in root.modules()}
        self.modules = [(m, _module_state(m)) for m in modules.values()]
        self.optimizers = [(o, structure_of(o)) for o in optimizers]
        self.leaves = leaves
        self.default = get_default_dtype()
        self.epoch = Epoch.count

    def difference(self) -> str | None:
        """What has changed, in words; None when nothing has."""
        for module, before in self.modules:
            now = _module_state(module)
            if len(now) != len(before) or not all(map(guards.same, now, before)):
                return f"a {type(module).__qualname__} changed: {_first_difference(before, now)}"
        for optimizer, before in self.optimizers:
            now = structure_of(optimizer)
            if len(now) != len(before) or not all(map(guards.same, now, before)):
                return f"the state or the parameters of the {type(optimizer).__name__} optimizer changed"
        for leaf, hooks in self.leaves:
            if len(leaf.hooks) != len(hooks) or any(a is not b for a, b in zip(leaf.hooks, hooks)):
                return "the hooks of a parameter changed"
        if get_default_dtype() is not self.default:
            return f"the default dtype changed {self.default.name} -> {get_default_dtype().name}"
        return None


def _module_state(module: Module) -> list[Any]:
    out: list[Any] = []
    for name, value in module.__dict__.items():
        out += [name, value]
        if name in ("_parameters", "_buffers", "_modules"):
            out += [x for pair in value.items() for x in pair]
        elif name in ("_forward_hooks", "_forward_pre_hooks"):
            out += value
    return out


def _first_difference(before: list[Any], now: list[Any]) -> str:
    for i, (a, b) in enumerate(zip(before, now)):
        if not guards.same(a, b):
            name = before[i - 1] if i and isinstance(before[i - 1], str) else "its attributes"
            return f"{name} {brief(a)} -> {brief(b)}"
    return "its attributes are more or fewer"


class Replay:
    """`run(args, kwargs)` gives the result of the recorded call for these arguments, or MISS."""

    def __init__(
        self,
        name: str,
        args: tuple,
        kwargs: dict,
        tensors: list[EagerTensor],
        recording: Recording,
        checks: list[Guard],
        metas: list[tuple[EagerTensor, Info]],
        structure: Structure,
        grad: bool,
    ) -> None:
        self.recording, self.checks, self.structure, self.grad = recording, checks, structure, grad
        self.metas = metas
        self.given = [x for x in nests.leaves((args, kwargs)) if not isinstance(x, EagerTensor)]
        self.numbers = [tuple(hyper) for *_, hyper in recording.groups]
        self.source = ""
        self.used = [False]
        self.check: Any = None  # like `run`, without running
        self.owner: Any = None  # weak reference to whom `run` is copied
        self.hoisted = ""  # what is kept between calls, in words
        self.run: Any = Writer(self, name, args, kwargs, tensors).function()

    def bring(self) -> bool:
        """States of generators that it reads, which may have been drawn from elsewhere, come back to its device; whether any was away."""
        away = [
            (s.what, i.device) for s, i in self.recording.infos.items()
            if s.kind == "outside" and s.what._val.info.device is not i.device and id(s.what) in roaming
        ]  # fmt: skip
        for cell, device in away:
            bring(cell, device)
        return bool(away)

    def become(self, run: Any) -> None:
        """Runs in another form from now on."""
        self.run = run
        owner = self.owner() if self.owner is not None else None
        if owner is not None:
            owner.follow(self)

    # ------------------------------------------------------------------------------------------- rare paths of the code
    def same_structure(self) -> bool:
        """The epoch has moved: whether what this replay depends on is still as it was."""
        epoch = Epoch.count
        if self.structure.difference() is not None:
            return False
        self.structure.epoch = epoch
        return True

    def regroup(self, i: int) -> bool:
        """Reads the hyperparameters of a group that has changed; False when it asks for another program."""
        optimizer, group, options, _ = self.recording.groups[i]
        version = group.version
        if optimizer.options(group) != options:
            return False
        self.numbers[i] = optimizer.hyper(group)
        self.versions[i] = version
        return True

    versions: list[int]

    def segment(self, program: Any, buffers: list[Any], vals: dict[int, Val], inputs: list[Any]) -> None:
        """Keeps what a backward pass from outside will need, as a flush does."""
        node = self.recording.node
        count = node.first + len(node.infos)
        entries = [vals[n] if n in vals else Val(None, n, None, NOTHING) for n in range(count)]
        leaves = {}
        for (e, k), given in zip(node.memo.inputs, inputs):
            if k is not None:  # numbers of one entry come in order
                entries[e].scalars = (*(entries[e].scalars or ()), given)
                continue
            leaves[given] = e
            entries[e].info, entries[e].buf, entries[e].extra = given.info, given.buf, given.extra
        for n, extra in self.recording.extras.items():
            entries[n].extra = extra
        trace = SimpleNamespace(entries=[*entries, END], leaves=leaves, placed=False)
        origins = _segment(trace, node.memo, program, buffers).origins  # type: ignore[arg-type]
        for n, origin in origins.items():
            if n in vals:
                vals[n].extra = origin

    def why(self, args: tuple, kwargs: dict) -> str:
        """Why the last call could not be a replay of this one."""
        now = [x for x in nests.leaves((args, kwargs)) if not isinstance(x, EagerTensor)]
        for a, b in zip(self.given, now):
            if not guards.same(a, b):
                return f"an argument changed {brief(a)} -> {brief(b)}"
        if state.grad is not self.grad:
            return f"gradients are {'on' if state.grad else 'off'} now"
        wanted = self.recording.default_device
        if wanted is not None and devices.default() != wanted:
            return f"the default device changed {wanted} -> {devices.default()}"
        kept = self.recording.numerics
        if kept is not None and numeric_mode.current() != kept:
            return f"numerics changed {kept} -> {numeric_mode.current()}"
        for guard in self.checks:
            if not guard.holds():
                return f"guard failed: {guard.report()}"
        if (difference := self.structure.difference()) is not None:
            return difference
        for i, (optimizer, group, options, _) in enumerate(self.recording.groups):
            if optimizer.options(group) != options:
                return f"the options of group {i} of the {type(optimizer).__name__} optimizer changed"
        for source, info in self.recording.infos.items():
            if source.kind == "outside" and source.what._val.info is not info:
                return f"a tensor from outside changed {info} -> {source.what._val.info}"
        for tensor, info in self.metas:
            if tensor._val.info is not info:
                return f"a tensor from outside changed {info} -> {tensor._val.info}"
        for _, leaf, before, _ in self.recording.grads:
            if before == "none" and leaf.grad is not None:
                return "a gradient that was None is there"
            if before == "tensor" and leaf.grad is None:
                return "a gradient that was there is None"
        return "storages, leaves or views of tensors changed"


class Writer:
    """Writes the function of a Replay."""

    def __init__(self, replay: Replay, name: str, args: tuple, kwargs: dict, tensors: list[EagerTensor]) -> None:
        self.replay, self.r = replay, replay.recording
        self.args, self.kwargs, self.tensors = args, kwargs, tensors
        self.title = name
        self.lines: list[str] = []
        self.names: dict[str, Any] = {
            "MISS": MISS, "state": state, "Epoch": Epoch, "structure": replay.structure, "replay": replay, "settle": settle, "new": object.__new__,
            "Val": Val, "Tensor": EagerTensor, "stale": stale, "aliased": aliased, "put": put, "same": guards.same, "Storage": Storage,
            "unchanged": guards.unchanged, "MISSING": guards.MISSING, "close": close_open_trace, "storage_of": storage_of,
            "alias": alias, "lent": lent, "shares": shares, "holder": holder,
        }  # fmt: skip
        self.variables: dict[Source, str] = {}  # of tensors
        self.numbered: dict[int, str] = {}  # value number -> variable of its Val
        self.argument_count = 0

    def const(self, value: Any, stem: str) -> str:
        name = f"{stem}{len(self.names)}"
        self.names[name] = value
        return name

    def add(self, *lines: str) -> None:
        self.lines += lines

    miss = "return MISS"
    last: Sequence[str] = ()  # what comes after everything else

    def miss_if(self, condition: str) -> None:
        self.lines.append(f"if {condition}: {self.miss}")

    def function(self) -> Any:
        r, replay = self.r, self.replay
        self.add("mine = state.__dict__")  # one look-up of this thread's state
        self.miss_if(f"mine['grad'] is not {replay.grad} or mine['capture'] is not None")
        self._ambient()
        self._arguments()
        self.miss_if("Epoch.count != structure.epoch and not replay.same_structure()")
        self._guards()
        self._tensors()
        self._groups()
        if r.program is not None:
            self._program()
        self._effects()
        self.add(*self.last)
        self._result()
        looks = (
            "    try:\n"
            + textwrap.indent("\n".join(self.lines[: self.checked]), " " * 8)
            + "\n    except LOOKS: return MISS\n"
        )
        text = "def replay_of(args, kwargs):\n" + looks + "    used[0] = True\n"
        text += textwrap.indent("\n".join(self.lines[self.checked :]), " " * 4)
        text += "\n\ndef check_of(args, kwargs):\n" + looks + "    return None\n"
        self.replay.source = text
        self.names["LOOKS"] = (LookupError, TypeError, AttributeError, ValueError)
        exec(compile(text, f"<replay of {self.title}>", "exec"), self.names)
        replay.check = self.names["check_of"]
        return self.names["replay_of"]

    # ------------------------------------------------------------------------------------------------------ the checks
    def _ambient(self) -> None:
        kept, wanted = self.r.numerics, self.r.default_device
        if kept is not None:
            self.names["numerics"] = numeric_mode.current
            self.miss_if(f"numerics() is not {self.const(kept, 'm')}")
        if wanted is not None:
            self.names["default_device"] = devices.default
            self.miss_if(f"default_device() is not {self.const(wanted, 'd')}")

    def _arguments(self) -> None:
        seen: dict[int, str] = {}

        def leaf(value: Any, source: str) -> None:
            if isinstance(value, EagerTensor):
                i = next(i for i, t in enumerate(self.tensors) if t is value)
                key = Source("argument", i)
                if id(value) in seen:
                    self.miss_if(f"{source} is not {seen[id(value)]}")
                    return
                name = seen[id(value)] = f"a{i}"
                self.add(f"{name} = {source}")
                self.miss_if(f"{name}.__class__ is not {self.const(value.__class__, 'c')}")
                self.variables[key] = name
            elif isinstance(value, guards.IMMUTABLE):
                x = self.const(value, "x")
                self.miss_if(f"{source} is not {x} and not same({source}, {x})")
            else:
                self.miss_if(f"{source} is not {self.const(value, 'x')}")

        self.miss_if(f"len(args) != {len(self.args)} or len(kwargs) != {len(self.kwargs)}")
        if self.args and all(isinstance(x, EagerTensor) for x in self.args):
            parts = [f"p{i}" for i in range(len(self.args))]
            self.add(f"{', '.join(parts)}, = args")
            for value, part in zip(self.args, parts):
                leaf(value, part)
        else:
            for i, value in enumerate(self.args):
                nests.taking(value, f"args[{i}]", self.lines, self.names, leaf, self.miss)
        for name, value in self.kwargs.items():
            self.miss_if(f"{name!r} not in kwargs")
            nests.taking(value, f"kwargs[{name!r}]", self.lines, self.names, leaf, self.miss)

    def _guards(self) -> None:
        for guard in self.replay.checks:
            mapping = {name: self.const(value, name) for name, value in guard.names.items()}
            test = guard.test
            for name in sorted(mapping, key=len, reverse=True):
                test = _replace(test, name, mapping[name])
            self.miss_if(f"not ({test})")
        for tensor, info in self.replay.metas:
            source = Source("outside", tensor)
            if source not in self.r.infos:
                self.r.infos[source] = info

    def _tensors(self) -> None:
        """Finds every tensor that is read or written, with its value; checks their types and storages."""
        r = self.r
        leaf_names: dict[int, str] = {}
        for source, info in r.infos.items():
            if source.kind == "argument":
                t = self.variables[source]
            elif source.kind == "outside":
                t = self.variables[source] = self.const(source.what, "T")
                if source.what._leaf is not None:
                    self.miss_if(f"{t}._leaf is not {self.const(source.what._leaf, 'L')}")
            else:
                continue
            self._value(source, t, info)
        for owner, leaf, before, _ in r.grads:
            if owner.kind == "argument":
                name = f"L{len(self.names)}_"
                self.names[name] = None
                self.add(f"{name} = {self.variables[owner]}._leaf")
                self.miss_if(f"{name} is None or {name}.hooks")
            else:
                name = self.const(leaf, "L")
            leaf_names[id(leaf)] = name
            source = Source("grad", leaf)
            if before == "none":
                self.miss_if(f"{name}.grad is not None")
            elif before == "tensor" or (source in r.infos and source in r.inputs):
                g = self.variables[source] = f"g{len(self.variables)}"
                self.add(f"{g} = {name}.grad")
                self.miss_if(f"{g} is None")
                self._value(source, g, r.infos[source])
        owners = {o for o, *_ in r.grads}
        for i, tensor in enumerate(self.tensors):
            source = Source("argument", i)
            if source in self.variables and tensor._leaf is not None and source not in owners:
                self.add(f"if {self.variables[source]}._leaf is None: return MISS")
        for tensor in r.no_leaf:
            name = self.const(tensor, "T")
            self.miss_if(f"{name}._leaf is not None or getattr({name}, '_kept', None) is not None")
        leafed = [self.variables[Source("argument", i)] for i, t in enumerate(self.tensors)
                  if t._leaf is not None and Source("argument", i) in self.variables]  # fmt: skip
        if leafed:
            static = self.const(
                {id(s.what._leaf) for s in r.infos if s.kind == "outside" and s.what._leaf is not None}, "S"
            )
            mine = f"({', '.join([f'id({t}._leaf)' for t in leafed])},)"
            self.miss_if(f"len(set({mine})) != {len(leafed)} or not {static}.isdisjoint({mine})")
        self.leaf_names = leaf_names
        written = [self.variables[s] for s in r.writes]
        if written:
            everything = list(dict.fromkeys(self.variables.values()))
            stored = " or ".join(f"{t}._storage is not None" for t in written)
            self.miss_if(f"({stored}) and aliased(({', '.join(everything)},), ({', '.join(written)},))")
            arguments = [self.variables[s] for s in self.variables if s.kind == "argument"]
            for a in arguments:
                for t in written:
                    if t != a:
                        self.miss_if(f"{a} is {t}")

    def _value(self, source: Source, t: str, info: Info) -> None:
        v = f"v_{t}"
        self.miss_if(f"{t}._storage is not None and stale({t})")
        self.add(f"{v} = {t}._val")
        self.miss_if(f"{v}.info is not {self.const(info, 'i')}")
        if source in self.r.writes:
            self.miss_if(f"{t}._chain or shares({t})")

    def _groups(self) -> None:
        self.replay.versions = [group.version for _, group, *_ in self.r.groups]
        self.names["versions"] = self.replay.versions
        self.names["hyper"] = self.replay.numbers
        self.names["used"] = self.replay.used
        for i, (_, group, *_) in enumerate(self.r.groups):
            self.miss_if(f"{self.const(group, 'G')}.version != versions[{i}] and not replay.regroup({i})")
        self.checked = len(self.lines)

    # ----------------------------------------------------------------------------------------------------- the program
    def _program(self) -> None:
        r = self.r
        program = r.program
        assert program is not None
        buffers: list[str] = []
        vals: list[str] = []
        loaded: dict[Source, str] = {}
        for x in r.inputs:
            if isinstance(x, Source):
                v = f"v_{self.variables[x]}"
                b = loaded.get(x)
                if b is None:
                    b = loaded[x] = f"b_{self.variables[x]}"
                    t = self.variables[x]
                    self.add(f"if {t}._storage is not None: {v} = lent({t}, {self._apart(len(buffers))})")
                    self.add(f"{b} = {v}.buf", f"if {b} is None: {b} = settle({v})")
                buffers.append(b)
                vals.append(v)
            elif x[0] == "constant":
                v = self.const(x[1], "K")
                buffers.append(self.const(x[1].buf, "B"))
                vals.append(v)
            elif x[0] == "number":
                buffers.append(self.const(x[1], "x"))
                vals.append(buffers[-1])
            else:
                buffers.append(f"hyper[{x[1]}][{x[2]}]")
                vals.append(buffers[-1])
        if r.writes:
            self.add("if len(mine['trace'].entries) != 1: close()")
        count = len(program.order) + len(program.residuals)
        outs = [f"o{i}" for i in range(count)]
        inputs = f"({', '.join(buffers)}{',' if buffers else ''})"
        given = donation.given_away(r)
        if given:
            self.add(*donation.run_lines(r, given, self.names, self.variables, inputs), f"{', '.join(outs)}, = outs")
        elif program.alive:
            self.add(f"outs = {self.const(program.run, 'run')}({inputs})", f"{', '.join(outs)}, = outs")
        else:
            self.add(f"{', '.join(outs)}, = {self.const(program.run, 'run')}({inputs})")
        wanted = self._wanted() | (set(program.order) if program.alive else set())
        for n, out in zip(program.order, outs):
            if n not in wanted:
                continue
            self._val(n, out)
        if given:
            self.add(*donation.START)
            self.last = donation.END
        if program.alive:
            table = ", ".join(f"{n}: {v}" for n, v in self.numbered.items())
            self.add(f"replay.segment({self.const(program, 'P')}, outs, {{{table}}}, [{', '.join(vals)}])")

    def _apart(self, k: int) -> bool:
        """Whether the program's input k must have memory of its own: it is kept for a backward pass or given back as a result; or, where other
        threads may run meanwhile, it may be an index, which is checked, and then used, and must be the same both times."""
        program = self.r.program
        assert program is not None
        bound = program.runnable
        if program.alive or not hasattr(bound, "program") or self.r.node.device is not devices.CPU:
            return bool(program.alive)
        type_ = bound.program.inputs[k]
        return k in bound.program.results or (type_.dtype.kind != "f" and bound.releases and bound.may_fail)

    def _val(self, n: int, out: str) -> None:
        """Makes value n, whose buffer is `out`."""
        program = self.r.program
        assert program is not None
        v = self.numbered[n] = f"r{n}"
        self.add(f"{v} = new(Val)", f"{v}.trace = None", f"{v}.index = {n}", f"{v}.node = None",
                 f"{v}.info = {self.const(self.r.node.info_of(n), 'i')}", f"{v}.buf = {out}", f"{v}.scalars = None")  # fmt: skip
        error = program.errors.get(n)
        if error is not None and not program.alive:
            self.names["Origin"] = Origin
            self.add(f"{v}.extra = Origin(None, {n}, {self.const(error, 'E')})")
        else:
            self.add(f"{v}.extra = None")
        self.add(f"{v}.stamp = None")

    def _wanted(self) -> set[int]:
        r = self.r
        return {m.number for m in r.made} | {n for n, _ in r.writes.values()} | set(r.storages)

    # --------------------------------------------------------------------------------------------- where outputs go
    def _effects(self) -> None:
        r = self.r
        for source, (n, overwritten) in r.writes.items():
            t, v = self.variables[source], self.numbered[n]
            if overwritten:
                self.add(f"v_{t}.overwritten = True")
            leaf = self._leaf_of(source, t)
            if leaf is not None and r.node.info_of(n).requires_grad:
                self.add(f"{v}.extra = {leaf}")
            self.add(f"if {t}._storage is None: {t}._val = {v}", f"else: put({t}, {v})")
        for i, n in enumerate(r.storages):
            self.add(f"s{i} = Storage({self.numbered[n]})")
        for i, made in enumerate(r.made):
            if made.number in self.numbered:
                self._tensor(f"m{i}", made)
        for _, grad_leaf, _, after in r.grads:
            name = self.leaf_names[id(grad_leaf)]
            if after is None:
                self.add(f"{name}.grad = None")
            elif after != "kept":
                self.add(f"{name}.grad = m{after}")

    def _leaf_of(self, source: Source, t: str) -> str | None:
        if source.kind == "argument":
            return f"{t}._leaf" if self.tensors[source.what]._leaf is not None else None
        if source.kind == "outside" and source.what._leaf is not None:
            return self.const(source.what._leaf, "L")
        return None

    def _tensor(self, name: str, made: Any) -> None:
        self.add(f"{name} = new(Tensor)", f"{name}._val = {self.numbered[made.number]}", f"{name}._leaf = None")
        chain = self.const(made.chain, "chain") if made.chain else "()"
        self.add(f"{name}._chain = {chain}")
        if made.source is not None:
            self.add(
                f"{name}._storage = storage_of({self.variables[made.source]})",
                f"{name}._seen = {name}._storage.version",
            )
        elif made.storage >= 0:
            self.add(f"{name}._storage = s{made.storage}", f"{name}._seen = 0")
        else:
            self.add(f"{name}._storage = None", f"{name}._seen = 0")
        if made.chain and not any(view is DATA for view, _ in made.chain):
            self.add(f"alias({name}._storage.val, {name}._val)")

    def _result(self) -> None:
        def leaf(value: Any) -> str:
            if isinstance(value, Fresh):
                return f"m{value.number}"
            if isinstance(value, Same):
                name = self.variables.get(value.source)
                if name is None:
                    name = f"{self.leaf_names[id(value.source.what)]}.grad"
                return name
            return self.const(value, "x")

        self.add(f"return {nests.building(self.r.result, self.names, leaf)}")


def _replace(text: str, name: str, by: str) -> str:
    """`text` with the identifier `name` replaced."""
    out: list[str] = []
    word = ""
    for ch in text + " ":
        if ch.isalnum() or ch == "_":
            word += ch
            continue
        out.append(by if word == name and (not out or out[-1] != ".") else word)
        out.append(ch)
        word = ""
    return "".join(out)[:-1]


__all__ = ["MISS", "Replay", "Structure", "Writer"]
