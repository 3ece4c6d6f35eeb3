"""Containers of modules and parameters."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from duo.nn.module import Module
from duo.nn.parameter import Parameter
from duo.nn.runs import Run
from duo_ir.errors import ArgumentError

_call = Module.__call__

class Sequential(Module):
    """Modules one after another: Sequential(a, b, ...) or Sequential(OrderedDict(name=module))."""

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        if self.__class__ is Sequential:
            object.__setattr__(self, "_run", Run())
        if len(modules) == 1 and isinstance(modules[0], OrderedDict):
            for name, module in modules[0].items():
                self.add_module(name, module)
        else:
            for i, module in enumerate(modules):
                self.add_module(str(i), module)

    def forward(self, input: Any) -> Any:
        for module in self._modules.values():
            # A module's call, written out where it does nothing but forward.
            if module.__class__.__call__ is not _call or module._forward_hooks or module._forward_pre_hooks:
                input = module(input)
            else:
                input = module.forward(input)
        return input

    def _layers(self) -> Iterable[Module]:
        return self._modules.values()

    def append(self, module: Module) -> Sequential:
        self.add_module(str(len(self)), module)
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Any:
        names = list(self._modules)
        if isinstance(index, slice):
            return Sequential(OrderedDict((n, self._modules[n]) for n in names[index]))
        return self._modules[names[index]]

    def __setitem__(self, index: int, module: Module) -> None:
        self.add_module(list(self._modules)[index], module)


class ModuleList(Module):
    """A list of modules."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def append(self, module: Module) -> ModuleList:
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> ModuleList:
        for module in modules:
            self.append(module)
        return self

    def __iadd__(self, modules: Iterable[Module]) -> ModuleList:
        return self.extend(modules)

    def insert(self, index: int, module: Module) -> None:
        modules = list(self)
        modules.insert(index, module)
        self._modules.clear()
        self.extend(modules)

    def _shown_modules(self) -> Iterable[tuple[str, str]]:
        """A run of modules that print alike is one line, as in torch."""
        first = 0
        for text, run in itertools.groupby(map(repr, self)):
            count = len(list(run))
            yield (str(first), text) if count == 1 else (f"{first}-{first + count - 1}", f"{count} x {text}")
            first += count

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(list(self._modules.values()))

    def __getitem__(self, index: int | slice) -> Any:
        modules = list(self._modules.values())
        return ModuleList(modules[index]) if isinstance(index, slice) else modules[index]

    def __setitem__(self, index: int, module: Module) -> None:
        self.add_module(list(self._modules)[index], module)


class ModuleDict(Module):
    """A dict of modules."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        for name, module in (modules or {}).items():
            self.add_module(name, module)

    def __getitem__(self, name: str) -> Module:
        return self._modules[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self.add_module(name, module)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def keys(self) -> Any:
        return self._modules.keys()

    def values(self) -> Any:
        return self._modules.values()

    def items(self) -> Any:
        return self._modules.items()


class ParameterList(Module):
    """A list of parameters."""

    def __init__(self, parameters: Iterable[Parameter] = ()) -> None:
        super().__init__()
        for p in parameters:
            self.append(p)

    def append(self, parameter: Parameter) -> ParameterList:
        if not isinstance(parameter, Parameter):
            raise ArgumentError(f"a ParameterList holds Parameters, not {type(parameter).__name__}")
        self.register_parameter(str(len(self)), parameter)
        return self

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(list(self._parameters.values()))

    def __getitem__(self, index: int) -> Parameter:
        return list(self._parameters.values())[index]
