"""Tagging: a label for each token of a sentence (many to many, of equal length)."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data import conll
from lmtrain.data.conll import Sentence
from lmtrain.data.padded import NOTHING
from lmtrain.data.tokenizer import Tokenizer, build_tokenizer, split_words
from lmtrain.data.vocabulary import tokenizer_of
from lmtrain.errors import ConfigError
from lmtrain.model.head import Softmax
from lmtrain.model.recurrent import State
from lmtrain.model.tagger import Tagger
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Files, Loss
from lmtrain.tasks.building import Builder
from lmtrain.tasks.examples import (
    ExampleData,
    Examples,
    ExampleTask,
    TrainedExamples,
    batched,
    grouped,
    place_names,
    require_finite,
)
from lmtrain.tasks.inputs import TOKENIZER_FILE
from lmtrain.tasks.labels import label_files, label_ids, labels_of, restored_labels
from lmtrain.tasks.spans import SpanF1, spans

_PREVIEWED = 2
_CHARACTERS_FILE = "characters.json"
# Of a longer word only its beginning is spelled.
_MOST_CHARACTERS = 20


@dataclass(frozen=True)
class TaggedData(ExampleData):
    """A tokenizer, the tags, and the sentences of the splits.

    Args:
        tokenizer: tokens to ids.
        tags: the names of the tags in the order of their ids.
        characters: characters to ids, where words are also read by them; None where not.
    """

    tokenizer: Tokenizer
    tags: Sequence[str]
    characters: Tokenizer | None = None

    def files(self) -> dict[str, str]:
        """The tokenizer, the tags, and the characters if they are read."""
        files = {TOKENIZER_FILE: self.tokenizer.to_json()} | label_files(self.tags)
        if self.characters is not None:
            files[_CHARACTERS_FILE] = self.characters.to_json()
        return files

    def sizes(self) -> dict[str, int]:
        """The sizes of the vocabulary and of the set of tags."""
        return {"vocab_size": self.tokenizer.vocab_size, "labels": len(self.tags)}

    def fingerprint(self, examples: Sequence[Sentence]) -> str:
        """A hash of tokens and tags."""
        return conll.fingerprint(examples)

    def encoded(self, examples: Sequence[Sentence], name: str) -> Examples:
        """Sentences as ids.

        Raises:
            TextError: a tag that the training data does not have.
        """
        found = label_ids((tag for each in examples for tag in each.tags), self.tags, name)
        tokens = [self.ids(each.tokens) for each in examples]
        tags = np.split(found, np.cumsum([len(ids) for ids in tokens])[:-1])
        return Examples(tokens, tags, self.fingerprint(examples), name)

    def ids(self, tokens: Sequence[str]) -> NDArray[np.int64]:
        """The ids of tokens, (T,); with characters (T, 1 + C), a token's id and its characters'."""
        # As the vocabulary was counted: a token that is too long for a word is known by its start.
        known = [self.tokenizer.words(_word(token)) for token in tokens]
        words = self.tokenizer.word_ids([each[0] if each else "" for each in known])
        if self.characters is None:
            return words
        spelled = [self.characters.encode(token[:_MOST_CHARACTERS]) for token in tokens]
        ids = np.full((len(tokens), 1 + _MOST_CHARACTERS), NOTHING)
        ids[:, 0] = words
        for row, each in zip(ids, spelled, strict=True):
            row[1 : 1 + len(each)] = each
        return ids


@dataclass(frozen=True)
class TaggedSentence:
    """The tags that a model predicts for a sentence.

    Args:
        tokens: the sentence.
        tags: the most likely tag of each token.
        probabilities: of these tags.
    """

    tokens: Sequence[str]
    tags: Sequence[str]
    probabilities: Sequence[float]

    def line(self) -> str:
        """A token, a tab and its tag a line, and an empty line."""
        return Sentence(tuple(self.tokens), tuple(self.tags)).lines()

    def fields(self) -> dict[str, Any]:
        """All of it by name, with the spans that the tags form."""
        found = [
            {"kind": kind, "first": first, "end": end, "text": " ".join(self.tokens[first:end])}
            for kind, first, end in spans(self.tags)
        ]
        return {
            "tokens": list(self.tokens),
            "tags": list(self.tags),
            "probabilities": list(self.probabilities),
            "spans": found,
        }


class TrainedTagger(TrainedExamples):
    """A trained tagger with its tokenizer, tags and settings."""

    model: Tagger
    data: TaggedData

    @property
    def task(self) -> "type[Tagging]":
        """Its task."""
        return Tagging

    def inputs(self, place: str) -> Iterator[Sequence[str]]:
        """What `predict` takes, of a file: see `conll.read_tokens`."""
        return conll.read_tokens(place)

    def predict(self, sentences: Iterable[str | Sequence[str]]) -> Iterator[TaggedSentence]:
        """The most likely tag of each token of sentences.

        Args:
            sentences: each a list of tokens, or a text whose tokens have white space between them.

        Raises:
            ConfigError: a single text, or what is no sentence.
            DivergedError: the model's probabilities are not finite.
        """
        for group in grouped(sentences):
            yield from self._predicted([_tokens(each) for each in group])

    @torch.no_grad()
    def _predicted(self, sentences: Sequence[Sequence[str]]) -> Iterator[TaggedSentence]:
        # A sentence without tokens is tagged as if it had one, which is not shown.
        arrays = [self.data.ids(each or [""]) for each in sentences]
        found = [TaggedSentence((), (), ())] * len(sentences)
        for indices, inputs, lengths in batched(self.model, arrays):
            logits = self.model(inputs, lengths).double()  # (T, B, C)
            likelihoods, best = (each.cpu() for each in logits.softmax(-1).max(-1))
            require_finite(likelihoods.numpy())
            for row, index in enumerate(indices):
                tokens = sentences[index]
                tags = [self.data.tags[each] for each in best[: len(tokens), row].tolist()]
                certain = likelihoods[: len(tokens), row].tolist()
                found[index] = TaggedSentence(tokens, tags, certain)
        yield from found


class Tagging(ExampleTask):
    """Trains a tagger."""

    unit = "tokens"
    command = "predict"
    metrics = SpanF1
    trivial = "the most frequent tag of each token"
    trained = TrainedTagger
    model: Tagger
    data: TaggedData

    @classmethod
    def read_files(cls, places: Sequence[str], config: Config) -> list[Sentence]:
        """The examples of files."""
        return list(conll.read(places))

    @staticmethod
    def kinds(example: Sentence) -> Collection[str]:
        """Its tags."""
        return set(example.tags)

    @classmethod
    def vocabularies(cls, examples: Sequence[Sentence], config: Config) -> TaggedData:
        """The tokens and the tags of training sentences."""
        data = config.data
        if data.vocabulary is not None:
            tokenizer = tokenizer_of(
                data.vocabulary, "whitespace", lowercase=data.lowercase, nfc=data.nfc
            )
        else:
            tokenizer = build_tokenizer(
                (" ".join(map(_word, each.tokens)) + "\n" for each in examples),
                "word",
                "whitespace",
                vocab_size=data.vocab_size,
                min_count=data.min_count,
                lowercase=data.lowercase,
                nfc=data.nfc,
            )
        tags = labels_of(
            {tag for each in examples for tag in each.tags}, place_names(config, "train")
        )
        characters = None
        if config.model.characters:
            words = ("".join(each.tokens) for each in examples)
            characters = build_tokenizer(words, "char", nfc=data.nfc)
        return TaggedData(tokenizer, tags, characters)

    @classmethod
    def restore(cls, files: Files, config: Config) -> TaggedData:
        """The tokenizers and the tags of a checkpoint."""
        tokenizer = Tokenizer.from_json(files.text(TOKENIZER_FILE))
        characters = None
        if config.model.characters:
            characters = Tokenizer.from_json(files.text(_CHARACTERS_FILE))
        return TaggedData(tokenizer, restored_labels(files), characters)

    @classmethod
    def build(cls, config: Config, data: TaggedData, *, is_shared: bool = False) -> Tagger:
        """The tagger with its first weights."""
        network, builder = config.model, Builder(config, is_shared=is_shared)
        words = data.tokenizer.vocab_size
        if data.characters is None:
            encoder = builder.encoder(builder.embedding(words))
        else:
            encoder = builder.encoder(builder.word_characters(words, data.characters.vocab_size))
        head = Softmax(encoder.recurrent.output_size, len(data.tags))
        model = Tagger(encoder, builder.dropout(network.output_dropout), head)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The total over time and sentences; the objective is its mean over sentences."""
        tokens, lengths, tags = batch.tensors
        loss = self.model.head.loss(self.model.hidden(tokens, lengths), tags, 1 / batch.rows)
        return self.mean(loss, batch, tags)

    @staticmethod
    def measured(
        model: Tagger,
        data: TaggedData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> SpanF1:
        """How well a batch is tagged."""
        tokens, lengths, tags = tensors
        log_probs = model(tokens, lengths).double().log_softmax(-1)  # (T, B, C)
        is_counted = tags != NOTHING
        right = log_probs.gather(-1, tags.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        best = log_probs.argmax(-1)
        counts = np.zeros(3)
        for row, length in enumerate(lengths.tolist()):
            found, truth = (
                set(spans([data.tags[index] for index in each[:length, row].tolist()]))
                for each in (best, tags)
            )
            counts += len(found), len(truth), len(found & truth)
        correct = int((best == tags)[is_counted].sum())
        return SpanF1(-float(right[is_counted].sum()), int(is_counted.sum()), correct, *counts)

    def preview(self, step: int) -> str:
        """Some validation sentences; where the predicted tag is wrong, the right one after it."""
        examples, indices = self.previewed(step, _PREVIEWED)
        self.model.eval()
        tokens, lengths, tags = self.placed(examples, indices)
        with torch.no_grad():
            best = self.model(tokens, lengths).argmax(-1)
        lines = []
        for row, length in enumerate(lengths.tolist()):
            ids = tokens[:length, row].reshape(length, -1)[:, 0].tolist()
            words = (self.data.tokenizer.vocabulary[index] for index in ids)
            pairs = zip(best[:length, row].tolist(), tags[:length, row].tolist(), strict=True)
            lines.append(" ".join(map(self._shown, words, pairs)))
        return "\n".join(lines)

    def _shown(self, word: str, pair: tuple[int, int]) -> str:
        found, right = (self.data.tags[index] for index in pair)
        if found == right:
            return word if found == "O" else f"{word}/{found}"
        return f"{word}/{found} (not {right})"

    def baseline(self, split: str) -> SpanF1 | None:
        """The most frequent tag of each token in the training data; of an unknown one, of all."""
        if split not in self.data.splits:
            return None
        counts = np.zeros((self.data.tokenizer.vocab_size, len(self.data.tags)))
        words = np.concatenate([_words(each) for each in self._train.inputs])
        np.add.at(counts, (words, np.concatenate(self._train.targets)), 1)
        prior = (counts.sum(0) + 1) / (counts.sum() + len(self.data.tags))
        likelihoods = (counts + prior) / (counts.sum(1, keepdims=True) + 1)
        best = likelihoods.argmax(1)
        examples = self.data.splits[split]
        sums = np.zeros(6)
        for inputs, tags in zip(examples.inputs, examples.targets, strict=True):
            tokens = _words(inputs)
            found, truth = (
                set(spans([self.data.tags[index] for index in each]))
                for each in (best[tokens], tags)
            )
            nats = -np.log(likelihoods[tokens, tags]).sum()
            correct = (best[tokens] == tags).sum()
            sums += nats, len(tags), correct, len(found), len(truth), len(found & truth)
        return SpanF1(*sums.tolist())

    def described(self) -> str:
        """The number of sentences and the sizes of the vocabularies."""
        return (
            f"{len(self._train.inputs):,} sentences, vocabulary "
            f"{self.data.tokenizer.vocab_size:,}, {len(self.data.tags):,} tags"
        )


def _words(inputs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ids of the words, (T,), with or without their characters."""
    return inputs if inputs.ndim == 1 else inputs[:, 0]


def _word(token: str) -> str:
    """A token as a word of the vocabulary, which has no white space in it."""
    return "_".join(split_words(" ".join(token.split()), "whitespace"))


def _tokens(sentence: str | Sequence[str]) -> Sequence[str]:
    """The tokens of a sentence.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(sentence, str):
        return sentence.split()
    if not isinstance(sentence, Sequence) or not all(isinstance(each, str) for each in sentence):
        raise ConfigError(f"predict takes texts or lists of tokens, not {sentence!r:.40}")
    return sentence
