"""Padded batches of examples of similar length.

The order of the batches is a pure function of the seed and the epoch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Batches whose examples are sorted by length together; more give less padding and randomness.
_POOL = 50

PADDING = -1
"""The value after the end of a sequence, and the target of steps that predict nothing."""


class PaddedBatches:
    """The training steps of a set of examples.

    Args:
        lengths: number of tokens of each example, (N,), N at least 1.
        batch_size: examples in a batch; the last batch of an epoch may have fewer.
        seed: seed of the order.

    Example:
        >>> batches = PaddedBatches(np.array([3, 1, 2]), batch_size=2, seed=1)
        >>> sorted(np.concatenate([batches.indices(0), batches.indices(1)]).tolist())
        [0, 1, 2]
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        self.steps_per_epoch: int = -(-len(lengths) // batch_size)
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[NDArray[np.int64]] = []

    def indices(self, step: int) -> NDArray[np.int64]:
        """The indices of the examples of a step, counted over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._shuffled(epoch), epoch
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch: shuffled, sorted by length within pools, and shuffled again."""
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._lengths))
        pool = _POOL * self._batch_size
        batches = []
        for first in range(0, len(order), pool):
            pooled = order[first : first + pool]
            pooled = pooled[np.argsort(self._lengths[pooled], kind="stable")]
            batches += _cut(pooled, self._batch_size)
        return [batches[index] for index in generator.permutation(len(batches))]


def by_length(
    lengths: NDArray[np.int64], batch_size: int, max_tokens: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Batches of all examples, by length, for evaluation and prediction.

    Args:
        lengths: number of tokens of each example, (N,).
        batch_size: maximum number of examples in a batch.
        max_tokens: maximum number of tokens in a padded batch, unless it has only one example.
    """
    for batch in _cut(np.argsort(lengths, kind="stable"), batch_size):
        first = 0
        while first < len(batch):
            rest = lengths[batch[first:]]
            # Padded sizes of the first example, the first two, and so on, in increasing order.
            sizes = rest * np.arange(1, len(rest) + 1)
            fitting = np.searchsorted(sizes, max_tokens or sizes[-1], "right")
            yield batch[first : first + max(1, int(fitting))]
            first += max(1, int(fitting))


def _cut(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def pad(sequences: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Stacks sequences (T, ...) into (T, B, ...), padded by −1, and returns their lengths (B,).

    Example:
        >>> ids, lengths = pad([np.array([5, 6]), np.array([7])])
        >>> ids.T.tolist(), lengths.tolist()
        ([[5, 6], [7, -1]], [2, 1])
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    shape = (int(lengths.max()), len(sequences), *sequences[0].shape[1:])
    padded = np.full(shape, PADDING, sequences[0].dtype)
    for column, sequence in enumerate(sequences):
        padded[: len(sequence), column] = sequence
    return padded, lengths
