"""The language model: token embedding, recurrent layers, softmax over the vocabulary.

Knows ids, never text or settings.
"""

import torch
from torch import Tensor

from lmtrain.model.network import Network
from lmtrain.model.recurrent import State


class LanguageModel(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = softmax(W_y a⟨t⟩ + b_y), a⟨t⟩ of the last recurrent layer.

    Args:
        encoder: tokens to hidden states.
        dropout: acts on the hidden states of the last layer.
        head: hidden states to probabilities.

    Example:
        >>> from lmtrain.cells import LSTM
        >>> from lmtrain.model.dropout import Dropout
        >>> from lmtrain.model.embedding import Embedding
        >>> from lmtrain.model.encoder import Encoder
        >>> from lmtrain.model.generator import ModelGenerator
        >>> from lmtrain.model.head import Softmax
        >>> from lmtrain.model.recurrent import Recurrent
        >>> generator = ModelGenerator(seed=1)
        >>> none = Dropout(0.0, generator)
        >>> encoder = Encoder(Embedding(10, 4, generator), none, Recurrent(LSTM, 4, [8], none))
        >>> logits, state = LanguageModel(encoder, none, Softmax(8, 10))(
        ...     torch.zeros(5, 2, dtype=torch.long)
        ... )
        >>> logits.shape
        torch.Size([5, 2, 10])
    """

    def zero_state(self, batch_size: int) -> State:
        """The state before the first token."""
        return self.encoder.recurrent.zero_state(batch_size)

    def hidden(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states (T, B, H) of the last layer for tokens (T, B), and the state after them.

        The dropout of the output has not acted on them.
        """
        hidden, state = self.encoder(inputs, state)
        return hidden, state

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) for tokens (T, B), and the state after them."""
        hidden, state = self.hidden(inputs, state)
        return self.head(self.dropout(hidden)), state

    @torch.no_grad()
    def log_probs(
        self, inputs: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Log P of each token of `targets`, (T, B), in nats, and the state after `inputs`.

        A target below 0 is none, and what is said of it means nothing.
        """
        hidden, state = self.hidden(inputs, state)
        return self.head.log_probs(hidden, targets.clamp(min=0)), state
