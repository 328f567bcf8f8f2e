"""Search over settings: random, or successive halving; limited in time and resumable."""

import contextlib
import json
import math
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError, model_validator

from lmtrain import checkpoint, files
from lmtrain import config as configuration
from lmtrain.errors import ConfigError, DivergedError
from lmtrain.schema import Config, PositiveInt, Section, Seed
from lmtrain.tasks.base import Shard
from lmtrain.tasks.registry import task_of
from lmtrain.training.limits import Limits
from lmtrain.training.ranks import Ranks
from lmtrain.training.run import build_task, run_training

_TRIALS = "trials.jsonl"


class Range(Section):
    """The values of a setting: a list, or an interval."""

    values: tuple[Any, ...] = ()
    """Values, chosen with equal probability."""
    low: float | None = None
    """Lower bound."""
    high: float | None = None
    """Upper bound."""
    scale: Literal["linear", "log"] = "linear"
    """Whether values or their logarithms are uniform between low and high."""
    integer: bool = False
    """Whether values between low and high are rounded to integers."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ValueError("must have either values, or low and high")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
            if self.scale == "log" and self.low <= 0:
                raise ValueError(f"low {self.low:g} must be above 0 on a log scale")
        return self

    def sample(self, generator: np.random.Generator) -> Any:
        """A random value."""
        if self.low is None or self.high is None:
            return self.values[int(generator.integers(len(self.values)))]
        if self.scale == "log":
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = float(generator.uniform(self.low, self.high))
        if self.integer:
            return round(value)
        # Rounding must not leave the interval: 0.9996 is not 1.
        return min(max(float(f"{value:.3g}"), self.low), self.high)


class Search(Section):
    """The search method and its limits."""

    method: Literal["random", "halving"] = "random"
    """random trains every trial in full; halving trains the best of many short trials longer."""
    trials: PositiveInt = 20
    """Number of settings to sample, 1 or more."""
    max_seconds: PositiveFloat = 3600
    """Total seconds of training, above 0; then the current trial ends and no other starts."""
    factor: Annotated[int, Field(ge=2, strict=True)] = 3
    """For halving: one in `factor` trials continues, with `factor` times the steps."""
    rounds: PositiveInt = 3
    """For halving: number of rounds; the last one trains in full."""
    seed: Seed = 1
    """Seed for sampling settings."""


class Space(Section):
    """The content of the file that `lmtrain sweep` reads."""

    config: str | None = None
    """Recipe or settings file of all trials; the defaults if it is missing."""
    search: Search = Search()
    """The search method and its limits."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Settings of all trials, by path."""
    space: dict[str, Range]
    """Settings to search, by path."""


@dataclass(frozen=True)
class Trial:
    """One training of the search, a line of trials.jsonl.

    Args:
        name: name of its run folder.
        settings: the sampled settings, by path.
        divisor: the divisor of its length: 1 for a full training, 3 for a third.
        metric: name of the headline metric.
        value: that metric at the best validation; None if it is not finite or training diverged.
        cost: ranks trials, lower is better; None if training diverged.
        seconds: duration.
        is_cut: whether the time limit of the search ended it early.
    """

    name: str
    settings: dict[str, Any]
    divisor: int
    metric: str
    value: float | None
    cost: float | None
    seconds: float
    is_cut: bool = False

    @property
    def rank(self) -> tuple[bool, bool, int, float]:
        """The sort key, lower is better: complete, cut short, then diverged trials.

        Longer trials come before shorter ones, then lower costs before higher ones.
        """
        cost = math.inf if self.cost is None else self.cost
        return self.cost is None, self.is_cut, self.divisor, cost

    @property
    def result(self) -> str:
        """The headline metric as text."""
        if self.cost is None:
            return "diverged"
        return "inf" if self.value is None else f"{self.value:.4f}"


_TRIAL_ADAPTER = TypeAdapter(Trial)


def load_space(path: Path) -> Space:
    """Reads the search space from a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML, or a setting is invalid.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    try:
        space = Space.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {entry}: {first['msg'].lower()}") from None
    # All trials are checked before the first one is trained.
    for index in range(space.search.trials):
        configuration.load(space.config, _trial_settings(space, index))
    return space


def run_sweep(
    space: Space, out: Path, *, report: Callable[[str], None] = lambda text: None
) -> list[Trial]:
    """Trains the trials of a search that are not in `out` yet.

    Args:
        space: the search space.
        out: folder of the runs and of trials.jsonl.
        report: called with a line for each trial when it ends.

    Returns:
        All trials, the best first.

    Raises:
        ConfigError: the folder contains another search.
        LmtrainError: errors of training, except divergence, which ranks a trial last.
    """
    with files.locked(out / ".lock", f"the sweep {out}"):
        _save_space(space, out)
        done = {trial.name: trial for trial in _read_trials(out)}
        search = space.search
        remaining = list(range(search.trials))
        settings = [_trial_settings(space, index) for index in remaining]
        rounds = search.rounds if search.method == "halving" else 1
        for number in range(rounds):
            trained: dict[int, Trial] = {}
            for index in remaining:
                name = f"trial-{index:03d}" + (f"-round-{number + 1}" if rounds > 1 else "")
                if name not in done or done[name].is_cut:
                    seconds_left = search.max_seconds - sum(
                        trial.seconds for trial in done.values()
                    )
                    if seconds_left <= 0:
                        return _ranked(done)
                    # The limit of a resumed trial includes the time that it took before.
                    seconds = seconds_left + (done[name].seconds if name in done else 0)
                    divisor = search.factor ** (rounds - 1 - number)
                    done[name] = _train(space, out / name, settings[index], divisor, seconds)
                    files.append_line(out / _TRIALS, json.dumps(vars(done[name])))
                    report(describe(done[name]))
                    if done[name].is_cut:
                        return _ranked(done)
                trained[index] = done[name]
            remaining.sort(key=lambda index: trained[index].rank)
            remaining = remaining[: max(1, len(remaining) // search.factor)]
        return _ranked(done)


def _ranked(trials: Mapping[str, Trial]) -> list[Trial]:
    return sorted(trials.values(), key=lambda trial: trial.rank)


def describe(trial: Trial) -> str:
    """A trial as one line of text."""
    result = trial.result if trial.cost is None else f"{trial.metric} {trial.result}"
    if trial.is_cut:
        result += ", cut short"
    settings = ", ".join(f"{path} {value}" for path, value in trial.settings.items())
    return f"{trial.name}: {result} in {trial.seconds:.0f} s; {settings}"


def _trial_settings(space: Space, index: int) -> dict[str, Any]:
    """The settings of a trial, by path: fixed and sampled ones."""
    generator = np.random.default_rng([space.search.seed, index])
    return {
        **space.fixed,
        **{path: values.sample(generator) for path, values in space.space.items()},
    }


def _save_space(space: Space, out: Path) -> None:
    path = out / "space.json"
    content = space.model_dump_json(exclude={"search": {"max_seconds"}}).encode()
    # A search that failed before its first trial may be corrected.
    is_begun = path.exists() and any(out.glob("trial*"))
    if is_begun and path.read_bytes() != content:
        raise ConfigError(f"{out} contains another search", "choose another folder: --out DIR")
    files.write(path, content)


def _read_trials(out: Path) -> list[Trial]:
    path = out / _TRIALS
    trials = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        # A line that a power loss cut off is ignored.
        with contextlib.suppress(ValidationError):
            trials.append(_TRIAL_ADAPTER.validate_json(line))
    return trials


def _train(
    space: Space, run: Path, overrides: Mapping[str, Any], divisor: int, seconds: float
) -> Trial:
    """Starts or resumes a trial.

    Args:
        space: the search space.
        run: the run folder of the trial.
        overrides: its settings, by path.
        divisor: the divisor of its length.
        seconds: seconds left in the search, plus those that the trial took before.

    Raises:
        ConfigError: there is no validation data.
    """
    full = configuration.load(space.config, overrides)
    trial_seconds = (full.train.max_seconds or math.inf) / divisor
    limit = {"train.max_seconds": min(seconds, trial_seconds)}
    settings = {path: overrides[path] for path in space.space}
    start = time.monotonic()
    try:
        if checkpoint.steps(run):
            summary = run_training(out=run, resume=True, overrides=limit, is_quiet=True)
        else:
            if run.exists():
                files.remove_folder(run)
            steps = (
                {"train.max_steps": max(1, _total_steps(full) // divisor)} if divisor > 1 else {}
            )
            config = configuration.load(space.config, {**overrides, **limit, **steps})
            summary = run_training(config, run, is_quiet=True)
    except DivergedError:
        metric = task_of(full).metrics.headline
        return Trial(run.name, settings, divisor, metric, None, None, time.monotonic() - start)
    if summary.best is None:
        raise ConfigError("a search needs validation data", "try: data.valid_fraction = 0.1")
    is_cut = summary.is_out_of_time and seconds < trial_seconds
    metrics, best = summary.task.metrics, summary.best
    value, cost = best[metrics.headline], metrics.cost(best)
    return Trial(
        run.name, settings, divisor, metrics.headline, value, cost, summary.seconds, is_cut
    )


def _total_steps(config: Config) -> int:
    """Updates of a full training; epochs are too coarse to divide."""
    task = build_task(config, task_of(config).read(config), Shard())
    return Limits(config.train, task.steps_per_epoch, Ranks(), 0.0).total_steps
