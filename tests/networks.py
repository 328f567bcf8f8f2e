"""Small networks and tasks for tests, built from settings as training builds them."""

from typing import Any

import numpy as np
import torch

from lmtrain import config, device
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Loss, Shard
from lmtrain.tasks.language_model import LanguageModelling, TextData


def _tokenizer(vocab_size: int) -> Tokenizer:
    return Tokenizer([UNK, EOS, *(f"w{index}" for index in range(2, vocab_size))])


def _settings(changes: dict[str, Any]) -> Config:
    """Settings named as in section model, or by a whole path with `__` for the dot."""
    changes = {"train__precision": "fp32", **changes}
    return config.load(
        overrides={
            name.replace("__", ".") if "__" in name else f"model.{name}": value
            for name, value in changes.items()
        }
    )


def language_model(vocab_size: int, **settings: Any) -> LanguageModel:
    """A language model with a vocabulary of `vocab_size` tokens."""
    return LanguageModelling.build(_settings(settings), TextData(_tokenizer(vocab_size)))


def language_modelling(vocab_size: int, **settings: Any) -> LanguageModelling:
    """The task of training a language model of `vocab_size` tokens on an arbitrary text."""
    resolved = _settings(settings)
    length = resolved.train.batch_size * (resolved.train.seq_len + 1)
    text = tokens(np.arange(length, dtype=np.uint16) % vocab_size, length)
    data = TextData(_tokenizer(vocab_size), {"train": text})
    return LanguageModelling(resolved, data, LanguageModelling.build(resolved, data), Shard())


def random_ids(length: int) -> np.ndarray:
    """`length` random ids from 0 to 8."""
    return torch.randint(0, 9, (length,), generator=device.generator(3)).numpy().astype(np.uint16)


def tokens(ids: np.ndarray, characters: int = 1) -> Tokens:
    """A text with the given ids."""
    return Tokens(np.asarray(ids), characters, "0" * 64, "text")


def loss(
    task: LanguageModelling,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    state: State | None = None,
) -> Loss:
    """The loss of inputs and targets, (T, B) each."""
    return task.loss(Batch((inputs, targets), rows=inputs.shape[1]), state)
