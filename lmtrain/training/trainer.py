"""The loop: truncated backpropagation through time over contiguous streams of text."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain import checkpoint
from lmtrain.errors import DivergedError, RunInterruptedError
from lmtrain.evaluation import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.schema import TrainConfig
from lmtrain.text.batches import Batches
from lmtrain.training import ranks as processes
from lmtrain.training.average import Average
from lmtrain.training.monitor import Silent
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks
from lmtrain.training.saver import Saver
from lmtrain.training.signals import Signals

# Guessing costs log V, less than 20 nats; beyond this the numbers mean nothing any more.
_ABSURD_NATS = 10_000.0
_MOST_SKIPPED = 10


class Trainer:
    """Trains a model until its steps, its time or its patience end.

    Args:
        run: the run folder.
        config: how long and how often.
        model: the model, on its device.
        batches: the tokens of each step.
        optimizer: the update.
        average: the weights that are validated and kept.
        monitor: the record.
        ranks: the processes that train together.
        validate: the validation of the model as it stands, which calls what it is given now and
            then; None without validation text.
        write: a sample of the model's writing for the step.
        documents: config.toml, tokenizer.json and what a resumed run needs to find its text.
        began: `time.monotonic()` when this process began to prepare.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        *,
        model: LanguageModel,
        batches: Batches,
        optimizer: Optimizer,
        average: Average,
        monitor: Silent,
        ranks: Ranks,
        validate: Callable[[Callable[[], None]], Evaluation] | None,
        write: Callable[[int], str],
        documents: tuple[str, str, Mapping[str, Any]],
        began: float,
    ) -> None:
        self.run = run
        self.config = config
        self.model = model
        self.batches = batches
        self.optimizer = optimizer
        self.average = average
        self.monitor = monitor
        self.ranks = ranks
        self.progress = Progress()
        self.state: State | None = None
        self._validate = validate
        self._write = write
        self._began = began
        self._validation_seconds = 0.0
        self._validated_step: int | None = None
        self._signals = Signals(is_launched=processes.is_worker())
        self._rows = ranks.share(batches.batch_size)
        self._loss = ranks.averaging(model)
        self._saver = Saver(
            run,
            config.keep_checkpoints,
            model=model,
            optimizer=optimizer,
            average=average,
            monitor=monitor,
            ranks=ranks,
            documents=documents,
        )
        self.total_steps = total_steps(config, batches)

    def train(self) -> None:
        """Runs the loop to its end.

        Raises:
            DivergedError: a loss, gradient or weight was not finite.
            RunInterruptedError: a signal asked for the end; a checkpoint was saved.
            MachineError: a checkpoint could not be written.
        """
        self.model.train()
        try:
            self._loop()
        except DivergedError as error:
            step = self.optimizer.step + 1
            saved = checkpoint.steps(self.run)
            raise DivergedError(
                f"training diverged at step {step:,}: {str(error).splitlines()[0]}",
                "the last checkpoint is intact" if saved else "no checkpoint was saved before",
                f"try: a smaller --lr than {self.optimizer.learning_rate:g}",
            ) from error

    def _loop(self) -> None:
        with self._signals:
            self._catch_up()
            while not self._is_over():
                self._step()
                if self._is_validation_due():
                    # Saved first: whatever ends the validation ends nothing else.
                    self.save()
                    self._record_validation()
                elif self.config.save_every and self.optimizer.step % self.config.save_every == 0:
                    self.save()
                self._obey_signals()
            self.save()
            if self._validated_step != self.optimizer.step:
                self._record_validation()

    def _catch_up(self) -> None:
        """Makes up for the validation that the checkpoint was saved before, if one was due."""
        step = self.optimizer.step
        loss = self.ranks.agreed(lambda: self.monitor.validation_at(step))
        if loss is not None:
            self._take_validation(loss)
        elif step and self._is_validation_due():
            self._record_validation()

    def _is_over(self) -> bool:
        return (
            self.optimizer.step >= self.total_steps
            or self._time_is_up()
            or self._patience_is_over()
        )

    def _obey_signals(self) -> None:
        """Does what signals asked for; the step's updates are done.

        Raises:
            RunInterruptedError: the end was asked for; a checkpoint was saved.
        """
        step, signals = self.optimizer.step, self._signals
        asked = self.ranks.exchanged([signals.ending or 0, signals.wants_checkpoint])
        # A signal to one of several processes is obeyed by all, after the same step.
        ending, wants_checkpoint = (int(max(each)) for each in zip(*asked, strict=True))
        if wants_checkpoint:
            signals.wants_checkpoint = False
            self.monitor.say(f"step {step:,}: saved in {self.save()}")
        if ending:
            raise RunInterruptedError(
                ending,
                f"interrupted at step {step:,}; saved in {self.save()}",
                f"go on: lmtrain train --resume {self.run}",
            )

    def _step(self) -> None:
        """One step of truncated backpropagation.

        Raises:
            DivergedError: the loss or the gradient is out of all bounds; nothing was updated.
        """
        before = self.state
        try:
            self._update()
            self.progress.skipped_in_a_row = 0
        except DivergedError as error:
            if self.config.on_nonfinite == "stop":
                raise
            self._skip(error, before)

    def _skip(self, error: DivergedError, before: State | None) -> None:
        """Leaves a batch out; the learning rate and the text go on as if it had been taken.

        Raises:
            DivergedError: too many were left out in a row.
        """
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        step = self.optimizer.step + 1
        if progress.skipped_in_a_row >= _MOST_SKIPPED:
            raise DivergedError(f"{_MOST_SKIPPED} updates skipped in a row; {error}") from error
        self.state = before
        learning_rate = self.optimizer.learning_rate
        self.optimizer.step = step
        self.monitor.record_skip(step, self.epoch(step - 1), learning_rate, str(error))

    def _update(self) -> None:
        begin = time.monotonic()
        step = self.optimizer.step
        inputs, targets = (self._place(tokens) for tokens in self.batches[step])  # (T, own B) each
        tokens = len(targets) * self.batches.batch_size
        if self.batches.starts_epoch(step):
            self.state = None
        nats: list[float] = []
        learning_rate = self.optimizer.learning_rate
        share = len(targets) / self.batches.seq_len
        grad_norm = self.optimizer.update(self._losses(inputs, targets, nats), share)
        self.average.update()
        seconds = time.monotonic() - begin
        self.progress.tokens += tokens
        self.progress.train_seconds += seconds
        self.monitor.record(
            step + 1,
            self.epoch(step),
            loss=math.fsum(nats),
            grad_norm=grad_norm,
            was_clipped=self.optimizer.was_clipped,
            learning_rate=learning_rate,
            tokens=tokens,
            seconds=seconds,
            seconds_left=self._seconds_left(),
        )

    def _place(self, tokens: Any) -> Tensor:
        own = torch.from_numpy(tokens[:, self._rows])
        place = self.model.embedding.device
        # From pinned memory a GPU takes it while this process goes on.
        return own.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else own

    def epoch(self, step: int) -> int:
        """The epoch, counted from 1, that a step, counted from 0, belongs to."""
        return step // self.batches.steps_per_epoch + 1

    def _losses(self, inputs: Tensor, targets: Tensor, nats: list[float]) -> Iterator[Tensor]:
        """What to differentiate, one group of streams after the other; carries the state on.

        Raises:
            DivergedError: a loss is out of all bounds.
        """
        groups = self.config.accumulate
        parts = inputs.chunk(groups, dim=1), targets.chunk(groups, dim=1)
        states = self.state.chunk(groups) if self.state else [None] * len(parts[0])
        after: list[State] = []
        for x, y, state in zip(*parts, states, strict=True):
            is_last = len(after) == len(states) - 1
            # Until the last group, no process waits for another's gradients.
            with contextlib.nullcontext() if is_last else self._loss.apart():
                loss = self._loss(x, y, state)
                # Backpropagation is truncated here: the next step gets numbers without history.
                after.append(loss.state.detach())
                costs = self.ranks.exchanged([float(loss.nats)])
                cost = math.fsum(own for (own,) in costs) / len(costs)
                nats.append(cost * y.shape[1] / targets.numel())
                if not nats[-1] <= _ABSURD_NATS:
                    raise DivergedError(f"the loss is {nats[-1]:.6g} nats a token")
                yield loss.objective * (y.shape[1] / targets.shape[1])
        self.state = State.cat(after)

    def _is_validation_due(self) -> bool:
        step = self.optimizer.step
        interval = self.config.eval_every or self.batches.steps_per_epoch
        return step % interval == 0 or step == self.total_steps

    def _record_validation(self) -> None:
        """Validates, shows a sample, and takes note of the best.

        Raises:
            DivergedError: the validation loss is not finite.
            RunInterruptedError: a signal asked for the end meanwhile.
        """
        if self._validate is None:
            return
        step = self.optimizer.step
        with self.average.in_place():
            result = self._validate(self._obey_signals)
            if not math.isfinite(result.loss):
                raise DivergedError(f"the validation loss is {result.loss}")
            sample = self._write(step) if self.ranks.is_first else ""
        self.model.train()
        self._validation_seconds = result.seconds
        best = self.progress.best_loss
        is_best = best is None or result.loss < best
        self.monitor.record_validation(step, self.epoch(step - 1), result, sample, is_best=is_best)
        self._take_validation(result.loss)

    def _take_validation(self, loss: float) -> None:
        """Takes note of a validation of this step that stands in the metrics."""
        step, progress = self.optimizer.step, self.progress
        self._validated_step = step
        self.average.validated(loss)
        progress.last_loss = loss
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, step
            progress.validations_since_best = 0
            self.ranks.agreed(lambda: checkpoint.write_best(self.run, step, "valid_loss", loss))
        else:
            progress.validations_since_best += 1
        if self._patience_is_over():
            self.monitor.say(f"no better validation in {self.config.patience}: ended")

    def _patience_is_over(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    def _elapsed(self) -> float:
        return self.progress.seconds + time.monotonic() - self._began

    def _time_is_up(self) -> bool:
        # The last validation and its checkpoint belong to the time that was given.
        limit = self.config.max_seconds
        if limit is None:
            return False
        is_up = self._elapsed() + 1.5 * self._validation_seconds > limit
        return any(is_over for (is_over,) in self.ranks.exchanged([is_up]))

    def _seconds_left(self) -> float:
        step_seconds = self.progress.train_seconds * self.batches.seq_len * self.batches.batch_size
        step_seconds /= max(1, self.progress.tokens)
        left = (self.total_steps - self.optimizer.step) * step_seconds
        if self.config.max_seconds is not None:
            left = min(left, self.config.max_seconds - self._elapsed())
        return max(0.0, left)

    def save(self) -> Path:
        """Writes a checkpoint of this step, if there is none; returns its folder.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the disk or the permissions refused.
        """
        return self._saver.save(replace(self.progress, seconds=self._elapsed()), self.state)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint as if never stopped.

        Raises:
            CheckpointError: it does not fit the model.
        """
        self.progress, self.state = self._saver.restore(saved, self.batches.batch_size)


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """Updates from the first to the end that epochs or steps set."""
    steps = config.max_epochs * batches.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)
