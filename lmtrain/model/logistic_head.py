"""Output head of independent binary outputs with the logistic loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.head import Head


class Logistic(Head):
    """ŷ = σ(W_y a + b_y): the probability of each of F independent binary outputs.

    Shapes: targets (T, B, F), 0 or 1, below 0 for padding; `weight` (F, H), `bias` (F).

    Args:
        hidden_size: H, features of a hidden state.
        num_outputs: F, number of outputs.
    """

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_outputs))

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale; None for ± 1/√H and zero biases."""
        with torch.no_grad():
            scale = init_scale or 0.0
            self.bias.uniform_(-scale, scale, generator=generator)
            scale = self.weight.shape[1] ** -0.5 if init_scale is None else init_scale
            self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (T, B, F), whose σ are the probabilities, from hidden states (T, B, H)."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def loss(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Scale · Σ (−y log ŷ − (1 − y) log(1 − ŷ)) over all targets (T, B, F), a scalar."""
        return -scale * self.log_probs(hidden, targets).sum()

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log P of each frame of `targets` (T, B, F), (T, B), in nats; 0 for padding."""
        return log_probs(self(hidden), targets)


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_f (y log ŷ + (1 − y) log(1 − ŷ)), (T, B), from logits and targets (T, B, F)."""
    labels = targets.clamp(min=0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return -(losses * (targets >= 0)).sum(-1)
