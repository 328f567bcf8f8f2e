"""The language model: token embedding, recurrent layers, softmax over the vocabulary.

Works on token ids; does not depend on text or settings.
"""

import torch
from torch import Tensor

from lmtrain.model.network import Network
from lmtrain.model.recurrent import State


class LanguageModel(Network):
    """P(y⟨t⟩ | y⟨1⟩ ... y⟨t−1⟩) = softmax(W_y a⟨t⟩ + b_y), a⟨t⟩ of the last recurrent layer.

    Shapes: tokens (T, B) give logits (T, B, V).

    Args:
        encoder: maps tokens to hidden states.
        dropout: applied to the hidden states of the last layer.
        head: maps hidden states to logits.

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
        """A state of zeros for all layers."""
        return self.encoder.recurrent.zero_state(batch_size)

    def hidden(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states (T, B, H) of the last layer before output dropout, and the final state.

        Args:
            inputs: tokens, (T, B). In evaluation mode a token below 0 has a zero embedding.
            state: the initial state; None for zeros.
        """
        hidden, state = self.encoder(inputs, state)
        return hidden, state

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (T, B, V) and the final state; arguments as `hidden`."""
        hidden, state = self.hidden(inputs, state)
        return self.head(self.dropout(hidden)), state

    @torch.no_grad()
    def log_probs(
        self, inputs: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Log P of each target, (T, B), in nats, and the final state.

        Args:
            inputs: tokens, (T, B).
            targets: the tokens after them, (T, B); where one is below 0 the value is undefined.
            state: the initial state; None for zeros.
        """
        hidden, state = self.hidden(inputs, state)
        return self.head.log_probs(hidden, targets.clamp(min=0)), state
