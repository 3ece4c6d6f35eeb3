"""Watching a function while it is recorded: which Python code runs, and what of the world outside that code reads.

The interpreter's trace hook reports each instruction of the code outside duo before it runs. A shadow of its value stack is kept, in which
values are known where they can be (names, constants, attributes, results of Python calls); so every read of a global, a closure cell, an
attribute or a container is known with the very object it was read from, and becomes a guard. What is not known makes the recording
unfit for replay, never wrong: reading from an unknown value, or an instruction that is not understood, is reported as a culprit.
"""

from __future__ import annotations

import dis
import functools
import gc
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from duo.eager.tensor import EagerTensor
from duo.eager.trie import Info
from duo.jit import guards
from duo.jit.guards import MISSING, Guard, Unguardable
from duo.jit.hooks import Hooks
from duo.jit.purity import MUTATION, REFLECTION, callable_in_python, known_class, mutates, pure, stateful
from duo.nn.module import Module
from duo.optim.optimizer import Optimizer

NEWEST = (3, 13)  # Python whose instructions `opcodes.py` knows


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


UNKNOWN, NULL, FRESH, PLAIN, MADE = map(_Mark, ("unknown", "null", "fresh", "plain", "made"))
# PLAIN: an immutable Python value that is not known, FRESH: a container made here, MADE: a function made here.


@functools.lru_cache(maxsize=4096)
def _instructions(code: types.CodeType) -> dict[int, tuple[Any, int]]:
    """Offset -> (instruction, offset of the next one)."""
    found = list(dis.get_instructions(code))
    return {i.offset: (i, found[k + 1].offset if k + 1 < len(found) else -1) for k, i in enumerate(found)}


@functools.lru_cache(maxsize=4096)
def _argument_names(code: types.CodeType) -> frozenset[str]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return frozenset(code.co_varnames[:count])


class _Frame:
    """The shadow of one running frame."""

    __slots__ = ("after", "called", "fresh", "function", "inner", "last", "names", "returned", "stack", "table")

    def __init__(self, code: types.CodeType, function: Any, inner: bool) -> None:
        self.table = _instructions(code)
        self.function = function  # the function object, where it is known
        self.inner = inner  # made by code that is being recorded
        self.stack: list[Any] = []
        self.after: Callable[[int], None] | None = None
        self.last: int | None = None  # the instruction after the one that runs
        self.returned: Any = UNKNOWN
        self.called = False
        self.fresh: set[str] = set()
        self.names: tuple[str, ...] = ()

    def pop(self) -> Any:
        return self.stack.pop() if self.stack else UNKNOWN

    def drop(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)


class Observer(Hooks):
    """Collects guards and culprits while it is on. `outside(tensor)` says whether a tensor's value was there before."""

    def __init__(self, root: Any, outside: Callable[[EagerTensor], bool]) -> None:
        super().__init__()
        self.root = root
        self.outside = outside
        self.guards: dict[tuple, Guard] = {}
        self.modules: dict[int, Module] = {}
        self.metas: dict[int, tuple[EagerTensor, Info]] = {}
        self.culprits: dict[str, None] = {}
        self.frames: dict[Any, _Frame] = {}
        self.fresh: dict[int, Any] = {}  # containers and instances made here
        self.made_codes: set[types.CodeType] = set()
        self.lent: set[str] = set()  # names of enclosing functions that functions made here use
        self.calling: Any = None  # the function that the next frame runs, where known
        self.seen: set[tuple] = set()

    # ------------------------------------------------------------------------------------------------------ on and off
    def attend(self) -> bool:
        """`start`. False when someone else is tracing (a debugger, coverage, a profiler): nothing is observed then."""
        if sys.gettrace() is not None or sys.getprofile() is not None:
            self.culprits["a debugger, profiler or coverage tool is tracing this thread"] = None
            return False
        if not (3, 11) <= sys.version_info[:2] <= NEWEST:
            self.culprits[f"what the instructions of Python {sys.version.split()[0]} read is not known to duo"] = None
            return False
        self.start()
        return True

    def stop(self) -> None:
        super().stop()
        self.frames.clear()
        self.fresh.clear()
        self.calling = None

    def culprit(self, what: str, frame: Any = None) -> None:
        where = f" ({_where(frame)})" if frame is not None else ""
        if len(self.culprits) < 16:
            self.culprits[what + where] = None

    # ------------------------------------------------------------------------------------------------------- the hooks
    def begin(self, frame: Any) -> None:
        if frame in self.frames:  # a generator goes on
            return
        code = frame.f_code
        function, self.calling = self.calling, None
        if function is None or getattr(function, "__code__", None) is not code:
            function = None
        try:
            self.frames[frame] = self._begin(frame, code, function)
        except Exception as error:
            self.culprit(f"{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}: {error}", frame)

    def watches(self, frame: Any) -> bool:
        return frame in self.frames

    def called(self, frame: Any) -> None:
        shadow = self.frames.get(frame)
        if shadow is not None:
            shadow.called = True

    def module_called(self, module: Any, frame: Any) -> None:
        """A module is called: its class's `forward`, whatever function that is, belongs to what the program depends on."""
        self.touch(module)
        for cls in type(module).__mro__:
            if "forward" in cls.__dict__:
                found = cls.__dict__["forward"]
                what = f"{cls.__qualname__}.forward"
                self._add(guards.member(cls, "forward", found, what, _where(frame)), cls, "forward")
                return

    def _begin(self, frame: Any, code: types.CodeType, function: Any) -> _Frame:
        inner = code in self.made_codes
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            self.culprit("asynchronous code", frame)
        arguments = frame.f_locals
        first = code.co_varnames[0] if code.co_argcount else None
        owner = arguments.get(first) if first is not None else None
        if first is not None and not isinstance(owner, (EagerTensor, *guards.IMMUTABLE)):
            for cls in type(owner).__mro__:
                found = cls.__dict__.get(code.co_name)
                plain = getattr(found, "__func__", found)
                plain = getattr(plain, "fget", plain)
                if getattr(plain, "__code__", None) is code:
                    self._add(
                        guards.member(cls, code.co_name, found, f"{cls.__qualname__}.{code.co_name}", _where(frame)),
                        cls,
                        code.co_name,
                    )
                    function = function or plain
                    break
        if code.co_name == "__init__" and owner is not None:
            self.fresh[id(owner)] = owner
        if not inner and function is None and self._needs_function(code):
            function = self._find(code, arguments, frame)
        if isinstance(function, types.FunctionType) and not inner:
            self._guard_function(function, frame)
        for name in _argument_names(code):
            value = arguments.get(name, MISSING)
            if isinstance(value, Module):
                self.touch(value)
            elif isinstance(value, EagerTensor):
                self._meta(value)
        return _Frame(code, function, inner)

    @staticmethod
    def _needs_function(code: types.CodeType) -> bool:
        return any(name != "__class__" for name in code.co_freevars)

    def _find(self, code: types.CodeType, arguments: dict[str, Any], frame: Any) -> Any:
        """The closure that runs in a frame which was entered from C or duo: the one whose cells hold what the frame sees."""
        matching = []
        for candidate in gc.get_referrers(code):
            if isinstance(candidate, types.FunctionType) and candidate.__code__ is code:
                cells = dict(zip(code.co_freevars, candidate.__closure__ or ()))
                if all(_cell(c) is arguments.get(n, MISSING) for n, c in cells.items()):
                    matching.append(candidate)
        if len(matching) == 1:
            return matching[0]
        self.culprit(f"which closure of {code.co_name} runs cannot be told", frame)
        return None

    def _guard_function(self, function: types.FunctionType, frame: Any) -> None:
        if ("function", id(function)) in self.seen:
            return
        self.seen.add(("function", id(function)))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            what = {"__code__": "the code", "__defaults__": "a default argument"}.get(name, "a keyword default")
            self._attempt(guards.attribute, function, name, value, f"{what} of {function.__qualname__}", frame)
            for part in (
                value if isinstance(value, tuple) else (value or {}).values() if isinstance(value, dict) else ()
            ):
                self.see(part, frame, "a default argument")

    def profile(self, frame: Any, event: str, arg: Any) -> None:
        if event == "return":
            caller = self.frames.get(frame.f_back)
            if caller is not None:
                caller.returned = arg
            mine = self.frames.get(frame)
            if mine is None:
                return
            if mine.last is None:
                self.culprit(f"the interpreter does not tell of the instructions of {frame.f_code.co_name}", frame)
            if mine.stack and mine.stack[-1] is FRESH and arg is not None:
                self.fresh[id(arg)] = arg
        elif event == "call":
            caller = self.frames.get(frame.f_back)
            if caller is not None:
                caller.called = True
        elif event == "c_call":
            mine = self.frames.get(frame)
            if mine is None:
                return
            mine.called = True
            if mutates(arg):
                if id(arg.__self__) not in self.fresh:
                    self.culprit(
                        f"a {type(arg.__self__).__name__} that was there before is changed by .{arg.__name__}()", frame
                    )
            elif not pure(arg):
                self.culprit(f"a call of {_c_name(arg)}", frame)

    def step(self, frame: Any, event: str) -> None:
        shadow = self.frames.get(frame)
        if shadow is None:
            return
        if event == "exception":
            shadow.stack.clear()
            shadow.after = None
        if event != "opcode":
            return
        offset = frame.f_lasti
        try:
            if shadow.after is not None:
                after, shadow.after = shadow.after, None
                after(offset)
            instruction, following = shadow.table[offset]
            shadow.last = following
            shadow.returned, shadow.called = UNKNOWN, False
            handler = _HANDLERS.get(instruction.opname)
            if handler is None:
                shadow.stack.clear()
                self.culprit(f"the instruction {instruction.opname} cannot be followed", frame)
            else:
                handler(self, shadow, frame, instruction)
        except Exception as error:  # never the user's concern: what is not understood is not replayed
            shadow.stack.clear()
            shadow.after = None
            self.culprit(f"{type(error).__name__}: {error}", frame)

    # ----------------------------------------------------------------------------------------------------- observations
    def _add(self, guard: Guard, *key: Any) -> None:
        self.guards.setdefault((guard.test, *[k if isinstance(k, str) else id(k) for k in key]), guard)

    def _attempt(self, make: Callable[..., Guard], owner: Any, name: Any, value: Any, what: str, frame: Any) -> None:
        key = (make.__name__, id(owner), name if isinstance(name, (str, int)) else id(name))
        if key in self.guards:
            return
        try:
            self.guards[key] = make(owner, name, value, what, _where(frame))
        except Unguardable as error:
            self.culprit(f"{what} is {error}", frame)

    def touch(self, module: Any) -> None:
        if isinstance(module, Module):
            self.modules.setdefault(id(module), module)

    def _meta(self, tensor: EagerTensor) -> None:
        if id(tensor) not in self.metas and self.outside(tensor):
            self.metas[id(tensor)] = (tensor, tensor._val.info)

    def see(self, value: Any, frame: Any, what: str) -> Any:
        """A value that was read from outside."""
        if isinstance(value, EagerTensor):
            self._meta(value)
        elif isinstance(value, Module):
            self.touch(value)
        elif isinstance(value, (list, dict, set)):
            if id(value) not in self.fresh:
                self._see_container(value, frame, what)
        elif isinstance(value, tuple):
            for x in value:
                self.see(x, frame, what)
        elif not isinstance(
            value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
        ) and stateful(value):
            if id(value) not in self.fresh:
                self.culprit(f"{what} is a {type(value).__name__}, whose state cannot be compared", frame)
        elif isinstance(value, functools.partial):
            self.see((value.func, *value.args, *value.keywords.values()), frame, what)
        return value

    def see_argument(self, value: Any) -> None:
        """A value that the function was called with."""
        self.see(value, None, "an argument")

    def _see_container(self, value: Any, frame: Any, what: str) -> None:
        if ("contents", id(value)) in self.guards:
            return
        self._attempt(_contents, value, "contents", value, f"the contents of {what}", frame)
        for x in guards._elements(value):
            if not isinstance(x, (list, dict, set)):
                self.see(x, frame, what)

    def global_(self, frame: Any, name: str) -> Any:
        table = frame.f_globals
        if name in table:
            value = table[name]
            self._attempt(guards.item, table, name, value, f"global {name!r}", frame)
            return self.see(value, frame, f"global {name!r}")
        self._attempt(guards.item, table, name, MISSING, f"global {name!r}", frame)
        value = frame.f_builtins.get(name, MISSING)
        if value is MISSING:
            return UNKNOWN
        self._attempt(guards.item, frame.f_builtins, name, value, f"builtin {name!r}", frame)
        return value

    def deref(self, shadow: _Frame, frame: Any, name: str) -> Any:
        value = frame.f_locals.get(name, UNKNOWN)
        code = frame.f_code
        if name in code.co_freevars and name != "__class__" and not shadow.inner and value is not UNKNOWN:
            function = shadow.function
            if function is None or function.__code__ is not code:
                self.culprit(f"{name!r} is read from a closure that cannot be found", frame)
                return value
            owner = function.__closure__[code.co_freevars.index(name)]
            self._attempt(_cell_guard, owner, "cell", value, f"{name!r} of the enclosing function", frame)
            self.see(value, frame, f"{name!r} of the enclosing function")
        return value

    def attribute(self, owner: Any, name: str, frame: Any) -> Any:
        """What owner.name gives; a guard if it was read from something that may change."""
        if owner.__class__ is _Mark:
            if owner is not PLAIN and owner is not FRESH:
                self.culprit(f".{name} is read from a value that is not known", frame)
            return UNKNOWN
        if isinstance(owner, guards.IMMUTABLE):
            return getattr(owner, name, UNKNOWN)
        cls = type(owner)
        if isinstance(owner, EagerTensor):
            self._meta(owner)
            if "__dict__" in dir(cls) and name in getattr(owner, "__dict__", ()):
                self._attempt(
                    guards.item, owner.__dict__, name, owner.__dict__[name], f"attribute {name!r} of a tensor", frame
                )
            found = getattr(cls, name, UNKNOWN)
            return UNKNOWN if isinstance(found, property) or inspect.isdatadescriptor(found) else found
        if id(owner) in self.fresh and not isinstance(owner, type):
            table = getattr(owner, "__dict__", {})
            return table[name] if name in table else self._class_attribute(owner, cls, name, frame)
        if isinstance(owner, types.ModuleType):
            value = owner.__dict__.get(name, UNKNOWN)
            if value is UNKNOWN:
                return UNKNOWN  # a module's __getattr__: Python code, which is seen
            what = f"{owner.__name__}.{name}"
            self._attempt(guards.item, owner.__dict__, name, value, what, frame)
            return self.see(value, frame, what)
        if isinstance(owner, type):
            return self._of_class(owner, owner, name, frame)
        if isinstance(owner, Module):
            self.touch(owner)
            value = _module_attribute(owner, name)
            if value is not MISSING:
                return self.see(value, frame, f"{cls.__qualname__}.{name}")
            return self._class_attribute(owner, cls, name, frame)
        if isinstance(
            owner, (types.FunctionType, types.MethodType, types.BuiltinFunctionType, list, dict, set, tuple, frozenset)
        ):
            return (
                getattr(owner, name, UNKNOWN)
                if not isinstance(owner, types.FunctionType)
                else self._plain(owner, name, frame)
            )
        if cls.__getattribute__ not in _GENERIC_READS:
            self.culprit(f".{name} of a {cls.__qualname__}, which has its own way to find attributes", frame)
            return UNKNOWN
        on_class = inspect.getattr_static(cls, name, MISSING)
        if on_class is not MISSING and inspect.isdatadescriptor(on_class):
            return self._class_attribute(owner, cls, name, frame)
        table = getattr(owner, "__dict__", None)
        if table is not None:
            value = table.get(name, MISSING)
            what = f"attribute {name!r} of a {cls.__qualname__}"
            self._attempt(guards.item, table, name, value, what, frame)
            if value is not MISSING:
                return self.see(value, frame, what)
        return self._class_attribute(owner, cls, name, frame)

    def _plain(self, owner: Any, name: str, frame: Any) -> Any:
        value = getattr(owner, name, MISSING)
        self._attempt(guards.attribute, owner, name, value, f"attribute {name!r} of {owner!r}", frame)
        return UNKNOWN if value is MISSING else self.see(value, frame, f"attribute {name!r}")

    def _class_attribute(self, owner: Any, cls: type, name: str, frame: Any) -> Any:
        return self._of_class(owner, cls, name, frame)

    def _of_class(self, owner: Any, cls: type, name: str, frame: Any) -> Any:
        for base in cls.__mro__:
            if name not in base.__dict__:
                if base.__flags__ & (1 << 9) and not isinstance(owner, (Module, Optimizer)):
                    self._attempt(guards.member, base, name, MISSING, f"{base.__qualname__}.{name}", frame)
                continue
            value = base.__dict__[name]
            what = f"{base.__qualname__}.{name}"
            self._attempt(guards.member, base, name, value, what, frame)
            if isinstance(value, types.FunctionType):
                return value
            if isinstance(value, staticmethod):
                return value.__func__
            if isinstance(value, classmethod):
                return types.MethodType(value.__func__, owner if isinstance(owner, type) else cls)
            if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)) and not isinstance(
                owner, type
            ):
                return self._plain(owner, name, frame) if id(owner) not in self.fresh else getattr(owner, name, UNKNOWN)
            if hasattr(type(value), "__get__"):
                return UNKNOWN  # a property: Python code, which is seen
            return self.see(value, frame, what)
        if isinstance(owner, type):
            return getattr(owner, name, UNKNOWN) if name in ("__name__", "__qualname__", "__mro__") else UNKNOWN
        return UNKNOWN  # __getattr__, or an AttributeError

    def local(self, shadow: _Frame, frame: Any, name: str) -> Any:
        value = frame.f_locals.get(name, UNKNOWN)
        if name in shadow.fresh and value is not UNKNOWN:
            self.fresh[id(value)] = value
        if isinstance(value, EagerTensor):
            self._meta(value)
        elif isinstance(value, Module):
            self.touch(value)
        return value

    def result(self, shadow: _Frame, usable: bool = True) -> None:
        """The instruction pushes a value; it is known if Python code returned it."""

        def after(offset: int) -> None:
            value = shadow.returned if usable else UNKNOWN
            shadow.push(UNKNOWN if value is NotImplemented else value)

        shadow.after = after

    def call(self, shadow: _Frame, frame: Any, function: Any, arguments: list[Any]) -> None:
        self.calling = (
            getattr(function, "__func__", function)
            if isinstance(function, (types.FunctionType, types.MethodType))
            else None
        )
        usable, outcome = False, UNKNOWN
        if function.__class__ is _Mark and function is not MADE:

            def unseen(offset: int) -> None:
                if not shadow.called:
                    self.culprit("a call that cannot be followed", frame)
                shadow.push(UNKNOWN)

            shadow.after = unseen
            return
        if function is MADE:
            usable = True
        elif isinstance(function, type):
            if not known_class(function):
                self.culprit(f"a call of {function.__module__}.{function.__qualname__}", frame)
            if function in (list, dict, set):
                outcome = FRESH
            elif function in (int, float, bool, str, range, tuple, super):
                outcome = PLAIN
        elif function in REFLECTION if isinstance(function, types.BuiltinFunctionType) else False:
            outcome = self._reflect(function, arguments, frame)
        elif function in MUTATION if isinstance(function, types.BuiltinFunctionType) else False:
            self._store(arguments[0], arguments[1] if len(arguments) > 1 else "?", frame)
        elif isinstance(function, types.BuiltinFunctionType):
            if function in (len, abs, min, max, sum, round, repr, ord, chr):
                outcome = _evaluated(function, arguments)
            elif function is sorted:
                outcome = FRESH
        elif isinstance(function, (types.MethodDescriptorType, types.WrapperDescriptorType)):
            if arguments and arguments[0].__class__ is dict and function.__name__ == "get" and len(arguments) > 1:
                outcome = _evaluated(function, arguments)
        elif callable_in_python(function):
            usable = True
        elif isinstance(function, functools.partial):
            usable = True
            self.see(function, frame, "a partial function")
        elif not isinstance(function, (types.MethodWrapperType, types.ClassMethodDescriptorType)):
            self.culprit(f"a call of a {type(function).__name__}", frame)

        def after(offset: int) -> None:
            shadow.push(shadow.returned if usable else outcome)

        shadow.after = after

    def _reflect(self, function: Any, arguments: list[Any], frame: Any) -> Any:
        if len(arguments) < 2 or not isinstance(arguments[1], str):
            self.culprit(f"{function.__name__}() of a name that is not known", frame)
            return UNKNOWN
        owner, name = arguments[0], arguments[1]
        if owner.__class__ is _Mark:
            self.culprit(f"{function.__name__}(..., {name!r}) of a value that is not known", frame)
            return UNKNOWN
        value = self.attribute(owner, name, frame)
        if function is hasattr:
            return PLAIN
        if value is UNKNOWN and len(arguments) > 2 and not hasattr(owner, name):
            return arguments[2]
        return value

    def _store(self, owner: Any, name: Any, frame: Any) -> None:
        if isinstance(owner, EagerTensor) or owner is FRESH or id(owner) in self.fresh:
            return
        kind = "a value that is not known" if owner.__class__ is _Mark else f"a {type(owner).__qualname__}"
        self.culprit(f"attribute {name!r} of {kind} is set", frame)


def _contents(owner: Any, name: str, value: Any, what: str, where: str) -> Guard:
    return guards.read("owner", {"owner": owner}, value, what, where)


def _cell_guard(owner: Any, name: str, value: Any, what: str, where: str) -> Guard:
    return guards.cell(owner, value, what, where)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _evaluated(function: Any, arguments: list[Any]) -> Any:
    if any(a.__class__ is _Mark or isinstance(a, EagerTensor) for a in arguments):
        return PLAIN
    if not all(isinstance(a, (*guards.IMMUTABLE, list, tuple, dict, set)) for a in arguments):
        return UNKNOWN
    try:
        return function(*arguments)
    except Exception:
        return UNKNOWN


def _module_attribute(module: Module, name: str) -> Any:
    tables = module.__dict__
    if name in tables:
        return tables[name]
    for table in ("_parameters", "_buffers", "_modules"):
        if name in tables.get(table, ()):
            return tables[table][name]
    return MISSING


def _c_name(function: Any) -> str:
    owner = function.__self__
    if isinstance(owner, types.ModuleType):
        return f"{owner.__name__}.{function.__name__}"
    return function.__qualname__ if isinstance(owner, type) else f"{type(owner).__qualname__}.{function.__name__}"


def _where(frame: Any) -> str:
    if frame is None:
        return "the call"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


_GENERIC_READS = (object.__getattribute__, types.SimpleNamespace.__getattribute__)
_HANDLERS: dict[str, Callable[[Observer, _Frame, Any, Any], None]] = {}
