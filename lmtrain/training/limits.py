"""The limits of a training: steps and time, whichever is reached first."""

import math
import time
from collections.abc import Mapping
from typing import Any

from lmtrain.schema import TrainConfig
from lmtrain.training.ranks import Ranks

# How often the number of steps that fit in the time is estimated during a training.
_NUM_ESTIMATES = 20


class Limits:
    """The maximum steps and seconds of a training.

    Args:
        config: `max_epochs`, `max_steps`, `max_seconds` and `eval_every`.
        steps_per_epoch: updates in one epoch.
        ranks: the training processes; all use the time of the slowest one.
        start_time: `time.monotonic()` when this process started.

    Attributes:
        total_steps: updates that `max_epochs` and `max_steps` allow.
        planned_steps: the estimated updates that also fit in `max_seconds`; `total_steps` until the
            time is known to be too short.
        validation_seconds: duration of the last validation.
        steps_between_validations: updates from one validation to the next.
    """

    def __init__(
        self, config: TrainConfig, steps_per_epoch: int, ranks: Ranks, start_time: float
    ) -> None:
        steps = config.max_epochs * steps_per_epoch
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.validation_seconds = 0.0
        self.steps_between_validations = config.eval_every or steps_per_epoch
        self._max_seconds = config.max_seconds
        self._ranks = ranks
        self._start_time = start_time
        self._earlier_seconds = 0.0
        self.planned_steps = self.total_steps
        self._next_estimate = (self._max_seconds or 0.0) / _NUM_ESTIMATES
        self._is_time_over = False

    @property
    def elapsed(self) -> float:
        """Seconds of this run so far, including preparation and time before it was resumed."""
        return self._earlier_seconds + time.monotonic() - self._start_time

    def is_reached(self, step: int, train_seconds: float) -> bool:
        """Whether training is over; updates `planned_steps` from time to time.

        Args:
            step: updates done.
            train_seconds: time spent in them.
        """
        if self._max_seconds is not None:
            self._check_time(step, train_seconds, self._max_seconds)
        return self._is_time_over or step >= self.planned_steps

    def _check_time(self, step: int, train_seconds: float, limit: float) -> None:
        times = self._ranks.all_gather([self.elapsed, train_seconds])
        elapsed, train_seconds = (max(column) for column in zip(*times, strict=True))
        # The limit includes the last validation and its checkpoint.
        left = limit - elapsed - 1.5 * self.validation_seconds
        if step and (elapsed >= self._next_estimate or step >= self.planned_steps):
            self._next_estimate = elapsed + limit / _NUM_ESTIMATES
            seconds = train_seconds / step
            seconds += self.validation_seconds / self.steps_between_validations
            self.planned_steps = min(
                step + max(0, int(left / max(seconds, 1e-9))), self.total_steps
            )
        self._is_time_over = left < 0

    def seconds_left(self, step: int, train_seconds: float) -> float:
        """Estimated seconds until training ends.

        Args:
            step: updates done.
            train_seconds: time spent in them.
        """
        left = (self.total_steps - step) * train_seconds / max(1, step)
        if self._max_seconds is not None:
            left = min(left, self._max_seconds - self.elapsed)
        return max(0.0, left)

    def state_dict(self) -> dict[str, Any]:
        """The seconds of this run so far."""
        return {"seconds": self.elapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`.

        Raises:
            ValueError: the seconds are negative or not finite.
        """
        seconds = float(state["seconds"])
        if not 0 <= seconds < math.inf:
            raise ValueError(f"its time is {seconds:g} seconds")
        self._earlier_seconds = seconds
