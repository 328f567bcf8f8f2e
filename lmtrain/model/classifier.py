"""The classifier: tokens or vectors in, one label out (many to one)."""

from typing import Literal

import torch
from torch import Tensor

from lmtrain.model.dropout import Dropout
from lmtrain.model.encoder import Encoder
from lmtrain.model.head import Head
from lmtrain.model.network import Network

Pooling = Literal["last", "mean", "max"]


class Classifier(Network):
    """P(label | x⟨1⟩ ... x⟨T⟩) = softmax(W_y p + b_y), p pooled over the hidden states a⟨t⟩.

    Args:
        encoder: tokens or vectors to hidden states.
        dropout: acts on p.
        head: p to probabilities.
        pooling: last: a⟨T⟩, and a⟨1⟩ of the direction that runs backward; mean or max: over t.

    Shapes: tokens (T, B), or vectors (T, B, F), and lengths (B,) give logits (B, C).
    """

    def __init__(
        self, encoder: Encoder, dropout: Dropout, head: Head, pooling: Pooling = "last"
    ) -> None:
        super().__init__(encoder, dropout, head)
        self.pooling = pooling

    def pooled(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """P after dropout, (1, B, H): the form that a head takes."""
        hidden, _ = self.encoder(inputs, None, lengths)
        pooled: Tensor = self.dropout(self._pool(hidden, lengths))
        return pooled.unsqueeze(0)

    def _pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        if self.pooling == "mean":
            # Beyond their lengths hidden states are 0.
            total: Tensor = hidden.sum(0)
            return total / lengths.unsqueeze(1).to(hidden.dtype)
        if self.pooling == "max":
            times = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
            is_over = (times >= lengths).unsqueeze(2)
            return hidden.masked_fill(is_over, -torch.inf).amax(0)
        rows = torch.arange(hidden.shape[1], device=hidden.device)
        last = hidden[lengths - 1, rows]
        if self.encoder.recurrent.directions == 1:
            return last
        size = hidden.shape[2] // 2
        return torch.cat([last[:, :size], hidden[0, :, size:]], dim=1)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, C) of tokens or vectors, each row of its own length (B,)."""
        logits: Tensor = self.head(self.pooled(inputs, lengths))[0]
        return logits
