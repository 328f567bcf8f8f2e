"""The training loop, independent of the task."""

import math
import time
from pathlib import Path

from lmtrain import checkpoint, device, torchrun
from lmtrain.errors import CheckpointError, DivergedError, RunInterruptedError
from lmtrain.schema import TrainConfig
from lmtrain.tasks.base import Metrics, Task
from lmtrain.training.average import WeightAverage
from lmtrain.training.checkpoints import Checkpoints, GeneratorStates, Stateful
from lmtrain.training.limits import Limits
from lmtrain.training.logger import LoggedUpdate, NullLogger
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks
from lmtrain.training.signals import Signals
from lmtrain.training.step import Step, Stepper, StepResult

_MAX_SKIPPED_IN_A_ROW = 10


class Trainer:
    """Trains the model of a task until its steps, its time or its patience are used up.

    Args:
        task: what to train.
        optimizer: updates the weights.
        average: the weights that are validated and saved.
        limits: when training ends.
        checkpoints: saves and restores the training.
        log: logs updates and validations.
        ranks: the training processes.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        average: WeightAverage,
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
        self.stepper = Stepper(task, optimizer, ranks, log.info)
        # The training state in a checkpoint, by the names in state.json.
        self.parts: dict[str, Stateful] = {
            "optimizer": optimizer,
            "average": average,
            "carried": self.stepper,
            "generators": GeneratorStates(task.generator, ranks),
            "progress": self.progress,
            "limits": limits,
            "log": log,
        }
        self._config: TrainConfig = task.config.train
        self._signals = Signals(is_worker=torchrun.is_worker())
        self._validated_step: int | None = None
        self._pending: list[Step] = []
        self._last_collect_time = time.monotonic()
        # On an asynchronous device, a step is collected after the next one is enqueued.
        self._max_pending = int(device.is_asynchronous(device.of(task.model)))

    def train(self) -> None:
        """Trains to the end.

        Raises:
            DivergedError: a loss, gradient or weight is out of bounds.
            RunInterruptedError: a signal ended the training; a checkpoint was saved.
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
                "the last checkpoint is intact" if saved else "no checkpoint was saved",
                f"try: a smaller --lr than {self.task.config.optimizer.learning_rate:g}",
            ) from error

    def _loop(self) -> None:
        self._run_missed_validation()
        self._last_collect_time = time.monotonic()
        while not self._is_over():
            self._step()
            self._log_gradients()
            if self._is_validation_due():
                # Saved before the validation, which may take long and be interrupted.
                self.save()
                self._validate()
            elif self._config.save_every and self.optimizer.step % self._config.save_every == 0:
                self.save()
            self._handle_signals()
        self._collect()
        self.log.finish()
        self.save()
        if self._validated_step != self.optimizer.step:
            self._validate()
        # A signal during the last validation ends the trials of a sweep too.
        self._handle_signals()

    def _step(self) -> None:
        """Enqueues a training step and logs the steps that are done.

        Raises:
            DivergedError: the loss or the gradient of a step is out of bounds; the step was not
                applied.
        """
        self._pending.append(self.stepper.enqueue(self.task.batch(self.optimizer.step)))
        self.average.update()
        self._collect(self._max_pending)

    def _log_gradients(self) -> None:
        """Logs gradient norms over time lags when they are due."""
        step, every = self.optimizer.step, self._config.log_gradients
        if not every or step % every:
            return
        self._collect()
        if self.ranks.is_rank_zero:
            self.log.log_gradients(step, self._epoch(step), self.task.gradient_figures())
        self._last_collect_time = time.monotonic()

    def _collect(self, max_pending: int = 0) -> None:
        """Waits for the enqueued steps and logs them, except the last `max_pending`.

        Raises:
            DivergedError: the loss or the gradient of a step is out of bounds.
        """
        while len(self._pending) > max_pending:
            step = self._pending.pop(0)
            result = step.collect()
            now = time.monotonic()
            seconds, self._last_collect_time = now - self._last_collect_time, now
            if result.was_applied:
                self._log_update(step, result, seconds)
            else:
                self._skip(step, result)

    def _log_update(self, step: Step, result: StepResult, seconds: float) -> None:
        progress = self.progress
        progress.skipped_in_a_row = 0
        progress.count += round(result.predictions)
        progress.train_seconds += seconds
        self.log.log_update(
            LoggedUpdate(
                step.number,
                self._epoch(step.number),
                result,
                step.learning_rate,
                seconds,
                self.limits.seconds_left(step.number, progress.train_seconds),
            )
        )

    def _skip(self, step: Step, result: StepResult) -> None:
        """Counts and logs a step that was not applied.

        Raises:
            DivergedError: no step may be skipped, or too many were in a row.
        """
        position, progress = f"step {step.number:,}", self.progress
        reason = f"loss {result.loss:.6g} nats, gradient norm {result.grad_norm:.6g}"
        if self._config.on_nonfinite == "stop":
            raise DivergedError(f"{position}: {reason}")
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"{position}: {_MAX_SKIPPED_IN_A_ROW} updates skipped in a row; {reason}"
            )
        self.log.log_skip(step.number, self._epoch(step.number), step.learning_rate, reason)

    def _epoch(self, step: int) -> int:
        """The epoch of a step; both are counted from 1."""
        return (step - 1) // self.task.steps_per_epoch + 1

    def _is_over(self) -> bool:
        planned_steps = self.limits.planned_steps
        is_reached = self.limits.is_reached(self.optimizer.step, self.progress.train_seconds)
        if self.limits.planned_steps != planned_steps:
            self.optimizer.set_total_steps(self.limits.planned_steps)
            self.log.set_total_steps(self.limits.planned_steps)
        return is_reached or self._is_patience_exhausted()

    def _is_patience_exhausted(self) -> bool:
        patience = self._config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    @property
    def is_out_of_time(self) -> bool:
        """Whether `max_seconds` ended the training before its steps or its patience."""
        return self.optimizer.step < self.limits.total_steps and not self._is_patience_exhausted()

    def _handle_signals(self) -> None:
        """Saves or ends as signals requested; called between steps and validation batches.

        Raises:
            RunInterruptedError: a signal requested the end; a checkpoint was saved.
        """
        step, signals = self.optimizer.step, self._signals
        requests = self.ranks.all_gather(
            [signals.termination_signal or 0, signals.checkpoint_requested]
        )
        # All processes act on a signal to any of them, after the same step.
        termination_signal, checkpoint_requested = (
            int(max(column)) for column in zip(*requests, strict=True)
        )
        if checkpoint_requested:
            signals.checkpoint_requested = False
            self.log.info(f"step {step:,}: saved in {self.save()}")
        if termination_signal:
            raise RunInterruptedError(
                termination_signal,
                f"interrupted at step {step:,}; saved in {self.save()}",
                f"resume with: lmtrain train --resume {self.checkpoints.run}",
            )

    def _is_validation_due(self) -> bool:
        step = self.optimizer.step
        is_last = step == self.limits.total_steps
        return is_last or step % self.limits.steps_between_validations == 0

    def _validate(self) -> None:
        """Validates, logs the result with a preview, and updates the best checkpoint.

        Raises:
            DivergedError: the validation loss is not finite.
            RunInterruptedError: a signal requested the end meanwhile.
        """
        self._collect()
        start, step = time.monotonic(), self.optimizer.step
        with self.average.swapped_in():
            shard = self.task.evaluate("valid", self._handle_signals)
            if shard is None:
                return
            metrics: Metrics = shard.summed(self.ranks.all_gather(shard.sums))
            if not math.isfinite(metrics.loss):
                raise DivergedError(f"step {step:,}: the validation loss is {metrics.loss}")
            seconds = time.monotonic() - start
            preview = self.task.preview(step) if self.ranks.is_rank_zero else ""
        self.task.model.train()
        all_seconds = self.ranks.all_gather([seconds])
        self.limits.validation_seconds = max(value for (value,) in all_seconds)
        is_best = self._is_better(metrics.figures)
        self.log.log_validation(step, self._epoch(step), metrics, preview, is_best=is_best)
        self._use_validation(metrics.figures)
        self._last_collect_time = time.monotonic()

    def _run_missed_validation(self) -> None:
        """Uses or repeats the validation that was due when the checkpoint was saved."""
        step = self.optimizer.step
        logged = self.ranks.run_on_rank_zero(lambda: self.log.validation_at(step))
        if logged is not None:
            self._use_validation(dict(logged))
        elif step and self._is_validation_due():
            self._validate()

    def _is_better(self, figures: dict[str, float | None]) -> bool:
        """Whether the metrics of a validation are better than the best so far."""
        best, rank = self.progress.best, self.task.metrics.sort_key
        return best is None or rank(figures) < rank(best)

    def _use_validation(self, figures: dict[str, float | None]) -> None:
        """Updates average, best checkpoint and patience from the validation of this step."""
        step, progress, metrics = self.optimizer.step, self.progress, self.task.metrics
        self._validated_step = step
        self.average.record_validation(metrics.cost(figures))
        if self._is_better(figures):
            progress.best = figures
            progress.best_step = step
            progress.validations_since_best = 0
            self._write_best()
        else:
            progress.validations_since_best += 1
        if self._is_patience_exhausted():
            self.log.info(f"training ends: no better validation in {self._config.patience}")

    def _write_best(self) -> None:
        """Writes which checkpoint is the best so far, if there is one."""
        progress, headline = self.progress, self.task.metrics.headline
        if progress.best_step is not None and progress.best is not None:
            value = progress.best.get(headline)
            self.checkpoints.write_best(progress.best_step, headline, value)

    def save(self) -> Path:
        """Writes a checkpoint of this step, unless it exists; returns its folder.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the checkpoint could not be written.
        """
        self._collect()
        path = self.checkpoints.save(
            self.optimizer.step, self.average, self.task, self.parts, self.log
        )
        self._last_collect_time = time.monotonic()
        return path

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Restores the state of a checkpoint, so that training continues from it.

        Raises:
            CheckpointError: the checkpoint does not match this training.
        """
        self.checkpoints.restore(saved, self.task, self.parts)
        if self.optimizer.step != saved.state["step"]:
            raise CheckpointError(
                f"{saved.path} does not match this training: its optimizer made "
                f"{self.optimizer.step} updates"
            )
        # best.json may be lost, or name a checkpoint after this one that was deleted.
        self._write_best()
