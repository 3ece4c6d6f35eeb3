"""The operating system's part of the CPU runtime: the module of this system under one name."""

from __future__ import annotations

import sys

if sys.platform == "linux":
    from duo_backends.cpu import os_linux as system
else:
    from duo_backends.cpu import os_portable as system

__all__ = ["system"]
