"""A softmax whose cost follows word frequency, for vocabularies of many tens of thousands."""

import math

import torch
from torch import Tensor, nn

from lmtrain.errors import ConfigError
from lmtrain.model.head import Head

# Shares of the vocabulary that the head and the head with the first tail hold.
_SHARES = (0.05, 0.25)
_LEAST_VOCABULARY = 100
# A tail's projections are so many times smaller than the one before.
_DIVISOR = 4


class AdaptiveSoftmax(Head):
    """P(word) = P(cluster) · P(word | cluster) for all but the frequent words.

    The most frequent twentieth of the words stands in the head, beside one entry for each of two
    tails, whose words share projections of a quarter and a sixteenth of the hidden size. Ids should
    be in the order of frequency, as those of words are.

    Args:
        hidden_size: H, numbers in a hidden state, at least 16.
        num_classes: V, at least 100.

    Raises:
        ConfigError: fewer hidden units, or a smaller vocabulary.

    Source: Grave et al. 2017 (arXiv 1609.04309); the module is torch's.
    """

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < _LEAST_VOCABULARY:
            raise ConfigError(
                f"an adaptive softmax of {num_classes} tokens: {_LEAST_VOCABULARY} are the least",
                "try: model.softmax=full",
            )
        if hidden_size < _DIVISOR ** len(_SHARES):
            raise ConfigError(
                f"an adaptive softmax of {hidden_size} hidden units: {_DIVISOR ** len(_SHARES)} "
                "are the least",
                "try: model.softmax=full",
            )
        cutoffs = [math.ceil(share * num_classes) for share in _SHARES]
        # torch draws first weights from its global generator, which must stay as it is.
        with torch.random.fork_rng(devices=[]):
            self.clusters = nn.AdaptiveLogSoftmaxWithLoss(
                hidden_size, num_classes, cutoffs, div_value=_DIVISOR, head_bias=True
            )

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights: uniform in ± init_scale, or each part's own way without it."""
        with torch.no_grad():
            for parameter in self.parameters():
                own = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() == 2 else 0.0
                scale = own if init_scale is None else init_scale
                parameter.uniform_(-scale, scale, generator=generator)

    def nats(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `Head.nats`."""
        return -scale * self.log_probs(hidden, targets).sum()

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
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
