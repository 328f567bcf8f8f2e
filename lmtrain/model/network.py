"""The base class of all networks: an encoder, output dropout and a head."""

from torch import nn

from lmtrain.cells import Cell
from lmtrain.model.dropout import Dropout
from lmtrain.model.encoder import Encoder
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.head import Head


class Network(nn.Module):
    """Base class of networks with an encoder and a head.

    Args:
        encoder: maps tokens or vectors to hidden states.
        dropout: applied to the input of the head.
        head: maps hidden states to logits.
    """

    def __init__(self, encoder: Encoder, dropout: Dropout, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = dropout
        self.head = head

    @property
    def generator(self) -> ModelGenerator:
        """The model's random generator."""
        return self.dropout.generator

    @property
    def num_parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialize(self, init_scale: float | None = None, forget_bias: float = 1.0) -> None:
        """Initializes all parameters from the model's CPU generator.

        Args:
            init_scale: every weight is uniform in ± init_scale; None for the default of each layer.
            forget_bias: added to the biases of forget gates.
        """
        generator = self.generator.generator
        self.encoder.embedding.initialize(generator, init_scale)
        self.head.initialize(generator, init_scale)
        for cell in self.encoder.recurrent.cells:
            if isinstance(cell, Cell):
                cell.initialize(generator, init_scale, forget_bias)
