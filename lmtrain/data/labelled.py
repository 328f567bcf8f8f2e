"""Text with one label for each example, as classification reads it.

Forms: lines `label<TAB>text`; JSON Lines with `label` and `text` (.jsonl, .jsonl.gz); a folder
with one file of lines for each label. Knows text, never ids.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.data import corpus
from lmtrain.errors import TextError

_TRY = "try: one example per line, the label first, then a tab and the text"
_TRY_JSON = 'try: one object per line, such as {"label": "good", "text": "I liked it"}'


@dataclass(frozen=True)
class Example:
    """A text and its label, both as `cleaned` gives them."""

    label: str
    text: str


def read(places: Sequence[str]) -> Iterator[Example]:
    """The examples of files, globs, folders and `-`, one after the other.

    Raises:
        TextError: missing, unreadable, a line without label or text, or no example at all.
    """
    found = False
    for place in places:
        # Path.is_dir raises where a name is too long for a folder; open_text says so of the file.
        is_folder = os.path.isdir(place)  # noqa: PTH112
        for example in _read_folder(Path(place)) if is_folder else _read_files(place):
            found = True
            yield example
    if not found:
        raise TextError(f"{', '.join(places)} has no examples", _TRY)


def read_texts(place: str) -> Iterator[str]:
    """The texts of a file without labels, one for each line; of JSON Lines, their `text`.

    A blank line is an empty text; in JSON Lines it is none.

    Raises:
        TextError: missing or unreadable.
    """
    for name, number, line in corpus.numbered_lines([place]):
        if not _is_json(name):
            yield cleaned(line)
        elif line.strip():
            yield cleaned(_field(_json(line, name, number), "text", name, number))


def cleaned(text: str) -> str:
    r"""A label or a text in one line, without white space around it, whatever it was read from.

    Example:
        >>> cleaned(" very\ngood ")
        'very good'
    """
    return " ".join(text.splitlines()).strip()


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over labels and texts in their order."""
    # Neither a label nor a text holds a newline.
    return corpus.fingerprint(f"{each.label}\n{each.text}\n" for each in examples)


def _read_folder(folder: Path) -> Iterator[Example]:
    """The examples of a folder with one file of lines for each label, named after it.

    Hidden files are none of them.

    Raises:
        TextError: it cannot be listed, or a name is no label.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if _is_label_file(path))
    except OSError as error:
        raise TextError(f"cannot read {folder}: {error.strerror}") from None
    for path in paths:
        _require_unicode(path.name, f"{folder}: the file name {path.name!a}")
        label = cleaned(path.name.removesuffix(".gz").rpartition(".")[0] or path.name)
        if not label:
            raise TextError(f"{folder}: the file name {path.name!a} has no label")
        # Not str(path), which for a file called - is the name of standard input.
        for _, _, line in _filled_lines(f"{folder}/{path.name}"):
            yield Example(label, cleaned(line))


def _is_label_file(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _read_files(place: str) -> Iterator[Example]:
    for name, number, line in _filled_lines(place):
        if _is_json(name):
            tree = _json(line, name, number)
            label, text = (_field(tree, key, name, number) for key in ("label", "text"))
        else:
            label, tab, text = line.partition("\t")
            if not tab:
                raise TextError(f"{name}, line {number}: no tab between label and text", _TRY)
        label, text = cleaned(label), cleaned(text)
        for what, value in (("label", label), ("text", text)):
            if not value:
                raise TextError(f"{name}, line {number}: the {what} is empty", _advice(name))
        yield Example(label, text)


def _filled_lines(place: str) -> Iterator[tuple[str, int, str]]:
    """The lines that are not blank, each with its file's name and its number."""
    return (each for each in corpus.numbered_lines([place]) if each[-1].strip())


def _is_json(name: str) -> bool:
    return name.removesuffix(".gz").endswith(".jsonl")


def _advice(name: str) -> str:
    return _TRY_JSON if _is_json(name) else _TRY


def _json(line: str, name: str, number: int) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise TextError(f"{name}, line {number}: not JSON", _TRY_JSON) from None


def _field(tree: object, key: str, name: str, number: int) -> str:
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise TextError(f"{name}, line {number}: no {key} that is text", _TRY_JSON)
    _require_unicode(str(value), f"{name}, line {number}: the {key}")
    return str(value)


def _require_unicode(text: str, what: str) -> None:
    """Checks that a text can be written in UTF-8; escapes in JSON and names of files may not be.

    Raises:
        TextError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(f"{what} is not valid Unicode") from None
