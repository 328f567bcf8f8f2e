"""A softmax whose cost follows word frequency, for vocabularies of many tens of thousands."""

import math

import torch
from torch import Tensor, nn

from lmtrain.errors import ConfigError

# Shares of the vocabulary that the head and the head with the first tail hold.
_SHARES = (0.05, 0.25)
_LEAST_VOCABULARY = 100
# A tail's projections are so many times smaller than the one before.
_DIVISOR = 4


class AdaptiveSoftmax(nn.Module):
    """P(word) = P(cluster) · P(word | cluster) for all but the frequent words.

    The most frequent twentieth of the words stands in the head, beside one entry for each of two
    tails, whose words share projections of a quarter and a sixteenth of the hidden size. Ids should
    be in the order of frequency, as those of words are.

    Args:
        hidden_size: H, numbers in a hidden state, at least 16.
        vocab_size: V, at least 100.

    Raises:
        ConfigError: fewer hidden units, or a smaller vocabulary.

    Source: Grave et al. 2017 (arXiv 1609.04309); the module is torch's.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        if vocab_size < _LEAST_VOCABULARY:
            raise ConfigError(
                f"an adaptive softmax of {vocab_size} tokens: {_LEAST_VOCABULARY} are the least",
                "try: model.softmax=full",
            )
        if hidden_size < _DIVISOR ** len(_SHARES):
            raise ConfigError(
                f"an adaptive softmax of {hidden_size} hidden units: {_DIVISOR ** len(_SHARES)} "
                "are the least",
                "try: model.softmax=full",
            )
        cutoffs = [math.ceil(share * vocab_size) for share in _SHARES]
        # Torch draws first weights from its global chance, which is nobody's business here.
        with torch.random.fork_rng(devices=[]):
            self.clusters = nn.AdaptiveLogSoftmaxWithLoss(
                hidden_size, vocab_size, cutoffs, div_value=_DIVISOR, head_bias=True
            )

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights: uniform in ± init_scale, or each part's own way without it."""
        with torch.no_grad():
            for parameter in self.parameters():
                own = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() == 2 else 0.0
                scale = own if init_scale is None else init_scale
                parameter.uniform_(-scale, scale, generator=generator)

    def log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log P of each of `targets` (T, B) after hidden states (T, B, H), in nats."""
        flat = hidden.flatten(0, 1).to(self.clusters.head.weight.dtype)
        log_probs: Tensor = self.clusters(flat, targets.flatten()).output
        if torch.is_grad_enabled():
            # A tail without a target would have no gradient, where other processes wait for one.
            log_probs = log_probs + 0 * sum(p.flatten()[0] for p in self.clusters.tail.parameters())
        return log_probs.view(targets.shape)

    def forward(self, hidden: Tensor) -> Tensor:
        """Log P of every word, (T, B, V), after hidden states (T, B, H)."""
        log_probs: Tensor = self.clusters.log_prob(hidden.flatten(0, 1))
        return log_probs.view(*hidden.shape[:2], -1)
