"""Output heads: the interface from hidden states to class probabilities, and the softmax."""

import abc
import math

import torch
from torch import Tensor, nn

from lmtrain.kernels.cross_entropy import cross_entropy, log_likelihood
from lmtrain.kernels.products import linear


class Head(nn.Module, abc.ABC):
    """A probability distribution over V classes, from a hidden state of H features."""

    @abc.abstractmethod
    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale; None for the default of the head."""

    @abc.abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (T, B, V) from hidden states (T, B, H)."""

    @abc.abstractmethod
    def loss(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Scale · Σ −log P of the targets, a scalar; a head may estimate it in training.

        Args:
            hidden: (T, B, H); if bf16, the operands of products are bf16.
            targets: class ids, (T, B).
            scale: factor of the sum and of all gradients.
        """

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log P of `targets` (T, B), (T, B), in nats, from hidden states (T, B, H)."""
        log_probs: Tensor = self(hidden).log_softmax(-1)  # (T, B, V)
        return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class Softmax(Head):
    """ŷ = softmax(W_y a + b_y).

    Shapes: `weight` (V, H), `bias` (V).

    Args:
        hidden_size: H, features of a hidden state.
        num_classes: V, number of classes.
        tied: the weights of an embedding, (V, H), used as W_y; None for separate weights.

    Source: tied weights: Press & Wolf 2017; Inan et al. 2017.
    """

    def __init__(
        self, hidden_size: int, num_classes: int, tied: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.is_tied = tied is not None
        self.weight = nn.Parameter(torch.empty(num_classes, hidden_size)) if tied is None else tied

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale; None for ± 1/√H and zero biases.

        Tied weights are left to the embedding.
        """
        default = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            scale = init_scale or 0.0
            self.bias.uniform_(-scale, scale, generator=generator)
            if not self.is_tied:
                scale = default if init_scale is None else init_scale
                self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (T, B, V) from hidden states (T, B, H)."""
        return linear(hidden, self.weight, self.bias)

    def loss(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """See `Head.loss`; a target below 0 adds 0. Logits are never all in memory at once."""
        return cross_entropy(hidden, self.weight, self.bias, targets, scale)

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Head.log_probs`; without autograd, logits are never all in memory at once."""
        if torch.is_grad_enabled():
            return super().log_probs(hidden, targets)
        return log_likelihood(hidden, self.weight, self.bias, targets)
