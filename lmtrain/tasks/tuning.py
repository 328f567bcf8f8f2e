"""Hyperparameter search for the neural cache and for dynamic evaluation."""

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
from lmtrain.tasks.adaptation import Adaptation, Cache, CacheEntries, Dynamic, interpolate
from lmtrain.tasks.perplexity import evaluate

_SIZES = (100, 500, 2000)
_SHARPNESSES = (0.03, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
_WEIGHTS = tuple(round(0.02 * i, 2) for i in range(1, 26))
_WINDOW = 256
# Most bytes of hidden states, which are computed once for all caches.
_MAX_BYTES = 1 << 30
# Rates grow by this factor from the first one until the loss gets worse.
_FIRST_RATE, _RATE_FACTOR = 1e-6, math.sqrt(10)
_DECAYS = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class TuningResult:
    """Hyperparameters and their validation loss in nats per token."""

    hyperparameters: Cache | Dynamic
    loss: float


@torch.no_grad()
def tune_cache(
    model: LanguageModel, ids: NDArray[np.integer], start_id: int | None
) -> Iterator[TuningResult]:
    """Caches of different sizes and sharpnesses, each with its best weight.

    Args:
        model: the model.
        ids: the validation text, (N,); of a long one, the start.
        start_id: the token before the first one; None for none.
    """
    model.eval()
    ids = ids[: _MAX_BYTES // (4 * model.encoder.recurrent.output_size)]
    hidden, targets, log_probs, state = [], [], [], None
    for window in windows(ids, start_id, 1, _WINDOW):
        x, y = (torch.from_numpy(part).to(device.of(model)) for part in window)
        states, state = model.hidden(x, state)
        hidden.append(states)
        targets.append(y)
        log_probs.append(model.head.log_probs(states, y))
    for size, sharpness in itertools.product(_SIZES, _SHARPNESSES):
        entries = CacheEntries(Cache(size, sharpness, 0.0))
        parts = [
            entries.probabilities(states, y) for states, y in zip(hidden, targets, strict=True)
        ]
        cache_probs, has_entries = (torch.cat(part) for part in zip(*parts, strict=True))
        losses = {
            weight: -float(
                interpolate(torch.cat(log_probs), cache_probs, has_entries, weight).mean()
            )
            for weight in _WEIGHTS
        }
        weight = min(losses, key=losses.__getitem__)
        yield TuningResult(Cache(size, sharpness, weight), losses[weight])


def tune_dynamic(
    model: LanguageModel,
    text: Tokens,
    tokenizer: Tokenizer,
    scales: Sequence[Tensor],
    seq_len: int,
) -> Iterator[TuningResult]:
    """Dynamic evaluation with increasing rates without decay, then decays at the best rate.

    Args:
        model: the model.
        text: the validation text.
        tokenizer: its tokenizer.
        scales: from `gradient_scales`.
        seq_len: number of tokens between two updates.
    """
    model.eval()

    def evaluated(dynamic: Dynamic) -> TuningResult:
        adapting = Adaptation(model, None, dynamic, scales)
        try:
            predict = adapting.log_probs
            loss = evaluate(model, text, tokenizer, predict=predict, piece=seq_len).loss
        finally:
            adapting.close()
        return TuningResult(dynamic, loss)

    rate, best, loss = _FIRST_RATE, _FIRST_RATE, math.inf
    while True:
        found = evaluated(Dynamic(rate, 0.0, seq_len))
        yield found
        if not found.loss < loss:
            break
        best, loss, rate = rate, found.loss, rate * _RATE_FACTOR
    for decay in _DECAYS:
        yield evaluated(Dynamic(best, decay, seq_len))
