"""What a run shows and keeps: progress bar, metrics.jsonl, TensorBoard events.

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
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from lmtrain import files, screen
from lmtrain.errors import MachineError
from lmtrain.evaluation import Evaluation, perplexity

_SCALARS = ("loss", "perplexity", "bits_per_char", "learning_rate", "grad_norm", "clipped_fraction",
            "tokens_per_second")  # fmt: skip


@dataclass
class Window:
    """Sums over the steps since the last line of metrics."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    clipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


class _Line(BaseModel, extra="allow", strict=True):
    """A line of metrics as far as it is read again."""

    kind: Literal["train", "valid"]
    step: int
    time: float
    loss: float | None
    perplexity: float | None = None
    bits_per_char: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    clipped_fraction: float | None = None
    tokens_per_second: float | None = None
    sample: str = ""


class Silent:
    """Shows and keeps nothing: of several processes of a training, only one does."""

    def __init__(self) -> None:
        self.save_seconds = 0.0

    def record(
        self,
        step: int,
        epoch: int,
        *,
        loss: float,
        grad_norm: float,
        was_clipped: bool,
        learning_rate: float,
        tokens: int,
        seconds: float,
        seconds_left: float,
    ) -> None:
        """Takes note of an update."""

    def record_skip(self, step: int, epoch: int, learning_rate: float, reason: str) -> None:
        """Takes note of an update that was left out, and why."""

    def finish(self) -> None:
        """Takes note that no update follows."""

    def record_validation(
        self, step: int, epoch: int, result: Evaluation, sample: str, *, is_best: bool
    ) -> None:
        """Takes note of a validation."""

    def validation_at(self, step: int) -> float | None:
        """The loss of the validation of a step that is recorded already."""

    def expect(self, steps: int) -> None:
        """Takes note of how many updates fit into the time that is given."""

    def say(self, text: str) -> None:
        """Shows a line."""

    def state(self) -> dict[str, Any]:
        """What a resumed monitor goes on from."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""

    def sync(self) -> None:
        """Makes the record so far durable."""

    def close(self) -> None:
        """Ends the record."""


class Monitor(Silent):
    """Shows and keeps what training does.

    Args:
        run: the run folder.
        first_step: updates done before; lines of later steps are dropped, they are done anew.
        total_steps: updates at the end.
        log_every: updates a line of metrics covers.
        chars_per_token: characters of the training text over its tokens.
        settings: hyper-parameters by path, for the dashboard.
        is_quiet: whether no progress is shown.
    """

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        total_steps: int,
        log_every: int,
        chars_per_token: float,
        settings: Mapping[str, Any],
        is_quiet: bool,
    ) -> None:
        super().__init__()
        self.window = Window()
        self._metrics = run / "metrics.jsonl"
        self._log_every = log_every
        self._chars_per_token = chars_per_token
        self._total_steps = total_steps
        kept = list(_lines_until(self._metrics, first_step))
        if self._metrics.exists():
            files.write(self._metrics, b"".join(line + b"\n" for line, _ in kept))
        self._validated = {
            line["step"]: line["loss"] for _, line in kept if line["kind"] == "valid"
        }
        self._is_written = ("train", first_step) in {
            (line["kind"], line["step"]) for _, line in kept
        }
        self._last: tuple[int, int, float] | None = None
        self._unwritten: list[str] = []
        self._warned: set[str] = set()
        self._settings = settings
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

    def record(
        self,
        step: int,
        epoch: int,
        *,
        loss: float,
        grad_norm: float,
        was_clipped: bool,
        learning_rate: float,
        tokens: int,
        seconds: float,
        seconds_left: float,
    ) -> None:
        """Takes note of an update.

        Args:
            step: updates done.
            epoch: the epoch it belonged to, counted from 1.
            loss: mean nats a token.
            grad_norm: before clipping.
            was_clipped: whether the gradient was limited.
            learning_rate: of this update.
            tokens: tokens trained on.
            seconds: time the update took.
            seconds_left: time left until training ends.
        """
        window = self.window
        window.steps += 1
        window.loss += loss
        window.grad_norm += grad_norm
        window.clipped += was_clipped
        window.tokens += tokens
        window.seconds += seconds
        self._bar.set_postfix_str(
            f"loss {window.loss / window.steps:.3f}, "
            f"perplexity {perplexity(window.loss / window.steps):.1f}, lr {learning_rate:.2g}, "
            f"{window.tokens / window.seconds:,.0f} tokens/s, {_clock(seconds_left)} left",
            refresh=False,
        )
        self._bar.update()
        self._end_window(step, epoch, learning_rate)

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
        mean = window.loss / window.steps if window.steps else math.nan
        self._write(
            {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "loss": mean,
                "perplexity": perplexity(mean),
                "bits_per_char": mean / math.log(2) / self._chars_per_token,
                "learning_rate": learning_rate,
                "grad_norm": window.grad_norm / max(1, window.steps),
                "clipped_fraction": window.clipped / max(1, window.steps),
                "tokens_per_second": window.tokens / window.seconds if window.seconds else 0.0,
                "skipped": window.skipped,
                "save_seconds": self.save_seconds,
            }
        )
        self.window = Window()
        self.save_seconds = 0.0

    def record_validation(
        self, step: int, epoch: int, result: Evaluation, sample: str, *, is_best: bool
    ) -> None:
        """Takes note of a validation and shows it with a sample of the model's writing."""
        self._write(
            {
                "kind": "valid",
                "step": step,
                "epoch": epoch,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_char": result.bits_per_char,
                "oov_rate": result.oov_rate,
                "sample": sample,
            }
        )
        best = " (best)" if is_best else ""
        self.say(
            f"step {step:,}, epoch {epoch}: validation loss {result.loss:.4f}, "
            f"perplexity {result.perplexity:.2f}{best}\n  {screen.one_line(sample)}"
        )

    def validation_at(self, step: int) -> float | None:
        """The loss of the validation of a step that is recorded already."""
        return self._validated.get(step)

    def expect(self, steps: int) -> None:
        """Lets the progress bar end with so many updates."""
        self._bar.total = steps

    def say(self, text: str) -> None:
        """Shows a line above the progress bar."""
        if not self._bar.disable:
            tqdm.write(text, file=screen.STDERR)

    def state(self) -> dict[str, Any]:
        """What a resumed monitor goes on from; times are left out, they differ in every run."""
        return asdict(self.window)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
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
        if self._events_folder.exists():
            files.remove_folder(self._events_folder)
        self._writers = {
            part: SummaryWriter(str(self._events_folder / part)) for part in ("train", "valid")
        }
        self._write_settings(self._settings)
        if self._metrics.exists():
            for line in self._metrics.read_bytes().splitlines():
                self._write_events(json.loads(line))

    def _close_events(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers = {}

    def _write_events(self, line: Mapping[str, Any]) -> None:
        writer, step, when = self._writers[line["kind"]], line["step"], line["time"]
        for name in _SCALARS:
            if line.get(name) is not None:
                writer.add_scalar(name, line[name], step, walltime=when)
        if line.get("sample"):
            # Indented by four, Markdown shows text as it is.
            shown = "    " + screen.printable(line["sample"]).replace("\n", "\n    ")
            writer.add_text("sample", shown, step, walltime=when)
        writer.flush()

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        writer = self._writers["valid"]
        values = {k: v if isinstance(v, (int, float)) else str(v) for k, v in settings.items()}
        for summary in hparams(values, {"loss": 0.0, "perplexity": 0.0}):
            writer._get_file_writer().add_summary(summary)
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)


def _lines_until(path: Path, step: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of metrics up to a step, and what they say."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            tree = _Line.model_validate_json(line)
        except ValidationError:
            # The end of a line that a full disk or a kill cut short.
            continue
        if tree.step <= step:
            yield line, tree.model_dump()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
