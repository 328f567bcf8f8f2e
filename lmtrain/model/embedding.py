"""The first layer of a network: token embeddings, or inputs that are already vectors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.kernels.dropout import mask
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.lookup import Lookup


class Embedding(Lookup):
    """A learned vector for each token.

    Shapes: tokens (T, B) give vectors (T, B, E); `weight` (V, E).

    Args:
        vocab_size: V, number of tokens.
        size: E, features of a vector.
        generator: the model's random generator, for word dropout.
        word_dropout: probability that a token of the vocabulary is dropped, at all its positions
            in a batch; in training only.

    Source: word dropout: Gal & Ghahramani 2016.
    """

    def __init__(
        self,
        vocab_size: int,
        size: int,
        generator: ModelGenerator,
        *,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.generator = generator
        self.word_dropout = word_dropout

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes the weights: uniform in ± init_scale.

        With None, the standard deviation is proportional to 1/√E.
        """
        scale = math.sqrt(3 / self.weight.shape[1]) / 2 if init_scale is None else init_scale
        with torch.no_grad():
            self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors (T, B, E) of tokens (T, B).

        In evaluation mode a token below 0 has the zero vector: x⟨1⟩ = 0 of the notes, before the
        first token. In training it has the vector of token 0: there it only occurs as padding.
        """
        ids = tokens.clamp(min=0)
        vectors = self.lookup(ids)
        if not self.training:
            return vectors * (tokens >= 0).unsqueeze(-1)
        if self.word_dropout:
            generator = self.generator.on(tokens.device)
            word_mask = mask((len(self.weight), 1), self.word_dropout, generator, vectors)
            vectors = vectors * F.embedding(ids, word_mask)
        return vectors


class Vectors(nn.Module):
    """The identity, for inputs that are already vectors.

    Args:
        size: F, features of a vector.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Does nothing: there are no weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` (T, B, F), unchanged."""
        return inputs
