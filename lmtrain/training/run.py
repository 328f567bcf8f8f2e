"""A run from its settings: its folder, data, model and loop; its start and its resuming."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain import checkpoint, device, files, launched, screen, untrusted
from lmtrain import config as configuration
from lmtrain.errors import CheckpointError, ConfigError, UnreadableError, out_of_memory_explained
from lmtrain.kernels.native import library
from lmtrain.schema import Config
from lmtrain.tasks.base import Data, Metrics, Shard, Task, uses_bf16, weight_shapes
from lmtrain.tasks.registry import task_of
from lmtrain.training import folder
from lmtrain.training.average import Average
from lmtrain.training.checkpoints import Checkpoints, Documents
from lmtrain.training.limits import Limits
from lmtrain.training.logger import Logger, NullLogger
from lmtrain.training.optimizer import Optimizer, Schedule, schedule
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks, joined
from lmtrain.training.rate_finder import RateCurve, range_test, rising
from lmtrain.training.step import Stepper
from lmtrain.training.trainer import Trainer

_SMALLER = "try: a smaller --batch-size, --seq-len, --hidden-size or --vocab-size"


@dataclass(frozen=True)
class Summary:
    """What a training came to.

    Args:
        run: the run folder.
        task: what was trained.
        steps: updates done.
        seconds: time from the start of preparation, over all processes of the run.
        progress: how far it got.
        baseline: the metrics of a trivial model on the validation data; None without any.
        is_cut_short: whether its time ended it before its steps or its patience did.
    """

    run: Path
    task: Task
    steps: int
    seconds: float
    progress: Progress
    baseline: Metrics | None
    is_cut_short: bool

    @property
    def best(self) -> Mapping[str, float | None] | None:
        """The figures of the best validation; None without validation data."""
        return self.progress.best

    @property
    def count_per_second(self) -> float:
        """Predictions over the time spent in training steps."""
        return self.progress.count / max(self.progress.train_seconds, 1e-9)


def run_training(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Mapping[str, object] | None = None,
    is_quiet: bool = False,
) -> Summary:
    """Trains as the settings say and returns what it came to.

    Args:
        config: the settings; None for the recipe python-docs.
        out: the run folder; None for a new one under runs/.
        resume: whether to go on with the run in `out`.
        overrides: with `resume`, settings to change.
        is_quiet: whether no progress is shown.

    Raises:
        ConfigError: settings that cannot be used, or that a resumed run must keep.
        CheckpointError: with `resume`, no run, or none of its checkpoints is intact.
        RunBusyError: the run folder holds a run already, or another process trains in it.
        LmtrainError: the others of `lmtrain.errors`, from what training calls.
    """
    began = time.monotonic()
    if resume and out is None:
        raise ConfigError("resume: which run?", "try: lmtrain train --resume RUN")
    config = None if resume else config or configuration.load("python-docs")
    if out is not None:
        folder.require_unicode(Path(out))
    with out_of_memory_explained(_SMALLER), joined() as ranks:
        run = Path(ranks.agreed(lambda: str(out or new_run(config))))
        # Only the first process shows what training does.
        is_quiet = is_quiet or not ranks.is_first
        if config is None:
            return _resume(run, overrides or {}, ranks, began=began, is_quiet=is_quiet)
        return _start(run, config, ranks, began=began, is_quiet=is_quiet)


def new_run(config: Config | None) -> Path:
    """A run folder for these settings that is not there yet."""
    config = config or configuration.load("python-docs")
    return folder.new_run(config.data.train[0], config.model.cell.rpartition(":")[2])


def _start(run: Path, config: Config, ranks: Ranks, *, began: float, is_quiet: bool) -> Summary:
    # A wrong device is reported before a long text is read.
    device.choose(config.train.device)
    ranks.agreed(lambda: folder.refuse_used(run))
    if not is_quiet and screen.STDERR.isatty():
        screen.note(f"reading {', '.join(config.data.train)}")
    data = _read(config, ranks)
    task = prepared(config, data, ranks.shard)

    def claim() -> None:
        contents = {name: text.encode() for name, text in _texts(task).items()}
        for name, content in contents.items():
            untrusted.require_readable(name, content)
        files.require_space(run, 2 * _checkpoint_bytes(task))
        held.enter_context(files.locked(run / ".lock", f"the run {run}"))
        folder.refuse_used(run)
        files.remove_leftovers(run)
        for name, content in contents.items():
            files.write(run / name, content)

    with contextlib.ExitStack() as held:
        ranks.agreed(claim)
        return _train(run, task, None, ranks, began=began, is_quiet=is_quiet)


def _texts(task: Task) -> dict[str, str]:
    """The settings and the vocabularies, which a run and its checkpoints hold, by file name."""
    return {folder.SETTINGS: configuration.to_toml(task.config), **task.data.files()}


@dataclass(frozen=True)
class _SentFiles:
    """Vocabularies that another process sent.

    Args:
        files: their contents by the name of the file.
    """

    files: Mapping[str, str]

    def text(self, name: str) -> str:
        return self.files[name]


def _read(config: Config, ranks: Ranks) -> Data:
    """The data, which the first process reads and the others find cached."""
    task, found = task_of(config), []

    def read() -> list[Any]:
        data = task.read(config)
        found.append(data)
        return [data.files(), data.references()] if ranks.size > 1 else []

    sent = ranks.agreed(read, is_long=True)
    if not found:
        found.append(task.find(config, task.restore(_SentFiles(sent[0]), config), sent[1]))
    # Another machine may have to read the text, too.
    ranks.wait_for_all()
    return found[0]


def prepared(config: Config, data: Data, shard: Shard) -> Task:
    """The task with its model on its device; sets threads and memory of this process.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
        MachineError: the device is not there.
        TextError: the data is too small for a batch.
    """
    place = device.choose(config.train.device)
    device.set_threads(config.train.threads, launched.local_size())
    device.keep_memory()
    if config.train.deterministic:
        device.make_deterministic()
    kind = task_of(config)
    model = kind.build(config, data, is_shared=shard.size > 1).to(place)
    task = kind(config, data, model, shard)
    # The first weights are the same in all processes; dropout is not.
    if shard.rank:
        task.generator.generator = device.generator(config.train.seed, shard.rank)
    return task


def _checkpoint_bytes(task: Task) -> int:
    """Roughly what a checkpoint takes: fp32 weights, what the update rule and an average keep."""
    rule = task.config.optimizer
    copies = 1 + (rule.average is not None) + 2 * (rule.name != "sgd")
    parameters: int = task.model.num_parameters
    return 4 * copies * parameters


def _resume(
    run: Path, overrides: Mapping[str, object], ranks: Ranks, *, began: float, is_quiet: bool
) -> Summary:
    def claim() -> int | None:
        # The step that training goes on from; None where none was saved yet.
        if checkpoint.is_checkpoint(run):
            raise CheckpointError(
                f"{run} is a checkpoint, not a run",
                "give the folder that has it among its checkpoints/",
            )
        if not folder.is_begun(run):
            raise CheckpointError(f"{run} is no run that can be resumed: it has no checkpoint")
        files.refuse_links(run, (".lock", "checkpoints", "events", "metrics.jsonl", "config.toml"))
        held.enter_context(files.locked(run / ".lock", f"the run {run}"))
        files.remove_leftovers(run)
        files.remove_leftovers(run / "checkpoints")
        if not checkpoint.steps(run):
            return None
        try:
            saved, problems = checkpoint.newest_intact(run)
        except UnreadableError as error:
            advice = "it may be whole; remove it to go on from an older one"
            raise UnreadableError(str(error), advice) from error
        for problem in problems:
            screen.note(f"skipped: {problem}")
        # What is newer is damaged; training makes these steps again.
        step: int = saved.state["step"]
        checkpoint.remove_after(run, step)
        return step

    with contextlib.ExitStack() as held:
        step = ranks.agreed(claim)
        if step is None:
            task = _begun(run, overrides, ranks)
            return _train(run, task, None, ranks, began=began, is_quiet=is_quiet)
        saved = checkpoint.read(checkpoint.folder(run, step))
        config = _resumed_config(saved, overrides)
        kind = task_of(config)
        data = kind.restore(saved, config)
        saved.require_shapes(weight_shapes(kind, config, data))
        data = kind.find(config, data, saved.state["data"])
        ranks.wait_for_all()
        task = prepared(config, data, ranks.shard)
        return _train(run, task, saved, ranks, began=began, is_quiet=is_quiet)


def _begun(run: Path, overrides: Mapping[str, object], ranks: Ranks) -> Task:
    """A run that ended before its first checkpoint, from its beginning.

    Raises:
        CheckpointError: its data is not what it was.
    """
    path = run / folder.SETTINGS
    config = configuration.parse(untrusted.text(path), str(path), overrides)
    data = _read(config, ranks)

    def compare() -> None:
        for name, text in data.files().items():
            if not (run / name).exists():
                files.write(run / name, text.encode())
            if text != untrusted.text(run / name):
                raise CheckpointError(f"the text of {run} is not what it was")

    ranks.agreed(compare)
    return prepared(config, data, ranks.shard)


def _resumed_config(saved: checkpoint.Checkpoint, overrides: Mapping[str, object]) -> Config:
    text, origin = saved.text("config.toml"), str(saved.path / "config.toml")
    try:
        stored = configuration.parse(text, origin)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    # What the run holds may mean nothing with another task, and would be blamed.
    is_same_task = overrides.get("data.task", stored.data.task) == stored.data.task
    config = configuration.parse(text, origin, overrides) if is_same_task else stored
    if not is_same_task or _kept(config) != _kept(stored):
        raise ConfigError(
            "a resumed run keeps its task, text, model, batch size, windows and seed",
            "what may change: epochs, steps, seconds, learning rate and the like",
        )
    return config


def _kept(config: Config) -> tuple[object, ...]:
    """What says which text a step sees, and what a resumed run therefore goes on with."""
    train = config.train
    windows = (train.batch_size, train.seq_len, train.random_seq_len)
    return config.data, config.model, windows, train.seed


def _train(
    run: Path,
    task: Task,
    saved: checkpoint.Checkpoint | None,
    ranks: Ranks,
    *,
    began: float,
    is_quiet: bool,
) -> Summary:
    config = task.config
    first_step = saved.state["step"] if saved else None
    surroundings = {
        "device": device.of(task.model).type,
        "processes": ranks.size,
        "threads": device.threads(),
        "precision": "bf16" if uses_bf16(config.train) else "fp32",
    }
    ranks.agreed(lambda: folder.record_start(run, first_step, **surroundings))
    limits = Limits(config.train, task.steps_per_epoch, ranks, began)
    log = NullLogger()
    if ranks.is_first:
        steps = {"first_step": first_step or 0, "total_steps": limits.total_steps}
        log = Logger(run, task, **steps, is_quiet=is_quiet)
    with contextlib.closing(log):
        _introduce(run, task, surroundings, log)
        trainer = Trainer(
            task,
            _optimizer(task, _schedules(task), limits.total_steps),
            Average(
                task.model,
                kind=config.optimizer.average,
                decay=config.optimizer.average_decay,
                patience=config.optimizer.average_patience,
            ),
            limits,
            Checkpoints(
                run,
                config.train.keep_checkpoints,
                Documents(_texts(task), task.data.references()),
                ranks,
            ),
            log,
            ranks,
        )
        if saved:
            trainer.restore(saved)
        trainer.train()
        if trainer.optimizer.step == first_step and trainer.is_cut_short:
            log.say(
                f"no time is left for a step: train.max_seconds = {config.train.max_seconds:g}, of "
                f"which {limits.elapsed:,.1f} s were used\n"
                "  more in all: --max-seconds N; no limit: --set train.max_seconds=none"
            )
    return _summary(run, trainer)


def _introduce(run: Path, task: Task, surroundings: Mapping[str, Any], log: NullLogger) -> None:
    size = surroundings["processes"]
    together = f"{size} processes, " if size > 1 else ""
    log.say(
        f"{task.described()}; {task.config.model.cell}, "
        f"{task.model.num_parameters:,} parameters, {surroundings['device']}, {together}"
        f"{surroundings['threads']} threads, {surroundings['precision']}; run {run}"
    )
    if task.notice:
        log.say(task.notice)
    if surroundings["device"] == "cpu" and (reason := library.absence()):
        log.say(f"recurrent layers run on torch alone: {reason}")


def _schedules(task: Task) -> Callable[[int], Schedule]:
    rule = task.config.optimizer
    return lambda steps: schedule(
        rule.schedule,
        peak=rule.learning_rate,
        total_steps=steps,
        steps_per_epoch=task.steps_per_epoch,
        warmup_steps=rule.warmup_steps,
        decay=rule.decay,
        decay_after_epochs=rule.decay_after_epochs,
    )


def _optimizer(task: Task, schedules: Callable[[int], Schedule], total_steps: int) -> Optimizer:
    rule = task.config.optimizer
    return Optimizer(
        task.model,
        name=rule.name,
        weight_decay=rule.weight_decay,
        clip=rule.clip,
        max_grad_norm=rule.max_grad_norm,
        schedule=schedules,
        total_steps=total_steps,
    )


def _summary(run: Path, trainer: Trainer) -> Summary:
    return Summary(
        run,
        trainer.task,
        trainer.optimizer.step,
        trainer.limits.elapsed,
        trainer.progress,
        trainer.task.baseline("valid"),
        trainer.is_cut_short,
    )


def find_learning_rate(config: Config, *, first: float, last: float, steps: int) -> RateCurve:
    """The losses of a new model while its learning rate rises; nothing is kept of it.

    Args:
        config: the settings.
        first: the first learning rate, above 0.
        last: the last, above the first.
        steps: updates at most.

    Raises:
        DivergedError: the loss is not finite from the start.
        LmtrainError: the others of `lmtrain.errors`, from what training calls.
    """
    with out_of_memory_explained(_SMALLER):
        task = prepared(config, task_of(config).read(config), Shard())
        if task.notice:
            screen.note(task.notice)
        rates = rising(first, last, steps)
        optimizer = _optimizer(task, lambda _: rates, steps)
        return range_test(task, Stepper(task, optimizer, Ranks(), screen.note), steps)
