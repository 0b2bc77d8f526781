"""One tree of errors. Every message says what is wrong, the value, where, and what to do; the class says the exit code."""

from __future__ import annotations


class ArmorError(Exception):
    """Root of all errors raised on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1

    @classmethod
    def page(cls) -> str:
        """Where the documentation explains errors of this class, or of the nearest one of this tree."""
        known = next(kind for kind in cls.__mro__ if kind.__module__ == __name__)
        return f"docs/errors.md#{known.__name__.lower()}"


class RecipeError(ArmorError):
    """The recipe or the command's usage is wrong. The message lists every problem found, one a line."""

    exit_code = 2


class PlanError(ArmorError):
    """The recipe is well formed but cannot be carried out on this model; nothing was changed."""

    exit_code = 3


class UnfitError(PlanError):
    """One module cannot be changed as an entry of the recipe asks; with `unfit: skip` it is left as it is, and listed.

    `reason` says why; the message says after it what to do.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason = reason


class NumericalError(ArmorError):
    """A computation met non-finite values or broke a checked invariant."""

    exit_code = 4


class InputError(ArmorError):
    """An input (model, dataset, text file) cannot be read or does not hold what was asked of it."""

    exit_code = 5


class CheckpointError(InputError):
    """A checkpoint folder is not what its format promises; the message names the file and the tensor."""


class VerificationError(ArmorError):
    """What was written does not read back as what was meant, a lock does not hold, or two folders differ."""

    exit_code = 6


class LockedError(ArmorError):
    """Another run is writing to the same output."""

    exit_code = 6


class ResourceError(ArmorError):
    """Disk or memory ran out, or a worker was lost."""

    exit_code = 7


class QualityError(ArmorError):
    """A quality gate that the recipe sets was not met."""

    exit_code = 8
