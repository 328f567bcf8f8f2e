"""One training step: forward, backward, apply; and the numbers that come of it.

Between steps backpropagation through time is truncated: the state goes on without its history.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch, Task
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.ranks import Ranks
from lmtrain.training.recording import Recorder, Work

# Guessing among V classes costs log V, less than 20 nats; a loss beyond this is meaningless.
_ABSURD_NATS = 10_000.0


class Numbers(NamedTuple):
    """What came of a step."""

    total_nats: float
    """Σ −log P of all processes, without penalties."""
    predictions: float
    """How many predictions all processes made."""
    grad_norm: float
    """Before clipping."""
    was_clipped: float
    """1 if the gradient was limited, else 0."""
    is_made: float
    """1 if the weights were updated; 0 if the loss or the gradient was out of bounds."""

    @property
    def loss(self) -> float:
        """Mean nats a prediction."""
        return self.total_nats / self.predictions


@dataclass(frozen=True)
class Step:
    """A step that the device was given and is asked about later.

    Args:
        number: counted from 1.
        learning_rate: of its update.
        reading: its numbers.
    """

    number: int
    learning_rate: float
    reading: device.Reading

    def collect(self) -> Numbers:
        """What came of it, when the device has done it."""
        return Numbers(*self.reading.values())


class Stepper:
    """Gives the device steps to do, without waiting for them, and carries the state between them.

    Args:
        task: whose loss is minimized.
        optimizer: the update.
        ranks: the processes that train together.
        tell: gets messages for the user.
    """

    def __init__(
        self, task: Task, optimizer: Optimizer, ranks: Ranks, tell: Callable[[str], None]
    ) -> None:
        self._task = task
        self._optimizer = optimizer
        self._ranks = ranks
        self._loss = ranks.loss_of(task)
        self._state: State | None = None
        self._rows = task.config.train.batch_size
        self._own = ranks.shard.of(self._rows)
        self._work: Work = self._computed
        if ranks.size == 1 and device.can_record(device.of(task.model)):
            self._work = Recorder(self._computed, task.generator, tell)

    def enqueue(self, batch: Batch) -> Step:
        """Gives the device a step to do."""
        learning_rate = self._optimizer.learning_rate
        self._task.generator.reseed(device.of(self._task.model))
        self._optimizer.begin(batch.length)
        state = self._state if batch.is_continued else None
        state = state or self._task.zero_state(self._own.stop - self._own.start)
        self._state, numbers = self._work(batch, state)
        return Step(self._optimizer.step, learning_rate, device.Reading(numbers))

    def state_dict(self) -> dict[str, Any]:
        """The carried state of the rows of all processes; nothing before the first step."""
        own = self._state.named() if self._state else {}
        everyone = self._ranks.gathered(own)
        return {name: torch.cat([each[name] for each in everyone]) for name in own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the rows of this process out of what `state_dict` gave."""
        zeros = self._task.zero_state(self._rows)
        if zeros is not None and (found := zeros.restored(state)) is not None:
            self._state = found.map(lambda part: part[self._own])

    def _computed(self, batch: Batch, state: State | None) -> tuple[State | None, Tensor]:
        """All that the device does of a step: the state after it, and its `Numbers`, (5,)."""
        loss = self._loss(batch, state)
        self._optimizer.backward(loss.objective)
        total, predictions = self._ranks.summed(torch.stack([loss.total, loss.predictions]))
        is_sound = loss.objective.isfinite() & (total <= _ABSURD_NATS * predictions)
        update = self._optimizer.apply(is_sound)
        after = None
        if loss.state is not None and state is not None:
            # Where nothing was updated, the next step goes on as if this one had not been.
            after = loss.state.detach().where(update.is_made, state)
        numbers = (total, predictions, update.grad_norm, update.was_clipped, update.is_made)
        return after, torch.stack([each.double() for each in numbers])
