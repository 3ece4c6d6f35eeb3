"""What graph mode raises, under the names of `tf.errors` where TensorFlow has one for the case."""

from __future__ import annotations

from duo_ir.errors import DuoError


class OpError(DuoError):
    """Base of the errors that a graph or a Session raises."""


class InvalidArgumentError(OpError, ValueError):
    """A feed that is missing or does not fit, an argument out of its range, tensors of two graphs in one op."""


class NoValueError(InvalidArgumentError):
    """Python asked for the value of a tensor that has one only when the program runs."""


class NotFoundError(OpError, KeyError):
    """A name that the graph does not have; a checkpoint or a variable of one that is not there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class FailedPreconditionError(OpError, RuntimeError):
    """A variable was read before its initialiser had run in this Session; a Session was used after it was closed."""


__all__ = ["FailedPreconditionError", "InvalidArgumentError", "NotFoundError", "OpError"]
