"""Which tokens a step sees: contiguous streams side by side, a pure function of the step.

The text is cut into `batch_size` streams of equal length; step k of an epoch takes the k-th window
of `seq_len` tokens of every stream, so that the state a stream ends one step with is the state it
starts the next with. Knows ids, never text.
"""

import numpy as np
from numpy.typing import NDArray

from lmtrain.errors import TextError


class Batches:
    """The training steps of a text.

    Args:
        ids: token ids of the whole text, (N,).
        batch_size: streams side by side, B.
        seq_len: steps of truncated backpropagation, T.

    Raises:
        TextError: the text has no single window for every stream.

    Example:
        >>> inputs, targets = Batches(np.arange(9), batch_size=2, seq_len=3)[0]
        >>> inputs.T.tolist(), targets.T.tolist()
        ([[0, 1, 2], [4, 5, 6]], [[1, 2, 3], [5, 6, 7]])
    """

    def __init__(self, ids: NDArray[np.unsignedinteger], batch_size: int, seq_len: int) -> None:
        length = len(ids) // batch_size
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.steps_per_epoch = (length - 1) // seq_len
        if self.steps_per_epoch < 1:
            least = batch_size * (seq_len + 1)
            fitting = len(ids) // (seq_len + 1)
            raise TextError(
                f"training text too short: {len(ids):,} tokens",
                f"batch_size {batch_size} x (seq_len {seq_len} + 1) needs at least {least:,}",
                f"try: --batch-size {fitting}" if fitting else "try: a smaller --seq-len",
            )
        self._streams = ids[: length * batch_size].reshape(batch_size, length)

    def starts_epoch(self, step: int) -> bool:
        """Whether the streams start anew at `step`, so that no state is carried into it."""
        return step % self.steps_per_epoch == 0

    def __getitem__(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs (T, B) of a step, counted over all epochs, and targets (T, B) one token ahead."""
        start = step % self.steps_per_epoch * self.seq_len
        window = self._streams[:, start : start + self.seq_len + 1].T.astype(np.int64, order="C")
        return window[:-1], window[1:]
