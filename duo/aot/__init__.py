"""Ahead of time: `duo.export` turns a function or module of either mode into a file that loads without a compiler, or a library for C."""

from duo.aot.spec import Spec, spec

__all__ = ["Spec", "spec"]
