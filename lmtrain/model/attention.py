"""Attention of a decoder to the states of an encoder."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scores = Literal["dot", "additive"]


class Attention(nn.Module):
    """ã⟨t⟩ = tanh(W_c [s⟨t⟩; a⟨t⟩]), s⟨t⟩ = Σ_j α_j h⟨j⟩, α = softmax of scores over the source.

    The score of a⟨t⟩ and h⟨j⟩ is a · W_k h (dot), or v · tanh(W_q a + W_k h) (additive).

    Args:
        memory_size: M, numbers of an encoder's state h.
        hidden_size: H, numbers of a decoder's state a.
        output_size: O, numbers of ã.
        scores: which of the two.

    Shapes: memory (S, B, M), hidden (T, B, H) and lengths (B,) give ã (T, B, O) and α (B, T, S).

    Source: dot, as "general", and ã: Luong, Pham & Manning 2015; additive: Bahdanau, Cho & Bengio
    2015, of a⟨t⟩ here, where theirs takes a⟨t−1⟩.
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
        """Draws the first weights: uniform in ± init_scale; without it ± √3/√(numbers of a row)."""
        with torch.no_grad():
            for weight in self.parameters():
                # Sums of numbers of size 1 are of size 1 then.
                scale = math.sqrt(3 / weight.shape[-1]) if init_scale is None else init_scale
                weight.uniform_(-scale, scale, generator=generator)

    def forward(self, hidden: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (T, B, O) and weights of attention (B, T, S); beyond their lengths these are 0.

        Args:
            hidden: (T, B, H).
            memory: (S, B, M).
            lengths: states of each memory, (B,).
        """
        queries, values = hidden.transpose(0, 1), memory.transpose(0, 1)
        keys = F.linear(values, self.weight_key.to(values.dtype))  # (B, S, H)
        if self.scores == "dot":
            scores = queries @ keys.transpose(1, 2)  # (B, T, S)
        else:
            query = F.linear(queries, self.weight_query.to(queries.dtype))
            summed = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))  # (B, T, S, H)
            scores = summed @ self.weight_score.to(summed.dtype)
        places = torch.arange(memory.shape[0], device=memory.device)
        is_beyond = places >= lengths.unsqueeze(1)  # (B, S)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(is_beyond.unsqueeze(1), -torch.inf).softmax(-1)
        context = weights.to(values.dtype) @ values  # (B, T, M)
        both = torch.cat([context, queries], dim=-1)
        output = torch.tanh(F.linear(both, self.weight_output.to(both.dtype)))
        return output.transpose(0, 1), weights
