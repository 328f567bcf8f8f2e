"""What a run shows and records: progress bar, metrics.jsonl, TensorBoard events.

metrics.jsonl is the record; the events are written from its lines, and written anew from them when
a run is resumed, so that nothing stands in them twice.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError
from tqdm import tqdm

from lmtrain import files, screen, untrusted
from lmtrain.errors import MachineError
from lmtrain.tasks.base import Metrics, Task
from lmtrain.training.step import Numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_METRICS = "metrics.jsonl"
# Entries of a line of metrics that are not figures of the model.
_NO_SCALARS = {"step", "epoch", "time", "skipped", "save_seconds"}
_Figures = Mapping[str, float | None]


@dataclass
class Window:
    """Sums over the steps since the last line of metrics."""

    steps: int = 0
    total_nats: float = 0.0
    grad_norm: float = 0.0
    clipped: int = 0
    count: int = 0
    seconds: float = 0.0
    skipped: int = 0


class _Line(BaseModel, extra="allow", strict=True, allow_inf_nan=False):
    """A line of metrics as far as it is read again."""

    kind: Literal["train", "valid", "gradients"]
    step: int
    time: float
    preview: str = ""
    __pydantic_extra__: dict[str, int | float | None]

    @property
    def figures(self) -> _Figures:
        return {k: v for k, v in self.__pydantic_extra__.items() if k not in _NO_SCALARS}


@dataclass(frozen=True)
class Made:
    """An update that was made.

    Args:
        step: updates done.
        epoch: the epoch it belonged to, counted from 1.
        numbers: what came of it.
        learning_rate: of this update.
        seconds: time it took.
        seconds_left: time left until training ends.
    """

    step: int
    epoch: int
    numbers: Numbers
    learning_rate: float
    seconds: float
    seconds_left: float


class NullLogger:
    """Shows and records nothing: of several processes of a training, only one does."""

    def __init__(self) -> None:
        self.save_seconds = 0.0

    def record(self, made: Made) -> None:
        """Takes note of an update."""

    def record_skip(self, step: int, epoch: int, learning_rate: float, reason: str) -> None:
        """Takes note of an update that was left out, and why."""

    def finish(self) -> None:
        """Takes note that no update follows."""

    def record_validation(
        self, step: int, epoch: int, metrics: Metrics, preview: str, *, is_best: bool
    ) -> None:
        """Takes note of a validation."""

    def record_gradients(self, step: int, epoch: int, figures: _Figures) -> None:
        """Takes note of how the gradient travels through time."""

    def validation_at(self, step: int) -> _Figures | None:
        """The figures of the validation of a step that is recorded already."""

    def expect(self, steps: int) -> None:
        """Takes note of how many updates fit into the time that is given."""

    def say(self, text: str) -> None:
        """Shows a line."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed logger goes on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""

    def sync(self) -> None:
        """Makes the record so far durable."""

    def close(self) -> None:
        """Ends the record."""


class Logger(NullLogger):
    """Shows and records what training does.

    Args:
        run: the run folder.
        task: names what is counted, and gives figures in its own units.
        first_step: updates done before; lines of later steps are dropped, they are done anew.
        total_steps: updates at the end.
        is_quiet: whether no progress is shown.
    """

    def __init__(
        self, run: Path, task: Task, *, first_step: int, total_steps: int, is_quiet: bool
    ) -> None:
        super().__init__()
        self.window = Window()
        self._task = task
        self._metrics = run / _METRICS
        self._log_every = task.config.train.log_every
        self._total_steps = total_steps
        kept = [pair for pair in _lines(self._metrics) if pair[1].step <= first_step]
        if self._metrics.exists():
            files.write(self._metrics, b"".join(content + b"\n" for content, _ in kept))
        self._validated = {line.step: line.figures for _, line in kept if line.kind == "valid"}
        self._is_written = any((line.kind, line.step) == ("train", first_step) for _, line in kept)
        self._last: tuple[int, int, float] | None = None
        self._unwritten: list[str] = []
        self._warned: set[str] = set()
        self._events_folder = run / "events"
        self._writers: dict[str, SummaryWriter] = {}
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            file=screen.STDERR,
            disable=is_quiet,
            mininterval=0.2 if screen.STDERR.isatty() else 20,
            dynamic_ncols=screen.STDERR.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        with self._tolerated("events"):
            self._rebuild_events()

    def record(self, made: Made) -> None:
        """Takes note of an update."""
        window, numbers = self.window, made.numbers
        window.steps += 1
        window.total_nats += numbers.total_nats
        window.grad_norm += numbers.grad_norm
        window.clipped += bool(numbers.was_clipped)
        window.count += round(numbers.predictions)
        window.seconds += made.seconds
        loss = window.total_nats / window.count
        headline = self._task.metrics.headline
        value = self._task.derived(loss).get(headline)
        shown = "" if value is None else f", {headline} {value:.4g}"
        self._bar.set_postfix_str(
            f"loss {loss:.3f}{shown}, lr {made.learning_rate:.2g}, "
            f"{window.count / window.seconds:,.0f} {self._task.unit}/s, "
            f"{_clock(made.seconds_left)} left",
            refresh=False,
        )
        self._bar.update()
        self._end_window(made.step, made.epoch, made.learning_rate)

    def record_skip(self, step: int, epoch: int, learning_rate: float, reason: str) -> None:
        """Takes note of an update that was left out, and why."""
        self.window.skipped += 1
        self.say(f"step {step:,} skipped: {reason}")
        self._bar.update()
        self._end_window(step, epoch, learning_rate)

    def _end_window(self, step: int, epoch: int, learning_rate: float) -> None:
        """Writes a line of metrics when it is due."""
        self._last = step, epoch, learning_rate
        if step % self._log_every == 0 or step == self._total_steps:
            self._write_window(*self._last)

    def finish(self) -> None:
        """Writes the line of the updates since the last one."""
        if self._last and self.window != Window():
            self._write_window(*self._last)

    def _write_window(self, step: int, epoch: int, learning_rate: float) -> None:
        window = self.window
        # Not a number where every update was left out.
        mean = window.total_nats / window.count if window.count else math.nan
        self._write(
            {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "loss": mean,
                **self._task.derived(mean),
                "learning_rate": learning_rate,
                "grad_norm": window.grad_norm / max(1, window.steps),
                "clipped_fraction": window.clipped / max(1, window.steps),
                f"{self._task.unit}_per_second": (
                    window.count / window.seconds if window.seconds else 0.0
                ),
                "skipped": window.skipped,
                "save_seconds": self.save_seconds,
            }
        )
        self.window = Window()
        self.save_seconds = 0.0

    def record_validation(
        self, step: int, epoch: int, metrics: Metrics, preview: str, *, is_best: bool
    ) -> None:
        """Takes note of a validation and shows it with a preview."""
        self._write(
            {
                "kind": "valid", "step": step, "epoch": epoch, **metrics.figures,
                "preview": preview,
            }
        )  # fmt: skip
        best = " (best)" if is_best else ""
        self.say(
            f"step {step:,}, epoch {epoch}: validation {metrics.line(metrics.figures)}{best}\n"
            f"  {screen.one_line(preview)}"
        )

    def record_gradients(self, step: int, epoch: int, figures: _Figures) -> None:
        """Takes note of how the gradient travels through time."""
        self._write({"kind": "gradients", "step": step, "epoch": epoch, **figures})

    def validation_at(self, step: int) -> _Figures | None:
        """The figures of the validation of a step that is recorded already."""
        return self._validated.get(step)

    def expect(self, steps: int) -> None:
        """Lets the progress bar end with so many updates."""
        self._bar.total = steps

    def say(self, text: str) -> None:
        """Shows a line above the progress bar."""
        if not self._bar.disable:
            tqdm.write(text, file=screen.STDERR)

    def state_dict(self) -> dict[str, Any]:
        """The sums of the steps since the last line."""
        return asdict(self.window)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        window = TypeAdapter(Window).validate_python(state)
        # A training that ended with its time has written its last window, but saved it before.
        self.window = Window() if self._is_written else window

    def sync(self) -> None:
        """Makes the lines so far durable: a checkpoint must not outlive the record of its steps."""
        with self._tolerated("metrics"):
            self._flush_metrics()
            if self._metrics.exists():
                files.sync_file(self._metrics)

    def close(self) -> None:
        """Ends the bar and writes the events out."""
        self._bar.close()
        with self._tolerated("metrics"):
            self._flush_metrics()
        self._close_events()

    def _write(self, line: Mapping[str, Any]) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        finite["time"] = round(time.time(), 3)
        self._unwritten.append(json.dumps(finite, allow_nan=False))
        with self._tolerated("metrics"):
            self._flush_metrics()
        with self._tolerated("events"):
            if not self._writers:
                self._rebuild_events()
            else:
                self._write_events(finite)

    def _flush_metrics(self) -> None:
        while self._unwritten:
            files.append_line(self._metrics, self._unwritten[0])
            del self._unwritten[0]

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """A record that cannot be written ends no training; what it lacks is written later."""
        try:
            yield
        except (OSError, MachineError) as error:
            if what == "events":
                self._close_events()
            if what not in self._warned:
                self._warned.add(what)
                reason = str(error).splitlines()[0]
                self.say(f"{what} cannot be written; training goes on: {reason}")

    def _rebuild_events(self) -> None:
        """Writes the events anew from the lines of metrics."""
        # TensorBoard takes a second to import, which commands that do not train need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        if self._events_folder.exists():
            files.remove_folder(self._events_folder)
        self._writers = {
            part: SummaryWriter(str(self._events_folder / part)) for part in ("train", "valid")
        }
        self._write_settings()
        if self._metrics.exists():
            for line in self._metrics.read_bytes().splitlines():
                self._write_events(json.loads(line))

    def _close_events(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers = {}

    def _write_events(self, line: Mapping[str, Any]) -> None:
        writer = self._writers["valid" if line["kind"] == "valid" else "train"]
        step, when = line["step"], line["time"]
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in _NO_SCALARS:
                writer.add_scalar(name, value, step, walltime=when)
        if line.get("preview"):
            # Indented by four, Markdown shows text as it is.
            shown = "    " + screen.printable(line["preview"]).replace("\n", "\n    ")
            writer.add_text("preview", shown, step, walltime=when)
            if (picture := self._task.picture(line["preview"])) is not None:
                writer.add_image("preview", picture, step, walltime=when, dataformats="HW")
        writer.flush()

    def _write_settings(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer = self._writers["valid"]
        settings = {
            f"{section}.{name}": value if isinstance(value, (int, float)) else str(value)
            for section, part in self._task.config.model_dump(mode="json").items()
            for name, value in part.items()
        }
        for summary in hparams(settings, {"loss": 0.0, self._task.metrics.headline: 0.0}):
            writer._get_file_writer().add_summary(summary)
        rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)


def recorded_updates(run: Path) -> Iterator[tuple[int, _Figures]]:
    """The step and the figures of each line of a run's metrics that covers updates.

    Raises:
        CheckpointError: the metrics are no plain file, or cannot be read.
    """
    path = run / _METRICS
    if untrusted.is_there(path):
        untrusted.file_size(path)
        with untrusted.explained(path):
            for _, line in _lines(path):
                if line.kind == "train":
                    yield line.step, line.figures


def _lines(path: Path) -> Iterator[tuple[bytes, _Line]]:
    """The whole lines of metrics and what they say."""
    if not path.exists():
        return
    for content in path.read_bytes().split(b"\n"):
        try:
            line = _Line.model_validate_json(content)
        except ValidationError:
            # The end of a line that a full disk or a kill cut short.
            continue
        yield content, line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
