"""The training loop, whatever the task."""

import math
import time
from pathlib import Path

from lmtrain import checkpoint, device, launched
from lmtrain.errors import DivergedError, RunInterruptedError
from lmtrain.schema import TrainConfig
from lmtrain.tasks.base import Metrics, Task
from lmtrain.training.average import Average
from lmtrain.training.checkpoints import Checkpoints, Generators, Part
from lmtrain.training.limits import Limits
from lmtrain.training.logger import Made, NullLogger
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks
from lmtrain.training.signals import Signals
from lmtrain.training.step import Numbers, Step, Stepper

_MOST_SKIPPED = 10


class Trainer:
    """Trains a task's model until its steps, its time or its patience end.

    Args:
        task: what is trained.
        optimizer: the update.
        average: the weights that are validated and kept.
        limits: when training ends.
        checkpoints: where and how it is saved.
        log: the record.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        average: Average,
        limits: Limits,
        checkpoints: Checkpoints,
        log: NullLogger,
        ranks: Ranks,
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.average = average
        self.limits = limits
        self.checkpoints = checkpoints
        self.log = log
        self.ranks = ranks
        self.progress = Progress()
        self.stepper = Stepper(task, optimizer, ranks, log.say)
        # All that a checkpoint holds beside the model.
        self.parts: dict[str, Part] = {
            "optimizer": optimizer,
            "average": average,
            "carried": self.stepper,
            "generators": Generators(task.generator, ranks),
            "progress": self.progress,
            "limits": limits,
            "log": log,
        }
        self._config: TrainConfig = task.config.train
        self._signals = Signals(is_launched=launched.is_worker())
        self._validated_step: int | None = None
        self._queue: list[Step] = []
        self._collected_until = time.monotonic()
        # A device that runs ahead is asked about a step when it has the next one to do.
        self._most_queued = int(device.runs_ahead(device.of(task.model)))

    def train(self) -> None:
        """Runs the loop to its end.

        Raises:
            DivergedError: a loss, gradient or weight was not finite.
            RunInterruptedError: a signal asked for the end; a checkpoint was saved.
            MachineError: a checkpoint could not be written.
        """
        self.task.model.train()
        try:
            with self._signals:
                self._loop()
        except DivergedError as error:
            saved = checkpoint.steps(self.checkpoints.run)
            raise DivergedError(
                f"training diverged at {str(error).splitlines()[0]}",
                "the last checkpoint is intact" if saved else "no checkpoint was saved before",
                f"try: a smaller --lr than {self.optimizer.learning_rate:g}",
            ) from error

    def _loop(self) -> None:
        self._make_up_validation()
        self._collected_until = time.monotonic()
        while not self._is_over():
            self._step()
            self._measure_gradients()
            if self._is_validation_due():
                # Saved first: whatever ends the validation ends nothing else.
                self.save()
                self._validate()
            elif self._config.save_every and self.optimizer.step % self._config.save_every == 0:
                self.save()
            self._obey_signals()
        self._collect()
        self.log.finish()
        self.save()
        if self._validated_step != self.optimizer.step:
            self._validate()

    def _step(self) -> None:
        """One training step.

        Raises:
            DivergedError: the loss or the gradient of a step is out of bounds; that step updated
                nothing.
        """
        self._queue.append(self.stepper.enqueue(self.task.batch(self.optimizer.step)))
        self.average.update()
        self._collect(self._most_queued)

    def _measure_gradients(self) -> None:
        """Records how the gradient travels through time, where that is due."""
        step, every = self.optimizer.step, self._config.log_gradients
        if not every or step % every:
            return
        self._collect()
        if self.ranks.is_first:
            self.log.record_gradients(step, self._epoch(step), self.task.gradient_figures())
        self._collected_until = time.monotonic()

    def _collect(self, most_left: int = 0) -> None:
        """Records the steps that the device has done, but so many of the last.

        Raises:
            DivergedError: the loss or the gradient of a step is out of bounds.
        """
        while len(self._queue) > most_left:
            step = self._queue.pop(0)
            numbers = step.collect()
            now = time.monotonic()
            seconds, self._collected_until = now - self._collected_until, now
            if numbers.is_made:
                self._record(step, numbers, seconds)
            else:
                self._record_skip(step, numbers)

    def _record(self, step: Step, numbers: Numbers, seconds: float) -> None:
        progress = self.progress
        progress.skipped_in_a_row = 0
        progress.count += round(numbers.predictions)
        progress.train_seconds += seconds
        self.log.record(
            Made(
                step.number,
                self._epoch(step.number),
                numbers,
                step.learning_rate,
                seconds,
                self.limits.seconds_left(step.number, progress.train_seconds),
            )
        )

    def _record_skip(self, step: Step, numbers: Numbers) -> None:
        """Takes note of a step that updated nothing; the rate and the data go on as if it had.

        Raises:
            DivergedError: none may be left out, or too many were in a row.
        """
        at, progress = f"step {step.number:,}", self.progress
        reason = f"loss {numbers.loss:.6g} nats, gradient norm {numbers.grad_norm:.6g}"
        if self._config.on_nonfinite == "stop":
            raise DivergedError(f"{at}: {reason}")
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= _MOST_SKIPPED:
            raise DivergedError(f"{at}: {_MOST_SKIPPED} updates skipped in a row; {reason}")
        self.log.record_skip(step.number, self._epoch(step.number), step.learning_rate, reason)

    def _epoch(self, step: int) -> int:
        """The epoch that a step belongs to; both are counted from 1."""
        return (step - 1) // self.task.steps_per_epoch + 1

    def _is_over(self) -> bool:
        fitting_steps = self.limits.fitting_steps
        is_reached = self.limits.is_reached(self.optimizer.step, self.progress.train_seconds)
        if self.limits.fitting_steps != fitting_steps:
            self.optimizer.expect(self.limits.fitting_steps)
            self.log.expect(self.limits.fitting_steps)
        return is_reached or self._is_patience_over()

    def _is_patience_over(self) -> bool:
        patience = self._config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    @property
    def is_cut_short(self) -> bool:
        """Whether time ended the training before its steps or its patience did."""
        return self.optimizer.step < self.limits.total_steps and not self._is_patience_over()

    def _obey_signals(self) -> None:
        """Does what signals asked for, between two steps or two batches of a validation.

        Raises:
            RunInterruptedError: the end was asked for; a checkpoint was saved.
        """
        step, signals = self.optimizer.step, self._signals
        everyone = self.ranks.exchanged([signals.ending or 0, signals.wants_checkpoint])
        # A signal to one of several processes is obeyed by all, after the same step.
        ending, wants_checkpoint = (int(max(each)) for each in zip(*everyone, strict=True))
        if wants_checkpoint:
            signals.wants_checkpoint = False
            self.log.say(f"step {step:,}: saved in {self.save()}")
        if ending:
            raise RunInterruptedError(
                ending,
                f"interrupted at step {step:,}; saved in {self.save()}",
                f"go on: lmtrain train --resume {self.checkpoints.run}",
            )

    def _is_validation_due(self) -> bool:
        step = self.optimizer.step
        is_last = step == self.limits.total_steps
        return is_last or step % self.limits.steps_between_validations == 0

    def _validate(self) -> None:
        """Validates, shows a preview, and takes note of the best.

        Raises:
            DivergedError: the validation loss is not finite.
            RunInterruptedError: a signal asked for the end meanwhile.
        """
        self._collect()
        began, step = time.monotonic(), self.optimizer.step
        with self.average.in_place():
            shard = self.task.evaluate("valid", self._obey_signals)
            if shard is None:
                return
            metrics: Metrics = shard.summed(self.ranks.exchanged(shard.sums))
            if not math.isfinite(metrics.loss):
                raise DivergedError(f"step {step:,}: the validation loss is {metrics.loss}")
            seconds = time.monotonic() - began
            preview = self.task.preview(step) if self.ranks.is_first else ""
        self.task.model.train()
        self.limits.validation_seconds = max(max(each) for each in self.ranks.exchanged([seconds]))
        is_best = self._is_better(metrics.figures)
        self.log.record_validation(step, self._epoch(step), metrics, preview, is_best=is_best)
        self._take_validation(metrics.figures)
        self._collected_until = time.monotonic()

    def _make_up_validation(self) -> None:
        """Makes up for the validation that the checkpoint was saved before, if one was due."""
        step = self.optimizer.step
        recorded = self.ranks.agreed(lambda: self.log.validation_at(step))
        if recorded is not None:
            self._take_validation(dict(recorded))
        elif step and self._is_validation_due():
            self._validate()

    def _is_better(self, figures: dict[str, float | None]) -> bool:
        """Whether a validation is better than the best one so far."""
        best, rank = self.progress.best, self.task.metrics.rank
        return best is None or rank(figures) < rank(best)

    def _take_validation(self, figures: dict[str, float | None]) -> None:
        """Takes note of a validation of this step that stands in the metrics."""
        step, progress, metrics = self.optimizer.step, self.progress, self.task.metrics
        self._validated_step = step
        self.average.validated(metrics.cost(figures))
        if self._is_better(figures):
            progress.best = figures
            progress.best_step = step
            progress.validations_since_best = 0
            self.checkpoints.write_best(step, metrics.headline, figures.get(metrics.headline))
        else:
            progress.validations_since_best += 1
        if self._is_patience_over():
            self.log.say(f"no better validation in {self._config.patience}: ended")

    def save(self) -> Path:
        """Writes a checkpoint of this step, if there is none; returns its folder.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the disk or the permissions refused.
        """
        self._collect()
        path = self.checkpoints.save(
            self.optimizer.step, self.average, self.task, self.parts, self.log
        )
        self._collected_until = time.monotonic()
        return path

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint as if never stopped.

        Raises:
            CheckpointError: it does not fit the model.
        """
        self.checkpoints.restore(saved, self.task, self.parts)
