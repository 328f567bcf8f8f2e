"""Reads text with a tag for each token: CoNLL columns.

Each line has a token and, in the last column, its tag; columns are separated by tabs, or else by
spaces. A blank line ends a sentence.

Source: the shared tasks of CoNLL (Tjong Kim Sang & De Meulder 2003).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lmtrain.data import corpus
from lmtrain.errors import TextError

_TRY = "try: one token per line, its tag in the last column, a blank line between sentences"
_SECTION = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    """The tokens of a sentence and their tags."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]

    def lines(self) -> str:
        """Lines of a token, a tab and its tag."""
        pairs = zip(self.tokens, self.tags, strict=True)
        return "".join(f"{token}\t{tag}\n" for token, tag in pairs)


def read(paths: Sequence[str]) -> Iterator[Sentence]:
    """Reads the sentences of files, globs and `-` in order.

    Raises:
        TextError: missing, unreadable, a line without a tag or with another number of columns than
            the line before, or no sentences.
    """
    found = False
    for rows in _sentences(paths):
        found = True
        yield Sentence(tuple(row[0] for row in rows), tuple(row[-1] for row in rows))
    if not found:
        raise TextError(f"{', '.join(paths)} has no sentences", _TRY)


def read_tokens(path: str) -> Iterator[tuple[str, ...]]:
    """Reads the tokens of sentences: CoNLL columns of a .conll file, or else a sentence per line.

    Raises:
        TextError: missing, unreadable, or columns whose number changes within a sentence.
    """
    if path.removesuffix(".gz").endswith(".conll"):
        for rows in _sentences([path], columns=1):
            yield tuple(row[0] for row in rows)
    else:
        for _, _, line in corpus.numbered_lines([path]):
            yield tuple(line.split())


def fingerprint(sentences: Iterable[Sentence]) -> str:
    """SHA-256 over tokens and tags, in the order of the sentences."""
    return corpus.fingerprint(f"{each.lines()}\n" for each in sentences)


def _sentences(paths: Sequence[str], columns: int = 2) -> Iterator[list[list[str]]]:
    """The rows of each sentence.

    Raises:
        TextError: a row has fewer than `columns` columns, or not as many as the row before.
    """
    rows: list[list[str]] = []
    for name, number, line in corpus.numbered_lines(paths):
        # The end of a file also ends a sentence.
        is_end = not line.strip() or line.startswith(_SECTION)
        if rows and (is_end or number == 1):
            yield rows
            rows = []
        if is_end:
            continue
        row = _row(line)
        if len(row) < columns or not all(row):
            raise TextError(f"{name}, line {number}: expected a token and a tag", _TRY)
        if rows and len(row) != len(rows[0]):
            raise TextError(
                f"{name}, line {number}: {len(row)} columns, but {len(rows[0])} in the line "
                "before it",
                _TRY,
            )
        rows.append(row)
    if rows:
        yield rows


def _row(line: str) -> list[str]:
    if "\t" in line.strip():
        # A field may contain white space, but no line separators of Unicode.
        return [" ".join(cell.split()) for cell in line.split("\t")]
    return line.split()
