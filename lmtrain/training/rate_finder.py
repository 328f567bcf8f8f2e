"""The learning-rate range test: a short training with an increasing learning rate."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from lmtrain.errors import DivergedError
from lmtrain.tasks.base import Task
from lmtrain.training.optimizer import Schedule
from lmtrain.training.step import Stepper

# The test ends when the loss exceeds the lowest loss by this factor.
_MAX_LOSS_RATIO = 2.0
# Decay of the exponential moving average of the loss.
_SMOOTHING = 0.95


@dataclass(frozen=True)
class RateCurve:
    """The losses of a range test.

    Args:
        learning_rates: the learning rate of each step.
        losses: the exponentially smoothed loss of each step, in nats per prediction.
    """

    learning_rates: list[float]
    losses: list[float]

    @property
    def lowest(self) -> float:
        """The learning rate with the lowest loss."""
        return self.learning_rates[int(np.argmin(self.losses))]

    @property
    def steepest(self) -> float:
        """The learning rate where the loss falls fastest, on a logarithmic scale of the rate."""
        end = max(2, int(np.argmin(self.losses)) + 1)
        slopes = np.diff(self.losses[:end])
        return self.learning_rates[int(np.argmin(slopes))]


def geometric_schedule(first: float, last: float, steps: int) -> Schedule:
    """Learning rates that increase from `first` to `last` by a constant factor per step."""
    return lambda step: first * (last / first) ** (step / max(1, steps - 1))


def range_test(task: Task, stepper: Stepper, steps: int) -> RateCurve:
    """The losses of a training in which the learning rate increases.

    It ends after `steps` updates, or when the loss has doubled or is not finite.

    Args:
        task: has a new model, whose weights are useless afterwards.
        stepper: computes the steps, with an increasing learning rate.
        steps: maximum number of updates.

    Raises:
        DivergedError: the first losses are not finite.

    Source: Smith 2017 (arXiv 1506.01186).
    """
    task.model.train()
    learning_rates: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for number in range(steps):
        step = stepper.enqueue(task.batch(number))
        result = step.collect()
        learning_rates.append(step.learning_rate)
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * result.loss
        losses.append(mean / (1 - _SMOOTHING ** (number + 1)))
        if not losses[-1] < _MAX_LOSS_RATIO * min(itertools.chain([math.inf], losses)):
            break
        if not result.was_applied:
            break
    if len(losses) < 3 or not math.isfinite(losses[0]):
        raise DivergedError(
            f"the loss is {losses[-1]:.6g} after {len(losses)} steps", "try: a smaller --first"
        )
    finite = [loss for loss in losses if math.isfinite(loss)]
    return RateCurve(learning_rates[: len(finite)], finite)
