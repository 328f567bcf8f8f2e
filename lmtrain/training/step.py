"""One step of truncated backpropagation through time, and the numbers that come of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.ranks import Ranks
from lmtrain.training.recording import Recorder, Work

# Guessing costs log V, less than 20 nats; beyond this the numbers mean nothing any more.
_ABSURD_NATS = 10_000.0


class Numbers(NamedTuple):
    """What came of a step."""

    loss: float
    """Mean nats a token."""
    grad_norm: float
    """Before clipping."""
    was_clipped: float
    """1 if the gradient was limited, else 0."""
    is_made: float
    """1 if the weights were updated; 0 if the loss or the gradient was out of all bounds."""


@dataclass(frozen=True)
class Step:
    """A step that the device was given and is asked about later.

    Args:
        number: counted from 1.
        length: T, its time steps.
        learning_rate: of its update.
        state: what the streams carry out of it.
        reading: its numbers.
    """

    number: int
    length: int
    learning_rate: float
    state: State
    reading: device.Reading

    def read(self) -> Numbers:
        """What came of it, when the device has done it."""
        return Numbers(*self.reading.values())


class Stepper:
    """Gives the device steps to do, without waiting for them.

    Args:
        model: the model.
        optimizer: the update.
        ranks: the processes that train together.
        tell: is told what a user should know of it.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        ranks: Ranks,
        *,
        tell: Callable[[str], None],
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._ranks = ranks
        self._loss = ranks.averaging(model)
        self._do: Work = self._work
        # An adaptive softmax asks the device how many words are rare.
        is_steady = model.adaptive_softmax is None and ranks.size == 1
        if is_steady and device.can_record(model.embedding.device):
            self._do = Recorder(self._work, model.chance, tell)

    def give(self, inputs: Tensor, targets: Tensor, before: State, share: float) -> Step:
        """Gives the device a step to do.

        Args:
            inputs: (T, own B).
            targets: (T, own B).
            before: the state that the streams carry into it.
            share: time steps of this window over those of most.
        """
        learning_rate = self._optimizer.learning_rate
        self._model.chance.renew(self._model.embedding.device)
        self._optimizer.begin(share)
        state, numbers = self._do(inputs, targets, before)
        reading = device.Reading(numbers)
        return Step(self._optimizer.step, len(inputs), learning_rate, state, reading)

    def _work(self, inputs: Tensor, targets: Tensor, before: State) -> tuple[State, Tensor]:
        """All that the device does of a step: the state after it, and its `Numbers`, (4,)."""
        loss = self._loss(inputs, targets, before)

        def is_sound() -> Tensor:
            return nats <= _ABSURD_NATS

        nats = self._ranks.averaged(loss.nats) / len(inputs)
        update = self._optimizer.make([loss.objective], is_sound)
        numbers = (nats, update.grad_norm, update.was_clipped, update.is_made)
        # Where nothing was updated, the next step goes on as if this one had not been.
        # Backpropagation is truncated here: the next step gets numbers without history.
        state = loss.state.detach().where(update.is_made, before)
        return state, torch.stack([each.double() for each in numbers])
