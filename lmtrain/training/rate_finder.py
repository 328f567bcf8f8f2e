"""The learning-rate range test: a short training in which the rate rises from step to step."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from lmtrain.data.streams import Streams
from lmtrain.errors import DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.training.optimizer import Optimizer, Schedule

# The curve ends where its loss is so many times the lowest.
_DIVERGED = 2.0
# What is kept of the smoothed loss at each step.
_SMOOTHING = 0.95


@dataclass(frozen=True)
class RateCurve:
    """Losses while the learning rate rose.

    Args:
        learning_rates: of each step.
        losses: exponentially smoothed nats a token of each step.
    """

    learning_rates: list[float]
    losses: list[float]

    @property
    def lowest(self) -> float:
        """The learning rate at the lowest loss."""
        return self.learning_rates[int(np.argmin(self.losses))]

    @property
    def steepest(self) -> float:
        """The learning rate where the loss falls fastest over the logarithm of the rate."""
        until = max(2, int(np.argmin(self.losses)) + 1)
        slopes = np.diff(self.losses[:until])
        return self.learning_rates[int(np.argmin(slopes))]


def rising(first: float, last: float, steps: int) -> Schedule:
    """Learning rates from `first` to `last` in equal factors, one for each step."""
    return lambda step: first * (last / first) ** (step / max(1, steps - 1))


def range_test(
    model: LanguageModel, batches: Streams, optimizer: Optimizer, steps: int
) -> RateCurve:
    """Trains while the rate rises, until the loss has doubled or the steps are over.

    Args:
        model: a new model, which is spoilt.
        batches: the tokens of each step.
        optimizer: the update, with a schedule that rises.
        steps: updates at most.

    Raises:
        DivergedError: the very first losses are not finite.

    Source: Smith 2017 (arXiv 1506.01186).
    """
    model.train()
    rates: list[float] = []
    losses: list[float] = []
    state, mean = None, 0.0
    for step in range(steps):
        inputs, targets = (
            torch.from_numpy(tokens).to(model.embedding.device) for tokens in batches[step]
        )
        loss = model.loss(inputs, targets, None if batches.starts_epoch(step) else state)
        state = loss.state.detach()
        rates.append(optimizer.learning_rate)
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * float(loss.nats) / len(targets)
        losses.append(mean / (1 - _SMOOTHING ** (step + 1)))
        if not losses[-1] < _DIVERGED * min(itertools.chain([math.inf], losses)):
            break
        if not optimizer.update([loss.objective], len(targets) / batches.seq_len).is_made:
            break
    if len(losses) < 3 or not math.isfinite(losses[0]):
        raise DivergedError(
            f"the loss is {losses[-1]:.6g} after {len(losses)} steps", "try: a smaller --first"
        )
    finite = [loss for loss in losses if math.isfinite(loss)]
    return RateCurve(rates[: len(finite)], finite)
