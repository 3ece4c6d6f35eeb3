"""Errors a duo user can act on.

Every error duo raises on purpose derives from `DuoError` and, where Python users expect it, also from the
built-in class they would catch (ValueError, TypeError, IndexError...). Messages name the op, the types and the
way out; `at(loc)` adds the user's own line.
"""

from __future__ import annotations


class DuoError(Exception):
    """Base of all errors that duo raises on purpose."""


class ShapeError(DuoError, ValueError):
    """Shapes that an op cannot take."""


class DTypeError(DuoError, TypeError):
    """Dtypes that an op cannot take."""


class ArgumentError(DuoError, ValueError):
    """An attribute or argument out of its range."""


class DeviceError(DuoError, RuntimeError):
    """Operands on different devices, or a device that is not there."""


class HostError(DeviceError, TypeError):
    """Memory of the host is asked of a tensor that is on another device."""


class GradientError(DuoError, RuntimeError):
    """A gradient that cannot be computed: freed, overwritten or not recorded."""


class IndexOutOfRange(DuoError, IndexError):
    """An index outside its axis, found when the program ran."""


class TraceError(DuoError, RuntimeError):
    """A value was needed where only its type is known (inside a compiled function)."""


class VerifyError(DuoError):
    """A Function that breaks a rule of the IR."""


class TextError(DuoError, ValueError):
    """Text that is not a Function."""


class FormatError(DuoError, ValueError):
    """A file that is not what it says it is."""


class NanError(DuoError, FloatingPointError):
    """`duo.debug.check_nan` found the first NaN or infinity."""
