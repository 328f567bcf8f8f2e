"""One training step: forward, backward, update; and its results.

Backpropagation through time is truncated between steps: the carried state is detached.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch, Task
from lmtrain.training.cuda_graphs import GraphedStep, StepFunction
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.ranks import Ranks

# A uniform guess among V classes costs log V nats, less than 20; a higher loss is divergence.
_MAX_LOSS = 10_000.0


class StepResult(NamedTuple):
    """The result of a step over all processes."""

    total_nats: float
    """Σ −log P, without penalties."""
    predictions: float
    """Number of predictions in the total."""
    grad_norm: float
    """Gradient norm before clipping."""
    was_clipped: float
    """1 if the gradient was clipped, else 0."""
    was_applied: float
    """1 if the weights were updated; 0 if the loss or the gradient was out of bounds."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats per prediction."""
        return self.total_nats / self.predictions


@dataclass(frozen=True)
class Step:
    """A step that is enqueued on the device.

    Args:
        number: number of the update, from 1.
        learning_rate: its learning rate.
        values: the fields of its `StepResult`.
    """

    number: int
    learning_rate: float
    values: device.HostCopy

    def collect(self) -> StepResult:
        """The result of the step; waits until the device has computed it."""
        return StepResult(*self.values.tolist())


class Stepper:
    """Enqueues training steps on the device and carries the recurrent state between them.

    Args:
        task: provides the loss.
        optimizer: updates the weights.
        ranks: the training processes.
        report: called with messages for the user.
    """

    def __init__(
        self, task: Task, optimizer: Optimizer, ranks: Ranks, report: Callable[[str], None]
    ) -> None:
        self._task = task
        self._optimizer = optimizer
        self._ranks = ranks
        self._loss = ranks.loss_function(task)
        self._state: State | None = None
        self._batch_size = task.config.train.batch_size
        self._rows = ranks.shard.of(self._batch_size)
        self._step: StepFunction = self._run_step
        can_be_captured = all(
            getattr(module, "can_be_captured", True) for module in task.model.modules()
        )
        if ranks.size == 1 and can_be_captured and device.supports_graphs(device.of(task.model)):
            self._step = GraphedStep(self._run_step, task.generator, report)

    def enqueue(self, batch: Batch) -> Step:
        """Starts a step on the device, without waiting for its result."""
        learning_rate = self._optimizer.learning_rate
        self._task.generator.reseed(device.of(self._task.model))
        self._optimizer.start_step(batch.length)
        state = self._state if batch.is_continued else None
        state = state or self._task.zero_state(self._rows.stop - self._rows.start)
        self._state, values = self._step(batch, state)
        return Step(self._optimizer.step, learning_rate, device.HostCopy(values))

    def state_dict(self) -> dict[str, Any]:
        """The carried state of all rows, over all processes; empty before the first step."""
        tensors = self._state.named() if self._state else {}
        by_rank = self._ranks.all_gather_tensors(tensors)
        return {name: torch.cat([gathered[name] for gathered in by_rank]) for name in tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the rows of this process from the result of `state_dict`."""
        zeros = self._task.zero_state(self._batch_size)
        if zeros is not None and (restored := zeros.restored(state)) is not None:
            self._state = restored.map(lambda part: part[self._rows])

    def _run_step(self, batch: Batch, state: State | None) -> tuple[State | None, Tensor]:
        """The state after a step, and the fields of its `StepResult`, (5,), on the device."""
        loss = self._loss(batch, state)
        self._optimizer.backward(loss.objective)
        total, predictions = self._ranks.all_reduce(torch.stack([loss.total, loss.predictions]))
        is_loss_valid = loss.objective.isfinite() & (total <= _MAX_LOSS * predictions)
        update = self._optimizer.apply(is_loss_valid)
        after = None
        if loss.state is not None and state is not None:
            # A step without an update does not change the state either.
            after = loss.state.detach().where(update.was_applied, state)
        values = (total, predictions, update.grad_norm, update.was_clipped, update.was_applied)
        return after, torch.stack([value.double() for value in values])
