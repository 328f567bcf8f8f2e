"""The frame model: predicts each vector of binary outputs from the vectors before it."""

from torch import Tensor

from lmtrain.model.network import Network
from lmtrain.model.recurrent import State


class FrameModel(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = Π_f P(y_f⟨t⟩ | ...), with ŷ⟨t⟩ = σ(W_y a⟨t⟩ + b_y).

    Shapes: inputs y⟨t−1⟩ (T, B, F) give logits of y⟨t⟩ (T, B, F).

    Args:
        encoder: maps vectors to hidden states.
        dropout: applied to the hidden states of the last layer.
        head: maps hidden states to logits.
    """

    def hidden(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states after dropout, (T, B, H), and the final state.

        Args:
            inputs: (T, B, F).
            lengths: steps of each row, (B,), 1 to T; None for T.
            state: the initial state; None for zeros.
        """
        hidden, state = self.encoder(inputs, state, lengths)
        return self.dropout(hidden), state

    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Logits (T, B, F) of the next frames, and the final state; arguments as `hidden`."""
        hidden, state = self.hidden(inputs, lengths, state)
        return self.head(hidden), state
