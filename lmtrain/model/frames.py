"""Networks whose output at a step is a vector of independent yes or no."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.network import Network
from lmtrain.model.recurrent import State


class Logistic(nn.Module):
    """ŷ = σ(W_y a + b_y): a probability for each of F outputs, none of which excludes another.

    Args:
        hidden_size: H, numbers in a hidden state.
        num_outputs: F.

    Shapes: `weight` (F, H), `bias` (F).
    """

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_outputs))

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights: uniform in ± init_scale; without it ± 1/√H, and zero biases."""
        with torch.no_grad():
            scale = init_scale or 0.0
            self.bias.uniform_(-scale, scale, generator=generator)
            scale = self.weight.shape[1] ** -0.5 if init_scale is None else init_scale
            self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (T, B, F), whose σ are the probabilities, of hidden states (T, B, H)."""
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """−y log ŷ − (1 − y) log(1 − ŷ) of each output, (T, B, F); 0 where a target is below 0."""
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none")
    return losses * (targets >= 0)


class FrameModel(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = Π_f P(y_f⟨t⟩ | ...), with ŷ⟨t⟩ = σ(W_y a⟨t⟩ + b_y).

    Args:
        encoder: vectors to hidden states.
        dropout: acts on the hidden states of the last layer.
        head: hidden states to probabilities.
    """

    head: Logistic

    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Logits (T, B, F) of the frames that follow inputs (T, B, F), and the state after them."""
        hidden, state = self.encoder(inputs, state, lengths)
        return self.head(self.dropout(hidden)), state
