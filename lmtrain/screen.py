"""Text for terminals: control characters are escaped, long names are shortened."""

import contextlib
import sys
import unicodedata
from collections.abc import Sequence

# Unicode categories that are escaped: control characters (Cc), format characters such as
# direction overrides (Cf), surrogates (Cs) and private use (Co).
_ESCAPED = {"Cc", "Cf", "Cs", "Co"}
# Maximum number of names in a message, and maximum length of each.
_MAX_NAMES, _MAX_LENGTH = 10, 40
_ALLOWED = {"\n", "\t", "\u200c", "\u200d"}


def printable(text: str) -> str:
    r"""The text with control characters escaped, except newlines and tabs.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ESCAPED and character not in _ALLOWED
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """The printable text on one line, with ⏎ for each newline."""
    return printable(text.strip("\n")).replace("\n", " ⏎ ")


def join_names(names: Sequence[str], max_names: int = _MAX_NAMES) -> str:
    """The first names, shortened and separated by commas, and how many more there are."""
    more = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(map(shorten, names[:max_names])) + more


def shorten(name: str) -> str:
    """A name on one line, cut to the length that fits in messages."""
    name = " ".join(name.split())
    return name if len(name) <= _MAX_LENGTH else f"{name[: _MAX_LENGTH - 1]}…"


class _StandardError:
    """Standard error; output is dropped if it is closed or its terminal is gone."""

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
"""Stream for messages and progress; failures to write are ignored."""


def note(text: str) -> None:
    """Prints a line to standard error, with control characters escaped."""
    STDERR.write(printable(text) + "\n")
