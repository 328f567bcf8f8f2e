"""Reads sentences and their translations: two aligned files, or lines of source, tab, target."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lmtrain.data import corpus
from lmtrain.errors import TextError

_TRY = (
    "try: a second file with the translations, --target FILE (--set data.valid_target=FILE); "
    "or lines of source, tab and target"
)


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation."""

    source: str
    target: str


def read(sources: Sequence[str], targets: Sequence[str]) -> Iterator[Pair]:
    """Reads sentences with their translations.

    Args:
        sources: files and globs of sentences.
        targets: files and globs of translations; empty if lines hold both.

    Raises:
        TextError: missing, unreadable, of unequal length, a line that is not source, tab and
            target, or an empty sentence.
    """
    found = False
    for pair in _aligned(sources, targets) if targets else _tabbed(sources):
        found = True
        yield pair
    if not found:
        raise TextError(f"{', '.join(sources)} has no sentences", _TRY)


def read_sentences(path: str) -> Iterator[str]:
    """Reads a file with a sentence on each line.

    Raises:
        TextError: missing or unreadable.
    """
    for _, _, line in corpus.numbered_lines([path]):
        yield line.strip()


def fingerprint(pairs: Iterable[Pair]) -> str:
    """SHA-256 over both languages, in the order of the sentences."""
    return corpus.fingerprint(f"{each.source}\n{each.target}\n" for each in pairs)


def _aligned(sources: Sequence[str], targets: Sequence[str]) -> Iterator[Pair]:
    both = [corpus.numbered_lines(paths) for paths in (sources, targets)]
    for count, pair in enumerate(itertools.zip_longest(*both)):
        if pair[0] is None or pair[1] is None:
            # Counted, not read again: standard input gives its lines once.
            counts = [
                count + (line is not None) + sum(1 for _ in lines)
                for line, lines in zip(pair, both, strict=True)
            ]
            raise TextError(
                f"{', '.join(sources)} has {counts[0]:,} lines, "
                f"{', '.join(targets)} has {counts[1]:,}",
                _TRY,
            )
        texts = []
        for name, number, line in pair:
            if not line.strip():
                raise TextError(f"{name}, line {number}: the sentence is empty")
            texts.append(line.strip())
        yield Pair(*texts)


def _tabbed(paths: Sequence[str]) -> Iterator[Pair]:
    for name, number, line in corpus.numbered_lines(paths):
        if not line.strip():
            continue
        source, tab, target = line.partition("\t")
        if not tab or not source.strip() or not target.strip():
            raise TextError(f"{name}, line {number}: expected source, tab and target", _TRY)
        if "\t" in target.strip():
            raise TextError(f"{name}, line {number}: more columns than source and target", _TRY)
        yield Pair(source.strip(), target.strip())
