"""The classifier: one label for a sequence of tokens or vectors (many to one)."""

from typing import Literal

import torch
from torch import Tensor

from lmtrain.model.dropout import Dropout
from lmtrain.model.encoder import Encoder
from lmtrain.model.head import Head
from lmtrain.model.network import Network

Pooling = Literal["last", "mean", "max"]


class Classifier(Network):
    """P(label | x⟨1⟩ ... x⟨T⟩) = softmax(W_y p + b_y), with p pooled over the hidden states a⟨t⟩.

    Shapes: tokens (T, B) or vectors (T, B, F), with lengths (B,), give logits (B, C).

    Args:
        encoder: maps tokens or vectors to hidden states.
        dropout: applied to p.
        head: maps p to logits.
        pooling: last: a⟨T⟩ of the forward direction and a⟨1⟩ of the backward one, T the row's
            length; mean, max: over the steps of the row.
    """

    def __init__(
        self, encoder: Encoder, dropout: Dropout, head: Head, pooling: Pooling = "last"
    ) -> None:
        super().__init__(encoder, dropout, head)
        self.pooling = pooling

    def pooled(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """The pooled hidden state p after dropout, (1, B, H), H the encoder's output size.

        Args:
            inputs: tokens (T, B) or vectors (T, B, F).
            lengths: steps of each row, (B,), 1 to T.
        """
        hidden, _ = self.encoder(inputs, None, lengths)
        # As a single time step: a mask that all steps share is still one for each row.
        dropped: Tensor = self.dropout(self._pool(hidden, lengths).unsqueeze(0))
        return dropped

    def _pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        if self.pooling == "mean":
            # Hidden states of padding are 0.
            total: Tensor = hidden.sum(0)
            return total / lengths.unsqueeze(1).to(hidden.dtype)
        if self.pooling == "max":
            steps = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
            is_padding = (steps >= lengths).unsqueeze(2)
            return hidden.masked_fill(is_padding, -torch.inf).amax(0)
        rows = torch.arange(hidden.shape[1], device=hidden.device)
        last = hidden[lengths - 1, rows]
        if self.encoder.recurrent.directions == 1:
            return last
        size = hidden.shape[2] // 2
        return torch.cat([last[:, :size], hidden[0, :, size:]], dim=1)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, C) of tokens (T, B) or vectors (T, B, F) with lengths (B,)."""
        logits: Tensor = self.head(self.pooled(inputs, lengths))[0]
        return logits
