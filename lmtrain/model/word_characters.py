"""Vectors of words from their characters beside those from the vocabulary."""

import torch
from torch import Tensor, nn

from lmtrain.cells import Cell
from lmtrain.model.embedding import Embedding
from lmtrain.model.recurrent import Recurrent


class WordCharacters(nn.Module):
    """A word's vector of the vocabulary, and the last states of layers over its characters.

    Rare and unknown words are told apart by how they are written.

    Args:
        words: the vectors of words.
        characters: the vectors of characters.
        recurrent: bidirectional layers over the characters of a word.

    Shapes: inputs (T, B, 1 + C), a word's id and those of its characters, below 0 beyond its end,
    give vectors (T, B, E + 2H).

    Source: Ling et al. 2015; Lample et al. 2016.
    """

    def __init__(self, words: Embedding, characters: Embedding, recurrent: Recurrent) -> None:
        super().__init__()
        self.words = words
        self.characters = characters
        self.recurrent = recurrent
        self.size = words.size + recurrent.output_size

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Draws the first weights of all parts."""
        self.words.initialize(generator, init_scale)
        self.characters.initialize(generator, init_scale)
        for cell in self.recurrent.cells:
            if isinstance(cell, Cell):
                cell.initialize(generator, init_scale, 1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """The vectors (T, B, E + 2H) of words with their characters (T, B, 1 + C)."""
        spelled = inputs[..., 1:].flatten(0, 1).T  # (C, T·B)
        lengths = (spelled >= 0).sum(0).clamp(min=1)
        _, last = self.recurrent(self.characters(spelled), None, lengths)
        written = torch.cat([parts[0] for parts in last[-2:]], dim=-1)
        both = [self.words(inputs[..., 0]), written.unflatten(0, inputs.shape[:2])]
        return torch.cat(both, dim=-1)
