"""From hidden states to a probability of each class: the softmax behind one interface."""

import abc
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.kernels.cross_entropy import cross_entropy, log_likelihood


class Head(nn.Module, abc.ABC):
    """A probability distribution over V classes, given a hidden state of H numbers."""

    @abc.abstractmethod
    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights: uniform in ± init_scale, or each its own way without it."""

    @abc.abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (T, B, V), whose softmax is the distribution, of hidden states (T, B, H)."""

    @abc.abstractmethod
    def nats(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """The training loss: scale · Σ −log P of targets (T, B), (); in training maybe estimated.

        Args:
            hidden: (T, B, H); in bf16, the operands of products are bf16.
            targets: (T, B).
            scale: factor of the sum, and so of all gradients.
        """

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log P of each of `targets` (T, B) after hidden states (T, B, H), in nats."""
        log_probs: Tensor = self(hidden).log_softmax(-1)  # (T, B, V)
        return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class Softmax(Head):
    """ŷ = softmax(W_y a + b_y).

    Args:
        hidden_size: H, numbers in a hidden state.
        num_classes: V.
        tied: an embedding's weights (V, H) that stand for W_y too; None for weights of its own.

    Shapes: `weight` (V, H), `bias` (V).

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
        """Draws the first weights: uniform in ± init_scale; without it ± 1/√H, and zero biases."""
        own = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            scale = init_scale or 0.0
            self.bias.uniform_(-scale, scale, generator=generator)
            if not self.is_tied:
                scale = own if init_scale is None else init_scale
                self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (T, B, V) of hidden states (T, B, H)."""
        return F.linear(hidden, self.weight, self.bias)

    def nats(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `Head.nats`, with the logits never whole in memory."""
        return cross_entropy(hidden, self.weight, self.bias, targets, scale)

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """As `Head.log_probs`; without gradients, the logits are never whole in memory."""
        if torch.is_grad_enabled():
            return super().log_probs(hidden, targets)
        return log_likelihood(hidden, self.weight, self.bias, targets)
