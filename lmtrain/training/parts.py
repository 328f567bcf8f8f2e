"""The parts of a training, made from its settings and what `assembly` made of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmtrain import assembly, device, launched
from lmtrain.data.streams import Streams
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.errors import ConfigError
from lmtrain.evaluation import Evaluation, evaluate
from lmtrain.generation import stream
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.schema import Config
from lmtrain.training.optimizer import Optimizer, Schedule, schedule
from lmtrain.training.ranks import Ranks

_SAMPLE_TOKENS = {"word": 40, "char": 160, "byte": 160}


@dataclass(frozen=True)
class Ready:
    """All that training needs, made before anything is written into the run folder."""

    config: Config
    tokenizer: Tokenizer
    texts: Mapping[str, Tokens]
    batches: Streams
    model: LanguageModel
    threads: int


def get_ready(
    config: Config, tokenizer: Tokenizer, texts: Mapping[str, Tokens], ranks: Ranks
) -> Ready:
    """Sets device, threads and memory of this process; makes the batches and the model.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
        MachineError: the device is not there.
        TextError: the text is too short for a batch.
    """
    place = device.choose(config.train.device)
    threads = device.set_threads(config.train.threads, launched.local_size())
    if config.train.batch_size % ranks.size:
        raise ConfigError(
            f"batch_size {config.train.batch_size} cannot be divided among {ranks.size} processes",
            f"try: --batch-size {-(-config.train.batch_size // ranks.size) * ranks.size}",
        )
    device.keep_memory()
    if config.train.deterministic:
        device.make_deterministic()
    is_shared = ranks.size > 1
    model = assembly.build_model(config, tokenizer.vocab_size, is_shared=is_shared).to(place)
    # The weights are the same everywhere; what is dropped from them is not.
    if not ranks.is_first:
        model.chance.generator = device.generator(config.train.seed, ranks.rank)
    return Ready(config, tokenizer, texts, batches(config, texts["train"]), model, threads)


def batches(config: Config, text: Tokens) -> Streams:
    """The tokens of each step.

    Raises:
        TextError: the text is too short for a batch.
    """
    train = config.train
    seed = train.seed if train.random_seq_len else None
    return Streams(text.ids, train.batch_size, train.seq_len, seed)


def validation(
    ready: Ready, text: Tokens, ranks: Ranks
) -> Callable[[Callable[[], None]], Evaluation]:
    """The validation of the model as it stands; what it is given is called before each window."""
    batch_size = ready.config.train.batch_size

    def validate(meanwhile: Callable[[], None]) -> Evaluation:
        def predict(inputs: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, State]:
            meanwhile()
            if not inputs.numel():
                return torch.zeros(inputs.shape), State()
            return ready.model.log_probs(inputs, targets, state)

        share = evaluate(
            ready.model,
            text.ids,
            start_id=ready.tokenizer.start_id,
            unk_id=ready.tokenizer.unk_id,
            characters=text.characters,
            batch_size=batch_size,
            columns=ranks.share(min(batch_size, len(text))),
            predict=predict,
        )
        costs = ranks.exchanged([share.total_nats, share.oov, share.oov_nats, share.seconds])
        nats, oov, oov_nats, seconds = zip(*costs, strict=True)
        return replace(
            share,
            total_nats=math.fsum(nats),
            oov=int(sum(oov)),
            oov_nats=math.fsum(oov_nats),
            seconds=max(seconds),
        )

    return validate


def writing(ready: Ready) -> Callable[[int], str]:
    """What writes a sample with the model as it stands, by a seed that follows the step."""

    def write(step: int) -> str:
        length = _SAMPLE_TOKENS[ready.tokenizer.level]
        seed = ready.config.train.seed + step
        pieces = stream(ready.model, ready.tokenizer, "", num=1, max_tokens=length, seed=seed)
        return "".join(piece for _, piece in pieces)

    return write


def build_schedule(config: Config, batches: Streams, steps: int) -> Schedule:
    """The learning rate of each step of a training of so many."""
    rule = config.optimizer
    return schedule(
        rule.schedule,
        peak=rule.learning_rate,
        total_steps=steps,
        steps_per_epoch=batches.steps_per_epoch,
        warmup_steps=rule.warmup_steps,
        decay=rule.decay,
        decay_after_epochs=rule.decay_after_epochs,
    )


def build_optimizer(config: Config, model: LanguageModel, schedule: Schedule) -> Optimizer:
    """The update rule of the model's weights."""
    rule = config.optimizer
    return Optimizer(
        model,
        name=rule.name,
        weight_decay=rule.weight_decay,
        clip=rule.clip,
        max_grad_norm=rule.max_grad_norm,
        schedule=schedule,
    )


def checkpoint_bytes(config: Config, model: LanguageModel) -> int:
    """Roughly what a checkpoint takes: fp32 weights, what the update rule and an average keep."""
    copies = 1 + (config.optimizer.average is not None) + 2 * (config.optimizer.name != "sgd")
    return 4 * copies * model.num_parameters
