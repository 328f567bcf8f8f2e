"""Text with a tag for each token: CoNLL columns.

A token a line, its tag in the last column; columns are separated by tabs, or by spaces where there
are none. A blank line ends a sentence. Knows text, never ids.

Source: the shared tasks of CoNLL (Tjong Kim Sang & De Meulder 2003).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lmtrain.data import corpus
from lmtrain.errors import TextError

_TRY = "try: a token a line, its tag in the last column, an empty line between sentences"
_SECTION = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    """Tokens and the tag of each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]

    def lines(self) -> str:
        """A token, a tab and its tag a line."""
        pairs = zip(self.tokens, self.tags, strict=True)
        return "".join(f"{token}\t{tag}\n" for token, tag in pairs)


def read(places: Sequence[str]) -> Iterator[Sentence]:
    """The sentences of files, globs and `-`, one after the other.

    Raises:
        TextError: missing, unreadable, a line without a tag or with another number of columns than
            the line before it, or no sentence at all.
    """
    found = False
    for rows in _sentences(places):
        found = True
        yield Sentence(tuple(row[0] for row in rows), tuple(row[-1] for row in rows))
    if not found:
        raise TextError(f"{', '.join(places)} has no sentences", _TRY)


def read_tokens(place: str) -> Iterator[tuple[str, ...]]:
    """The tokens of sentences: of CoNLL columns, or of text with a sentence a line.

    A file whose name ends in .conll has columns.

    Raises:
        TextError: missing, unreadable, or columns whose number changes within a sentence.
    """
    if place.removesuffix(".gz").endswith(".conll"):
        for rows in _sentences([place], columns=1):
            yield tuple(row[0] for row in rows)
    else:
        for _, _, line in corpus.numbered_lines([place]):
            yield tuple(line.split())


def fingerprint(sentences: Iterable[Sentence]) -> str:
    """SHA-256 over tokens and tags, in the order of the sentences."""
    return corpus.fingerprint(f"{each.lines()}\n" for each in sentences)


def _sentences(places: Sequence[str], columns: int = 2) -> Iterator[list[list[str]]]:
    """The rows of each sentence, with at least so many columns.

    Raises:
        TextError: a row has fewer, or not as many as the one before it.
    """
    rows: list[list[str]] = []
    for name, number, line in corpus.numbered_lines(places):
        # A sentence ends with its file, too.
        is_end = not line.strip() or line.startswith(_SECTION)
        if rows and (is_end or number == 1):
            yield rows
            rows = []
        if is_end:
            continue
        row = _row(line)
        if len(row) < columns or not all(row):
            raise TextError(f"{name}, line {number}: no token with a tag", _TRY)
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
        # A cell may have white space in it, but is one line, whatever Unicode takes for its end.
        return [" ".join(cell.split()) for cell in line.split("\t")]
    return line.split()
