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
        raise MachineError("out of memory", advice) from error
    except RuntimeError as error:
        text = str(error)
        if "allocate" not in text and "out of memory" not in text:
            raise
        raise MachineError(f"out of memory: {text.splitlines()[0][:120]}", advice) from error
