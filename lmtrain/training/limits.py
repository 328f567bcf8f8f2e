"""When a training ends: after its steps or its time, whichever is first."""

import time
from collections.abc import Mapping
from typing import Any

from lmtrain.schema import TrainConfig
from lmtrain.training.ranks import Ranks

# How often within the time of a training the steps that fit into the rest are counted anew.
_PLANS = 20


class Limits:
    """The steps and the seconds of a training.

    Args:
        config: epochs, steps and seconds.
        steps_per_epoch: updates of one epoch.
        ranks: the processes that train together; all act on the slowest one's clock.
        began: `time.monotonic()` when this process began to prepare.

    Attributes:
        total_steps: updates that epochs and steps allow.
        validation_seconds: time that the last validation took.
        steps_between_validations: updates from one validation to the next.
    """

    def __init__(
        self, config: TrainConfig, steps_per_epoch: int, ranks: Ranks, began: float
    ) -> None:
        steps = config.max_epochs * steps_per_epoch
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.validation_seconds = 0.0
        self.steps_between_validations = config.eval_every or steps_per_epoch
        self._seconds = config.max_seconds
        self._ranks = ranks
        self._began = began
        self._before = 0.0
        # As many steps as the time allows; all of them until it is known to be too short.
        self.fitting_steps = self.total_steps
        self._next_plan = (self._seconds or 0.0) / _PLANS
        self._is_time_up = False

    @property
    def elapsed(self) -> float:
        """Seconds of this training, preparation and earlier processes included."""
        return self._before + time.monotonic() - self._began

    def is_reached(self, step: int, train_seconds: float) -> bool:
        """Whether no step follows; counts the steps that fit into the time anew when it is due.

        Args:
            step: updates done.
            train_seconds: time spent in them.
        """
        if self._seconds is not None:
            self._watch_time(step, train_seconds, self._seconds)
        return self._is_time_up or step >= self.fitting_steps

    def _watch_time(self, step: int, train_seconds: float, limit: float) -> None:
        clocks = self._ranks.exchanged([self.elapsed, train_seconds])
        elapsed, train_seconds = (max(each) for each in zip(*clocks, strict=True))
        # The last validation and its checkpoint belong to the time that was given.
        left = limit - elapsed - 1.5 * self.validation_seconds
        if step and (elapsed >= self._next_plan or step >= self.fitting_steps):
            self._next_plan = elapsed + limit / _PLANS
            seconds = train_seconds / step
            seconds += self.validation_seconds / self.steps_between_validations
            self.fitting_steps = min(
                step + max(0, int(left / max(seconds, 1e-9))), self.total_steps
            )
        self._is_time_up = left < 0

    def seconds_left(self, step: int, train_seconds: float) -> float:
        """An estimate of the time until the training ends."""
        left = (self.total_steps - step) * train_seconds / max(1, step)
        if self._seconds is not None:
            left = min(left, self._seconds - self.elapsed)
        return max(0.0, left)

    def state_dict(self) -> dict[str, Any]:
        """The time that was spent."""
        return {"seconds": self.elapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._before = float(state["seconds"])
