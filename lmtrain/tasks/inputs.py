"""The inputs of examples: tokenized text, or vectors."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from lmtrain.data.tokenizer import Tokenizer, build_tokenizer
from lmtrain.data.vectors import MOST_NUMBERS, require_width
from lmtrain.data.vocabulary import tokenizer_of
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.model.embedding import Embedding, Vectors
from lmtrain.schema import Config, default
from lmtrain.tasks.base import Files
from lmtrain.tasks.building import Builder

TOKENIZER_FILE, VECTORS_FILE = "tokenizer.json", "vectors.json"
_SIZE = Field(ge=1, le=MOST_NUMBERS, strict=True)
_CONTENT = TypeAdapter(dict[Literal["size"], Annotated[int, _SIZE]])
# Settings that apply to tokens only.
_OF_TOKENS = (
    "data.level", "data.splitter", "data.vocabulary", "data.vocab_size", "data.min_count",
    "data.lowercase", "data.nfc", "model.embedding_size", "model.embeddings",
    "model.word_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class TextInputs:
    """Text inputs with their tokenizer."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, texts: Iterable[str], config: Config) -> "TextInputs":
        """Text inputs with the vocabulary of training texts."""
        data = config.data
        if data.vocabulary is not None:
            return cls(
                tokenizer_of(data.vocabulary, data.splitter, lowercase=data.lowercase, nfc=data.nfc)
            )
        return cls(
            build_tokenizer(
                (f"{text}\n" for text in texts),
                data.level,
                data.splitter,
                vocab_size=data.vocab_size,
                min_count=data.min_count,
                lowercase=data.lowercase,
                nfc=data.nfc,
            )
        )

    def files(self) -> dict[str, str]:
        """The tokenizer."""
        return {TOKENIZER_FILE: self.tokenizer.to_json()}

    def sizes(self) -> dict[str, int]:
        """The size of the vocabulary."""
        return {"vocab_size": self.tokenizer.vocab_size}

    def encode(self, text: str, name: str) -> NDArray[np.int64]:
        """The ids of a text; a text without tokens becomes a single `<UNK>` or token 0."""
        ids = self.tokenizer.encode(text)
        return ids if len(ids) else np.array([self.tokenizer.unk_id or 0], np.int64)

    def unknown_characters(self, texts: Iterable[str]) -> dict[str, int]:
        """The characters that are `<UNK>` at character level, with their counts."""
        return self.tokenizer.unknown_characters(texts)

    def shown(self, ids: NDArray[np.int64]) -> str:
        """The text of ids, for a preview."""
        return self.tokenizer.decode(ids)

    def described(self) -> str:
        """The size of the vocabulary, for text output."""
        return f"vocabulary {self.tokenizer.vocab_size:,}"

    def first_layer(self, builder: Builder) -> Embedding:
        """An embedding layer."""
        return builder.embedding(self.tokenizer.vocab_size)


@dataclass(frozen=True)
class VectorInputs:
    """Inputs that are vectors of `size` numbers."""

    size: int

    @classmethod
    def of(cls, size: int, config: Config) -> "VectorInputs":
        """Vector inputs of that size.

        Raises:
            ConfigError: a setting that does not apply to vectors.
        """
        for path in _OF_TOKENS:
            section, name = path.split(".")
            value = getattr(getattr(config, section), name)
            if value != default(path):
                raise ConfigError(f"{path} = {value} does not apply to vectors, only to text")
        return cls(size)

    def files(self) -> dict[str, str]:
        """The size of the vectors."""
        return {VECTORS_FILE: json.dumps({"size": self.size})}

    def sizes(self) -> dict[str, int]:
        """The size of the vectors."""
        return {"input_size": self.size}

    def encode(self, vectors: NDArray[Any], name: str) -> NDArray[np.float32]:
        """Checks vectors (T, F) and converts them to float32.

        Raises:
            TextError: another width, no steps, or values that are not finite.
        """
        return require_width(vectors, self.size, name)

    def unknown_characters(self, vectors: Iterable[Any]) -> dict[str, int]:
        """None: vectors have no characters."""
        return {}

    def shown(self, vectors: NDArray[np.float32]) -> str:
        """The number of vectors, for a preview."""
        return f"{len(vectors):,} steps"

    def described(self) -> str:
        """The size, for text output."""
        return f"vectors of {self.size:,} numbers"

    def first_layer(self, builder: Builder) -> Vectors:
        """A layer that returns the vectors unchanged."""
        return Vectors(self.size)


def restored_inputs(files: Files, *, vectors: bool) -> TextInputs | VectorInputs:
    """The inputs of a checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not vectors:
        return TextInputs(Tokenizer.from_json(files.text(TOKENIZER_FILE)))
    try:
        return VectorInputs(_CONTENT.validate_json(files.text(VECTORS_FILE))["size"])
    except (ValidationError, KeyError):
        raise CheckpointError(f"{VECTORS_FILE} is damaged") from None
