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
from lmtrain.data.padded import PADDING
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
    data_names,
    groups,
    length_batches,
    require_finite,
)
from lmtrain.tasks.inputs import TOKENIZER_FILE
from lmtrain.tasks.labels import label_files, label_ids, labels_of, restored_labels
from lmtrain.tasks.spans import SpanF1, spans

_PREVIEWED = 2
_CHARACTERS_FILE = "characters.json"
# The character encoder reads at most this many characters of a word.
_MAX_CHARACTERS = 20


@dataclass(frozen=True)
class TaggedData(ExampleData):
    """A tokenizer, the tags, and the sentences of the splits.

    Args:
        tokenizer: the vocabulary of words.
        tags: names of the tags by id.
        characters: the vocabulary of characters; None without a character encoder.
    """

    tokenizer: Tokenizer
    tags: Sequence[str]
    characters: Tokenizer | None = None

    def files(self) -> dict[str, str]:
        """Content of the files for words, tags and, if used, characters."""
        files = {TOKENIZER_FILE: self.tokenizer.to_json()} | label_files(self.tags)
        if self.characters is not None:
            files[_CHARACTERS_FILE] = self.characters.to_json()
        return files

    def sizes(self) -> dict[str, int]:
        """The size of the vocabulary and the number of tags."""
        return {"vocab_size": self.tokenizer.vocab_size, "labels": len(self.tags)}

    def fingerprint(self, examples: Sequence[Sentence]) -> str:
        """A hash of tokens and tags."""
        return conll.fingerprint(examples)

    def encode_examples(self, examples: Sequence[Sentence], name: str) -> Examples:
        """Encodes sentences.

        Raises:
            TextError: a tag that the training data does not have.
        """
        tag_ids = label_ids((tag for each in examples for tag in each.tags), self.tags, name)
        tokens = [self.ids(each.tokens) for each in examples]
        tags = np.split(tag_ids, np.cumsum([len(ids) for ids in tokens])[:-1])
        return Examples(tokens, tags, self.fingerprint(examples), name)

    def ids(self, tokens: Sequence[str]) -> NDArray[np.int64]:
        """The ids of tokens, (T,); with characters, (T, 1 + C): a token and its characters."""
        # The vocabulary splits overlong tokens, too: the first part stands for the token.
        parts = [self.tokenizer.words(_word(token)) for token in tokens]
        words = self.tokenizer.word_ids([each[0] if each else "" for each in parts])
        if self.characters is None:
            return words
        spellings = [self.characters.encode(token)[:_MAX_CHARACTERS] for token in tokens]
        ids = np.full((len(tokens), 1 + _MAX_CHARACTERS), PADDING)
        ids[:, 0] = words
        for row, each in zip(ids, spellings, strict=True):
            row[1 : 1 + len(each)] = each
        return ids


@dataclass(frozen=True)
class TaggedSentence:
    """The tags that a model predicts for a sentence.

    Args:
        tokens: the sentence.
        tags: the most likely tag of each token.
        probabilities: probability of each of these tags.
    """

    tokens: Sequence[str]
    tags: Sequence[str]
    probabilities: Sequence[float]

    def line(self) -> str:
        """Lines of a token, a tab and its tag, and an empty line."""
        return Sentence(tuple(self.tokens), tuple(self.tags)).lines()

    def fields(self) -> dict[str, Any]:
        """All fields by name, with the spans of the tags, for JSON."""
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
        """The task that the model was trained for."""
        return Tagging

    def inputs(self, path: str) -> Iterator[Sequence[str]]:
        """Reads inputs for `predict`: see `conll.read_tokens`."""
        return conll.read_tokens(path)

    def predict(self, sentences: Iterable[str | Sequence[str]]) -> Iterator[TaggedSentence]:
        """The most likely tag of each token of sentences.

        Args:
            sentences: lists of tokens, or texts that are split at white space.

        Raises:
            ConfigError: a single text instead of a list, or an item of another type.
            DivergedError: the model's probabilities are not finite.
        """
        for group in groups(sentences):
            yield from self._predict_group([_tokens(each) for each in group])

    @torch.no_grad()
    def _predict_group(self, sentences: Sequence[Sequence[str]]) -> Iterator[TaggedSentence]:
        # A sentence without tokens is encoded as one empty token, whose tag is dropped.
        arrays = [self.data.ids(each or [""]) for each in sentences]
        tagged = [TaggedSentence((), (), ())] * len(sentences)
        for indices, inputs, lengths in length_batches(self.model, arrays):
            logits = self.model(inputs, lengths).double()  # (T, B, C)
            probabilities, best = (each.cpu() for each in logits.softmax(-1).max(-1))
            require_finite(probabilities.numpy())
            for row, index in enumerate(indices):
                tokens = sentences[index]
                tags = [self.data.tags[each] for each in best[: len(tokens), row].tolist()]
                of_tags = probabilities[: len(tokens), row].tolist()
                tagged[index] = TaggedSentence(tokens, tags, of_tags)
        yield from tagged


class Tagging(ExampleTask):
    """Trains a tagger."""

    unit = "tokens"
    command = "predict"
    metrics = SpanF1
    baseline_name = "the most frequent tag of each token"
    trained = TrainedTagger
    model: Tagger
    data: TaggedData

    @classmethod
    def read_files(cls, paths: Sequence[str], config: Config) -> list[Sentence]:
        """Reads the sentences of files."""
        return list(conll.read(paths))

    @staticmethod
    def labels_in(example: Sentence) -> Collection[str]:
        """The tags of the sentence."""
        return set(example.tags)

    @classmethod
    def build_vocabularies(cls, examples: Sequence[Sentence], config: Config) -> TaggedData:
        """Builds the vocabularies of words, tags and, if used, characters."""
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
            {tag for each in examples for tag in each.tags}, data_names(config, "train")
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
    def build(cls, config: Config, data: TaggedData) -> Tagger:
        """The tagger with initial weights."""
        network, builder = config.model, Builder(config)
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
        """The sum over time and sentences; the objective is the mean over sentences."""
        tokens, lengths, tags = batch.tensors
        loss = self.model.head.loss(self.model.hidden(tokens, lengths), tags, 1 / batch.rows)
        return self.mean_loss(loss, batch, tags)

    @staticmethod
    def batch_metrics(
        model: Tagger,
        data: TaggedData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> SpanF1:
        """F1 and accuracy of a batch."""
        tokens, lengths, tags = tensors
        log_probs = model(tokens, lengths).double().log_softmax(-1)  # (T, B, C)
        is_counted = tags != PADDING
        of_targets = log_probs.gather(-1, tags.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        best = log_probs.argmax(-1)
        counts = np.zeros(3)
        for row, length in enumerate(lengths.tolist()):
            found, truth = (
                set(spans([data.tags[index] for index in each[:length, row].tolist()]))
                for each in (best, tags)
            )
            counts += len(found), len(truth), len(found & truth)
        correct = int((best == tags)[is_counted].sum())
        return SpanF1(-float(of_targets[is_counted].sum()), int(is_counted.sum()), correct, *counts)

    def preview(self, step: int) -> str:
        """Some validation sentences with predicted tags; wrong ones with the correct tag."""
        examples, indices = self.preview_examples(step, _PREVIEWED)
        self.model.eval()
        tokens, lengths, tags = self.to_device(examples, indices)
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
        predicted, correct = (self.data.tags[index] for index in pair)
        if predicted == correct:
            return word if predicted == "O" else f"{word}/{predicted}"
        return f"{word}/{predicted} (correct: {correct})"

    def baseline(self, split: str) -> SpanF1 | None:
        """Predicts the most frequent tag of each word; for unknown words, of all words."""
        if split not in self.data.splits:
            return None
        counts = np.zeros((self.data.tokenizer.vocab_size, len(self.data.tags)))
        words = np.concatenate([_words(each) for each in self._train.inputs])
        np.add.at(counts, (words, np.concatenate(self._train.targets)), 1)
        prior = (counts.sum(0) + 1) / (counts.sum() + len(self.data.tags))
        probabilities = (counts + prior) / (counts.sum(1, keepdims=True) + 1)
        best = probabilities.argmax(1)
        examples = self.data.splits[split]
        sums = np.zeros(6)
        for inputs, tags in zip(examples.inputs, examples.targets, strict=True):
            tokens = _words(inputs)
            found, truth = (
                set(spans([self.data.tags[index] for index in each]))
                for each in (best[tokens], tags)
            )
            nats = -np.log(probabilities[tokens, tags]).sum()
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
    """The word ids (T,) of inputs with or without characters."""
    return inputs if inputs.ndim == 1 else inputs[:, 0]


def _word(token: str) -> str:
    """A token with white space replaced, as in the vocabulary."""
    return "_".join(split_words(" ".join(token.split()), "whitespace"))


def _tokens(sentence: str | Sequence[str]) -> Sequence[str]:
    """The tokens of a sentence.

    Raises:
        ConfigError: neither a text nor a list of texts.
    """
    if isinstance(sentence, str):
        return sentence.split()
    if not isinstance(sentence, Sequence) or not all(isinstance(each, str) for each in sentence):
        raise ConfigError(f"predict takes texts or lists of tokens, not {sentence!r:.40}")
    return sentence
