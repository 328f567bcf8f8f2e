"""The objects a user holds: `train` a model, `load` one, let it sample, score and evaluate.

Here the tree of settings is turned into plain arguments; below, nothing knows it.
"""

import contextlib
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmtrain
from lmtrain import checkpoint, device, evaluation, files, generation, screen
from lmtrain import config as configuration
from lmtrain.config import Config
from lmtrain.errors import (
    CheckpointError,
    ConfigError,
    MachineError,
    RunBusyError,
    TextError,
)
from lmtrain.evaluation import Evaluation
from lmtrain.model.language_model import LanguageModel
from lmtrain.text import corpus
from lmtrain.text.batches import Batches
from lmtrain.text.tokenizer import Tokenizer
from lmtrain.text.tokens import Tokens, cached_tokenizer, load_tokens, tokenize
from lmtrain.training.monitor import Monitor
from lmtrain.training.optimizer import Optimizer, schedule
from lmtrain.training.trainer import Trainer, total_steps

_SAMPLE_TOKENS = {"word": 40, "char": 160, "byte": 160}


@dataclass(frozen=True)
class SentenceScore:
    """How likely a sentence is.

    Args:
        text: the sentence.
        tokens: its tokens, the end of the sentence included.
        log_probs: log P of each given those before it, in nats.
        oov: how many of them are `<UNK>`.
    """

    text: str
    tokens: list[str]
    log_probs: list[float]
    oov: int

    @property
    def log_prob(self) -> float:
        """Log P(sentence), in nats."""
        return math.fsum(self.log_probs)


class TrainedModel:
    """A trained model with its tokenizer and settings.

    Args:
        path: the checkpoint folder.
        config: the settings it was trained with.
        tokenizer: text to ids and back.
        model: the network, on its device.
        step: updates done.
    """

    def __init__(
        self, path: Path, config: Config, tokenizer: Tokenizer, model: LanguageModel, step: int
    ) -> None:
        self.path = path
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.step = step

    def sample(
        self,
        prompt: str = "",
        *,
        num: int = 1,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
    ) -> list[str]:
        """Novel texts that go on from `prompt`; the same seed gives the same texts.

        Args:
            prompt: text before the first drawn token; may be empty.
            num: texts, 1 or more.
            max_tokens: tokens drawn for each at most, 1 or more.
            temperature: above 0; below 1 the likely becomes likelier.
            top_k: draw from so many likeliest tokens; None for all.
            top_p: draw from the likeliest tokens that sum to this probability; None for all.
            seed: of the draws.

        Raises:
            ConfigError: an argument out of its range.
            TextError: at character level, a prompt with a character the model does not know.
        """
        texts = [""] * num
        for row, piece in self.stream(
            prompt, num=num, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed,
        ):  # fmt: skip
            texts[row] += piece
        return texts

    def stream(
        self,
        prompt: str = "",
        *,
        num: int = 1,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1,
    ) -> Iterator[tuple[int, str]]:
        """As `sample`, piece by piece as they are drawn: which text, and what comes next in it.

        Raises:
            ConfigError: an argument out of its range.
            TextError: at character level, a prompt with a character the model does not know.
        """
        _check_sampling(prompt, num, max_tokens, temperature, top_k, top_p, seed)
        ids = self.tokenizer.encode(prompt).tolist() if prompt else []
        joiners = [self.tokenizer.joiner() for _ in range(num)]
        for row, joiner in enumerate(joiners):
            if ids:
                yield row, "".join(joiner.add(index) for index in ids)
        drawn = generation.generate(
            self.model,
            ids,
            start_id=self.tokenizer.start_id,
            eos_id=self.tokenizer.eos_id,
            unk_id=self.tokenizer.unk_id,
            num=num,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        for indices in drawn:
            for row, index in enumerate(indices):
                if index is not None and index != self.tokenizer.eos_id:
                    yield row, joiners[row].add(index)
        for row, joiner in enumerate(joiners):
            yield row, joiner.end()

    def score(self, sentences: Iterable[str]) -> Iterator[SentenceScore]:
        """Log P of each sentence, its end included; each from a fresh state.

        Raises:
            TextError: at character level, a character the model does not know.
        """
        tokenizer = self.tokenizer
        texts = [sentence.rstrip("\n") for sentence in sentences]
        ends = [] if tokenizer.line_end_id is None else [tokenizer.line_end_id]
        # The text has no newline, so what the tokenizer may add at its end is taken off first.
        ids = [_without_end(tokenizer.encode(text).tolist(), ends) + ends for text in texts]
        scores = evaluation.sentence_log_probs(self.model, ids, tokenizer.start_id)
        for text, each, log_probs in zip(texts, ids, scores, strict=True):
            tokens = [tokenizer.vocabulary[index] for index in each]
            yield SentenceScore(text, tokens, log_probs, _count(each, tokenizer.unk_id))

    def evaluate(self, places: Sequence[str], *, batch_size: int = 1) -> Evaluation:
        """How well the model predicts a text, every token counted once.

        Args:
            places: files, globs, `-` or names of corpora, read one after the other.
            batch_size: streams the text is cut into.

        Raises:
            TextError: the text cannot be read, or has a character the model does not know.
        """
        return self.evaluate_tokens(tokenize(corpus.open_text(places), self.tokenizer), batch_size)

    def evaluate_tokens(self, tokens: Tokens, batch_size: int = 1) -> Evaluation:
        """As `evaluate`, for a text that is tokens already."""
        return evaluation.evaluate(
            self.model,
            tokens.ids,
            start_id=self.tokenizer.start_id,
            unk_id=self.tokenizer.unk_id,
            characters=tokens.characters,
            batch_size=batch_size,
        )

    def own_texts(self) -> dict[str, Tokens]:
        """The run's own validation and test text, from the token cache or cut anew.

        Raises:
            TextError: the text is gone.
            CheckpointError: the text changed.
        """
        saved = checkpoint.read(self.path).state["texts"]
        return _find_texts(saved, self.config, self.tokenizer, parts=("valid", "test"))


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


def train(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Mapping[str, object] | None = None,
    is_quiet: bool = True,
) -> TrainedModel:
    """Trains a model and returns its best checkpoint, loaded.

    Args:
        config: the settings (see `lmtrain.load_config`); None for the recipe python-docs.
        out: the run folder; None for a new one under runs/.
        resume: whether to go on with the run in `out`, bit for bit as if it had never stopped.
        overrides: with `resume`, settings to change, such as {"train.max_epochs": 20}.
        is_quiet: whether no progress is shown.

    Raises:
        LmtrainError: see `lmtrain.errors`; its exit code says which kind.
    """
    summary = run_training(config, out, resume=resume, overrides=overrides, is_quiet=is_quiet)
    return load(summary.run)


def run_training(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Mapping[str, object] | None = None,
    is_quiet: bool = False,
) -> Summary:
    """As `train`, but returns what the training came to.

    Raises:
        ConfigError: settings that cannot be used, or that a resumed run must keep.
        CheckpointError: with `resume`, no run, or none of its checkpoints is intact.
        RunBusyError: the run folder holds a run already, or another process trains in it.
        LmtrainError: the others of `lmtrain.errors`, from what training calls.
    """
    began = time.monotonic()
    if resume:
        if out is None:
            raise ConfigError("resume: which run?", "try: lmtrain train --resume RUN")
        run = Path(out)
        if not run.is_dir():
            raise CheckpointError(f"no run {run}")
    else:
        config = config or configuration.load("python-docs")
        run = Path(out) if out is not None else _new_run(config)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise RunBusyError(
                f"{run} is used already",
                f"go on with it: lmtrain train --resume {run}, or train elsewhere: --out DIR",
            )
    with files.locked(run / ".lock", f"the run {run}"), _out_of_memory_explained():
        files.remove_leftovers(run)
        files.remove_leftovers(run / "checkpoints")
        if resume:
            return _resume(run, overrides or {}, began=began, is_quiet=is_quiet)
        return _start(run, config or Config(), began=began, is_quiet=is_quiet)


def _start(run: Path, config: Config, *, began: float, is_quiet: bool) -> Summary:
    if not is_quiet:
        screen.note(f"reading {', '.join(config.data.train)}")
    tokenizer, texts = prepare(config)
    files.write(run / "config.toml", configuration.to_toml(config).encode())
    files.write(run / "tokenizer.json", tokenizer.to_json().encode())
    return _run(run, config, tokenizer, texts, None, began=began, is_quiet=is_quiet)


def _resume(run: Path, overrides: Mapping[str, object], *, began: float, is_quiet: bool) -> Summary:
    saved, problems = checkpoint.newest_intact(run)
    for problem in problems:
        screen.note(f"skipped: {problem}")
    text, origin = saved.text("config.toml"), str(saved.path / "config.toml")
    stored = configuration.parse(text, origin)
    config = configuration.parse(text, origin, overrides)
    if (config.data, config.model) != (stored.data, stored.model) or (
        config.train.batch_size,
        config.train.seed,
    ) != (stored.train.batch_size, stored.train.seed):
        raise ConfigError(
            "a resumed run keeps its text, its model, its batch size and its seed",
            "what may change: epochs, steps, seconds, learning rate and the like",
        )
    tokenizer = Tokenizer.from_json(saved.text("tokenizer.json"))
    texts = _find_texts(saved.state["texts"], config, tokenizer)
    return _run(run, config, tokenizer, texts, saved, began=began, is_quiet=is_quiet)


def _run(
    run: Path,
    config: Config,
    tokenizer: Tokenizer,
    texts: Mapping[str, Tokens],
    saved: checkpoint.Checkpoint | None,
    *,
    began: float,
    is_quiet: bool,
) -> Summary:
    place = device.choose(config.train.device)
    threads = device.set_threads(config.train.threads)
    train_text, valid_text = texts["train"], texts.get("valid")
    batches = Batches(train_text.ids, config.train.batch_size, config.train.seq_len)
    model = build_model(config, tokenizer.vocab_size).to(place)
    optimizer = _build_optimizer(config, model, batches)
    _write_run_file(run, place, threads, saved)
    monitor = Monitor(
        run,
        first_step=saved.state["step"] if saved else 0,
        total_steps=total_steps(config.train, batches),
        log_every=config.train.log_every,
        chars_per_token=train_text.characters / len(train_text),
        settings=_flat(config),
        is_quiet=is_quiet,
    )
    handle = TrainedModel(run, config, tokenizer, model, 0)
    trainer = Trainer(
        run,
        config.train,
        model=model,
        batches=batches,
        optimizer=optimizer,
        monitor=monitor,
        validate=(lambda: handle.evaluate_tokens(valid_text, config.train.batch_size))
        if valid_text
        else None,
        write=lambda step: handle.sample(
            max_tokens=_SAMPLE_TOKENS[config.data.level], seed=config.train.seed + step
        )[0],
        documents=(configuration.to_toml(config), tokenizer.to_json(), _references(texts)),
        began=began,
    )
    if saved:
        trainer.restore(saved)
    words = f"{len(train_text):,} tokens, vocabulary {tokenizer.vocab_size:,}"
    monitor.say(
        f"{words}; {config.model.cell}, {model.num_parameters:,} parameters, "
        f"{place.type}, {threads} threads; run {run}"
    )
    with contextlib.closing(monitor):
        progress = trainer.train()
    return Summary(
        run=run,
        steps=optimizer.step,
        tokens=progress.tokens,
        seconds=progress.seconds + time.monotonic() - began,
        tokens_per_second=progress.tokens / max(progress.train_seconds, 1e-9),
        valid_loss=progress.best_loss,
        best_step=progress.best_step,
        unigram_loss=evaluation.unigram_loss(train_text.ids, valid_text.ids, tokenizer.vocab_size)
        if valid_text
        else None,
        parameters=model.num_parameters,
        vocab_size=tokenizer.vocab_size,
        chars_per_token=valid_text.characters / len(valid_text) if valid_text else 0.0,
    )


def load(path: str | Path, *, device_name: str = "auto") -> TrainedModel:
    """The model of a run (its best checkpoint, else its newest) or of a checkpoint folder.

    Args:
        path: the run or checkpoint.
        device_name: auto, cpu or cuda.

    Raises:
        CheckpointError: missing, damaged or of a newer format.
        MachineError: the device is not there.
    """
    saved = checkpoint.read(checkpoint.find(Path(path)))
    try:
        config = configuration.parse(saved.text("config.toml"), str(saved.path / "config.toml"))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    tokenizer = Tokenizer.from_json(saved.text("tokenizer.json"))
    model = build_model(config, tokenizer.vocab_size)
    saved.load_weights(model)
    model.to(device.choose(device_name)).eval()
    return TrainedModel(saved.path, config, tokenizer, model, int(saved.state["step"]))


def prepare(config: Config) -> tuple[Tokenizer, dict[str, Tokens]]:
    """The tokenizer and the tokens of the training, validation and test text.

    Raises:
        TextError: text is missing, unreadable or too short.
        MachineError: the token cache cannot be written.
    """
    data = config.data
    parts = _open_parts(config)
    tokenizer = cached_tokenizer(
        parts["train"],
        corpus.Text(parts["train"].sources),
        data.level,
        data.splitter,
        vocab_size=data.vocab_size,
        min_count=data.min_count,
        lowercase=data.lowercase,
    )
    return tokenizer, {part: tokenize(text, tokenizer) for part, text in parts.items()}


def _open_parts(config: Config) -> Mapping[str, corpus.Text]:
    data = config.data
    return corpus.open_parts(
        data.train,
        data.valid,
        data.test,
        valid_fraction=data.valid_fraction,
        test_fraction=data.test_fraction,
        at_line_ends=data.level == "word",
    )


def _references(texts: Mapping[str, Tokens]) -> dict[str, dict[str, str]]:
    """What finds the texts again: their names and their keys in the token cache."""
    return {part: {"name": tokens.name, "key": tokens.key} for part, tokens in texts.items()}


def _find_texts(
    references: Mapping[str, Mapping[str, str]],
    config: Config,
    tokenizer: Tokenizer,
    parts: Sequence[str] = ("train", "valid", "test"),
) -> dict[str, Tokens]:
    wanted = {part: references[part] for part in parts if part in references}
    found = {}
    for part, reference in wanted.items():
        tokens = load_tokens(reference["key"], tokenizer.vocab_size, reference["name"])
        if tokens is None:
            break
        found[part] = tokens
    if len(found) == len(wanted):
        return found
    opened = _open_parts(config)
    for part, reference in wanted.items():
        tokens = tokenize(opened[part], tokenizer) if part in opened else None
        if tokens is None or tokens.key != reference["key"]:
            raise CheckpointError(
                f"the {part} text {reference['name']} is not the one this run was trained with"
            )
        found[part] = tokens
    return found


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """The model that the settings describe, with its first weights.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
    """
    return LanguageModel(
        vocab_size,
        cell=config.model.cell,
        embedding_size=config.embedding_size,
        hidden_size=config.model.hidden_size,
        num_layers=config.model.num_layers,
        dropout=config.model.dropout,
        tied_embeddings=config.model.tied_embeddings,
        init_scale=config.model.init_scale,
        forget_bias=config.model.forget_bias,
        cell_options={
            "cell_output": config.model.cell_output,
            "peephole": config.model.peephole,
            "activation": config.model.activation,
        },
        seed=config.train.seed,
    )


def _build_optimizer(config: Config, model: LanguageModel, batches: Batches) -> Optimizer:
    rule = config.optimizer
    return Optimizer(
        model,
        name=rule.name,
        weight_decay=rule.weight_decay,
        clip=rule.clip,
        max_grad_norm=rule.max_grad_norm,
        schedule=schedule(
            rule.schedule,
            peak=rule.learning_rate,
            total_steps=total_steps(config.train, batches),
            steps_per_epoch=batches.steps_per_epoch,
            warmup_steps=rule.warmup_steps,
            decay=rule.decay,
            decay_after_epochs=rule.decay_after_epochs,
        ),
    )


def _write_run_file(
    run: Path, place: torch.device, threads: int, saved: checkpoint.Checkpoint | None
) -> None:
    path = run / "run.json"
    entry = {
        "lmtrain": lmtrain.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "argv": sys.argv,
        "device": place.type,
        "threads": threads,
        "from_step": saved.state["step"] if saved else 0,
        "time": round(time.time(), 3),
    }
    starts = checkpoint.run_starts(path)
    if saved and starts and starts[-1].get("threads") != threads:
        before = starts[-1].get("threads")
        screen.note(f"not bit for bit as before: {before} threads then, {threads} now")
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


def _count(ids: Sequence[int], wanted: int | None) -> int:
    return 0 if wanted is None else sum(index == wanted for index in ids)


def _without_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: -len(ends)] if ends and ids[-len(ends) :] == ends else ids


def _check_sampling(
    prompt: str,
    num: int,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    checks = {
        f"num {num} is below 1": num < 1,
        f"max_tokens {max_tokens} is below 1": max_tokens < 1,
        f"temperature {temperature} is not above 0": not 0 < temperature < math.inf,
        f"top_k {top_k} is below 1": top_k is not None and top_k < 1,
        f"top_p {top_p} is not above 0 and at most 1": top_p is not None and not 0 < top_p <= 1,
        f"seed {seed} is below 0": seed < 0,
    }
    for problem, is_wrong in checks.items():
        if is_wrong:
            raise ConfigError(problem)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TextError("the prompt is not valid UTF-8") from None
