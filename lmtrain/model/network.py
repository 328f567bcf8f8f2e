"""What networks over tokens share: an encoder, the dropout of its output, and a head."""

from torch import nn

from lmtrain.cells import Cell
from lmtrain.model.dropout import Dropout
from lmtrain.model.encoder import Encoder
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.head import Head


class Network(nn.Module):
    """An encoder and a head.

    Args:
        encoder: tokens to hidden states.
        dropout: acts on what the head takes.
        head: hidden states to probabilities.
    """

    def __init__(self, encoder: Encoder, dropout: Dropout, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = dropout
        self.head = head

    @property
    def generator(self) -> ModelGenerator:
        """What dropout draws from."""
        return self.dropout.generator

    @property
    def num_parameters(self) -> int:
        """Weights, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialize(self, init_scale: float | None = None, forget_bias: float = 1.0) -> None:
        """Draws the first weights.

        Args:
            init_scale: every weight uniform in ± this; None for each part's own way.
            forget_bias: what forget gates' biases start at.
        """
        generator = self.generator.generator
        self.encoder.embedding.initialize(generator, init_scale)
        self.head.initialize(generator, init_scale)
        for cell in self.encoder.recurrent.cells:
            if isinstance(cell, Cell):
                cell.initialize(generator, init_scale, forget_bias)
