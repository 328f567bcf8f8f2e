"""The errors that users see, each with the exit code of the command line.

A message has one to three lines: what is wrong and where, the value and the limit, and what to do.
"""

import contextlib
from collections.abc import Iterator


class LmtrainError(Exception):
    """Base class of the errors that are shown to the user as one to three lines.

    Args:
        problem: what is wrong, and where.
        details: up to two more lines: the value and its limit, and what to try.

    Attributes:
        is_reported: whether another process of the same training shows this error.
    """

    exit_code = 1
    is_reported = False

    def __init__(self, problem: str, *details: str) -> None:
        super().__init__("\n  ".join((problem, *details)))


class ConfigError(LmtrainError):
    """Invalid setting, option or argument."""

    exit_code = 2


class TextError(LmtrainError):
    """Data that cannot be read or decoded, or that is too short for its purpose."""

    exit_code = 3


class CheckpointError(LmtrainError):
    """Run or checkpoint that is missing, damaged or incompatible."""

    exit_code = 4


class UnreadableError(CheckpointError):
    """File of a run that exists but that the operating system could not read."""


class MachineError(LmtrainError):
    """Failure of the machine: disk, permissions, memory, device or network."""

    exit_code = 5


class DivergedError(LmtrainError):
    """Training that diverged: a loss, gradient or weight is out of bounds."""

    exit_code = 6


class RunBusyError(LmtrainError):
    """Run folder that another process uses, or that already contains a run."""

    exit_code = 7


class RunInterruptedError(LmtrainError):
    """A command ended by a signal; training saves a checkpoint first.

    Args:
        signal_number: the signal received; the exit code is 128 plus this number.
        problem: what was interrupted, and where a checkpoint was saved, if any.
        details: how to resume, if that is possible.
    """

    def __init__(self, signal_number: int, problem: str, *details: str) -> None:
        super().__init__(problem, *details)
        self.exit_code = 128 + signal_number


# Phrases of Python, NumPy and torch, in lower case.
_OUT_OF_MEMORY_PHRASES = (
    "out of memory", "not enough memory", "can't allocate", "cannot allocate",
    "failed to allocate", "unable to allocate",
)  # fmt: skip


@contextlib.contextmanager
def map_out_of_memory(advice: str) -> Iterator[None]:
    """Raises MachineError for out-of-memory errors of Python and torch inside the block.

    Args:
        advice: what to try; the last line of the message.

    Raises:
        MachineError: out of memory.
        RuntimeError: another RuntimeError, unchanged.
    """
    try:
        yield
    except MemoryError as error:
        raise MachineError(_out_of_memory_message(error), advice) from error
    except RuntimeError as error:
        if not any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY_PHRASES):
            raise
        raise MachineError(_out_of_memory_message(error), advice) from error


def _out_of_memory_message(error: Exception) -> str:
    return ": ".join(["out of memory", *str(error).splitlines()[:1]])[:140]
