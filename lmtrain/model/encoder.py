"""Hidden states of tokens or vectors: what every network begins with."""

from torch import Tensor, nn

from lmtrain.model.dropout import Dropout
from lmtrain.model.embedding import Embedding, Vectors
from lmtrain.model.recurrent import Recurrent, State
from lmtrain.model.word_characters import WordCharacters


class Encoder(nn.Module):
    """Embedding, dropout, recurrent layers.

    Args:
        embedding: vectors of tokens, or inputs that are vectors.
        dropout: acts on the vectors.
        recurrent: the layers.
        is_mixed: whether training steps take bf16 for activations and the operands of products;
            weights, sums and cell states are fp32, and so is everything outside training.

    Shapes: tokens (T, B) or vectors (T, B, F) give hidden states (T, B, H) of the last layer.
    """

    def __init__(
        self,
        embedding: Embedding | WordCharacters | Vectors,
        dropout: Dropout,
        recurrent: Recurrent,
        *,
        is_mixed: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout = dropout
        self.recurrent = recurrent
        self._is_mixed = is_mixed

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states (T, B, H) of tokens or vectors, and the state after them.

        Args:
            inputs: tokens (T, B) or vectors (T, B, F).
            state: the state before the first step; None for zeros.
            lengths: steps of each row, (B,), 1 to T; None for T.
        """
        vectors = self.embedding(inputs)
        if self.training and self._is_mixed:
            vectors = vectors.bfloat16()
        hidden, state = self.recurrent(self.dropout(vectors), state, lengths)
        return hidden, state
