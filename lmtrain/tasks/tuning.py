"""The numbers of a cache and of dynamic evaluation that predict a validation text best."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device
from lmtrain.data.streams import windows
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks.adaptation import Adaptation, Cache, Dynamic, Memory, mixed
from lmtrain.tasks.perplexity import evaluate

_SIZES = (100, 500, 2000)
_SHARPNESSES = (0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
_WEIGHTS = tuple(round(0.02 * i, 2) for i in range(1, 26))
_WINDOW = 256
# Rates are tried from this one on, each so many times the last, until they get worse.
_FIRST_RATE, _RATE_FACTOR = 1e-6, math.sqrt(10)
_DECAYS = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Trial:
    """Numbers that were tried and the validation loss they gave, in nats a token."""

    tried: Cache | Dynamic
    loss: float


@torch.no_grad()
def cache_trials(
    model: LanguageModel, ids: NDArray[np.integer], start_id: int | None
) -> Iterator[Trial]:
    """The best weight for each size and sharpness of a cache.

    Args:
        model: the model.
        ids: the validation text, (N,).
        start_id: the token taken to stand before the first; None for nothing.
    """
    model.eval()
    hidden, targets, log_probs, state = [], [], [], None
    for window in windows(ids, start_id, 1, _WINDOW):
        x, y = (torch.from_numpy(part).to(device.of(model)) for part in window)
        states, state = model.hidden(x, state)
        hidden.append(states)
        targets.append(y)
        log_probs.append(model.head.log_probs(states, y))
    for size, sharpness in itertools.product(_SIZES, _SHARPNESSES):
        memory = Memory(Cache(size, sharpness, 0.0))
        parts = [memory.probabilities(states, y) for states, y in zip(hidden, targets, strict=True)]
        share, has_seen = (torch.cat(part) for part in zip(*parts, strict=True))
        losses = {
            weight: -float(mixed(torch.cat(log_probs), share, has_seen, weight).mean())
            for weight in _WEIGHTS
        }
        weight = min(losses, key=losses.__getitem__)
        yield Trial(Cache(size, sharpness, weight), losses[weight])


def dynamic_trials(
    model: LanguageModel,
    text: Tokens,
    tokenizer: Tokenizer,
    scales: Sequence[Tensor],
    seq_len: int,
) -> Iterator[Trial]:
    """Rates of dynamic evaluation without decay, then decays at the best rate.

    Args:
        model: the model.
        text: the validation text.
        tokenizer: its tokenizer.
        scales: from `gradient_scales`.
        seq_len: tokens between two steps of the weights.
    """
    model.eval()

    def trial(dynamic: Dynamic) -> Trial:
        adapting = Adaptation(model, None, dynamic, scales)
        try:
            predict = adapting.log_probs
            loss = evaluate(model, text, tokenizer, predict=predict, piece=seq_len).loss
        finally:
            adapting.close()
        return Trial(dynamic, loss)

    rate, best, loss = _FIRST_RATE, _FIRST_RATE, math.inf
    while True:
        found = trial(Dynamic(rate, 0.0, seq_len))
        yield found
        if not found.loss < loss:
            break
        best, loss, rate = rate, found.loss, rate * _RATE_FACTOR
    for decay in _DECAYS:
        yield trial(Dynamic(best, decay, seq_len))
