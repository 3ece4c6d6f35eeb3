"""Module: a tree of parameters, buffers and submodules with a `forward`, after torch.nn.Module.

A Module runs in either mode: applied to eager tensors it records, applied to a placeholder it builds graph nodes that read the very
same parameters. `epoch` counts real changes of any module's structure or flags; compiled functions compare it before
they replay.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from duo import dispatch
from duo.devices import names_device
from duo.eager.flush import flush
from duo.eager.hooks import RemovableHook
from duo.eager.keeping import note_state
from duo.eager.mode import no_grad
from duo.eager.tensor import EagerTensor
from duo.eager.trace import state
from duo.eager.watch import Epoch, WatchedDict
from duo.nn.parameter import Parameter
from duo.nn.runs import Run, of_duo
from duo.runtime import check_device
from duo_ir.errors import ArgumentError, DuoError, ShapeError
from duo_ir.types import dtype as as_dtype

_TABLES = ("_parameters", "_buffers", "_modules")
_LIKELY = ("_parameters", "_modules", "_buffers")  # the order in which attributes are looked for


class IncompatibleKeys(NamedTuple):
    """What load_state_dict(strict=False) could not match."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ModuleError(DuoError, AttributeError):
    """A Module without the attribute that was asked for, or not initialised."""


class Module:
    """Base of all layers and models. Subclasses call `super().__init__()` first, set parameters, buffers and submodules as attributes, and
    define `forward`."""

    training: bool
    _one_op = False  # of duo.nn's layers: whether `forward` records one op at most and does nothing else, or is a Run's
    _run: Run

    def __init__(self) -> None:
        object.__setattr__(self, "training", True)
        for table in _TABLES:
            object.__setattr__(self, table, WatchedDict())
        object.__setattr__(self, "_forward_hooks", [])
        object.__setattr__(self, "_forward_pre_hooks", [])
        object.__setattr__(self, "_non_persistent", set())
        if self._one_op and of_duo(self):
            object.__setattr__(self, "_run", Run())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise DuoError(f"{type(self).__name__} does not define forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            run = self.__dict__.get("_run")
            if run is not None and dispatch.chain is not None:
                return run(dispatch.chain, self, args[0])
            if not self._forward_pre_hooks and not self._forward_hooks:
                return self.forward(args[0])  # a plain call costs half of one through * and **
        return self._hooked(args, kwargs)

    def _plainly(self, input: Any) -> Any:
        """A call, by Python."""
        if not self._forward_pre_hooks and not self._forward_hooks:
            return self.forward(input)
        return self._hooked((input,), {})

    def _layers(self) -> Iterable[Module]:
        """The modules that a Run goes through."""
        return (self,)

    def _hooked(self, args: tuple, kwargs: dict) -> Any:
        for hook in list(self._forward_pre_hooks):
            changed = hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        out = self.forward(*args, **kwargs)
        for hook in list(self._forward_hooks):
            changed = hook(self, args, out)
            if changed is not None:
                out = changed
        return out

    # ---------------------------------------------------------------------------------------------- attributes
    def __setattr__(self, name: str, value: Any) -> None:
        tables = self.__dict__
        if "_parameters" not in tables:
            if isinstance(value, (Parameter, Module)):
                raise ModuleError(f"{type(self).__name__}: call super().__init__() before setting {name!r}")
            object.__setattr__(self, name, value)
            return
        if tables.get(name, _MISSING) is not value:
            Epoch.count += 1
        if isinstance(value, Parameter):
            self._drop(name, "_parameters")
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._drop(name, "_modules")
            self._modules[name] = value
        elif name in self._parameters:
            if value is not None:
                raise ArgumentError(
                    f"{name!r} is a parameter; set it to a Parameter or None, not {type(value).__name__}"
                )
            self._parameters[name] = None
        elif name in self._buffers and (value is None or isinstance(value, EagerTensor)):
            self._buffers[name] = value
            if value is not None:
                note_state(value)
        elif name in self._modules and value is None:
            self._modules[name] = None
        else:
            self._drop(name)
            object.__setattr__(self, name, value)

    def _drop(self, name: str, but: str = "") -> None:
        """Takes `name` out of all tables but one, where it keeps its place."""
        for table in _TABLES:
            if table != but:
                self.__dict__[table].pop(name, None)
        self.__dict__.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        tables = self.__dict__
        for table in _LIKELY:
            if table in tables:
                found = tables[table].get(name, _MISSING)
                if found is not _MISSING:
                    return found
        raise ModuleError(f"{type(self).__name__} has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        Epoch.count += 1
        if not any(name in self.__dict__[t] for t in _TABLES) and name not in self.__dict__:
            raise ModuleError(f"{type(self).__name__} has no attribute {name!r}")
        self._drop(name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._parameters, *self._buffers, *self._modules})

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Adds a parameter; None keeps the name without one."""
        Epoch.count += 1
        self._drop(name, "_parameters")
        self._parameters[name] = param

    def register_buffer(self, name: str, tensor: EagerTensor | None, persistent: bool = True) -> None:
        """Adds a tensor that is saved with the module (unless not persistent) but not trained."""
        Epoch.count += 1
        self._drop(name)
        self._buffers[name] = tensor
        if tensor is not None:
            note_state(tensor)
        if not persistent:
            self._non_persistent.add(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Adds a submodule under that name."""
        Epoch.count += 1
        self._drop(name, "_modules")
        self._modules[name] = module

    register_module = add_module

    def register_forward_hook(self, hook: Callable) -> RemovableHook:
        """hook(module, args, output) after forward; what it returns, if anything, replaces the output."""
        Epoch.count += 1
        return RemovableHook(self._forward_hooks, hook)

    def register_forward_pre_hook(self, hook: Callable) -> RemovableHook:
        """hook(module, args) before forward; what it returns, if anything, replaces the arguments."""
        Epoch.count += 1
        return RemovableHook(self._forward_pre_hooks, hook)

    # ---------------------------------------------------------------------------------------------- walking
    def named_modules(self, memo: set | None = None, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of this module and all below it, each once."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name)

    def modules(self) -> Iterator[Module]:
        return (m for _, m in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        return ((n, m) for n, m in self._modules.items() if m is not None)

    def children(self) -> Iterator[Module]:
        return (m for _, m in self.named_children())

    def _named(self, table: str, prefix: str, recurse: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        modules = self.named_modules(prefix=prefix) if recurse else [(prefix, self)]
        for path, module in modules:
            for name, tensor in module.__dict__[table].items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter), each parameter once."""
        return self._named("_parameters", prefix, recurse)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return (p for _, p in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, EagerTensor]]:
        return self._named("_buffers", prefix, recurse)

    def buffers(self, recurse: bool = True) -> Iterator[EagerTensor]:
        return (b for _, b in self.named_buffers(recurse=recurse))

    def get_submodule(self, target: str) -> Module:
        """The module of that dotted name."""
        module = self
        for name in target.split(".") if target else ():
            module = getattr(module, name)
        return module

    def get_parameter(self, target: str) -> Parameter:
        path, _, name = target.rpartition(".")
        return self.get_submodule(path)._parameters[name]

    def apply(self, fn: Callable[[Module], Any]) -> Module:
        """Calls fn on every module below, then on this one."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    # ---------------------------------------------------------------------------------------------- modes
    def train(self, mode: bool = True) -> Module:
        """Training mode (dropout drops, ...) or evaluation mode, for the whole tree."""
        for module in self.modules():
            if module.training != mode:
                module.training = mode
        return self

    def eval(self) -> Module:
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        Epoch.count += 1
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def to(self, *args: Any, **kwargs: Any) -> Module:
        """Casts floating-point parameters and buffers (`to(duo.float64)`) and moves all of them to a device (`to("cuda")`), in place: they stay the
        same tensors. An optimizer's state follows at its next step.

        memory_format is taken and changes nothing: layout is the compiler's matter."""
        target, device = kwargs.get("dtype"), kwargs.get("device")
        for arg in args:
            if isinstance(arg, EagerTensor):
                target, device = arg.dtype, arg.device
            elif isinstance(arg, bool):
                continue  # PyTorch's non_blocking
            elif names_device(arg):
                device = arg
            else:
                target = arg
        place = None if device is None else check_device(device)
        wanted = None if target is None else as_dtype(target)

        def convert(t: Any) -> Any:
            if place is not None:
                t = t._to_device(place)
            return t.to(wanted) if wanted is not None and t._type.dtype.is_float else t

        if place is not None or wanted is not None:
            self._convert(convert)
        return self

    def _convert(self, fn: Callable[[Any], Any]) -> None:
        Epoch.count += 1
        with no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                new = fn(tensor.detach())
                if new._type is not tensor._type or new._val.info.device is not tensor._val.info.device:
                    gradient = tensor.grad
                    tensor.grad = None
                    tensor._replace(new)
                    if gradient is not None:
                        tensor.grad = fn(gradient)
        if state.capture is None:
            flush()  # gradients recorded from here on are of other types: a trace holds one type of a leaf

    def float(self) -> Module:
        return self.to("f32")

    def double(self) -> Module:
        return self.to("f64")

    def half(self) -> Module:
        return self.to("f16")

    def bfloat16(self) -> Module:
        return self.to("bf16")

    def cpu(self) -> Module:
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Module:
        """Moves it to a GPU: the current one, or that of the number or name."""
        return self.to("cuda" if device is None else device)

    # ---------------------------------------------------------------------------------------------- state
    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> OrderedDict[str, Any]:
        """Dotted name -> tensor (detached, sharing storage) of parameters and persistent buffers."""
        out: OrderedDict[str, Any] = OrderedDict() if destination is None else destination
        for name, p in self._parameters.items():
            if p is not None:
                out[prefix + name] = p if keep_vars else p.detach()
        for name, b in self._buffers.items():
            if b is not None and name not in self._non_persistent:
                out[prefix + name] = b if keep_vars else b.detach()
        for name, module in self._modules.items():
            if module is not None:
                module.state_dict(out, f"{prefix}{name}.", keep_vars)
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Copies values in by name. Raises ArgumentError for missing and unexpected names (unless not strict) and ShapeError for shapes."""
        mine = self.state_dict(keep_vars=True)
        missing = [k for k in mine if k not in state_dict]
        unexpected = [k for k in state_dict if k not in mine]
        wrong = [
            f"{k}: {list(state_dict[k].shape)} in the state dict, {list(t.shape)} here"
            for k, t in mine.items()
            if k in state_dict and tuple(state_dict[k].shape) != tuple(t.shape)
        ]
        if wrong:
            raise ShapeError(f"load_state_dict of {type(self).__name__}: shapes differ: " + "; ".join(wrong))
        if strict and (missing or unexpected):
            raise ArgumentError(
                f"load_state_dict of {type(self).__name__}: missing {missing}, unexpected {unexpected}; strict=False takes what fits"
            )
        for k, t in mine.items():
            if k in state_dict:
                t.detach().copy_(state_dict[k])
        return IncompatibleKeys(missing, unexpected)

    # ---------------------------------------------------------------------------------------------- looks
    def extra_repr(self) -> str:
        """What to print of this layer between the parentheses."""
        return ""

    def _shown_modules(self) -> Iterable[tuple[str, str]]:
        return ((name, repr(module)) for name, module in self._modules.items())

    def __repr__(self) -> str:
        lines = [f"({name}): " + text.replace("\n", "\n  ") for name, text in self._shown_modules()]
        extra = self.extra_repr()
        if not lines:
            return f"{type(self).__name__}({extra})"
        return f"{type(self).__name__}({extra}\n  " + "\n  ".join(lines) + "\n)"


_MISSING = object()
