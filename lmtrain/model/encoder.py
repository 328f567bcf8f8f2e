"""The encoder of every network: embedding, dropout, recurrent layers."""

from torch import Tensor, nn

from lmtrain.model.dropout import Dropout
from lmtrain.model.embedding import Embedding, Vectors
from lmtrain.model.recurrent import Recurrent, State
from lmtrain.model.word_characters import WordCharacters


class Encoder(nn.Module):
    """Maps tokens or vectors to the hidden states of the last recurrent layer.

    Shapes: tokens (T, B), words with characters (T, B, 1 + C) or vectors (T, B, F) give hidden
    states (T, B, D·H), D = 2 if bidirectional, else 1.

    Args:
        embedding: the first layer.
        dropout: applied to the vectors of the first layer.
        recurrent: the recurrent layers.
        is_bf16: whether training steps use bf16 activations and product operands; weights,
            accumulation and states are fp32, and so is everything in evaluation mode.
    """

    def __init__(
        self,
        embedding: Embedding | WordCharacters | Vectors,
        dropout: Dropout,
        recurrent: Recurrent,
        *,
        is_bf16: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout = dropout
        self.recurrent = recurrent
        self._is_bf16 = is_bf16

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states (T, B, D·H) of the last layer, and the final state of all layers.

        Args:
            inputs: tokens (T, B), words with characters (T, B, 1 + C), or vectors (T, B, F).
            state: the initial state; None for zeros.
            lengths: steps of each row, (B,), 1 to T; None for T.
        """
        vectors = self.embedding(inputs)
        if self.training and self._is_bf16:
            vectors = vectors.bfloat16()
        hidden, state = self.recurrent(self.dropout(vectors), state, lengths)
        return hidden, state
