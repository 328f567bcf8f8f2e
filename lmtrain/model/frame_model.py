"""The model of frames: vectors of independent yes or no, each predicted from those before it."""

from torch import Tensor

from lmtrain.model.network import Network
from lmtrain.model.recurrent import State


class FrameModel(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = Π_f P(y_f⟨t⟩ | ...), with ŷ⟨t⟩ = σ(W_y a⟨t⟩ + b_y).

    Args:
        encoder: vectors to hidden states.
        dropout: acts on the hidden states of the last layer.
        head: hidden states to probabilities.

    Shapes: frames before (T, B, F) give logits (T, B, F).
    """

    def hidden(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states after dropout, (T, B, H), and the state after the inputs."""
        hidden, state = self.encoder(inputs, state, lengths)
        return self.dropout(hidden), state

    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Logits (T, B, F) of the frames that follow inputs (T, B, F), and the state after them."""
        hidden, state = self.hidden(inputs, lengths, state)
        return self.head(hidden), state
