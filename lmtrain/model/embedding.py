"""The vectors that recurrent layers take: those of tokens, or inputs that are vectors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.dropout import keep_mask
from lmtrain.model.generator import ModelGenerator


class Embedding(nn.Module):
    """One learned vector for each token.

    Args:
        vocab_size: V, tokens.
        size: E, numbers in a vector.
        generator: what word dropout draws from.
        word_dropout: probability, in training, that a token of the vocabulary is dropped wherever
            it stands in a batch.
        is_sparse: whether the gradient may be sparse, one row for each token of the batch, where
            the vocabulary is larger than the batch; never on CUDA.

    Source: word dropout: Gal & Ghahramani 2016.
    """

    def __init__(
        self,
        vocab_size: int,
        size: int,
        generator: ModelGenerator,
        *,
        word_dropout: float = 0.0,
        is_sparse: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.generator = generator
        self.word_dropout = word_dropout
        self.is_sparse = is_sparse

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights, uniform in ± init_scale.

        Without it their scale gives sums of one size over E, whatever E is.
        """
        scale = math.sqrt(3 / self.weight.shape[1]) / 2 if init_scale is None else init_scale
        with torch.no_grad():
            self.weight.uniform_(-scale, scale, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors (T, B, E) of tokens (T, B).

        Outside training, a token below 0 has the zero vector: "nothing yet", x⟨1⟩ = 0 in the
        notes. In training it has that of token 0: there such tokens are padding only.
        """
        known = tokens.clamp(min=0)
        is_sparse = self.is_sparse and self.training and tokens.numel() < len(self.weight)
        vectors = F.embedding(known, self.weight, sparse=is_sparse and not tokens.is_cuda)
        if not self.training:
            return vectors * (tokens >= 0).unsqueeze(-1)
        if self.word_dropout:
            generator = self.generator.on(tokens.device)
            shape = (len(self.weight), 1)
            vectors = vectors * F.embedding(
                known, keep_mask(shape, self.word_dropout, generator, vectors)
            )
        return vectors


class Vectors(nn.Module):
    """Inputs that are vectors already.

    Args:
        size: numbers in a vector.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws nothing: there are no weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        """The same vectors, (T, B, F)."""
        return inputs
