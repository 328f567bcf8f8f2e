"""The loop: truncated backpropagation through time over contiguous streams of text."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtrain import checkpoint, device, launched
from lmtrain.data.streams import Streams
from lmtrain.errors import DivergedError, RunInterruptedError
from lmtrain.evaluation import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.schema import TrainConfig
from lmtrain.training.average import Average
from lmtrain.training.monitor import Silent
from lmtrain.training.optimizer import Optimizer, Schedule
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks
from lmtrain.training.saver import Saver
from lmtrain.training.signals import Signals
from lmtrain.training.step import Numbers, Step, Stepper

_MOST_SKIPPED = 10
# How often within the time of a training the steps that fit into the rest are counted anew.
_PLANS = 20


class Trainer:
    """Trains a model until its steps, its time or its patience end.

    Args:
        run: the run folder.
        config: how long and how often.
        model: the model, on its device.
        batches: the tokens of each step.
        optimizer: the update.
        schedule: the learning rates of a training of so many steps.
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
        batches: Streams,
        optimizer: Optimizer,
        schedule: Callable[[int], Schedule],
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
        self._unread: list[Step] = []
        self._read_until = time.monotonic()
        # A device that runs ahead is asked about a step when it has the next one to do.
        self._most_unread = int(device.runs_ahead(model.embedding.device))
        self._signals = Signals(is_launched=launched.is_worker())
        self._rows = ranks.share(batches.batch_size)
        self._stepper = Stepper(model, optimizer, ranks, tell=monitor.say)
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
        self._schedule = schedule
        # As many steps as the time allows; all of them until it is known to be too short.
        self._fitting_steps = self.total_steps
        self._next_plan = (config.max_seconds or 0.0) / _PLANS

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
            saved = checkpoint.steps(self.run)
            raise DivergedError(
                f"training diverged at {str(error).splitlines()[0]}",
                "the last checkpoint is intact" if saved else "no checkpoint was saved before",
                f"try: a smaller --lr than {self.optimizer.learning_rate:g}",
            ) from error

    def _loop(self) -> None:
        with self._signals:
            self._catch_up()
            self._read_until = time.monotonic()
            while not self._is_over():
                self._step()
                if self._is_validation_due():
                    # Saved first: whatever ends the validation ends nothing else.
                    self.save()
                    self._record_validation()
                elif self.config.save_every and self.optimizer.step % self.config.save_every == 0:
                    self.save()
                self._obey_signals()
            self._read()
            self.monitor.finish()
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
            self._time_is_up()
            or self.optimizer.step >= self._fitting_steps
            or self._patience_is_over()
        )

    @property
    def is_cut_short(self) -> bool:
        """Whether time ended the training before its steps or its patience did."""
        return self.optimizer.step < self.total_steps and not self._patience_is_over()

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
            DivergedError: the loss or the gradient of a step is out of all bounds; that step
                updated nothing.
        """
        self._give()
        self._read(self._most_unread)

    def _give(self) -> None:
        """Gives the device a step to do, without waiting for it."""
        done, zeros = self.optimizer.step, self.model.recurrent.zero_state
        inputs, targets = (self._place(tokens) for tokens in self.batches[done])  # (T, own B) each
        before = None if self.batches.starts_epoch(done) else self.state
        before = self._reset(before or zeros(inputs.shape[1]))
        share = len(targets) / self.batches.seq_len
        step = self._stepper.give(inputs, targets, before, share)
        self.state = step.state
        self.average.update()
        self._unread.append(step)

    def _reset(self, state: State) -> State:
        """The state with zeros for the streams that begin anew (Melis, Dyer & Blunsom 2018)."""
        if not self.config.state_reset:
            return state
        # Drawn by the step for all streams: the same after a resume and in any number of processes.
        chance = np.random.default_rng([self.config.seed, self.optimizer.step, 1])
        is_kept = chance.random((1, self.batches.batch_size)) >= self.config.state_reset
        kept = self._place(is_kept).T
        return state.map(lambda part: part * kept)

    def _read(self, most_left: int = 0) -> None:
        """Records the steps that were given to the device, but so many of the last.

        Raises:
            DivergedError: the loss or the gradient of a step is out of all bounds.
        """
        while len(self._unread) > most_left:
            step = self._unread.pop(0)
            numbers = step.read()
            now = time.monotonic()
            seconds, self._read_until = now - self._read_until, now
            if numbers.is_made:
                self._take(step, numbers, seconds)
            else:
                self._take_skip(step, numbers)

    def _take(self, step: Step, numbers: Numbers, seconds: float) -> None:
        tokens = step.length * self.batches.batch_size
        self.progress.skipped_in_a_row = 0
        self.progress.tokens += tokens
        self.progress.train_seconds += seconds
        self.monitor.record(
            step.number,
            self.epoch(step.number - 1),
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            was_clipped=bool(numbers.was_clipped),
            learning_rate=step.learning_rate,
            tokens=tokens,
            seconds=seconds,
            seconds_left=self._seconds_left(),
        )

    def _take_skip(self, step: Step, numbers: Numbers) -> None:
        """Takes note of a step that updated nothing; the rate and the text go on as if it had.

        Raises:
            DivergedError: none may be left out, or too many were in a row.
        """
        at, progress = f"step {step.number:,}", self.progress
        reason = f"loss {numbers.loss:.6g} nats a token, gradient norm {numbers.grad_norm:.6g}"
        if self.config.on_nonfinite == "stop":
            raise DivergedError(f"{at}: {reason}")
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row >= _MOST_SKIPPED:
            raise DivergedError(f"{at}: {_MOST_SKIPPED} updates skipped in a row; {reason}")
        epoch = self.epoch(step.number - 1)
        self.monitor.record_skip(step.number, epoch, step.learning_rate, reason)

    def _place(self, tokens: Any) -> Tensor:
        own = torch.from_numpy(tokens[:, self._rows])
        place = self.model.embedding.device
        # From pinned memory a GPU takes it while this process goes on.
        return own.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else own

    def epoch(self, step: int) -> int:
        """The epoch, counted from 1, that a step, counted from 0, belongs to."""
        return step // self.batches.steps_per_epoch + 1

    def _is_validation_due(self) -> bool:
        step = self.optimizer.step
        return step % self._steps_between_validations == 0 or step == self.total_steps

    def _record_validation(self) -> None:
        """Validates, shows a sample, and takes note of the best.

        Raises:
            DivergedError: the validation loss is not finite.
            RunInterruptedError: a signal asked for the end meanwhile.
        """
        if self._validate is None:
            return
        self._read()
        step = self.optimizer.step
        with self.average.in_place():
            result = self._validate(self._obey_signals)
            if not math.isfinite(result.loss):
                raise DivergedError(f"step {step:,}: the validation loss is {result.loss}")
            sample = self._write(step) if self.ranks.is_first else ""
        self.model.train()
        self._read_until = time.monotonic()
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

    @property
    def _steps_between_validations(self) -> int:
        return self.config.eval_every or self.batches.steps_per_epoch

    def _patience_is_over(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    def _elapsed(self) -> float:
        return self.progress.seconds + time.monotonic() - self._began

    def _time_is_up(self) -> bool:
        limit, step = self.config.max_seconds, self.optimizer.step
        if limit is None:
            return False
        # All processes act on the clock of the one that is last.
        clocks = self.ranks.exchanged([self._elapsed(), self.progress.train_seconds])
        elapsed: float = max(clock[0] for clock in clocks)
        train_seconds: float = max(clock[1] for clock in clocks)
        # The last validation and its checkpoint belong to the time that was given.
        left = limit - elapsed - 1.5 * self._validation_seconds
        if step and (elapsed >= self._next_plan or step >= self._fitting_steps):
            self._next_plan = elapsed + limit / _PLANS
            seconds = train_seconds / step
            seconds += self._validation_seconds / self._steps_between_validations
            self._plan(step + max(0, int(left / max(seconds, 1e-9))))
        return left < 0

    def _plan(self, steps: int) -> None:
        """Lets the learning rate fall to its end with these steps, if there are not as many."""
        self._fitting_steps = min(steps, self.total_steps)
        self.optimizer.schedule = self._schedule(self._fitting_steps)
        self.monitor.expect(self._fitting_steps)

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
        self._read()
        place = self._saver.save(replace(self.progress, seconds=self._elapsed()), self.state)
        self._read_until = time.monotonic()
        return place

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint as if never stopped.

        Raises:
            CheckpointError: it does not fit the model.
        """
        self.progress, self.state = self._saver.restore(saved, self.batches.batch_size)


def total_steps(config: TrainConfig, batches: Streams) -> int:
    """Updates from the first to the end that epochs or steps set."""
    steps = config.max_epochs * batches.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)
