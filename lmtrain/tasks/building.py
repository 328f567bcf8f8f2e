"""Networks from settings: the one place where the tree of settings becomes layers."""

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

# Numbers of a character's vector, and units of each direction over the characters of a word.
_CHARACTER_SIZE, _CHARACTER_UNITS = 32, 50


class Builder:
    """The parts of a network.

    Args:
        config: the settings.
        is_shared: whether several processes train it, which exchange whole gradients.
    """

    def __init__(self, config: Config, *, is_shared: bool) -> None:
        self.config = config
        self.generator = ModelGenerator(config.train.seed)
        self._is_shared = is_shared

    def dropout(self, p: float | None) -> Dropout:
        """The dropout of that probability, or of model.dropout without one."""
        network = self.config.model
        p = network.dropout if p is None else p
        return Dropout(p, self.generator, is_locked=network.locked_dropout)

    def embedding(self, vocab_size: int, *, can_freeze: bool = True) -> Embedding:
        """The vectors of so many tokens.

        Args:
            vocab_size: V, tokens.
            can_freeze: whether they are those that model.freeze_embeddings speaks of.
        """
        config, network = self.config, self.config.model
        embedding = Embedding(
            vocab_size,
            config.embedding_size,
            self.generator,
            word_dropout=network.word_dropout,
            # Rules that remember or decay need every row in every step.
            is_sparse=config.optimizer.name == "sgd"
            and config.optimizer.weight_decay == 0
            and not (self._is_shared or network.tied_embeddings),
        )
        embedding.weight.requires_grad_(not (network.freeze_embeddings and can_freeze))
        return embedding

    def word_characters(self, vocab_size: int, num_characters: int) -> WordCharacters:
        """The vectors of so many words, with so many characters."""
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
        """Layers over vectors.

        Args:
            embedding: gives the vectors.
            hidden_sizes: H of each layer; None for what model.hidden_size and num_layers say.
            is_bidirectional: None for what model.bidirectional says.

        Raises:
            ConfigError: no such cell, or a size or an option that it does not have.
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
    """The settings of a model that are arguments of its cell, those of a user's own included.

    Raises:
        ConfigError: no such cell.
    """
    options = cells.cell_class(network.cell).options
    return {
        name: value
        for name, value in network
        if name in options or name in (network.model_extra or {})
    }
