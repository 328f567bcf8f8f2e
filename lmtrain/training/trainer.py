"""The loop: truncated backpropagation through time over contiguous streams of text."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from lmtrain import checkpoint
from lmtrain.errors import CheckpointError, DivergedError, RunInterruptedError
from lmtrain.evaluation import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.schema import TrainConfig
from lmtrain.text.batches import Batches
from lmtrain.training.average import Average
from lmtrain.training.monitor import Monitor
from lmtrain.training.optimizer import Optimizer

# Guessing costs log V, less than 20 nats; beyond this the numbers mean nothing any more.
_ABSURD_NATS = 10_000.0


@dataclass
class Progress:
    """Where training stands; all of it is in every checkpoint.

    Args:
        seconds: time spent before this process, preparation included.
        train_seconds: time spent in training steps.
        tokens: tokens trained on.
        best_loss: the lowest validation loss.
        best_step: where it was reached.
        last_loss: the newest validation loss.
        validations_since_best: validations after the best.
    """

    seconds: float = 0.0
    train_seconds: float = 0.0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    validations_since_best: int = 0


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
        validate: the validation of the model as it stands; None without validation text.
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
        monitor: Monitor,
        validate: Callable[[], Evaluation] | None,
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
        self.progress = Progress()
        self.state: State | None = None
        self._validate = validate
        self._write = write
        self._documents = documents
        self._began = began
        self._validation_seconds = 0.0
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
        with _StopSignals() as stop:
            while self.optimizer.step < self.total_steps and not self._time_is_up():
                self._step()
                step = self.optimizer.step
                if self._is_due(self.config.eval_every or self.batches.steps_per_epoch):
                    self._record_validation()
                    self.save()
                    if self._patience_is_over():
                        self.monitor.say(f"no better validation in {self.config.patience}: ended")
                        break
                elif self.config.save_every and step % self.config.save_every == 0:
                    self.save()
                if stop.received:
                    raise RunInterruptedError(
                        stop.received,
                        f"interrupted at step {step:,}; saved in {self.save()}",
                        f"go on: lmtrain train --resume {self.run}",
                    )
            if checkpoint.steps(self.run)[-1:] != [self.optimizer.step]:
                self._record_validation()
                self.save()

    def _step(self) -> None:
        """One step of truncated backpropagation.

        Raises:
            DivergedError: the loss or the gradient is out of all bounds; nothing was updated.
        """
        begin = time.monotonic()
        step = self.optimizer.step
        inputs, targets = (self._place(tokens) for tokens in self.batches[step])  # (T, B) each
        if self.batches.starts_epoch(step):
            self.state = None
        nats: list[float] = []
        learning_rate = self.optimizer.learning_rate
        share = len(targets) / self.batches.seq_len
        grad_norm = self.optimizer.update(self._losses(inputs, targets, nats), share)
        self.average.update()
        seconds = time.monotonic() - begin
        self.progress.tokens += targets.numel()
        self.progress.train_seconds += seconds
        self.monitor.record(
            step + 1,
            self.epoch(step),
            loss=math.fsum(nats),
            grad_norm=grad_norm,
            was_clipped=self.optimizer.was_clipped,
            learning_rate=learning_rate,
            tokens=targets.numel(),
            seconds=seconds,
            seconds_left=self._seconds_left(),
        )

    def _place(self, tokens: Any) -> Tensor:
        return torch.from_numpy(tokens).to(self.model.embedding.device)

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
        after = []
        for x, y, state in zip(*parts, states, strict=True):
            loss = self.model.loss(x, y, state)
            # Backpropagation is truncated here: the next step gets numbers without their history.
            after.append(loss.state.detach())
            nats.append(float(loss.nats) * y.shape[1] / targets.numel())
            if nats[-1] > _ABSURD_NATS:
                raise DivergedError(f"the loss is {nats[-1]:.6g} nats a token")
            yield loss.objective * (y.shape[1] / targets.shape[1])
        self.state = State.cat(after)

    def _is_due(self, interval: int) -> bool:
        step = self.optimizer.step
        return step % interval == 0 or step == self.total_steps

    def _record_validation(self) -> None:
        """Validates, shows a sample, and takes note of the best.

        Raises:
            DivergedError: the validation loss is not finite.
        """
        if self._validate is None:
            return
        step = self.optimizer.step
        with self.average.in_place():
            result = self._validate()
            if not math.isfinite(result.loss):
                raise DivergedError(f"the validation loss is {result.loss}")
            sample = self._write(step)
        self.model.train()
        self.average.validated(result.loss)
        self._validation_seconds = result.seconds
        progress = self.progress
        is_best = progress.best_loss is None or result.loss < progress.best_loss
        progress.last_loss = result.loss
        if is_best:
            progress.best_loss, progress.best_step = result.loss, step
            progress.validations_since_best = 0
        else:
            progress.validations_since_best += 1
        self.monitor.record_validation(step, self.epoch(step - 1), result, sample, is_best=is_best)

    def _patience_is_over(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.validations_since_best >= patience

    def _elapsed(self) -> float:
        return self.progress.seconds + time.monotonic() - self._began

    def _time_is_up(self) -> bool:
        # The last validation and its checkpoint belong to the time that was given.
        limit = self.config.max_seconds
        return limit is not None and self._elapsed() + 1.5 * self._validation_seconds > limit

    def _seconds_left(self) -> float:
        step_seconds = self.progress.train_seconds * self.batches.seq_len * self.batches.batch_size
        step_seconds /= max(1, self.progress.tokens)
        left = (self.total_steps - self.optimizer.step) * step_seconds
        if self.config.max_seconds is not None:
            left = min(left, self.config.max_seconds - self._elapsed())
        return max(0.0, left)

    def save(self) -> Path:
        """Writes a checkpoint of this step, then notes the best and removes old ones.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the disk or the permissions refused.
        """
        with self.average.in_place():
            return self._save()

    def _save(self) -> Path:
        weights = self.model.state_dict()
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise DivergedError(f"{name} is not finite")
        config, tokenizer, texts = self._documents
        progress = {**vars(self.progress), "seconds": self._elapsed()}
        path = checkpoint.save(
            self.run,
            self.optimizer.step,
            config=config,
            tokenizer=tokenizer,
            weights=weights,
            state_tensors={
                **self.optimizer.state_tensors(),
                **self.average.state_tensors(),
                **_named(self.state or State()),
                "chance": self.model.generator.get_state(),
            },
            state={
                "step": self.optimizer.step,
                "progress": progress,
                "average": self.average.state(),
                "window": self.monitor.state(),
                "texts": texts,
            },
        )
        if self.progress.best_loss is not None and self.progress.best_step is not None:
            best = self.progress.best_step
            checkpoint.write_best(self.run, best, "valid_loss", self.progress.best_loss)
        checkpoint.rotate(self.run, self.config.keep_checkpoints)
        return path

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Goes on from a checkpoint as if never stopped.

        Raises:
            CheckpointError: it does not fit the model.
        """
        saved.load_weights(self.model)
        tensors = saved.tensors("state.safetensors")
        try:
            self.optimizer.restore(int(saved.state["step"]), tensors)
            self.average.restore(saved.state["average"], tensors)
            self.progress = Progress(**saved.state["progress"])
            self.monitor.restore(saved.state["window"])
            self.model.generator.set_state(tensors["chance"])
            zeros = self.model.recurrent.zero_state(self.batches.batch_size)
            self.state = State(
                tuple(tensors[f"carried/{i}/{j}"].to(part.device) for j, part in enumerate(parts))
                for i, parts in enumerate(zeros)
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{saved.path} does not fit this training: {error!a}") from None


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """Updates from the first to the end that epochs or steps set."""
    steps = config.max_epochs * batches.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _named(state: State) -> dict[str, Tensor]:
    return {
        f"carried/{layer}/{part}": tensor
        for layer, parts in enumerate(state)
        for part, tensor in enumerate(parts)
    }


class _StopSignals:
    """Takes note of SIGINT and SIGTERM inside its block; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
