"""Language modelling: predict each token of a text from the tokens before it (many to many).

Training is truncated backpropagation through time over contiguous streams of text; the state is
carried from one batch to the next.
"""

import contextlib
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device, screen
from lmtrain.data import corpus
from lmtrain.data.division import Division, open_parts
from lmtrain.data.noise import Noise
from lmtrain.data.streams import Streams, fitting
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokens import Tokens, load_tokens, read_tokens, token_keys, tokenize
from lmtrain.errors import ConfigError, TextError
from lmtrain.model.adaptive_head import AdaptiveSoftmax
from lmtrain.model.head import Head, Softmax
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.model.sampled_head import SampledSoftmax
from lmtrain.schema import Config, TrainConfig
from lmtrain.tasks import perplexity, sampling, tuning
from lmtrain.tasks.adaptation import Adaptation, Cache, Dynamic, gradient_scales
from lmtrain.tasks.base import (
    Batch,
    Files,
    Loss,
    Shard,
    Task,
    Trained,
    require_unchanged,
    warn_of_unknown,
)
from lmtrain.tasks.building import Builder
from lmtrain.tasks.gradient_norms import LagNorms, gradient_norms
from lmtrain.tasks.perplexity import Perplexity
from lmtrain.tasks.sampling import Sampling
from lmtrain.tasks.tuning import TuningResult

_PREVIEW_TOKENS = {"word": 40, "char": 160, "byte": 160}
_TOKENIZER = "tokenizer.json"
# Sentences that are sorted by length together, and in memory at the same time.
_SCORED_TOGETHER = 4096
# Tokens of the training text that are counted to find how many start a line.
_COUNTED = 1 << 20
# From this fraction of unknown words in the validation text on, a warning is printed.
_MANY_UNKNOWN = 0.01
_SPLIT_NAMES = {"train": "training", "valid": "validation", "test": "test"}
# Lags and number of positions of the gradient norms that are logged in training.
_LOGGED_LAGS, _LOGGED_POSITIONS = (1, 10, 50), 32


@dataclass(frozen=True)
class TextData:
    """A tokenizer and the token ids of the splits.

    Args:
        tokenizer: the tokenizer.
        texts: the tokens of each split.
    """

    tokenizer: Tokenizer
    texts: Mapping[str, Tokens] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        """Content of the tokenizer file."""
        return {_TOKENIZER: self.tokenizer.to_json()}

    def sizes(self) -> dict[str, int]:
        """The size of the vocabulary."""
        return {"vocab_size": self.tokenizer.vocab_size}

    def references(self) -> dict[str, dict[str, str]]:
        """The name of each text and its key in the token cache."""
        return {split: {"name": text.name, "key": text.key} for split, text in self.texts.items()}


@dataclass(frozen=True)
class SentenceScore:
    """Log-probabilities of a sentence.

    Args:
        text: the sentence.
        tokens: its tokens, including the end of the sentence.
        log_probs: log P of each token given the tokens before it, in nats.
        oov: number of tokens that are `<UNK>`.
    """

    text: str
    tokens: list[str]
    log_probs: list[float]
    oov: int

    @property
    def log_prob(self) -> float:
        """Log P(sentence), in nats."""
        return math.fsum(self.log_probs)


class TrainedLanguageModel(Trained):
    """A trained language model with its tokenizer and settings."""

    model: LanguageModel
    data: TextData

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.data.tokenizer

    def sample(self, prompt: str = "", **settings: Any) -> list[str]:
        """Samples texts that continue a prompt; the same seed gives the same texts.

        Args:
            prompt: text to continue; may be empty.
            settings: arguments of `Sampling`: num, max_tokens, temperature, top_k, top_p, seed,
                stop.

        Raises:
            ConfigError: an argument out of its range.
            TextError: a prompt that is not valid Unicode.
        """
        chosen = Sampling(**settings)
        texts = [""] * chosen.num
        for row, piece in sampling.stream(self.model, self.tokenizer, prompt, chosen):
            texts[row] += piece
        return texts

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[tuple[int, str]]:
        """As `sample`, in pieces as they are sampled: the index of a text and its next piece."""
        return sampling.stream(self.model, self.tokenizer, prompt, Sampling(**settings))

    def score(self, sentences: Iterable[str]) -> Iterator[SentenceScore]:
        """Log P of each sentence including its end; each starts with a zero state.

        Raises:
            ConfigError: a single text instead of a list.
        """
        if isinstance(sentences, str):
            raise ConfigError("score takes a list of texts, not one text", "try: score([text])")
        tokenizer, source = self.tokenizer, iter(sentences)
        ends = [] if tokenizer.line_end_id is None else [tokenizer.line_end_id]
        unknown_characters = Counter[str]()
        while group := list(itertools.islice(source, _SCORED_TOGETHER)):
            texts = [sentence.rstrip("\r\n") for sentence in group]
            unknown_characters.update(tokenizer.unknown_characters(texts))
            ids = [tokenizer.encode(text).tolist() + ends for text in texts]
            scores = perplexity.sentence_log_probs(self.model, ids, tokenizer.start_id)
            for text, each, log_probs in zip(texts, ids, scores, strict=True):
                tokens = [tokenizer.vocabulary[index] for index in each]
                unknown = sum(index == tokenizer.unk_id for index in each)
                yield SentenceScore(text, tokens, log_probs, unknown)
        warn_of_unknown(unknown_characters, "the text")

    def read(self, paths: Sequence[str]) -> Tokens:
        """Reads and tokenizes text.

        Args:
            paths: files, globs, `-` or names of corpora, concatenated; of a corpus its test part,
                or else its validation part, or else all.

        Raises:
            TextError: the text cannot be read.
        """
        text = corpus.open_text(paths, ("test", "valid", "train"))
        [tokens] = tokenize(Division(text), self.tokenizer).values()
        warn_of_unknown(tokens.unknown_characters, tokens.name)
        return tokens

    def own_data(self, splits: Sequence[str] = ("valid", "test")) -> Mapping[str, Tokens]:
        """The run's own texts, from the token cache or tokenized again.

        Raises:
            TextError: a file is missing.
            CheckpointError: a file has changed.
        """
        return LanguageModelling.find(self.config, self.data, self.state["data"], splits).texts

    def measure(
        self,
        data: Tokens,
        *,
        batch_size: int = 1,
        cache: Cache | None = None,
        dynamic: Dynamic | None = None,
    ) -> Perplexity:
        """Perplexity of a text; each token is predicted once.

        Args:
            data: the text.
            batch_size: number of streams the text is split into.
            cache: a neural cache; None for none.
            dynamic: dynamic evaluation; None for none.

        Raises:
            TextError: with `dynamic`, the training text is missing.
        """
        self.model.eval()
        scales = self.gradient_scales if dynamic else []
        adaptation = Adaptation(self.model, cache, dynamic, scales)
        with contextlib.closing(adaptation):
            return perplexity.evaluate(
                self.model,
                data,
                self.tokenizer,
                batch_size=batch_size,
                predict=adaptation.log_probs if cache or dynamic else None,
                piece=dynamic.seq_len if dynamic else 1,
            )

    @functools.cached_property
    def gradient_scales(self) -> list[Tensor]:
        """Root mean square gradients on the training text, for dynamic evaluation.

        Raises:
            TextError: the text is missing.
            CheckpointError: the text has changed.
        """
        self.model.eval()
        return gradient_scales(self.model, self.own_data(("train",))["train"].ids)

    def tune_cache(self) -> Iterator[TuningResult]:
        """Searches the hyperparameters of a neural cache on the run's validation text.

        Raises:
            TextError: there is no validation text, or it is missing.
            CheckpointError: the text has changed.
        """
        return tuning.tune_cache(self.model, self._validation_text().ids, self.tokenizer.start_id)

    def tune_dynamic(self, seq_len: int = 5, max_tokens: int = 20_000) -> Iterator[TuningResult]:
        """Searches the hyperparameters of dynamic evaluation on the run's validation text.

        Args:
            seq_len: number of tokens between two updates, 1 or more.
            max_tokens: number of tokens used, from the start of the text.

        Raises:
            TextError: there is no validation text, or a text is missing.
            CheckpointError: a text has changed.
        """
        text = self._validation_text()
        text = replace(text, ids=text.ids[:max_tokens])
        return tuning.tune_dynamic(self.model, text, self.tokenizer, self.gradient_scales, seq_len)

    def gradient_norms(self, text: Tokens, lags: int = 100) -> list[LagNorms]:
        """Gradient norms of single predictions over time lags.

        Args:
            text: the result of `read` or `own_data`.
            lags: maximum number of steps back, 1 or more.

        Raises:
            TextError: the text is too short.
        """
        return gradient_norms(self.model, text.ids, lags)

    def _validation_text(self) -> Tokens:
        texts = self.own_data(("valid",))
        if "valid" not in texts:
            raise TextError(f"{self.path} was trained without validation text")
        return texts["valid"]


class LanguageModelling(Task):
    """Trains a language model."""

    unit = "tokens"
    command = "sample"
    metrics = Perplexity
    trained = TrainedLanguageModel
    model: LanguageModel
    data: TextData

    def __init__(self, config: Config, data: TextData, model: LanguageModel, shard: Shard) -> None:
        train, num_tokens = config.train, len(data.texts["train"])
        if train.batch_size % shard.size:
            raise ConfigError(
                f"batch_size {train.batch_size} cannot be divided among {shard.size} processes",
                f"try: --batch-size {-(-train.batch_size // shard.size) * shard.size}",
            )
        batch_size, seq_len = fitting(num_tokens, train.batch_size, train.seq_len, shard.size)
        changed = {"batch_size": batch_size, "seq_len": seq_len}
        fitted = config.model_copy(update={"train": train.model_copy(update=changed)})
        super().__init__(fitted, data, model, shard)
        if fitted.train != train:
            self.notice = _change(train, fitted.train, num_tokens)
        train = fitted.train
        seed = train.seed if train.random_seq_len else None
        self.streams = Streams(data.texts["train"].ids, train.batch_size, train.seq_len, seed)
        self._rows = shard.of(train.batch_size)
        self._starts = _TextStarts(data, train.state_reset) if train.state_reset else None
        self._noise = None
        if train.noise:
            self._noise = Noise(data.texts["train"].ids, data.tokenizer.vocab_size, train.noise)

    @classmethod
    def read(cls, config: Config) -> TextData:
        """Reads the texts and builds the vocabulary from the training text."""
        train, *others = _divisions(config)
        tokenizer, texts = read_tokens(train, config.data)
        for division in others:
            texts |= tokenize(division, tokenizer)
        for split, text in texts.items():
            if split != "train":
                warn_of_unknown(text.unknown_characters, f"{_SPLIT_NAMES[split]} text {text.name}")
        given = config.data
        chooses_words = given.level == "word" and given.vocabulary is None
        # With fewer words than it may have, the vocabulary has all of the training text.
        has_all = given.min_count == 1 and tokenizer.vocab_size < given.vocab_size
        if chooses_words and has_all and texts.get("valid"):
            _warn_of_new_words(texts["valid"], tokenizer.unk_id)
        return TextData(tokenizer, texts)

    @classmethod
    def restore(cls, files: Files, config: Config) -> TextData:
        """The tokenizer of a checkpoint."""
        return TextData(Tokenizer.from_json(files.text(_TOKENIZER)))

    @classmethod
    def find(
        cls,
        config: Config,
        data: TextData,
        references: Mapping[str, Mapping[str, str]],
        splits: Sequence[str] = ("train", "valid", "test"),
    ) -> TextData:
        """The texts of a run, from the token cache or tokenized again."""
        chosen = {split: references[split] for split in splits if split in references}
        tokenizer, found = data.tokenizer, {}
        for split, reference in chosen.items():
            tokens = load_tokens(reference["key"], tokenizer.vocab_size, reference["name"])
            if tokens is None:
                break
            found[split] = tokens
        if len(found) == len(chosen):
            return TextData(tokenizer, found)
        divisions = [each for each in _divisions(config) if chosen.keys() & set(each.names)]
        keys: dict[str, str] = {}
        for division in divisions:
            keys |= token_keys(division, tokenizer)
        # Compared before the text is cached: the run, and with it the path, may come from anyone.
        for split, reference in chosen.items():
            require_unchanged(split, reference["name"], keys.get(split), reference["key"])
        for division in divisions:
            found |= tokenize(division, tokenizer)
        return TextData(tokenizer, {split: found[split] for split in chosen})

    @classmethod
    def build(cls, config: Config, data: TextData) -> LanguageModel:
        """The language model with initial weights."""
        network, builder = config.model, Builder(config)
        last = config.embedding_size if network.tied_embeddings else network.hidden_size
        sizes = [network.hidden_size] * (network.num_layers - 1) + [last]
        vocab_size = data.tokenizer.vocab_size
        embedding = builder.embedding(vocab_size)
        encoder = builder.encoder(embedding, sizes)
        tied = embedding.weight if network.tied_embeddings else None
        head: Head
        if network.softmax == "adaptive":
            head = AdaptiveSoftmax(last, vocab_size)
        elif network.softmax == "sampled":
            head = SampledSoftmax(last, vocab_size, network.samples, builder.generator, tied)
        else:
            head = Softmax(last, vocab_size, tied)
        model = LanguageModel(encoder, builder.dropout(network.output_dropout), head)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    @classmethod
    def initialize(cls, config: Config, model: Any, data: TextData) -> str:
        """See `Task.initialize`; with `model.frequency_bias` first predictions are frequencies."""
        if config.model.frequency_bias:
            ids, vocab_size = data.texts["train"].ids, data.tokenizer.vocab_size
            frequencies = perplexity.log_frequencies(ids, vocab_size)
            with torch.no_grad():
                model.head.bias.copy_(torch.from_numpy(frequencies))
        return super().initialize(config, model, data)

    @property
    def steps_per_epoch(self) -> int:
        """Number of windows in each stream."""
        return self.streams.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """A window of each stream."""
        train, model_device = self.config.train, device.of(self.model)
        inputs, targets = self.streams[step]
        # Seeded by the step: the same after resuming and for any number of processes.
        generator = np.random.default_rng([train.seed, step, 1])
        noised = self._noise(inputs, generator) if self._noise else inputs
        arrays: list[NDArray[Any]] = [noised, targets]
        if self._starts:
            arrays.append(generator.random((1, train.batch_size)) >= self._starts.rates(inputs[:1]))
        windows = [device.from_numpy(array[:, self._rows], model_device) for array in arrays]
        return Batch(
            tuple(windows),
            rows=train.batch_size / self.shard.size,
            length=len(windows[0]) / train.seq_len,
            is_continued=not self.streams.starts_epoch(step),
        )

    def zero_state(self, rows: int) -> State:
        """The state before the first token."""
        return self.model.zero_state(rows)

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The sum over time and streams; the objective is its mean over streams, as in the notes.

        Regularization adds T · (α mean(a²) + β mean((a⟨t⟩ − a⟨t−1⟩)²)) for the hidden states a of
        the last layer, which have dropout applied in the first term.

        Source: activation and temporal regularization: Merity, Keskar & Socher 2018; state resets:
        Melis, Dyer & Blunsom 2018.
        """
        inputs, targets, *is_kept = batch.tensors
        if state is not None and is_kept:
            state = state.map(lambda part: part * is_kept[0].T)
        hidden, after = self.model.hidden(inputs, state)
        dropped = self.model.dropout(hidden)
        loss = self.model.head.loss(dropped, targets, 1 / batch.rows)
        objective, steps, network = loss, len(hidden), self.config.model
        if network.activation_regularization:
            penalty = network.activation_regularization * _mean_square(dropped)
            objective = objective + steps * penalty
        if network.temporal_regularization and steps > 1:
            penalty = network.temporal_regularization * _mean_square(hidden.diff(dim=0))
            objective = objective + steps * penalty
        total = loss.detach().double() * batch.rows
        return Loss(objective, total, torch.full_like(total, targets.numel()), after)

    def evaluate(
        self, split: str, between_batches: Callable[[], None] = lambda: None
    ) -> Perplexity | None:
        """Perplexity of this process's streams of a split.

        A short text has fewer streams than the training, so that each is at least as long as a
        window: otherwise most tokens would be predicted soon after a zero state.
        """
        if split not in self.data.texts:
            return None
        text, train = self.data.texts[split], self.config.train

        def predict(inputs: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, State]:
            between_batches()
            if not inputs.numel():
                return torch.zeros(inputs.shape), State()
            return self.model.log_probs(inputs, targets, state)

        return perplexity.evaluate(
            self.model,
            text,
            self.data.tokenizer,
            batch_size=max(1, min(train.batch_size, len(text) // train.seq_len)),
            shard=self.shard,
            predict=predict,
        )

    def preview(self, step: int) -> str:
        """A sample, seeded by the step."""
        tokenizer = self.data.tokenizer
        length, seed = _PREVIEW_TOKENS[tokenizer.level], self.config.train.seed + step
        pieces = sampling.stream(
            self.model, tokenizer, "", Sampling(num=1, max_tokens=length, seed=seed)
        )
        return "".join(piece for _, piece in pieces)

    def baseline(self, split: str) -> Perplexity | None:
        """Perplexity under token frequencies."""
        texts = self.data.texts
        if split not in texts:
            return None
        return perplexity.unigram(texts["train"], texts[split], self.data.tokenizer)

    def gradient_figures(self) -> dict[str, float]:
        """Median gradient norms at some lags relative to lag 0, for each part of the state.

        Measured on the validation text, or else on the training text.
        """
        ids = self.data.texts.get("valid", self.data.texts["train"]).ids
        lags = [lag for lag in _LOGGED_LAGS if 2 * lag + 2 <= len(ids)]
        if not lags:
            return {}
        return {
            f"gradient/layer_{each.layer}_{each.part}_lag_{lag}": float(each.relative.median[lag])
            for each in gradient_norms(self.model, ids, lags[-1], positions=_LOGGED_POSITIONS)
            for lag in lags
        }

    def derived(self, loss: float) -> dict[str, float]:
        """Perplexity and bits per character."""
        text = self.data.texts["train"]
        characters = text.characters / len(text)
        return {
            "perplexity": perplexity.perplexity(loss),
            "bits_per_char": loss / math.log(2) / characters,
        }

    def described(self) -> str:
        """The number of tokens and the size of the vocabulary."""
        tokens, vocabulary = len(self.data.texts["train"]), self.data.tokenizer.vocab_size
        return f"{tokens:,} tokens, vocabulary {vocabulary:,}"


class _TextStarts:
    """Selects the windows that start with a zero state, as texts do.

    Args:
        data: the training text and its tokenizer.
        fraction: of all windows. Only those after the end of a line are selected, if there are any.
    """

    def __init__(self, data: TextData, fraction: float) -> None:
        beginning = data.texts["train"].ids[:_COUNTED]
        start_id = data.tokenizer.start_id
        num_starts = 0 if start_id is None else int((beginning == start_id).sum())
        self._start_id = start_id if num_starts else None
        self._rate = fraction * len(beginning) / num_starts if num_starts else fraction

    def rates(self, first: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probability of a zero state, by the first inputs of windows."""
        is_start = np.full(first.shape, True) if self._start_id is None else first == self._start_id
        return np.where(is_start, self._rate, 0.0)


def _mean_square(values: Tensor) -> Tensor:
    """The mean of the squares, summed in fp32; ()."""
    # The dot product takes less time than square and mean, forward and backward.
    vector = values.float().flatten()
    return vector.dot(vector) / len(vector)


def _change(given: TrainConfig, used: TrainConfig, num_tokens: int) -> str:
    changes = [
        f"{name} {before} -> {after}"
        for name, before, after in (
            ("batch size", given.batch_size, used.batch_size),
            ("window", given.seq_len, used.seq_len),
        )
        if before != after
    ]
    return f"{', '.join(changes)}: the training text has only {num_tokens:,} tokens"


def _divisions(config: Config) -> list[Division]:
    data = config.data
    return open_parts(
        data.train,
        data.valid,
        data.test,
        valid_fraction=data.valid_fraction,
        test_fraction=data.test_fraction,
        at_line_ends=data.level == "word" or data.nfc,
    )


def _warn_of_new_words(valid: Tokens, unk_id: int | None) -> None:
    """Warns of new words in the validation text of a training text without `<UNK>`."""
    fraction = float((valid.ids == unk_id).mean())
    if fraction >= _MANY_UNKNOWN:
        screen.note(
            f"warning: {100 * fraction:.1f} % of the validation text are words that the training "
            "text does not have,\nand without <UNK> in its training text a model does not expect "
            "them\n  try: --set data.min_count=2"
        )
