"""A bounded search over settings: random, or successive halving; resumable from its record."""

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
from lmtrain.training.run import prepared, run_training

_RECORD = "trials.jsonl"


class Range(Section):
    """Values of a setting: some listed ones, or all between two bounds."""

    values: tuple[Any, ...] = ()
    """The values, chosen from with equal probability."""
    low: float | None = None
    """The least value."""
    high: float | None = None
    """The greatest value."""
    scale: Literal["linear", "log"] = "linear"
    """Whether values or their logarithms are equally likely between low and high."""
    integer: bool = False
    """Whether values between low and high are rounded to whole numbers."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ValueError("a range is either values or low and high")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
            if self.scale == "log" and self.low <= 0:
                raise ValueError(f"low {self.low:g} has no logarithm")
        return self

    def draw(self, generator: np.random.Generator) -> Any:
        """One of the values."""
        if self.low is None or self.high is None:
            return self.values[int(generator.integers(len(self.values)))]
        if self.scale == "log":
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = float(generator.uniform(self.low, self.high))
        return round(drawn) if self.integer else float(f"{drawn:.3g}")


class Search(Section):
    """How the search goes."""

    method: Literal["random", "halving"] = "random"
    """Every trial trained in full, or many short ones of which the best go on to longer ones."""
    trials: PositiveInt = 20
    """Draws of settings."""
    max_seconds: PositiveFloat = 3600
    """Seconds of training in all, after which no trial begins and the last one ends."""
    factor: Annotated[int, Field(ge=2, strict=True)] = 3
    """Halving: one of so many trials goes on, with so many times the updates."""
    rounds: PositiveInt = 3
    """Halving: rounds, the last of which trains in full."""
    seed: Seed = 1
    """Seed of the draws."""


class Space(Section):
    """What a sweep searches: the file that `lmtrain sweep` reads."""

    config: str | None = None
    """The recipe or settings file that trials start from; without it, the defaults."""
    search: Search = Search()
    """How the search goes."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Settings of all trials by path."""
    space: dict[str, Range]
    """Ranges of settings by path."""


@dataclass(frozen=True)
class Trial:
    """A training of the search.

    Args:
        name: its folder's name.
        settings: what was drawn, by path.
        share: it was trained for one of so many parts of its length.
        metric: the name of the headline figure.
        value: that figure of its best validation; None if it is not finite, or it diverged.
        cost: orders trials: smaller is better; None if it diverged.
        seconds: time it took.
        is_cut: the search's time ended it before its own length.
    """

    name: str
    settings: dict[str, Any]
    share: int
    metric: str
    value: float | None
    cost: float | None
    seconds: float
    is_cut: bool = False

    @property
    def rank(self) -> tuple[bool, bool, int, float]:
        """Smaller for better: those that diverged last, before them those cut short, then by cost.

        Of the others, the longer first.
        """
        cost = math.inf if self.cost is None else self.cost
        return self.cost is None, self.is_cut, self.share, cost

    @property
    def result(self) -> str:
        """The figure, as a person reads it."""
        if self.cost is None:
            return "diverged"
        return "inf" if self.value is None else f"{self.value:.4f}"


_TRIAL = TypeAdapter(Trial)


def load_space(path: Path) -> Space:
    """The search that a TOML file describes.

    Raises:
        ConfigError: no such file, not TOML, or settings that cannot be.
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
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg'].lower()}") from None
    # What is wrong with a setting should be said before anything is trained.
    for index in range(space.search.trials):
        configuration.load(space.config, _drawn(space, index))
    return space


def run_sweep(
    space: Space, out: Path, *, say: Callable[[str], None] = lambda text: None
) -> list[Trial]:
    """Trains the trials of a search, those that are not in the folder's record yet.

    Args:
        space: the search.
        out: the folder of its runs and its record.
        say: told about each trial when it ends.

    Returns:
        All trials, the best first.

    Raises:
        ConfigError: the folder holds another search.
        LmtrainError: from training; trials that diverge only lose.
    """
    with files.locked(out / ".lock", f"the sweep {out}"):
        _keep_space(space, out)
        done = {trial.name: trial for trial in _recorded(out)}
        search = space.search
        chosen = list(range(search.trials))
        draws = [_drawn(space, index) for index in chosen]
        rounds = search.rounds if search.method == "halving" else 1
        for number in range(rounds):
            trained: dict[int, Trial] = {}
            for index in chosen:
                name = f"trial-{index:03d}" + (f"-round-{number + 1}" if rounds > 1 else "")
                if name not in done or done[name].is_cut:
                    left = search.max_seconds - sum(trial.seconds for trial in done.values())
                    if left <= 0:
                        return _ranked(done)
                    # Of a trial that was cut, what it took before is in its time.
                    seconds = left + (done[name].seconds if name in done else 0)
                    share = search.factor ** (rounds - 1 - number)
                    done[name] = _train(space, out / name, draws[index], share, seconds)
                    files.append_line(out / _RECORD, json.dumps(vars(done[name])))
                    say(described(done[name]))
                    if done[name].is_cut:
                        return _ranked(done)
                trained[index] = done[name]
            chosen.sort(key=lambda index: trained[index].rank)
            chosen = chosen[: max(1, len(chosen) // search.factor)]
        return _ranked(done)


def _ranked(trials: Mapping[str, Trial]) -> list[Trial]:
    return sorted(trials.values(), key=lambda trial: trial.rank)


def described(trial: Trial) -> str:
    """A trial in one line."""
    result = trial.result if trial.cost is None else f"{trial.metric} {trial.result}"
    if trial.is_cut:
        result += ", cut short"
    settings = ", ".join(f"{path} {value}" for path, value in trial.settings.items())
    return f"{trial.name}: {result} in {trial.seconds:.0f} s; {settings}"


def _drawn(space: Space, index: int) -> dict[str, Any]:
    """The settings of the trial of that number."""
    generator = np.random.default_rng([space.search.seed, index])
    return {**space.fixed, **{path: each.draw(generator) for path, each in space.space.items()}}


def _keep_space(space: Space, out: Path) -> None:
    path, text = out / "space.json", space.model_dump_json(exclude={"search": {"max_seconds"}})
    if path.exists() and path.read_text() != text:
        raise ConfigError(f"{out} holds another search", "search elsewhere: --out DIR")
    files.write(path, text.encode())


def _recorded(out: Path) -> list[Trial]:
    path = out / _RECORD
    trials = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        # The end of a line that a loss of power cut short is no trial.
        with contextlib.suppress(ValidationError):
            trials.append(_TRIAL.validate_json(line))
    return trials


def _train(
    space: Space, run: Path, overrides: Mapping[str, Any], share: int, seconds: float
) -> Trial:
    """Trains a trial, or goes on with it, for one of `share` parts of its length.

    Args:
        space: the search.
        run: the trial's folder.
        overrides: its settings, by path.
        share: how many times shorter it is.
        seconds: time for it, all its processes together.

    Raises:
        ConfigError: there is no validation text.
    """
    whole = configuration.load(space.config, overrides)
    own_seconds = (whole.train.max_seconds or math.inf) / share
    limit = {"train.max_seconds": min(seconds, own_seconds)}
    settings = {path: overrides[path] for path in space.space}
    began = time.monotonic()
    try:
        if checkpoint.steps(run):
            summary = run_training(out=run, resume=True, overrides=limit, is_quiet=True)
        else:
            if run.exists():
                files.remove_folder(run)
            steps = {"train.max_steps": max(1, _steps(whole) // share)} if share > 1 else {}
            config = configuration.load(space.config, {**overrides, **limit, **steps})
            summary = run_training(config, run, is_quiet=True)
    except DivergedError:
        metric = task_of(whole).metrics.headline
        return Trial(run.name, settings, share, metric, None, None, time.monotonic() - began)
    if summary.best is None:
        raise ConfigError("a search needs validation data", "try: data.valid_fraction = 0.1")
    is_cut = summary.is_cut_short and seconds < own_seconds
    metrics, best = summary.task.metrics, summary.best
    value, cost = best[metrics.headline], metrics.cost(best)
    return Trial(run.name, settings, share, metrics.headline, value, cost, summary.seconds, is_cut)


def _steps(config: Config) -> int:
    """Updates of a whole training. Epochs alone would not do: a third of two is one, as of five."""
    task = prepared(config, task_of(config).read(config), Shard())
    return Limits(config.train, task.steps_per_epoch, Ranks(), 0.0).total_steps
