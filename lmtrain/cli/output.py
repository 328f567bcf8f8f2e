"""What commands print: results on standard output, as text or as JSON without NaN."""

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
    """Prints one JSON object with its schema's name; numbers that are not finite become null.

    A terminal gets it in ASCII, since JSON lets through much that a terminal obeys.
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
    """Prints rows in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print(shown("  ".join(cells).rstrip()))


def shown(text: str) -> str:
    """The text as standard output gets it: printable on a terminal, as it is in a pipe."""
    return screen.printable(text) if sys.stdout.isatty() else text


def use_utf8() -> None:
    """Lets text that the locale cannot show through, as replacements rather than an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def end_in_silence() -> None:
    """Ends the process without a word when whoever reads its results leaves, as in `| head -1`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
