"""The log of a run: progress bar, metrics.jsonl, TensorBoard events.

The events are written from the lines of metrics.jsonl. They are rewritten when a run is resumed, so
that no step appears twice.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from tqdm import tqdm

from lmtrain import files, screen, untrusted
from lmtrain.errors import MachineError
from lmtrain.tasks.base import Metrics, Task
from lmtrain.training.step import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_METRICS = "metrics.jsonl"
# After a failure to write the events, they are not written for so long.
_REBUILD_SECONDS = 60
# Entries of a line that are not metrics of the model.
_NOT_METRICS = {"step", "epoch", "time", "skipped", "save_seconds"}
_Metrics = Mapping[str, float | None]


@dataclass
class Totals:
    """Sums over the steps since the last line of metrics.jsonl."""

    steps: int = 0
    total_nats: float = 0.0
    grad_norm: float = 0.0
    clipped: int = 0
    count: int = 0
    seconds: float = 0.0
    skipped: int = 0


class _Line(BaseModel, extra="allow", strict=True, allow_inf_nan=False):
    """A line of metrics.jsonl; the extra entries are numbers."""

    kind: Literal["train", "valid", "gradients"]
    step: Annotated[int, Field(ge=0, lt=1 << 63)]
    time: float
    preview: str = ""
    __pydantic_extra__: dict[str, Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)] | float | None]

    @property
    def metrics(self) -> _Metrics:
        return {k: v for k, v in self.__pydantic_extra__.items() if k not in _NOT_METRICS}


@dataclass(frozen=True)
class LoggedUpdate:
    """An applied update, as the logger needs it.

    Args:
        step: updates done, this one included.
        epoch: epoch of the update, from 1.
        result: result of the step.
        learning_rate: learning rate of the update.
        seconds: duration of the step.
        seconds_left: estimated seconds until training ends.
    """

    step: int
    epoch: int
    result: StepResult
    learning_rate: float
    seconds: float
    seconds_left: float


class NullLogger:
    """A logger that does nothing, for all ranks but 0.

    Attributes:
        save_seconds: seconds spent on saving checkpoints since the last line of metrics.jsonl.
    """

    def __init__(self) -> None:
        self.save_seconds = 0.0

    def log_update(self, update: LoggedUpdate) -> None:
        """Logs an applied update."""

    def log_skip(self, step: int, epoch: int, learning_rate: float, reason: str) -> None:
        """Logs a skipped update and the reason."""

    def finish(self) -> None:
        """Logs the remaining updates at the end of training."""

    def log_validation(
        self, step: int, epoch: int, metrics: Metrics, preview: str, *, is_best: bool
    ) -> None:
        """Logs a validation and its preview."""

    def log_gradients(self, step: int, epoch: int, norms: _Metrics) -> None:
        """Logs gradient norms over time lags, by name."""

    def validation_at(self, step: int) -> _Metrics | None:
        """The metrics of the validation at a step; None if it was not logged."""

    def set_total_steps(self, total_steps: int) -> None:
        """Sets the number of updates at which training is expected to end."""

    def info(self, text: str) -> None:
        """Shows a message."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""

    def sync(self) -> None:
        """Makes the log durable."""

    def close(self) -> None:
        """Closes the log."""


class Logger(NullLogger):
    """Writes metrics.jsonl and TensorBoard events, and shows progress.

    A failure to write is shown once and does not end training; missing lines are written later.

    Args:
        run: the run folder.
        task: defines units and metrics.
        first_step: updates done before; lines of later steps are removed, since they are repeated.
        total_steps: updates of the whole training.
        is_quiet: whether to hide progress.

    Raises:
        CheckpointError: metrics.jsonl is not a regular file, or could not be read.
    """

    def __init__(
        self, run: Path, task: Task, *, first_step: int, total_steps: int, is_quiet: bool
    ) -> None:
        super().__init__()
        self.totals = Totals()
        self._task = task
        self._metrics_file = run / _METRICS
        self._log_every = task.config.train.log_every
        self._total_steps = total_steps
        kept = [pair for pair in _read_lines(self._metrics_file) if pair[1].step <= first_step]
        if self._metrics_file.exists():
            files.write(self._metrics_file, b"".join(content + b"\n" for content, _ in kept))
        self._validations = {line.step: line.metrics for _, line in kept if line.kind == "valid"}
        self._has_first_step = any(
            (line.kind, line.step) == ("train", first_step) for _, line in kept
        )
        self._last: tuple[int, int, float] | None = None
        self._unwritten: list[str] = []
        self._warned: set[str] = set()
        self._events_folder = run / "events"
        self._writers: dict[str, SummaryWriter] = {}
        self._next_rebuild = 0.0
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            file=screen.STDERR,
            disable=is_quiet,
            mininterval=0.2 if screen.STDERR.isatty() else 20,
            dynamic_ncols=screen.STDERR.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        with self._warn_once("events"):
            self._rebuild_events()

    def log_update(self, update: LoggedUpdate) -> None:
        """Adds an update to the totals and shows progress; writes a line when one is due."""
        totals, result = self.totals, update.result
        totals.steps += 1
        totals.total_nats += result.total_nats
        totals.grad_norm += result.grad_norm
        totals.clipped += bool(result.was_clipped)
        totals.count += round(result.predictions)
        totals.seconds += update.seconds
        loss = totals.total_nats / totals.count
        headline = self._task.metrics.headline
        value = self._task.derived(loss).get(headline)
        metric = "" if value is None else f", {headline} {value:.4g}"
        self._bar.set_postfix_str(
            f"loss {loss:.3f}{metric}, lr {update.learning_rate:.2g}, "
            f"{totals.count / totals.seconds:,.0f} {self._task.unit}/s, "
            f"{_format_duration(update.seconds_left)} left",
            refresh=False,
        )
        self._bar.update()
        self._end_step(update.step, update.epoch, update.learning_rate)

    def log_skip(self, step: int, epoch: int, learning_rate: float, reason: str) -> None:
        """Counts a skipped update and shows the reason; writes a line when one is due."""
        self.totals.skipped += 1
        self.info(f"step {step:,} skipped: {reason}")
        self._bar.update()
        self._end_step(step, epoch, learning_rate)

    def _end_step(self, step: int, epoch: int, learning_rate: float) -> None:
        self._last = step, epoch, learning_rate
        if step % self._log_every == 0 or step == self._total_steps:
            self._write_totals(*self._last)

    def finish(self) -> None:
        """Writes a line for the updates since the last line."""
        if self._last and self.totals != Totals():
            self._write_totals(*self._last)

    def _write_totals(self, step: int, epoch: int, learning_rate: float) -> None:
        totals = self.totals
        # NaN if every update was skipped.
        mean = totals.total_nats / totals.count if totals.count else math.nan
        self._write(
            {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "loss": mean,
                **self._task.derived(mean),
                "learning_rate": learning_rate,
                "grad_norm": totals.grad_norm / max(1, totals.steps),
                "clipped_fraction": totals.clipped / max(1, totals.steps),
                f"{self._task.unit}_per_second": (
                    totals.count / totals.seconds if totals.seconds else 0.0
                ),
                "skipped": totals.skipped,
                "save_seconds": self.save_seconds,
            }
        )
        self.totals = Totals()
        self.save_seconds = 0.0

    def log_validation(
        self, step: int, epoch: int, metrics: Metrics, preview: str, *, is_best: bool
    ) -> None:
        """Writes a line for a validation and shows it with its preview."""
        self._write(
            {
                "kind": "valid", "step": step, "epoch": epoch, **metrics.figures,
                "preview": preview,
            }
        )  # fmt: skip
        best = " (best)" if is_best else ""
        self.info(
            f"step {step:,}, epoch {epoch}: validation {metrics.line(metrics.figures)}{best}\n"
            f"  {screen.one_line(preview)}"
        )

    def log_gradients(self, step: int, epoch: int, norms: _Metrics) -> None:
        """Writes a line with gradient norms over time lags, by name."""
        self._write({"kind": "gradients", "step": step, "epoch": epoch, **norms})

    def validation_at(self, step: int) -> _Metrics | None:
        """The metrics of the validation at a step; None if it was not logged."""
        return self._validations.get(step)

    def set_total_steps(self, total_steps: int) -> None:
        """Sets the number of updates at which the progress bar ends."""
        self._bar.total = total_steps

    def info(self, text: str) -> None:
        """Shows a message above the progress bar."""
        if not self._bar.disable:
            tqdm.write(text, file=screen.STDERR)

    def state_dict(self) -> dict[str, Any]:
        """The totals since the last line."""
        return asdict(self.totals)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        totals = TypeAdapter(Totals).validate_python(state)
        # A run that `max_seconds` ended wrote its last line after the totals had been saved.
        self.totals = Totals() if self._has_first_step else totals

    def sync(self) -> None:
        """Flushes the lines to the disk, so that a checkpoint never has steps that they lack."""
        with self._warn_once("metrics"):
            self._flush_metrics()
            if self._metrics_file.exists():
                files.sync_file(self._metrics_file)

    def close(self) -> None:
        """Closes the progress bar and the events; writes missing lines."""
        self._bar.close()
        with self._warn_once("metrics"):
            self._flush_metrics()
        with self._warn_once("events"):
            if not self._writers:
                self._rebuild_events()
        self._close_events()

    def _write(self, line: Mapping[str, Any]) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        finite["time"] = round(time.time(), 3)
        self._unwritten.append(json.dumps(finite, allow_nan=False))
        with self._warn_once("metrics"):
            self._flush_metrics()
        with self._warn_once("events"):
            if self._writers:
                self._write_events(finite)
            elif time.monotonic() >= self._next_rebuild:
                self._rebuild_events()

    def _flush_metrics(self) -> None:
        while self._unwritten:
            files.append_line(self._metrics_file, self._unwritten[0])
            del self._unwritten[0]

    @contextlib.contextmanager
    def _warn_once(self, output: str) -> Iterator[None]:
        """Shows the first failure to write an output and ignores failures."""
        try:
            yield
        except (OSError, MachineError) as error:
            if output == "events":
                self._close_events()
                # All lines are written again, which would cost more and more on a full disk.
                self._next_rebuild = time.monotonic() + _REBUILD_SECONDS
            if output not in self._warned:
                self._warned.add(output)
                reason = str(error).splitlines()[0]
                self.info(f"warning: could not write {output}, training continues: {reason}")

    def _rebuild_events(self) -> None:
        """Rewrites the events from metrics.jsonl."""
        # Imported late, since TensorBoard takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        if self._events_folder.exists():
            files.remove_folder(self._events_folder)
        self._writers = {
            kind: SummaryWriter(str(self._events_folder / kind)) for kind in ("train", "valid")
        }
        self._write_settings()
        if self._metrics_file.exists():
            for line in self._metrics_file.read_bytes().splitlines():
                self._write_events(json.loads(line))

    def _close_events(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers = {}

    def _write_events(self, line: Mapping[str, Any]) -> None:
        writer = self._writers["valid" if line["kind"] == "valid" else "train"]
        step, walltime = line["step"], line["time"]
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in _NOT_METRICS:
                writer.add_scalar(name, value, step, walltime=walltime)
        if line.get("preview"):
            # Markdown shows lines that are indented by four spaces verbatim.
            verbatim = "    " + screen.printable(line["preview"]).replace("\n", "\n    ")
            writer.add_text("preview", verbatim, step, walltime=walltime)
            if (picture := self._task.picture(line["preview"])) is not None:
                writer.add_image("preview", picture, step, walltime=walltime, dataformats="HW")
        writer.flush()

    def _write_settings(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer = self._writers["valid"]
        settings = {
            f"{section}.{name}": value if isinstance(value, (int, float)) else str(value)
            for section, values in self._task.config.model_dump(mode="json").items()
            for name, value in values.items()
        }
        for summary in hparams(settings, {"loss": 0.0, self._task.metrics.headline: 0.0}):
            writer._get_file_writer().add_summary(summary)
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)


def read_train_metrics(run: Path) -> Iterator[tuple[int, _Metrics]]:
    """The step and the metrics of each training line in the metrics.jsonl of a run.

    Raises:
        CheckpointError: metrics.jsonl is not a regular file, or could not be read.
    """
    for _, line in _read_lines(run / _METRICS):
        if line.kind == "train":
            yield line.step, line.metrics


def _read_lines(path: Path) -> Iterator[tuple[bytes, _Line]]:
    """Each valid line of metrics.jsonl, as bytes and parsed.

    Raises:
        CheckpointError: it is not a regular file, or could not be read.
    """
    if not untrusted.exists(path):
        return
    untrusted.require_regular_file(path)
    with untrusted.map_os_errors(path):
        lines = path.read_bytes().split(b"\n")
    for content in lines:
        try:
            line = _Line.model_validate_json(content)
        except ValidationError:
            # A line that a full disk or a kill cut off.
            continue
        yield content, line


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
