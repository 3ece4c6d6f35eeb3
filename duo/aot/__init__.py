"""Ahead of time: `duo.export` turns a function or module of either mode into a file that loads without a compiler, or a library for C;
`duo.load_executable` loads the file."""

from duo.aot.export import export
from duo.aot.spec import Spec, spec
from duo.aot.training import export_training
from duo.executable import Executable, load_executable

__all__ = ["Executable", "Spec", "export", "export_training", "load_executable", "spec"]
