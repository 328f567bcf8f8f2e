"""A run from its settings: its folder, texts, model and loop; its start and its resuming."""

import contextlib
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain import assembly, checkpoint, device, files, screen, untrusted
from lmtrain import config as configuration
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.errors import CheckpointError, ConfigError, UnreadableError, out_of_memory_explained
from lmtrain.evaluation import unigram_loss
from lmtrain.kernels.native import library
from lmtrain.schema import Config
from lmtrain.training import folder, parts
from lmtrain.training.average import Average
from lmtrain.training.monitor import Monitor, Silent
from lmtrain.training.ranks import Ranks, joined
from lmtrain.training.rate_finder import RateCurve, range_test, rising
from lmtrain.training.trainer import Trainer, total_steps

_SMALLER = "try: a smaller --batch-size, --seq-len, --hidden-size or --vocab-size"


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
        is_cut_short: whether its time ended it before its steps or its patience did.
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
    is_cut_short: bool


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
    return folder.new_run(config.data.train[0], config.model.cell)


def _start(run: Path, config: Config, ranks: Ranks, *, began: float, is_quiet: bool) -> Summary:
    # Said before a long text is read.
    device.choose(config.train.device)
    ranks.agreed(lambda: folder.refuse_used(run))
    if not is_quiet and screen.STDERR.isatty():
        screen.note(f"reading {', '.join(config.data.train)}")
    ready = parts.get_ready(config, *_prepared(config, ranks), ranks)

    def claim() -> None:
        files.require_space(run, 2 * parts.checkpoint_bytes(config, ready.model))
        held.enter_context(files.locked(run / ".lock", f"the run {run}"))
        folder.refuse_used(run)
        files.remove_leftovers(run)
        files.write(run / folder.SETTINGS, configuration.to_toml(config).encode())
        files.write(run / folder.TOKENIZER, ready.tokenizer.to_json().encode())

    with contextlib.ExitStack() as held:
        ranks.agreed(claim)
        return _train(run, ready, None, ranks, began=began, is_quiet=is_quiet)


def _prepared(config: Config, ranks: Ranks) -> tuple[Tokenizer, dict[str, Tokens]]:
    """The tokenizer and the texts, which the first process reads and the others find cached."""
    found = []

    def prepare() -> list[Any]:
        found.append(assembly.prepare(config))
        tokenizer, texts = found[0]
        return [tokenizer.to_json(), assembly.references(texts)] if ranks.size > 1 else []

    told = ranks.agreed(prepare, is_long=True)
    if not found:
        tokenizer = Tokenizer.from_json(told[0])
        found.append((tokenizer, assembly.find_texts(told[1], config, tokenizer)))
    # Another machine may have to read the text, too.
    ranks.wait_for_all()
    return found[0]


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
            ready = _begun(run, overrides, ranks)
            return _train(run, ready, None, ranks, began=began, is_quiet=is_quiet)
        saved = checkpoint.read(checkpoint.folder(run, step))
        config = _resumed_config(saved, overrides)
        tokenizer = Tokenizer.from_json(saved.text("tokenizer.json"))
        saved.require_shapes(assembly.weight_shapes(config, tokenizer.vocab_size))
        texts = assembly.find_texts(saved.state["texts"], config, tokenizer)
        ranks.wait_for_all()
        ready = parts.get_ready(config, tokenizer, texts, ranks)
        return _train(run, ready, saved, ranks, began=began, is_quiet=is_quiet)


def _begun(run: Path, overrides: Mapping[str, object], ranks: Ranks) -> parts.Ready:
    """A run that ended before its first checkpoint, from its beginning.

    Raises:
        CheckpointError: its text is not what it was.
    """
    path = run / folder.SETTINGS
    config = configuration.parse(untrusted.text(path), str(path), overrides)
    tokenizer, texts = _prepared(config, ranks)

    def compare() -> None:
        path = run / folder.TOKENIZER
        if not path.exists():
            files.write(path, tokenizer.to_json().encode())
        if tokenizer.to_json() != untrusted.text(path):
            raise CheckpointError(f"the text of {run} is not what it was")

    ranks.agreed(compare)
    return parts.get_ready(config, tokenizer, texts, ranks)


def _resumed_config(saved: checkpoint.Checkpoint, overrides: Mapping[str, object]) -> Config:
    text, origin = saved.text("config.toml"), str(saved.path / "config.toml")
    try:
        stored = configuration.parse(text, origin)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    config = configuration.parse(text, origin, overrides)
    if _kept(config) != _kept(stored):
        raise ConfigError(
            "a resumed run keeps its text, its model, its batch size, its windows and its seed",
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
    ready: parts.Ready,
    saved: checkpoint.Checkpoint | None,
    ranks: Ranks,
    *,
    began: float,
    is_quiet: bool,
) -> Summary:
    config, model, batches = ready.config, ready.model, ready.batches
    valid_text = ready.texts.get("valid")
    ranks.agreed(
        lambda: folder.record_start(
            run,
            saved.state["step"] if saved else None,
            device=model.embedding.device.type,
            processes=ranks.size,
            threads=ready.threads,
            precision=_precision(config),
        )
    )
    schedule = functools.partial(parts.build_schedule, config, batches)
    monitor = _monitor(run, ready, saved, is_quiet=is_quiet) if ranks.is_first else Silent()
    with contextlib.closing(monitor):
        _introduce(run, ready, monitor, ranks.size)
        trainer = Trainer(
            run,
            config.train,
            model=model,
            batches=batches,
            optimizer=parts.build_optimizer(
                config, model, schedule(total_steps(config.train, batches))
            ),
            schedule=schedule,
            average=Average(
                model,
                kind=config.optimizer.average,
                decay=config.optimizer.average_decay,
                patience=config.optimizer.average_patience,
            ),
            monitor=monitor,
            ranks=ranks,
            validate=parts.validation(ready, valid_text, ranks) if valid_text else None,
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


def _monitor(
    run: Path, ready: parts.Ready, saved: checkpoint.Checkpoint | None, *, is_quiet: bool
) -> Monitor:
    text = ready.texts["train"]
    return Monitor(
        run,
        first_step=saved.state["step"] if saved else 0,
        total_steps=total_steps(ready.config.train, ready.batches),
        log_every=ready.config.train.log_every,
        chars_per_token=text.characters / len(text),
        settings=_flat(ready.config),
        is_quiet=is_quiet,
    )


def _introduce(run: Path, ready: parts.Ready, monitor: Silent, size: int) -> None:
    model, place = ready.model, ready.model.embedding.device.type
    together = f"{size} processes, " if size > 1 else ""
    monitor.say(
        f"{len(ready.texts['train']):,} tokens, vocabulary {ready.tokenizer.vocab_size:,}; "
        f"{ready.config.model.cell}, {model.num_parameters:,} parameters, "
        f"{place}, {together}{ready.threads} threads, {_precision(ready.config)}; run {run}"
    )
    if place == "cpu" and (reason := library.absence()):
        monitor.say(f"recurrent layers run on torch alone: {reason}")


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
        is_cut_short=trainer.is_cut_short,
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
        ready = parts.get_ready(config, *assembly.prepare(config), Ranks())
        optimizer = parts.build_optimizer(config, ready.model, rising(first, last, steps))
        return range_test(ready.model, ready.batches, optimizer, steps)


def _precision(config: Config) -> str:
    """The precision of training steps on this machine."""
    return "bf16" if assembly.is_mixed(config) else "fp32"


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, part in config.model_dump(mode="json").items()
        for name, value in part.items()
    }
