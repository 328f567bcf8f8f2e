"""Batches of contiguous streams of text, as a pure function of the step.

The text is split into `batch_size` streams of equal length. Step k of an epoch is the k-th window
of every stream, so that the final state of a step is the initial state of the next. Windows have
`seq_len` tokens, or random lengths around it; then streams also start at random positions.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lmtrain.errors import TextError


def fitting(num_tokens: int, batch_size: int, seq_len: int, processes: int = 1) -> tuple[int, int]:
    """The batch size and window length for which a text has a window in every stream.

    They are unchanged if the text is long enough. A short text gets fewer streams, the same number
    for each process, and then shorter windows.

    Args:
        num_tokens: number of tokens in the text, N.
        batch_size: number of streams, B.
        seq_len: steps of truncated backpropagation, T.
        processes: number of processes that share the streams.

    Raises:
        TextError: fewer than two tokens for each process.

    Example:
        >>> fitting(312, batch_size=20, seq_len=35), fitting(9, batch_size=20, seq_len=35)
        ((8, 35), (1, 8))
    """
    if num_tokens < 2 * processes:
        raise TextError(
            f"training text too short: {num_tokens:,} tokens",
            f"at least {2 * processes:,} are needed, 2 for each process"
            if processes > 1
            else "at least 2 are needed",
        )
    most = num_tokens // (seq_len + 1) // processes * processes
    batch_size = min(batch_size, max(most, processes))
    return batch_size, min(seq_len, num_tokens // batch_size - 1)


class Streams:
    """The training steps of a text.

    Args:
        ids: token ids of the whole text, (N,).
        batch_size: number of streams, B.
        seq_len: steps of truncated backpropagation, T.
        seed: seed of random window lengths, around T or, one in twenty, around T/2, scaled so that
            an epoch has as many windows as with length T, and of the position at which each stream
            starts in an epoch, to continue from its beginning after its end; None for windows of
            length T from the beginning.

    The text has at least one window for every stream (see `fitting`).

    Source: random lengths: Merity, Keskar & Socher 2018; random positions: Press 2019
    (arXiv 1903.04167).

    Example:
        >>> inputs, targets = Streams(np.arange(9), batch_size=2, seq_len=3)[0]
        >>> inputs.T.tolist(), targets.T.tolist()
        ([[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]])
    """

    def __init__(
        self,
        ids: NDArray[np.unsignedinteger],
        batch_size: int,
        seq_len: int,
        seed: int | None = None,
    ) -> None:
        length = len(ids) // batch_size
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.steps_per_epoch = (length - 1) // seq_len
        self._streams = ids[: length * batch_size].reshape(batch_size, length)
        self._seed = seed
        self._epoch = -1
        self._starts = np.arange(self.steps_per_epoch + 1) * seq_len
        self._positions = np.zeros(batch_size, np.int64)

    def starts_epoch(self, step: int) -> bool:
        """Whether an epoch starts at `step`, so that no state is carried over."""
        return step % self.steps_per_epoch == 0

    def __getitem__(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs (T, B) of a step, counted over all epochs, and targets (T, B) one token ahead."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._seed is not None and epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._starts, self._epoch = self._random_starts(generator), epoch
            batch_size, length = self._streams.shape
            self._positions = generator.integers(length, size=batch_size)
        start, stop = self._starts[index : index + 2]
        columns = self._positions + np.arange(start, stop + 1)[:, np.newaxis]  # (T + 1, B)
        columns %= self._streams.shape[1]
        window = self._streams[np.arange(self.batch_size), columns].astype(np.int64)
        return window[:-1], window[1:]

    def _random_starts(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The start of each window of an epoch, and the end of the last one."""
        spread = self.seq_len / 14
        around = np.where(generator.random(self.steps_per_epoch) < 0.95, 1.0, 0.5) * self.seq_len
        lengths = np.maximum(spread, generator.normal(around, spread))
        last = self._streams.shape[1] - 1
        ends = np.rint(np.cumsum(lengths) * last / lengths.sum()).astype(np.int64)
        # After rounding, each window still has at least one step.
        steps = np.arange(1, self.steps_per_epoch + 1)
        ends = steps + np.maximum.accumulate(np.maximum(ends - steps, 0))
        return np.concatenate([[0], np.minimum(ends, last - steps[::-1] + 1)])


def windows(
    ids: NDArray[np.integer], start_id: int | None, batch_size: int, seq_len: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The windows of a text in which every token is a target once, for evaluation.

    Args:
        ids: token ids of the whole text, (N,), N at least 1.
        start_id: the input before the first token; None for none.
        batch_size: number of streams, reduced to the number of tokens if necessary.
        seq_len: T, window length.

    Yields:
        Inputs and targets, each (T, B); −1 stands for inputs that are nothing, and for targets
        beyond the end of a stream.

    Example:
        >>> inputs, targets = next(windows(np.arange(3, 8), 0, batch_size=2, seq_len=9))
        >>> inputs.T.tolist(), targets.T.tolist()
        ([[0, 3, 4], [5, 6, -1]], [[3, 4, 5], [6, 7, -1]])
    """
    batch_size = min(batch_size, len(ids))
    length = -(-len(ids) // batch_size)
    for start in range(0, length, seq_len):
        stop = min(start + seq_len, length)
        inputs = np.full((stop - start, batch_size), -1, np.int64)
        targets = np.full((stop - start, batch_size), -1, np.int64)
        for row in range(batch_size):
            first = row * length
            piece = ids[first + start : min(first + stop, first + length)]
            before = ids[max(first + start - 1, 0) : first + start + len(piece) - 1]
            targets[: len(piece), row] = piece
            inputs[len(piece) - len(before) : len(piece), row] = before
        if start == 0 and start_id is not None:
            inputs[0, 0] = start_id
        yield inputs, targets
