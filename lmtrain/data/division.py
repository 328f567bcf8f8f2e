"""Training, validation and test text: separate files, or held out from the training text."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from lmtrain.data import corpus
from lmtrain.data.characters import SPACE, in_class
from lmtrain.data.corpus import Text, open_text
from lmtrain.errors import ConfigError, TextError

VALID_FRACTION = 0.1
_SPACE = re.compile(f"[{in_class(SPACE)}]")


@dataclass(frozen=True)
class Division:
    """A text and its consecutive parts.

    Args:
        text: the text.
        names: names of the parts.
        fractions: the fraction of characters of each part after the first.
        at_line_ends: whether parts end at the end of a line, or else of a word.
    """

    text: Text
    names: tuple[str, ...] = ("text",)
    fractions: tuple[float, ...] = ()
    at_line_ends: bool = False


class Cuts:
    """Finds the bounds of the parts of a text while it is read.

    Args:
        division: the text and its fractions.

    Raises:
        TextError: the text cannot be read.
    """

    def __init__(self, division: Division) -> None:
        self._text = division.text
        self._total = division.text.characters
        # Exact fractions: as floats, 0.2 + 0.1 exceeds 0.3.
        fractions = [Fraction(str(fraction)) for fraction in division.fractions]
        targets = [int(self._total * (1 - sum(fractions[i:]))) for i in range(len(fractions))]
        self._cuts = [_Cut(each, None if division.at_line_ends else each) for each in targets]
        self._position = 0

    def segments(self, chunk: str) -> Iterator[str]:
        """Splits the next chunk of the text at each possible bound."""
        ends = {len(chunk)}
        for cut in self._cuts:
            cut.look(chunk, self._position)
            ends |= {end - self._position for end in cut.found()}
        done = 0
        for end in sorted(end for end in ends if 0 < end <= len(chunk)):
            yield chunk[done:end]
            done = end
        self._position += len(chunk)

    def bounds(self) -> list[int]:
        """The start of each part and the end of the last one, in characters, after reading.

        Raises:
            TextError: a part would be empty.
        """
        bounds = [0, *(cut.end(self._total) for cut in self._cuts), self._total]
        if any(start >= stop for start, stop in itertools.pairwise(bounds)):
            raise TextError(
                f"{self._text.name} is too short to be split: {self._total:,} characters",
                "give validation text of its own: --valid FILE",
            )
        return bounds


@dataclass
class _Cut:
    """A bound between parts, which moves from its target to the end of a line or else of a word.

    Args:
        target: where the fractions put it, in characters.
        line_end: the first line end after it; the target itself where the cut does not move.
        word_end: the first white space after it.
    """

    target: int
    line_end: int | None = None
    word_end: int | None = None

    def look(self, chunk: str, position: int) -> None:
        """Searches for line and word ends in a chunk that starts at `position`."""
        start = max(0, self.target - position)
        if self.line_end is not None or start >= len(chunk):
            return
        if (at := chunk.find("\n", start)) >= 0:
            self.line_end = position + at + 1
        if self.word_end is None and (space := _SPACE.search(chunk, start)):
            self.word_end = position + space.end()

    def found(self) -> set[int]:
        """Possible positions of the bound."""
        return {end for end in (self.line_end, self.word_end) if end is not None}

    def end(self, total: int) -> int:
        """The position of the bound in a text of `total` characters."""
        # A newline at the end of the text would leave the next part empty.
        if self.line_end is not None and self.line_end < total:
            return self.line_end
        return self.word_end or total


def require_training_part(fractions: Iterable[float]) -> None:
    """Checks that the fractions of the other parts leave a training part.

    Raises:
        ConfigError: they do not.
    """
    total = float(sum(Fraction(str(fraction)) for fraction in fractions))
    if total >= 1:
        raise ConfigError(
            f"validation and test parts, {total:g} of the training data, leave none to train on",
            "choose smaller data.valid_fraction and data.test_fraction",
        )


def open_parts(
    train: Sequence[str],
    valid: Sequence[str],
    test: Sequence[str],
    *,
    valid_fraction: float | None,
    test_fraction: float | None,
    at_line_ends: bool,
) -> list[Division]:
    """Training, validation and test text; missing ones are held out from the training text.

    The training text comes first.

    Args:
        train: places of the training text.
        valid: places of the validation text; may be empty.
        test: places of the test text; may be empty.
        valid_fraction: fraction cut off for validation if `valid` is empty; None for what is
            customary for the corpus, else `VALID_FRACTION`.
        test_fraction: the same for testing, else none.
        at_line_ends: whether cuts are moved to line ends.

    Raises:
        ConfigError: the fractions leave no training text.
        TextError: text is missing, unreadable or empty.
    """
    text = open_text(train)
    places = {"valid": list(valid), "test": list(test)}
    fractions = {"valid": VALID_FRACTION, "test": 0.0}
    if len(train) == 1 and train[0] in corpus.catalogue() and not Path(train[0]).exists():
        # A public corpus brings its customary division along.
        for part in places:
            if not places[part] and corpus.fetched_file(train[0], part):
                places[part] = [train[0]]
        fractions |= corpus.catalogue()[train[0]].get("fractions", {})
    for part, fraction in (("valid", valid_fraction), ("test", test_fraction)):
        if fraction is not None:
            fractions[part] = fraction
    cut = [part for part in places if not places[part] and fractions[part] > 0]
    require_training_part(fractions[part] for part in cut)
    return [
        Division(text, ("train", *cut), tuple(fractions[part] for part in cut), at_line_ends),
        *(Division(open_text(given, (part,)), (part,)) for part, given in places.items() if given),
    ]
