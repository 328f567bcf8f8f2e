"""The tagger: a label for each token (many to many, equal lengths)."""

from torch import Tensor

from lmtrain.model.network import Network


class Tagger(Network):
    """P(label⟨t⟩ | x⟨1⟩ ... x⟨T⟩) = softmax(W_y a⟨t⟩ + b_y), a⟨t⟩ of one direction or of both.

    Shapes: tokens (T, B), or words with characters (T, B, 1 + C), and lengths (B,) give logits
    (T, B, V), V the number of labels.

    Args:
        encoder: maps tokens to hidden states.
        dropout: applied to the hidden states of the last layer.
        head: maps hidden states to logits.
    """

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states after dropout, (T, B, D·H).

        Args:
            tokens: (T, B), or words with characters (T, B, 1 + C).
            lengths: steps of each row, (B,), 1 to T.
        """
        hidden, _ = self.encoder(tokens, None, lengths)
        dropped: Tensor = self.dropout(hidden)
        return dropped

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (T, B, V); arguments as `hidden`."""
        logits: Tensor = self.head(self.hidden(tokens, lengths))
        return logits
