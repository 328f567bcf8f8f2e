"""Small networks and tasks that tests share, built from settings as training builds them."""

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
    """Settings by names of model., or by whole paths with two underscores for the point."""
    changes = {"train__precision": "fp32", **changes}
    return config.load(
        overrides={
            name.replace("__", ".") if "__" in name else f"model.{name}": value
            for name, value in changes.items()
        }
    )


def language_model(vocab_size: int, **settings: Any) -> LanguageModel:
    """A language model over so many tokens."""
    return LanguageModelling.build(_settings(settings), TextData(_tokenizer(vocab_size)))


def language_modelling(vocab_size: int, **settings: Any) -> LanguageModelling:
    """The task of training a language model over so many tokens, on a text of no matter what."""
    chosen = _settings(settings)
    length = chosen.train.batch_size * (chosen.train.seq_len + 1)
    text = tokens(np.arange(length, dtype=np.uint16) % vocab_size, length)
    data = TextData(_tokenizer(vocab_size), {"train": text})
    return LanguageModelling(chosen, data, LanguageModelling.build(chosen, data), Shard())


def random_ids(length: int) -> np.ndarray:
    """Ids below 9."""
    return torch.randint(0, 9, (length,), generator=device.generator(3)).numpy().astype(np.uint16)


def tokens(ids: np.ndarray, characters: int = 1) -> Tokens:
    """A text of these ids."""
    return Tokens(np.asarray(ids), characters, "0" * 64, "text")


def loss(
    task: LanguageModelling,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    state: State | None = None,
) -> Loss:
    """The loss of a window, inputs and targets (T, B)."""
    return task.loss(Batch((inputs, targets), rows=inputs.shape[1]), state)
