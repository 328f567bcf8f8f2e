"""Starting and resuming runs: from settings to folder, data, model and training loop."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain import checkpoint, device, files, screen, torchrun, untrusted
from lmtrain import config as configuration
from lmtrain.errors import CheckpointError, ConfigError, UnreadableError, map_out_of_memory
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.native import library
from lmtrain.model.lookup import allow_sparse_gradients
from lmtrain.schema import Config, canonical
from lmtrain.tasks.base import Data, Metrics, Shard, Task, uses_bf16, weight_shapes
from lmtrain.tasks.registry import task_of
from lmtrain.training import run_folder
from lmtrain.training.average import WeightAverage
from lmtrain.training.checkpoints import Checkpoints, RunFiles
from lmtrain.training.limits import Limits
from lmtrain.training.logger import Logger, NullLogger
from lmtrain.training.optimizer import Optimizer, Schedule, schedule
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks, connect
from lmtrain.training.rate_finder import RateCurve, geometric_schedule, range_test
from lmtrain.training.step import Stepper
from lmtrain.training.trainer import Trainer

_MEMORY_ADVICE = "try: a smaller --batch-size, --seq-len, --hidden-size or --vocab-size"


@dataclass(frozen=True)
class Summary:
    """The result of a training.

    Args:
        run: the run folder.
        task: the task with its trained model.
        steps: updates done.
        seconds: duration of the run, including preparation and time before it was resumed.
        progress: the progress of the training.
        baseline: metrics of a trivial model on the validation data; None without validation data.
        is_out_of_time: whether `max_seconds` ended it before its steps or its patience.
    """

    run: Path
    task: Task
    steps: int
    seconds: float
    progress: Progress
    baseline: Metrics | None
    is_out_of_time: bool

    @property
    def best(self) -> Mapping[str, float | None] | None:
        """Metrics of the best validation, by name; None without validation data."""
        return self.progress.best

    @property
    def count_per_second(self) -> float:
        """Predictions per second of training steps."""
        return self.progress.count / max(self.progress.train_seconds, 1e-9)


def run_training(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Mapping[str, object] | None = None,
    is_quiet: bool = False,
) -> Summary:
    """Trains a model and returns a summary.

    Args:
        config: the settings; None for the recipe python-docs.
        out: the run folder; None for a new one under runs/.
        resume: whether to resume the run in `out`.
        overrides: with `resume`, settings to change.
        is_quiet: whether to hide progress.

    Raises:
        ConfigError: invalid settings, settings that a resumed run cannot change, `config` with
            `resume`, or `overrides` without it.
        CheckpointError: with `resume`, there is no run, or none of its checkpoints is intact.
        RunBusyError: the run folder is not empty, or another process trains in it.
        LmtrainError: other errors of training, see `lmtrain.errors`.
    """
    start_time = time.monotonic()
    if resume and out is None:
        raise ConfigError("resume needs a run folder", "try: lmtrain train --resume RUN")
    if resume and config is not None:
        raise ConfigError("resume takes no config", "change settings by overrides")
    if overrides and not resume:
        raise ConfigError("overrides need resume", "give them to lmtrain.load_config instead")
    if not resume:
        config = config or configuration.load(configuration.DEFAULT_RECIPE)
    if out is not None:
        run_folder.require_unicode(Path(out))

    def choose_path() -> str:
        return str(out if config is None else out or new_run_path(config))

    with map_out_of_memory(_MEMORY_ADVICE), connect() as ranks:
        run = Path(ranks.run_on_rank_zero(choose_path))
        is_quiet = is_quiet or not ranks.is_rank_zero
        if config is None:
            return _resume(run, overrides or {}, ranks, start_time=start_time, is_quiet=is_quiet)
        return _start(run, config, ranks, start_time=start_time, is_quiet=is_quiet)


def new_run_path(config: Config) -> Path:
    """The path of a new run folder for these settings."""
    return run_folder.new_path(config.data.train[0], config.model.cell.rpartition(":")[2])


def _start(
    run: Path, config: Config, ranks: Ranks, *, start_time: float, is_quiet: bool
) -> Summary:
    # Checked before a long text is read.
    device.choose(config.train.device)
    ranks.run_on_rank_zero(lambda: run_folder.require_new(run))
    if not is_quiet and screen.STDERR.isatty():
        screen.note(f"reading {', '.join(config.data.train)}")
    data = _read(config, ranks)
    task = _new_task(config, data, ranks.shard, is_quiet=is_quiet)

    def create_folder() -> None:
        contents = {name: text.encode() for name, text in _texts(task).items()}
        for name, content in contents.items():
            untrusted.require_within_limit(name, content)
        files.require_space(run, 2 * _checkpoint_bytes(task))
        locks.enter_context(files.locked(run / ".lock", f"the run {run}"))
        run_folder.require_new(run)
        files.remove_leftovers(run)
        for name, content in contents.items():
            files.write(run / name, content)

    with contextlib.ExitStack() as locks:
        ranks.run_on_rank_zero(create_folder)
        return _train(run, task, None, ranks, start_time=start_time, is_quiet=is_quiet)


def _texts(task: Task) -> dict[str, str]:
    """Content of config.toml and of the vocabularies, by file name."""
    return {run_folder.CONFIG: configuration.to_toml(task.config), **task.data.files()}


@dataclass(frozen=True)
class _ReceivedFiles:
    """Vocabularies that rank 0 sent.

    Args:
        files: their content by file name.
    """

    files: Mapping[str, str]

    def text(self, name: str) -> str:
        return self.files[name]


def _read(config: Config, ranks: Ranks) -> Data:
    """The data: rank 0 reads it, the other ranks load it from the cache."""
    task: type[Task] = task_of(config)
    data: Data | None = None

    def read() -> list[Any]:
        nonlocal data
        data = task.read(config)
        return [data.files(), data.references()] if ranks.size > 1 else []

    received = ranks.run_on_rank_zero(read, is_slow=True)
    if data is None:
        vocabularies, references = received
        restored = task.restore(_ReceivedFiles(vocabularies), config)
        data = task.find(config, restored, references)
    # Ranks on other machines may have to read the text, too.
    ranks.barrier()
    return data


def build_task(config: Config, data: Data, shard: Shard) -> Task:
    """The task with a new model on its device; configures torch in this process.

    Args:
        config: the settings.
        data: the data of the task.
        shard: the rows of each batch that this process computes.

    Raises:
        ConfigError: the cell is unknown, or sizes do not match.
        MachineError: the device is not available.
        TextError: the data is too short for a batch.
    """
    target_device = device.choose(config.train.device)
    device.set_threads(config.train.threads, torchrun.local_world_size())
    device.keep_memory()
    if config.train.deterministic:
        device.make_deterministic()
    task_class = task_of(config)
    model = task_class.build(config, data).to(target_device)
    # Momentum changes every row at every step, and processes exchange dense gradients.
    if config.optimizer.name == "sgd" and shard.size == 1:
        allow_sparse_gradients(model)
    task = task_class(config, data, model, shard)
    # Ranks start with the same weights but draw different dropout masks.
    if shard.rank:
        task.generator.generator = device.generator(config.train.seed, shard.rank)
    return task


def _new_task(config: Config, data: Data, shard: Shard, *, is_quiet: bool = False) -> Task:
    """The task of a new training, with the initial weights that depend on data.

    Raises:
        ConfigError: as `build_task`, or vectors of another size.
        TextError: as `build_task`, or vectors that cannot be read.
    """
    task = build_task(config, data, shard)
    if (summary := task.initialize(config, task.model, data)) and not is_quiet:
        screen.note(summary)
    return task


def _checkpoint_bytes(task: Task) -> int:
    """Approximate size of a checkpoint: fp32 weights, their average and the optimizer state."""
    optimizer = task.config.optimizer
    copies = 1 + (optimizer.average is not None) + 2 * (optimizer.name != "sgd")
    parameters: int = task.model.num_parameters
    return 4 * copies * parameters


def _resume(
    run: Path, overrides: Mapping[str, object], ranks: Ranks, *, start_time: float, is_quiet: bool
) -> Summary:
    def lock_and_find_step() -> int | None:
        # None if the run has no checkpoint.
        if checkpoint.is_checkpoint(run):
            raise CheckpointError(
                f"{run} is a checkpoint, not a run",
                "give the run folder, which contains checkpoints/",
            )
        if not run_folder.is_resumable(run):
            raise CheckpointError(f"cannot resume {run}: it is not a run folder")
        files.refuse_links(run, (".lock", "checkpoints", "events", "metrics.jsonl", "config.toml"))
        locks.enter_context(files.locked(run / ".lock", f"the run {run}"))
        files.remove_leftovers(run)
        files.remove_leftovers(run / "checkpoints")
        if not checkpoint.steps(run):
            return None
        try:
            saved, problems = checkpoint.newest_intact(run)
        except UnreadableError as error:
            advice = "it may be intact; to resume from an older checkpoint, delete it"
            raise UnreadableError(str(error), advice) from error
        for problem in problems:
            screen.note(f"checkpoint skipped: {problem}")
        # Later checkpoints are damaged; training repeats their steps.
        step: int = saved.state["step"]
        checkpoint.remove_after(run, step)
        return step

    with contextlib.ExitStack() as locks:
        step = ranks.run_on_rank_zero(lock_and_find_step, is_slow=True)
        if step is None:
            task = _restart(run, overrides, ranks, is_quiet=is_quiet)
            return _train(run, task, None, ranks, start_time=start_time, is_quiet=is_quiet)
        saved = checkpoint.read(checkpoint.folder(run, step))
        config = _resumed_config(saved, overrides)
        task_class = task_of(config)
        data = task_class.restore(saved, config)
        saved.require_shapes(weight_shapes(task_class, config, data))
        data = task_class.find(config, data, saved.state["data"])
        ranks.barrier()
        task = build_task(config, data, ranks.shard)
        return _train(run, task, saved, ranks, start_time=start_time, is_quiet=is_quiet)


def _restart(run: Path, overrides: Mapping[str, object], ranks: Ranks, *, is_quiet: bool) -> Task:
    """The task of a run that ended before its first checkpoint, as it started.

    Raises:
        CheckpointError: the data has changed.
        ConfigError: settings that it cannot change.
    """
    path = run / run_folder.CONFIG
    text = untrusted.text(path)
    config = _changed(configuration.parse(text, str(path)), text, str(path), overrides)
    data = _read(config, ranks)

    def compare() -> None:
        for name, text in data.files().items():
            if not (run / name).exists():
                files.write(run / name, text.encode())
            if text != untrusted.text(run / name):
                raise CheckpointError(f"the data of {run} has changed since it started")

    ranks.run_on_rank_zero(compare)
    task = _new_task(config, data, ranks.shard, is_quiet=is_quiet)
    # The run begins now, with these settings.
    content = configuration.to_toml(task.config).encode()
    ranks.run_on_rank_zero(lambda: files.write(path, content))
    return task


def _resumed_config(saved: checkpoint.Checkpoint, overrides: Mapping[str, object]) -> Config:
    text, origin = saved.text("config.toml"), str(saved.path / "config.toml")
    try:
        stored = configuration.parse(text, origin)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return _changed(stored, text, origin, overrides)


def _changed(stored: Config, text: str, origin: str, overrides: Mapping[str, object]) -> Config:
    """The stored settings, parsed from a text, with those that a resumed run changes.

    Raises:
        ConfigError: it cannot change one of them.
    """
    # With another task, other settings of the run could be reported as invalid instead.
    task = stored.data.task
    is_same_task = canonical(overrides.get("data.task", task), (task,)) == task
    config = configuration.parse(text, origin, overrides) if is_same_task else stored
    before, after = _fixed_settings(stored), _fixed_settings(config)
    changed = [path for path, value in after.items() if before.get(path) != value]
    if not is_same_task or changed:
        raise ConfigError(
            f"a resumed run cannot change {', '.join(changed) or 'data.task'}",
            "it can change: epochs, steps, seconds, learning rate and others",
        )
    return config


def _fixed_settings(config: Config) -> dict[str, object]:
    """The settings by path that determine the model and the batch of each step."""
    sections = config.model_dump()
    batches = {"batch_size", "seq_len", "random_seq_len", "seed"}
    fixed = {"data": sections["data"].keys(), "model": sections["model"].keys(), "train": batches}
    return {f"{name}.{key}": sections[name][key] for name, keys in fixed.items() for key in keys}


def _train(
    run: Path,
    task: Task,
    saved: checkpoint.Checkpoint | None,
    ranks: Ranks,
    *,
    start_time: float,
    is_quiet: bool,
) -> Summary:
    config = task.config
    first_step = saved.state["step"] if saved else None
    environment = {
        "device": device.of(task.model).type,
        "processes": ranks.size,
        "threads": device.threads(),
        "precision": "bf16" if uses_bf16(config.train) else "fp32",
        "kernels": kernels_for(next(task.model.parameters())) or "torch",
    }
    ranks.run_on_rank_zero(lambda: run_folder.record_start(run, first_step, **environment))
    limits = Limits(config.train, task.steps_per_epoch, ranks, start_time)
    log = NullLogger()
    if ranks.is_rank_zero:
        steps = {"first_step": first_step or 0, "total_steps": limits.total_steps}
        log = Logger(run, task, **steps, is_quiet=is_quiet)
    with contextlib.closing(log):
        _log_start(run, task, environment, log)
        trainer = Trainer(
            task,
            _optimizer(task, _schedule_factory(task), limits.total_steps),
            WeightAverage(
                task.model,
                method=config.optimizer.average,
                decay=config.optimizer.average_decay,
                patience=config.optimizer.average_patience,
            ),
            limits,
            Checkpoints(
                run,
                config.train.keep_checkpoints,
                RunFiles(_texts(task), task.data.references()),
                ranks,
            ),
            log,
            ranks,
        )
        if saved:
            trainer.restore(saved)
        trainer.train()
        if trainer.optimizer.step == first_step and trainer.is_out_of_time:
            log.info(
                f"no time left to train: {limits.elapsed:,.1f} s of train.max_seconds = "
                f"{config.train.max_seconds:g} are used\n"
                "  try: --max-seconds N for more in total, or --set train.max_seconds=none"
            )
        elif trainer.optimizer.step == first_step:
            log.info(f"nothing left to train: the run has made its {first_step:,} steps")
    return _summary(run, trainer)


def _log_start(run: Path, task: Task, environment: Mapping[str, Any], log: NullLogger) -> None:
    size = environment["processes"]
    processes = f"{size} processes, " if size > 1 else ""
    threads = "1 thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    log.info(
        f"{task.described()}; {task.config.model.cell}, "
        f"{task.model.num_parameters:,} parameters, {environment['device']}, {processes}"
        f"{threads}, {environment['precision']}; run {run}"
    )
    if task.notice:
        log.info(task.notice)
    if environment["device"] == "cpu" and (reason := library.unavailable_reason()):
        log.info(f"warning: recurrent layers run without native kernels: {reason}")


def _schedule_factory(task: Task) -> Callable[[int], Schedule]:
    """A function from the total number of steps to the schedule of the settings."""
    optimizer = task.config.optimizer
    return lambda total_steps: schedule(
        optimizer.schedule,
        peak=optimizer.learning_rate,
        total_steps=total_steps,
        steps_per_epoch=task.steps_per_epoch,
        warmup_steps=optimizer.warmup_steps,
        decay=optimizer.decay,
        decay_after_epochs=optimizer.decay_after_epochs,
    )


def _optimizer(
    task: Task, schedule_factory: Callable[[int], Schedule], total_steps: int
) -> Optimizer:
    optimizer = task.config.optimizer
    return Optimizer(
        task.model,
        name=optimizer.name,
        weight_decay=optimizer.weight_decay,
        clip=optimizer.clip,
        max_grad_norm=optimizer.max_grad_norm,
        max_embedding_grad_norm=optimizer.max_embedding_grad_norm,
        schedule=schedule_factory,
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
        trainer.is_out_of_time,
    )


def find_learning_rate(config: Config, *, first: float, last: float, steps: int) -> RateCurve:
    """The losses of a learning-rate range test with a new model; nothing is saved.

    Args:
        config: the settings.
        first: the first learning rate, above 0.
        last: the last learning rate, above `first`.
        steps: maximum number of updates.

    Raises:
        DivergedError: the first losses are not finite.
        LmtrainError: other errors of training, see `lmtrain.errors`.
    """
    with map_out_of_memory(_MEMORY_ADVICE):
        task = _new_task(config, task_of(config).read(config), Shard())
        if task.notice:
            screen.note(task.notice)
        increasing = geometric_schedule(first, last, steps)
        optimizer = _optimizer(task, lambda _: increasing, steps)
        return range_test(task, Stepper(task, optimizer, Ranks(), screen.note), steps)
