"""The errors a user can cause or meet, each class with the exit code the command line ends with.

A message says what is wrong and where, the value and the limit, and what to do: one to three lines.
"""

import contextlib
from collections.abc import Iterator


class LmtrainError(Exception):
    """An error that is explained to the user in one to three lines.

    Args:
        problem: what is wrong, and where.
        details: up to two more lines: the value and its limit, and what to try.

    Attributes:
        is_told: whether another process of the same training tells the user already.
    """

    exit_code = 1
    is_told = False

    def __init__(self, problem: str, *details: str) -> None:
        super().__init__("\n  ".join((problem, *details)))


class ConfigError(LmtrainError):
    """A setting, an option or an argument that cannot be used."""

    exit_code = 2


class TextError(LmtrainError):
    """Text that cannot be read, decoded, or that is too short for its purpose."""

    exit_code = 3


class CheckpointError(LmtrainError):
    """A run or checkpoint that is missing, damaged, or that does not fit."""

    exit_code = 4


class UnreadableError(CheckpointError):
    """A file of a run that is there and that the system does not let be read."""


class MachineError(LmtrainError):
    """Something the machine refused: disk, permission, memory, device, network."""

    exit_code = 5


class DivergedError(LmtrainError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 6


class RunBusyError(LmtrainError):
    """A run folder that another process trains in, or that holds a run already."""

    exit_code = 7


class RunInterruptedError(LmtrainError):
    """Training that a signal ended, after a checkpoint was saved.

    Args:
        signal_number: the signal received; the exit code is 128 plus this number.
        problem: what was saved, and where.
        details: how to go on.
    """

    def __init__(self, signal_number: int, problem: str, *details: str) -> None:
        super().__init__(problem, *details)
        self.exit_code = 128 + signal_number


# How Python, NumPy and torch say it, in small letters.
_OUT_OF_MEMORY = (
    "out of memory", "not enough memory", "can't allocate", "cannot allocate",
    "failed to allocate", "unable to allocate",
)  # fmt: skip


@contextlib.contextmanager
def out_of_memory_explained(advice: str) -> Iterator[None]:
    """Inside, what Python and torch raise when memory ends becomes an error for the user.

    Args:
        advice: what to try.

    Raises:
        MachineError: out of memory.
        RuntimeError: any other, as it was.
    """
    try:
        yield
    except MemoryError as error:
        raise MachineError(_out_of_memory(error), advice) from error
    except RuntimeError as error:
        if not any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY):
            raise
        raise MachineError(_out_of_memory(error), advice) from error


def _out_of_memory(error: Exception) -> str:
    return ": ".join(["out of memory", *str(error).splitlines()[:1]])[:140]
