"""Reads texts with a label for each example.

Forms: lines `label<TAB>text`; JSON Lines with `label` and `text` (.jsonl, .jsonl.gz); a folder
with one file of lines for each label. Knows text, never ids.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain import files
from lmtrain.data import corpus
from lmtrain.errors import TextError

_TRY = "try: one example per line, the label first, then a tab and the text"
_TRY_JSON = 'try: one object per line, such as {"label": "good", "text": "I liked it"}'


@dataclass(frozen=True)
class Example:
    """A text and its label, both passed through `cleaned`."""

    label: str
    text: str


def read(paths: Sequence[str]) -> Iterator[Example]:
    """Reads the examples of files, globs, folders and `-` in order.

    Raises:
        TextError: missing, unreadable, a line without label or text, or no examples.
    """
    found = False
    for path in paths:
        # A name that is too long is reported by open_text.
        is_folder = files.is_folder(path)
        for example in _read_folder(Path(path)) if is_folder else _read_files(path):
            found = True
            yield example
    if not found:
        raise TextError(f"{', '.join(paths)} has no examples", _TRY)


def read_texts(path: str) -> Iterator[str]:
    """Reads texts without labels: lines, or the field `text` of JSON Lines.

    A blank line is an empty text; in JSON Lines it is skipped.

    Raises:
        TextError: missing or unreadable.
    """
    for name, number, line in corpus.numbered_lines([path]):
        if not _is_json(name):
            yield cleaned(line)
        elif line.strip():
            yield cleaned(_field(_json(line, name, number), "text", name, number))


def cleaned(text: str) -> str:
    r"""A label or a text as one line, without surrounding white space.

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
    """Reads a folder with one file of lines for each label, named after the label.

    Hidden files are skipped.

    Raises:
        TextError: the folder cannot be listed, or a file name is not a label.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if _is_label_file(path))
    except OSError as error:
        raise TextError(f"cannot read {folder}: {error.strerror}") from None
    for path in paths:
        _require_unicode(path.name, f"{folder}: the file name {path.name!a}")
        name = path.name.removesuffix(".gz")
        label = cleaned(name.rpartition(".")[0] or name)
        if not label:
            raise TextError(f"{folder}: the file name {path.name!a} has no label")
        # str(path) of a file named - would mean standard input.
        for _, _, line in _filled_lines(f"{folder}/{path.name}"):
            yield Example(label, cleaned(line))


def _is_label_file(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _read_files(path: str) -> Iterator[Example]:
    for name, number, line in _filled_lines(path):
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


def _filled_lines(path: str) -> Iterator[tuple[str, int, str]]:
    """Lines that are not blank, each with the name of its file and its number."""
    return (each for each in corpus.numbered_lines([path]) if each[-1].strip())


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
        raise TextError(f"{name}, line {number}: {key} is missing or not text", _TRY_JSON)
    _require_unicode(str(value), f"{name}, line {number}: the {key}")
    return str(value)


def _require_unicode(text: str, what: str) -> None:
    """Checks that a text can be encoded in UTF-8; JSON escapes and file names may not be.

    Raises:
        TextError: it cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(f"{what} is not valid Unicode") from None
