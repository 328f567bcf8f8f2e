"""The learning-rate range test: a short training in which the rate rises from step to step."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from lmtrain.errors import DivergedError
from lmtrain.tasks.base import Task
from lmtrain.training.optimizer import Schedule
from lmtrain.training.step import Stepper

# The curve ends where its loss is so many times the lowest.
_DIVERGED = 2.0
# What is kept of the smoothed loss at each step.
_SMOOTHING = 0.95


@dataclass(frozen=True)
class RateCurve:
    """Losses while the learning rate rose.

    Args:
        learning_rates: of each step.
        losses: exponentially smoothed nats a prediction of each step.
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


def range_test(task: Task, stepper: Stepper, steps: int) -> RateCurve:
    """Trains while the rate rises, until the loss has doubled or the steps are over.

    Args:
        task: whose model is new; its weights are of no use afterwards.
        stepper: its steps, with a learning rate that rises.
        steps: updates at most.

    Raises:
        DivergedError: the very first losses are not finite.

    Source: Smith 2017 (arXiv 1506.01186).
    """
    task.model.train()
    rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for number in range(steps):
        step = stepper.enqueue(task.batch(number))
        numbers = step.collect()
        rates.append(step.learning_rate)
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * numbers.loss
        losses.append(mean / (1 - _SMOOTHING ** (number + 1)))
        if not losses[-1] < _DIVERGED * min(itertools.chain([math.inf], losses)):
            break
        if not numbers.is_made:
            break
    if len(losses) < 3 or not math.isfinite(losses[0]):
        raise DivergedError(
            f"the loss is {losses[-1]:.6g} after {len(losses)} steps", "try: a smaller --first"
        )
    finite = [loss for loss in losses if math.isfinite(loss)]
    return RateCurve(rates[: len(finite)], finite)
