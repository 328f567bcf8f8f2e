"""Adaptive softmax: an output layer for large vocabularies, cheaper for rare words."""

import math

import torch
from torch import Tensor, nn

from lmtrain.errors import ConfigError
from lmtrain.model.head import Head

# Fractions of the vocabulary at which the head and the first tail end.
_CUTOFF_FRACTIONS = (0.05, 0.25)
_MIN_VOCAB_SIZE = 100
# Each tail projects to a hidden size smaller by this factor than the one before.
_DIVISOR = 4


class AdaptiveSoftmax(Head):
    """Softmax with a head for frequent words and two low-rank tails for rare ones.

        P(word) = P(tail) · P(word | tail)      for a word in a tail

    The head contains the most frequent words and one class for each tail. Each tail projects the
    hidden state to a smaller size. Ids should be in order of decreasing frequency, as those of
    word vocabularies are. Targets below 0 are not supported.

    Args:
        hidden_size: H, features of a hidden state, at least 16.
        num_classes: V, at least 100.

    Attributes:
        can_be_captured: False: the loss reads numbers of targets from the GPU, which a CUDA graph
            cannot do.

    Raises:
        ConfigError: a hidden size or a vocabulary below these.

    Source: Grave et al. 2017 (arXiv 1609.04309); torch.nn.AdaptiveLogSoftmaxWithLoss.
    """

    can_be_captured = False

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < _MIN_VOCAB_SIZE:
            raise ConfigError(
                f"adaptive softmax: {num_classes} tokens, the minimum is {_MIN_VOCAB_SIZE}",
                "try: model.softmax=full",
            )
        minimum = _DIVISOR ** len(_CUTOFF_FRACTIONS)
        if hidden_size < minimum:
            raise ConfigError(
                f"adaptive softmax: {hidden_size} hidden units, the minimum is {minimum}",
                "try: model.softmax=full",
            )
        cutoffs = [math.ceil(fraction * num_classes) for fraction in _CUTOFF_FRACTIONS]
        # torch initializes from its global generator, whose state must not change.
        with torch.random.fork_rng(devices=[]):
            self.clusters = nn.AdaptiveLogSoftmaxWithLoss(
                hidden_size, num_classes, cutoffs, div_value=_DIVISOR, head_bias=True
            )

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale; None for ± 1/√columns, zero biases."""
        with torch.no_grad():
            for parameter in self.parameters():
                default = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() == 2 else 0.0
                scale = default if init_scale is None else init_scale
                parameter.uniform_(-scale, scale, generator=generator)

    def loss(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Scale · Σ −log P of targets (T, B), a scalar; see `Head.loss`."""
        return -scale * self.log_probs(hidden, targets).sum()

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log P of `targets` (T, B), (T, B), in nats, from hidden states (T, B, H)."""
        flat = hidden.flatten(0, 1).to(self.clusters.head.weight.dtype)
        log_probs: Tensor = self.clusters(flat, targets.flatten()).output
        if torch.is_grad_enabled():
            # A tail without a target gets a zero gradient: DistributedDataParallel needs one.
            log_probs = log_probs + 0 * sum(p.flatten()[0] for p in self.clusters.tail.parameters())
        return log_probs.view(targets.shape)

    def forward(self, hidden: Tensor) -> Tensor:
        """Log P of every word, (T, B, V), in nats, from hidden states (T, B, H)."""
        log_probs: Tensor = self.clusters.log_prob(hidden.flatten(0, 1))
        return log_probs.view(*hidden.shape[:2], -1)
