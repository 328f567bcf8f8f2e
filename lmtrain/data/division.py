"""Training, validation and test text: given, or cut from the end of the training text."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from lmtrain.data import corpus
from lmtrain.data.corpus import Text, open_text
from lmtrain.errors import TextError

VALID_FRACTION = 0.1


@dataclass(frozen=True)
class Division:
    """A text and the consecutive parts that it is cut into.

    Args:
        text: what is cut.
        names: those of the parts.
        shares: for each part after the first, its share of the characters.
        at_line_ends: whether a cut moves on to the end of its line, or else of its word.
    """

    text: Text
    names: tuple[str, ...] = ("text",)
    shares: tuple[float, ...] = ()
    at_line_ends: bool = False

    def cuts(self) -> "Cuts":
        """Where the parts end, to be found while the text is read.

        Raises:
            TextError: the text cannot be read.
        """
        return Cuts(self)


class Cuts:
    """The places where a text is cut, found while it is read.

    Args:
        division: the text and its shares.
    """

    def __init__(self, division: Division) -> None:
        self._division = division
        self._total = division.text.characters
        # Exact: in floats, 0.2 + 0.1 is more than 0.3.
        shares = [Fraction(str(share)) for share in division.shares]
        targets = [int(self._total * (1 - sum(shares[index:]))) for index in range(len(shares))]
        self._cuts = [_Cut(target) for target in targets]
        self._position = 0

    def segments(self, chunk: str) -> Iterator[str]:
        """The next piece of the text, itself in pieces: one ends at each place for a cut."""
        places = {len(chunk)}
        for cut in self._cuts:
            start = max(0, cut.target - self._position)
            if start >= len(chunk):
                continue
            if not self._division.at_line_ends:
                places.add(start)
            elif cut.line_end is None:
                places |= cut.look(chunk, start, self._position)
        done = 0
        for place in sorted(places - {0}):
            yield chunk[done:place]
            done = place
        self._position += len(chunk)

    def bounds(self) -> list[int]:
        """Where the parts begin and the last one ends, in characters, once the text was read.

        Raises:
            TextError: a part would be empty.
        """
        inner = [
            cut.place(self._total) if self._division.at_line_ends else cut.target
            for cut in self._cuts
        ]
        bounds = [0, *inner, self._total]
        if any(start >= stop for start, stop in itertools.pairwise(bounds)):
            raise TextError(
                f"{self._division.text.name} is too short to be split: {self._total:,} characters",
                "give validation text of its own: --valid FILE",
            )
        return bounds


@dataclass
class _Cut:
    """A cut that moves on from its target to the end of a line, or else of a word."""

    target: int
    line_end: int | None = None
    word_end: int | None = None

    def look(self, chunk: str, start: int, position: int) -> set[int]:
        """Looks for the ends in a chunk; returns those that were found, counted in the chunk."""
        found = set()
        if (line_end := chunk.find("\n", start) + 1) > 0:
            self.line_end = position + line_end
            found.add(line_end)
        if self.word_end is None and (word_end := chunk.find(" ", start) + 1) > 0:
            self.word_end = position + word_end
            found.add(word_end)
        return found

    def place(self, total: int) -> int:
        """Where the cut is, in a text of so many characters."""
        # A newline at the very end would leave nothing behind it.
        if self.line_end is not None and self.line_end < total:
            return self.line_end
        return self.word_end or total


def open_parts(
    train: Sequence[str],
    valid: Sequence[str],
    test: Sequence[str],
    *,
    valid_fraction: float | None,
    test_fraction: float | None,
    at_line_ends: bool,
) -> list[Division]:
    """Training, validation and test text; what is not given is cut from the training text's end.

    The training text comes first.

    Args:
        train: places of the training text.
        valid: places of the validation text; may be empty.
        test: places of the test text; may be empty.
        valid_fraction: share cut off for validation if `valid` is empty; None for what is
            customary for the corpus, else `VALID_FRACTION`.
        test_fraction: the same for testing, else none.
        at_line_ends: whether cuts are moved to line ends.

    Raises:
        TextError: text is missing, unreadable or empty.
    """
    text = open_text(train)
    places = {"valid": list(valid), "test": list(test)}
    shares = {"valid": VALID_FRACTION, "test": 0.0}
    if len(train) == 1 and train[0] in corpus.catalogue() and not Path(train[0]).exists():
        # A public corpus brings its customary division along.
        for part in places:
            if not places[part] and corpus.fetched_file(train[0], part):
                places[part] = [train[0]]
        shares |= corpus.catalogue()[train[0]].get("fractions", {})
    for part, share in (("valid", valid_fraction), ("test", test_fraction)):
        if share is not None:
            shares[part] = share
    cut = [part for part in places if not places[part] and shares[part] > 0]
    shared = tuple(shares[part] for part in cut)
    return [
        Division(text, ("train", *cut), shared, at_line_ends),
        *(Division(open_text(given, (part,)), (part,)) for part, given in places.items() if given),
    ]
