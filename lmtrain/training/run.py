"""A run from its settings: its folder, texts, model and loop; its start and its resuming."""

import contextlib
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmtrain
from lmtrain import assembly, checkpoint, files, screen, untrusted
from lmtrain import config as configuration
from lmtrain.errors import CheckpointError, ConfigError, MachineError, RunBusyError
from lmtrain.evaluation import unigram_loss
from lmtrain.kernels.native import library
from lmtrain.schema import Config
from lmtrain.text import corpus
from lmtrain.text.tokenizer import Tokenizer
from lmtrain.training import parts
from lmtrain.training.average import Average
from lmtrain.training.monitor import Monitor
from lmtrain.training.rate_finder import RateCurve, range_test, rising
from lmtrain.training.trainer import Trainer, total_steps

_SETTINGS, _TOKENIZER = "config.toml", "tokenizer.json"


@dataclass(frozen=True)
class Summary:
    """What a training came to.

    Args:
        run: the run folder.
        steps: updates done.
        tokens: tokens trained on.
        seconds: time from the start of preparation, over all processes of the run.
        tokens_per_second: trained tokens over the time spent in training steps.
        valid_loss: nats a token of the best validation; None without validation text.
        best_step: the step of the best validation.
        unigram_loss: nats a token of the validation text under word frequencies.
        parameters: trained numbers.
        vocab_size: tokens in the vocabulary.
        chars_per_token: characters of the validation text over its tokens.
    """

    run: Path
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    valid_loss: float | None
    best_step: int | None
    unigram_loss: float | None
    parameters: int
    vocab_size: int
    chars_per_token: float


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
    with _out_of_memory_explained():
        if resume:
            if out is None:
                raise ConfigError("resume: which run?", "try: lmtrain train --resume RUN")
            return _resume(Path(out), overrides or {}, began=began, is_quiet=is_quiet)
        config = config or configuration.load("python-docs")
        run = Path(out) if out is not None else _new_run(config)
        return _start(run, config, began=began, is_quiet=is_quiet)


def _start(run: Path, config: Config, *, began: float, is_quiet: bool) -> Summary:
    _refuse_used(run)
    if not is_quiet and screen.STDERR.isatty():
        screen.note(f"reading {', '.join(config.data.train)}")
    ready = parts.get_ready(config, *assembly.prepare(config))
    files.require_space(run, 2 * parts.checkpoint_bytes(config, ready.model))
    with files.locked(run / ".lock", f"the run {run}"):
        _refuse_used(run)
        files.remove_leftovers(run)
        files.write(run / _SETTINGS, configuration.to_toml(config).encode())
        files.write(run / _TOKENIZER, ready.tokenizer.to_json().encode())
        return _train(run, ready, None, began=began, is_quiet=is_quiet)


def _refuse_used(run: Path) -> None:
    with files.explained(run, "look into"):
        is_used = run.exists() and (not run.is_dir() or any(map(_is_used, run.iterdir())))
    if is_used:
        resumable = f"go on with it: lmtrain train --resume {run}, or "
        raise RunBusyError(
            f"{run} is used already",
            (resumable if _is_begun(run) else "") + "train elsewhere: --out DIR",
        )


def _is_used(entry: Path) -> bool:
    # What a process that was killed at its very start may leave.
    return entry.name != ".lock" and not files.is_leftover(entry)


def _is_begun(run: Path) -> bool:
    return bool(checkpoint.steps(run)) or (run / _SETTINGS).is_file()


def _resume(run: Path, overrides: Mapping[str, object], *, began: float, is_quiet: bool) -> Summary:
    if not _is_begun(run):
        raise CheckpointError(f"{run} is no run that can be resumed: it has no checkpoint")
    files.refuse_links(run, (".lock", "checkpoints", "events", "metrics.jsonl", _SETTINGS))
    with files.locked(run / ".lock", f"the run {run}"):
        files.remove_leftovers(run)
        files.remove_leftovers(run / "checkpoints")
        if not checkpoint.steps(run):
            return _train(run, _begun(run, overrides), None, began=began, is_quiet=is_quiet)
        saved, problems = checkpoint.newest_intact(run)
        for problem in problems:
            screen.note(f"skipped: {screen.printable(problem)}")
        # What is newer is damaged; training makes these steps again.
        checkpoint.remove_after(run, saved.state["step"])
        config = _resumed_config(saved, overrides)
        tokenizer = Tokenizer.from_json(saved.text("tokenizer.json"))
        saved.require_shapes(assembly.weight_shapes(config, tokenizer.vocab_size))
        texts = assembly.find_texts(saved.state["texts"], config, tokenizer)
        ready = parts.get_ready(config, tokenizer, texts)
        return _train(run, ready, saved, began=began, is_quiet=is_quiet)


def _begun(run: Path, overrides: Mapping[str, object]) -> parts.Ready:
    """A run that ended before its first checkpoint, from its beginning.

    Raises:
        CheckpointError: its text is not what it was.
    """
    path = run / _SETTINGS
    config = configuration.parse(untrusted.text(path), str(path), overrides)
    tokenizer, texts = assembly.prepare(config)
    path = run / _TOKENIZER
    if not path.exists():
        files.write(path, tokenizer.to_json().encode())
    if tokenizer.to_json() != untrusted.text(path):
        raise CheckpointError(f"the text of {run} is not what it was")
    return parts.get_ready(config, tokenizer, texts)


def _resumed_config(saved: checkpoint.Checkpoint, overrides: Mapping[str, object]) -> Config:
    text, origin = saved.text("config.toml"), str(saved.path / "config.toml")
    try:
        stored = configuration.parse(text, origin)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    config = configuration.parse(text, origin, overrides)
    if (config.data, config.model) != (stored.data, stored.model) or (
        config.train.batch_size,
        config.train.seed,
    ) != (stored.train.batch_size, stored.train.seed):
        raise ConfigError(
            "a resumed run keeps its text, its model, its batch size and its seed",
            "what may change: epochs, steps, seconds, learning rate and the like",
        )
    return config


def _train(
    run: Path,
    ready: parts.Ready,
    saved: checkpoint.Checkpoint | None,
    *,
    began: float,
    is_quiet: bool,
) -> Summary:
    config, model, batches = ready.config, ready.model, ready.batches
    train_text, valid_text = ready.texts["train"], ready.texts.get("valid")
    _write_run_file(run, ready, saved)
    monitor = Monitor(
        run,
        first_step=saved.state["step"] if saved else 0,
        total_steps=total_steps(config.train, batches),
        log_every=config.train.log_every,
        chars_per_token=train_text.characters / len(train_text),
        settings=_flat(config),
        is_quiet=is_quiet,
    )
    with contextlib.closing(monitor):
        monitor.say(
            f"{len(train_text):,} tokens, vocabulary {ready.tokenizer.vocab_size:,}; "
            f"{config.model.cell}, {model.num_parameters:,} parameters, "
            f"{model.embedding.device.type}, {ready.threads} threads, {_precision(config)}; "
            f"run {run}"
        )
        if model.embedding.device.type == "cpu" and (reason := library.absence()):
            monitor.say(f"recurrent layers run on torch alone: {reason}")
        trainer = Trainer(
            run,
            config.train,
            model=model,
            batches=batches,
            optimizer=parts.build_optimizer(config, model, parts.build_schedule(config, batches)),
            average=Average(
                model,
                kind=config.optimizer.average,
                decay=config.optimizer.average_decay,
                patience=config.optimizer.average_patience,
            ),
            monitor=monitor,
            validate=parts.validation(ready, valid_text) if valid_text else None,
            write=parts.writing(ready),
            documents=(
                configuration.to_toml(config),
                ready.tokenizer.to_json(),
                assembly.references(ready.texts),
            ),
            began=began,
        )
        if saved:
            trainer.restore(saved)
        trainer.train()
    return _summary(run, ready, trainer, time.monotonic() - began)


def _summary(run: Path, ready: parts.Ready, trainer: Trainer, seconds: float) -> Summary:
    progress, valid_text = trainer.progress, ready.texts.get("valid")
    vocab_size = ready.tokenizer.vocab_size
    unigram, chars_per_token = None, 0.0
    if valid_text:
        unigram = unigram_loss(ready.texts["train"].ids, valid_text.ids, vocab_size)
        chars_per_token = valid_text.characters / len(valid_text)
    return Summary(
        run=run,
        steps=trainer.optimizer.step,
        tokens=progress.tokens,
        seconds=progress.seconds + seconds,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        valid_loss=progress.best_loss,
        best_step=progress.best_step,
        unigram_loss=unigram,
        parameters=ready.model.num_parameters,
        vocab_size=vocab_size,
        chars_per_token=chars_per_token,
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
    with _out_of_memory_explained():
        ready = parts.get_ready(config, *assembly.prepare(config))
        optimizer = parts.build_optimizer(config, ready.model, rising(first, last, steps))
        return range_test(ready.model, ready.batches, optimizer, steps)


def _precision(config: Config) -> str:
    """The precision of training steps on this machine."""
    return "bf16" if assembly.is_mixed(config) else "fp32"


def _write_run_file(run: Path, ready: parts.Ready, saved: checkpoint.Checkpoint | None) -> None:
    threads = ready.threads
    path = run / "run.json"
    entry = {
        "lmtrain": lmtrain.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "argv": sys.argv,
        "device": ready.model.embedding.device.type,
        "threads": threads,
        "precision": _precision(ready.config),
        "from_step": saved.state["step"] if saved else 0,
        "time": round(time.time(), 3),
    }
    starts = checkpoint.run_starts(path)
    for what in ("torch", "device", "threads", "precision"):
        if saved and starts and (before := starts[-1].get(what)) != (now := entry[what]):
            then = screen.printable(str(before))
            screen.note(f"not bit for bit as before: {what} {then} then, {now} now")
    checkpoint.write_run_starts(path, [*starts, entry])


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, part in config.model_dump(mode="json").items()
        for name, value in part.items()
    }


def _new_run(config: Config) -> Path:
    place = config.data.train[0]
    stem = place if corpus.named(place) else Path(place).name.partition(".")[0]
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "text"
    taken = {entry.name for entry in Path("runs").glob("*")}
    stem = f"{name[:60]}-{config.model.cell}"
    number = next(n for n in range(1, len(taken) + 2) if f"{stem}-{n}" not in taken)
    return Path("runs") / f"{stem}-{number}"


@contextlib.contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "allocate" in text or "out of memory" in text:
            raise MachineError(
                "out of memory: " + text.splitlines()[0][:120] if text else "out of memory",
                "try: a smaller --batch-size, --seq-len, --hidden-size or --vocab-size",
            ) from error
        raise
