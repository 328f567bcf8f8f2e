"""Noising: input tokens are replaced at random, by counts that smooth n-gram models."""

import numpy as np
from numpy.typing import NDArray

# Tokens whose pairs are sorted at once.
_CHUNK = 1 << 22


class Noise:
    """Replaces tokens x with probability γ N(x ·) / n(x) by tokens y drawn in proportion to N(· y).

    n(x) is the number of occurrences of x in the training text, N(x ·) that of different tokens
    after it, N(· y) that of different tokens before y. So words that many words can follow are
    replaced more often, and by words that can follow many.

    Args:
        ids: token ids of the training text, (N,).
        vocab_size: V, number of tokens.
        rate: γ, 0 to 1.

    Source: bigram Kneser-Ney noising, here of inputs only: Xie et al. 2017 (arXiv 1703.02573).
    """

    def __init__(self, ids: NDArray[np.unsignedinteger], vocab_size: int, rate: float) -> None:
        counts = np.zeros(vocab_size, np.int64)
        pairs = np.zeros(0, np.int64)  # of different tokens, each once: first · V + second
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK + 1].astype(np.int64)
            counts += np.bincount(chunk[:_CHUNK], minlength=vocab_size)
            pairs = np.union1d(pairs, chunk[:-1] * vocab_size + chunk[1:])
        after = np.bincount(pairs // vocab_size, minlength=vocab_size)
        before = np.bincount(pairs % vocab_size, minlength=vocab_size)
        self._rates = rate * after / np.maximum(counts, 1)
        self._cumulative = before.cumsum() / len(pairs)

    def __call__(
        self, tokens: NDArray[np.int64], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """The tokens, some of them replaced."""
        is_replaced = generator.random(tokens.shape) < self._rates[tokens]
        # Drawn for all tokens, so that later random numbers do not depend on what is replaced.
        uniform = generator.random(tokens.shape)[is_replaced]
        noised = tokens.copy()
        noised[is_replaced] = self._cumulative.searchsorted(uniform, side="right")
        return noised
