"""Builds the layers of networks from settings."""

from typing import Any

from lmtrain import cells
from lmtrain.cells import Cell
from lmtrain.model.dropout import Dropout
from lmtrain.model.embedding import Embedding, Vectors
from lmtrain.model.encoder import Encoder
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import Recurrent
from lmtrain.model.word_characters import WordCharacters
from lmtrain.schema import Config, ModelConfig
from lmtrain.tasks.base import uses_bf16

# Size of a character's embedding, and hidden units of each direction over a word's characters.
_CHARACTER_SIZE, _CHARACTER_UNITS = 32, 50


class Builder:
    """Builds the parts of a network.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.generator = ModelGenerator(config.train.seed)

    def dropout(self, p: float | None) -> Dropout:
        """Dropout with probability p, by default model.dropout."""
        network = self.config.model
        p = network.dropout if p is None else p
        return Dropout(p, self.generator, is_locked=network.locked_dropout)

    def embedding(self, vocab_size: int, *, can_freeze: bool = True) -> Embedding:
        """An embedding of `vocab_size` tokens.

        Args:
            vocab_size: V, tokens.
            can_freeze: whether model.freeze_embeddings applies to it.
        """
        config, network = self.config, self.config.model
        embedding = Embedding(
            vocab_size,
            config.embedding_size,
            self.generator,
            word_dropout=network.word_dropout,
        )
        embedding.weight.requires_grad_(not (network.freeze_embeddings and can_freeze))
        return embedding

    def word_characters(self, vocab_size: int, num_characters: int) -> WordCharacters:
        """The embedding of a vocabulary of words, each combined with its characters."""
        characters = Embedding(num_characters, _CHARACTER_SIZE, self.generator)
        recurrent = Recurrent(
            self._cell,
            _CHARACTER_SIZE,
            [_CHARACTER_UNITS],
            self.dropout(0.0),
            is_bidirectional=True,
        )
        return WordCharacters(self.embedding(vocab_size), characters, recurrent)

    def encoder(
        self,
        embedding: Embedding | WordCharacters | Vectors,
        hidden_sizes: list[int] | None = None,
        *,
        is_bidirectional: bool | None = None,
    ) -> Encoder:
        """Recurrent layers over an embedding.

        Args:
            embedding: the first layer.
            hidden_sizes: H of each layer; by default model.num_layers times model.hidden_size.
            is_bidirectional: by default model.bidirectional.

        Raises:
            ConfigError: no such cell, or a size or an option that it does not support.
        """
        network = self.config.model
        recurrent = Recurrent(
            self._cell,
            embedding.size,
            hidden_sizes or [network.hidden_size] * network.num_layers,
            self.dropout(None),
            weight_dropout=network.weight_dropout,
            is_residual=network.residual,
            is_bidirectional=(
                network.bidirectional if is_bidirectional is None else is_bidirectional
            ),
        )
        dropout = self.dropout(network.input_dropout)
        return Encoder(embedding, dropout, recurrent, is_bf16=uses_bf16(self.config.train))

    def _cell(self, input_size: int, hidden_size: int) -> Cell:
        network = self.config.model
        return cells.create(network.cell, input_size, hidden_size, cell_options(network))


def cell_options(network: ModelConfig) -> dict[str, Any]:
    """The settings of a model that are arguments of its cell, also of a user-defined one.

    Raises:
        ConfigError: no such cell.
    """
    options = cells.cell_class(network.cell).options
    return {
        name: value
        for name, value in network
        if name in options or name in (network.model_extra or {})
    }
