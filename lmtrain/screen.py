"""What may reach a terminal: text from files, with nothing in it that the terminal would obey."""

import contextlib
import sys
import unicodedata
from collections.abc import Sequence

# Besides control characters, the marks that turn the direction of writing (category Cf).
_UNSAFE = {"Cc", "Cf", "Cs", "Co"}
# How many names stand in a message, and how much of each.
_LISTED, _SHORT = 10, 40
_ALLOWED = {"\n", "\t", "\u200c", "\u200d"}


def printable(text: str) -> str:
    r"""The text with control characters written as escapes; newlines and tabs stay.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNSAFE and character not in _ALLOWED
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """The text, printable, with its lines joined by a sign for the newline."""
    return printable(text.strip("\n")).replace("\n", " ⏎ ")


def listed(names: Sequence[str], most: int = _LISTED) -> str:
    """The first names, `most` of them, each in one line and shortened, for messages."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shortened, names[:most])) + more


def shortened(name: str) -> str:
    """The beginning of a name, in one line."""
    name = " ".join(name.split())
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 1]}…"


class _StandardError:
    """Standard error, or nothing where it is closed or its terminal is gone."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


STDERR = _StandardError()
"""What is shown beside the results goes here; that it cannot be shown ends nothing."""


def note(text: str) -> None:
    """Shows a line beside the results, printable: on standard error."""
    STDERR.write(printable(text) + "\n")
