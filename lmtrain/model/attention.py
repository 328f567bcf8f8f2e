"""Attention of a decoder to the hidden states of an encoder."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scores = Literal["dot", "additive"]


class Attention(nn.Module):
    """Global attention with dot or additive scores.

        score⟨t,j⟩ = a⟨t⟩ · W_k h⟨j⟩                      dot
        score⟨t,j⟩ = v · tanh(W_q a⟨t⟩ + W_k h⟨j⟩)        additive
        α⟨t⟩ = softmax over j of score⟨t,j⟩
        s⟨t⟩ = Σ_j α⟨t,j⟩ h⟨j⟩
        ã⟨t⟩ = tanh(W_c [s⟨t⟩, a⟨t⟩])

    Shapes: hidden states a (T, B, H) of the decoder, memory h (S, B, M) of the encoder and lengths
    (B,) give ã (T, B, O) and α (B, T, S).

    Args:
        memory_size: M, features of the encoder's hidden state h.
        hidden_size: H, features of the decoder's hidden state a.
        output_size: O, features of ã.
        scores: dot or additive.

    Source: dot (their "general") and ã: Luong, Pham & Manning 2015; additive: Bahdanau, Cho &
    Bengio 2015, whose scores use a⟨t−1⟩ rather than a⟨t⟩.
    """

    def __init__(
        self, memory_size: int, hidden_size: int, output_size: int, scores: Scores
    ) -> None:
        super().__init__()
        self.weight_key = nn.Parameter(torch.empty(hidden_size, memory_size))
        self.weight_output = nn.Parameter(torch.empty(output_size, memory_size + hidden_size))
        if scores == "additive":
            self.weight_query = nn.Parameter(torch.empty(hidden_size, hidden_size))
            self.weight_score = nn.Parameter(torch.empty(hidden_size))
        self.scores = scores

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale; None for ± √(3 / columns)."""
        with torch.no_grad():
            for weight in self.parameters():
                # Products with inputs of unit variance have unit variance.
                scale = math.sqrt(3 / weight.shape[-1]) if init_scale is None else init_scale
                weight.uniform_(-scale, scale, generator=generator)

    def forward(self, hidden: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ã (T, B, O) and attention weights α (B, T, S), 0 for padding.

        Args:
            hidden: the decoder's hidden states, (T, B, H).
            memory: the encoder's hidden states, (S, B, M).
            lengths: valid states of each row of `memory`, (B,), 1 to S.
        """
        queries, values = hidden.transpose(0, 1), memory.transpose(0, 1)
        keys = F.linear(values, self.weight_key.to(values.dtype))  # (B, S, H)
        if self.scores == "dot":
            scores = queries @ keys.transpose(1, 2)  # (B, T, S)
        else:
            query = F.linear(queries, self.weight_query.to(queries.dtype))
            summed = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))  # (B, T, S, H)
            scores = summed @ self.weight_score.to(summed.dtype)
        positions = torch.arange(memory.shape[0], device=memory.device)
        is_padding = positions >= lengths.unsqueeze(1)  # (B, S)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(is_padding.unsqueeze(1), -torch.inf).softmax(-1)
        context = weights.to(values.dtype) @ values  # (B, T, M)
        both = torch.cat([context, queries], dim=-1)
        output = torch.tanh(F.linear(both, self.weight_output.to(both.dtype)))
        return output.transpose(0, 1), weights
