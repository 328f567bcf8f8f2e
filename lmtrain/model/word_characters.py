"""Word vectors concatenated with vectors computed from the characters of the words."""

import torch
from torch import Tensor, nn

from lmtrain.cells import Cell
from lmtrain.model.embedding import Embedding
from lmtrain.model.recurrent import Recurrent


class WordCharacters(nn.Module):
    """A word embedding, concatenated with the final states of a character-level network.

    The characters distinguish rare and unknown words.

    Shapes: inputs (T, B, 1 + C), the id of a word and the ids of its characters, below 0 for
    padding, give vectors (T, B, E + 2H).

    Args:
        words: embedding of words.
        characters: embedding of characters.
        recurrent: bidirectional layers over the characters of a word.

    Source: Ling et al. 2015; Lample et al. 2016.
    """

    def __init__(self, words: Embedding, characters: Embedding, recurrent: Recurrent) -> None:
        super().__init__()
        self.words = words
        self.characters = characters
        self.recurrent = recurrent
        self.size = words.size + recurrent.output_size

    def initialize(self, generator: torch.Generator, init_scale: float | None) -> None:
        """Initializes all parameters: uniform in ± init_scale; None for each layer's default."""
        self.words.initialize(generator, init_scale)
        self.characters.initialize(generator, init_scale)
        for cell in self.recurrent.cells:
            if isinstance(cell, Cell):
                cell.initialize(generator, init_scale, 1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """Vectors (T, B, E + 2H) of words with characters (T, B, 1 + C)."""
        characters = inputs[..., 1:].flatten(0, 1).T  # (C, T·B)
        lengths = (characters >= 0).sum(0).clamp(min=1)
        _, last = self.recurrent(self.characters(characters), None, lengths)
        final = torch.cat([parts[0] for parts in last[-2:]], dim=-1)
        vectors = [self.words(inputs[..., 0]), final.unflatten(0, inputs.shape[:2])]
        return torch.cat(vectors, dim=-1)
