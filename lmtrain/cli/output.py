"""Results on standard output, as text or as JSON without NaN."""

import json
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from lmtrain import screen

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(schema: str, content: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Prints one JSON object with the name of its schema; numbers that are not finite become null.

    On a terminal all other than ASCII is escaped, since JSON allows characters that control one.
    """
    tree = _finite({"schema": schema, **content})
    print(json.dumps(tree, allow_nan=False, ensure_ascii=sys.stdout.isatty(), indent=indent))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows as a table: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print(shown("  ".join(cells).rstrip()))


def shown(text: str) -> str:
    """The text for standard output: control characters are escaped on a terminal, not in a pipe."""
    return screen.printable(text) if sys.stdout.isatty() else text


def use_utf8() -> None:
    """Writes UTF-8 whatever the locale; characters that cannot be encoded are replaced."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def exit_quietly_on_broken_pipe() -> None:
    """Makes a closed pipe, as in `| head -1`, end the process without a message."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
