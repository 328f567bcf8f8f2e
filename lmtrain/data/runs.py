"""Numbers the words of a long text; a run of characters without a space is split only once.

A text repeats most of its runs, such as `stop.` or `don't`. The words of a run do not depend on the
text around it, so that they are looked up instead of split again. Knows no rules for splitting.
"""

from array import array
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

# All known runs are forgotten above these limits, so that memory is bounded.
_MOST_RUNS = 1 << 19
_MOST_BYTES = 16 * _MOST_RUNS
# Stands for a line end; it does not occur in UTF-8.
_END = b"\xff"


class RunNumbers:
    r"""Numbers the words of the pieces of a text, which do not end within a word.

    Args:
        numbers: the number of each word.
        split: the words of lines, with `\n` after each line.
        end: the word that stands for a line end.
    """

    def __init__(
        self, numbers: Mapping[str, int], split: Callable[[str], list[str]], end: str
    ) -> None:
        self._numbers = numbers
        self._split = split
        self._end = numbers[end]
        self._forget()

    def _forget(self) -> None:
        self._indices = _Indices({_END: 0})
        self._bytes = 0
        # The words of the run with index i are `_words[_starts[i] : _starts[i + 1]]`.
        self._words, self._starts = array("I", [self._end]), array("I", [0, 1])

    def encode(self, text: str) -> NDArray[np.uint32]:
        r"""The numbers of the words of a text, (N,); its only line end is `\n`."""
        if self._bytes > _MOST_BYTES or len(self._indices) > _MOST_RUNS:
            self._forget()
        # bytes.split() knows only the white space of ASCII: other white space is left to `split`.
        runs = text.encode("utf-8", "surrogatepass").replace(b"\n", b" %b " % _END).split()
        indices = np.fromiter(map(self._indices.__getitem__, runs), np.int64, len(runs))
        self._add(self._indices.take_added())
        return _ranges(
            np.frombuffer(self._words, np.uint32), np.frombuffer(self._starts, np.uint32), indices
        )

    def _add(self, runs: list[bytes]) -> None:
        """Stores the words of new runs."""
        lines = b"\n".join([*runs, b""])
        words = self._split(lines.decode("utf-8", "surrogatepass"))
        # Ends of lines are not stored: the words after the n-th one move by n.
        is_end = np.fromiter(map("\n".__eq__, words), np.bool_, len(words))
        ends = np.flatnonzero(is_end) - np.arange(len(runs)) + len(self._words)
        self._starts.frombytes(ends.astype(np.uint32).tobytes())
        self._words.extend(map(self._numbers.__getitem__, filter("\n".__ne__, words)))
        self._bytes += len(lines)


class _Indices(dict[bytes, int]):
    """The index of each run, by first occurrence."""

    def __init__(self, known: Mapping[bytes, int]) -> None:
        super().__init__(known)
        self._added: list[bytes] = []

    def __missing__(self, run: bytes) -> int:
        index = self[run] = len(self)
        self._added.append(run)
        return index

    def take_added(self) -> list[bytes]:
        """The runs that were added since the last call."""
        added, self._added = self._added, []
        return added


def _ranges(
    values: NDArray[np.uint32], starts: NDArray[np.uint32], indices: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """The concatenated ranges of `values` from starts[i] to starts[i + 1], for each index i."""
    first = starts[indices].astype(np.int64)
    counts = starts[indices + 1] - first
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return values[np.repeat(first - ends + counts, counts) + np.arange(total)]
