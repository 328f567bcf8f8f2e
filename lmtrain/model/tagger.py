"""The tagger: tokens in, a label for each out (many to many, of equal length)."""

from torch import Tensor

from lmtrain.model.network import Network


class Tagger(Network):
    """P(label⟨t⟩ | x⟨1⟩ ... x⟨T⟩) = softmax(W_y a⟨t⟩ + b_y), a⟨t⟩ of one direction or of both.

    Args:
        encoder: tokens to hidden states.
        dropout: acts on the hidden states.
        head: hidden states to probabilities.

    Shapes: tokens (T, B) and lengths (B,) give logits (T, B, C).
    """

    def hidden(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states after dropout, (T, B, H)."""
        hidden, _ = self.encoder(tokens, None, lengths)
        dropped: Tensor = self.dropout(hidden)
        return dropped

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (T, B, C) of tokens (T, B), each row of its own length (B,)."""
        logits: Tensor = self.head(self.hidden(tokens, lengths))
        return logits
