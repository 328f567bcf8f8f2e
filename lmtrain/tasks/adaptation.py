"""Adaptation during evaluation: the neural cache, and dynamic evaluation.

Both see a token only after it was predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State

# Windows of the training text on which mean square gradients are measured.
_WINDOWS, _STREAMS, _STEPS = 100, 20, 50
# Upper bound of cache sizes and pieces.
_MAX_TOKENS = 10**12


@dataclass(frozen=True)
class Cache:
    """Hyperparameters of a neural cache, which raises P of words that followed similar states.

    p⟨t⟩(w) = (1 − λ) ŷ⟨t⟩[w] + λ Σ_i [y⟨i⟩ = w] e^(θ a⟨t⟩·a⟨i⟩) / Σ_i e^(θ a⟨t⟩·a⟨i⟩), over
    the last `size` steps i before t.

    Args:
        size: number of time steps in the cache, 1 or more.
        sharpness: θ, above 0.
        weight: λ, 0 to 1.

    Raises:
        ConfigError: an argument out of its range.

    Source: Grave, Joulin & Usunier 2017 (arXiv 1612.04426).
    """

    size: int
    sharpness: float
    weight: float

    def __post_init__(self) -> None:
        is_size = 1 <= self.size <= _MAX_TOKENS
        if not is_size or not 0 < self.sharpness < float("inf") or not 0 <= self.weight < 1:
            raise ConfigError(
                f"a cache of {self.size} steps, sharpness {self.sharpness:g}, weight "
                f"{self.weight:g}",
                f"size from 1 to {_MAX_TOKENS:,}, sharpness above 0, weight from 0 to below 1",
            )


@dataclass(frozen=True)
class Dynamic:
    """Hyperparameters of dynamic evaluation: an update after each piece of the predicted text.

    w ← w − η g / (r + r̄) + min(1, λ r / r̄) (w₀ − w), g the gradient of the piece's mean nats, r the
    root of g's mean square on the training text, r̄ the mean of r over all weights, w₀ the trained
    weights.

    Args:
        rate: η, above 0.
        decay: λ, 0 or more.
        seq_len: number of tokens in a piece, 1 or more.

    Raises:
        ConfigError: an argument out of its range.

    Source: Krause, Kahembwe, Murray & Renals 2018 (arXiv 1709.07432), their ε being r̄ here.
    """

    rate: float
    decay: float
    seq_len: int = 5

    def __post_init__(self) -> None:
        is_rate = 0 < self.rate < float("inf") and 0 <= self.decay < float("inf")
        if not is_rate or not 1 <= self.seq_len <= _MAX_TOKENS:
            raise ConfigError(
                f"dynamic evaluation with rate {self.rate:g}, decay {self.decay:g}, pieces of "
                f"{self.seq_len}",
                f"rate above 0, decay from 0, pieces of 1 to {_MAX_TOKENS:,} tokens",
            )


class CacheEntries:
    """The entries of a cache over B streams of text.

    Args:
        cache: size and sharpness.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._seen: tuple[Tensor, Tensor] | None = None

    def probabilities(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """P of each target under the cache, and whether the cache had entries.

        Args:
            hidden: (T, B, H).
            targets: (T, B).

        Returns:
            Both (T, B).
        """
        states, words = hidden, targets
        if self._seen is not None:
            states = torch.cat([self._seen[0], hidden])  # (M + T, B, H)
            words = torch.cat([self._seen[1], targets])
        before = len(words) - len(targets)
        scores = torch.einsum("tbh,mbh->tbm", hidden, states) * self._cache.sharpness
        now = torch.arange(before, len(words), device=words.device).view(-1, 1, 1)
        then = torch.arange(len(words), device=words.device)
        is_near = (then < now) & (then >= now - self._cache.size)  # (T, 1, M + T)
        scores = scores.masked_fill(~is_near, -torch.inf)
        matching = scores.masked_fill(targets.unsqueeze(-1) != words.T, -torch.inf)
        cache_probs = (matching.logsumexp(-1) - scores.logsumexp(-1)).exp()
        has_entries = is_near.any(-1).expand_as(targets)
        self._seen = states[-self._cache.size :], words[-self._cache.size :]
        return torch.where(has_entries, cache_probs, 0), has_entries


def interpolate(
    log_probs: Tensor, cache_probs: Tensor, has_entries: Tensor, weight: float
) -> Tensor:
    """Log of (1 − λ) e^log_probs + λ · cache_probs, or `log_probs` where the cache is empty."""
    both = torch.log((1 - weight) * log_probs.double().exp() + weight * cache_probs.double())
    return torch.where(has_entries, both, log_probs.double())


class Adaptation:
    """An adaptive replacement of `LanguageModel.log_probs`.

    Dynamic evaluation changes the weights of the model; `close` restores them.

    Args:
        model: the model.
        cache: the neural cache; None for none.
        dynamic: dynamic evaluation; None for none.
        scales: with `dynamic`, r for each parameter, from `gradient_scales`.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache | None,
        dynamic: Dynamic | None = None,
        scales: Sequence[Tensor] = (),
    ) -> None:
        self._model = model
        self._cache = cache
        self._entries = CacheEntries(cache) if cache else None
        self._dynamic = dynamic
        self._weights = _learning(model)
        self._trained = [weight.detach().clone() for weight in self._weights] if dynamic else []
        self._decays: list[Tensor] = []
        if dynamic:
            mean = sum(float(r.sum()) for r in scales) / sum(r.numel() for r in scales)
            self._rates = [dynamic.rate / (r + mean) for r in scales]
            if dynamic.decay:
                self._decays = [(dynamic.decay / mean * r).clamp(max=1) for r in scales]

    def log_probs(
        self, inputs: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """As `LanguageModel.log_probs`, for consecutive windows of a text.

        Weights are also updated at the end of a window, which should be a multiple of a piece.
        """
        length = self._dynamic.seq_len if self._dynamic else len(inputs)
        pieces = []
        for x, y in zip(inputs.split(length), targets.split(length), strict=True):
            with torch.set_grad_enabled(self._dynamic is not None):
                hidden, after = self._model.hidden(x, state)
                log_probs = self._model.head.log_probs(hidden, y.clamp(min=0))
            if self._dynamic:
                self._update(-log_probs[y >= 0].mean())
            state = after.detach()
            log_probs = log_probs.detach()
            if self._entries and self._cache:
                cache_probs, has_entries = self._entries.probabilities(hidden.detach(), y)
                log_probs = interpolate(log_probs, cache_probs, has_entries, self._cache.weight)
            pieces.append(log_probs)
        return torch.cat(pieces), state or State()

    def _update(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self._weights)
        with torch.no_grad():
            if self._decays:
                torch._foreach_lerp_(self._weights, self._trained, self._decays)
            torch._foreach_addcmul_(self._weights, gradients, self._rates, value=-1)

    @torch.no_grad()
    def close(self) -> None:
        """Restores the trained weights."""
        for weight, trained in zip(self._weights, self._trained, strict=False):
            weight.copy_(trained)


def gradient_scales(model: LanguageModel, ids: NDArray[np.integer]) -> list[Tensor]:
    """Root mean square of the gradient of each weight over windows of a text.

    Args:
        model: the model.
        ids: the training text, (N,).
    """
    streams = max(1, min(_STREAMS, len(ids) // (_STEPS + 1)))
    starts = np.linspace(0, max(0, len(ids) - _STEPS - 1), _WINDOWS * streams).astype(np.int64)
    weights = _learning(model)
    squares = [torch.zeros_like(weight) for weight in weights]
    for first in starts.reshape(_WINDOWS, streams):
        window = np.stack([ids[start : start + _STEPS + 1] for start in first], axis=1)
        tokens = torch.from_numpy(window.astype(np.int64)).to(device.of(model))
        hidden, _ = model.hidden(tokens[:-1])
        loss = -model.head.log_probs(hidden, tokens[1:]).mean()
        gradients = torch.autograd.grad(loss, weights)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 / _WINDOWS)
    return [square.sqrt_() for square in squares]


def _learning(model: LanguageModel) -> list[Tensor]:
    """The weights that are not frozen."""
    return [weight for weight in model.parameters() if weight.requires_grad]
