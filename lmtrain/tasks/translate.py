"""Translation: an encoder–decoder from one sentence to another (many to many)."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data import parallel
from lmtrain.data.padded import PADDING
from lmtrain.data.parallel import Pair
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.model.attention import Attention
from lmtrain.model.head import Softmax
from lmtrain.model.recurrent import State
from lmtrain.model.translator import Translator
from lmtrain.schema import Config
from lmtrain.tasks import beam, bleu
from lmtrain.tasks.base import Batch, Files, Loss
from lmtrain.tasks.bleu import Bleu
from lmtrain.tasks.building import Builder
from lmtrain.tasks.examples import (
    EVAL_BATCH_SIZE,
    ExampleData,
    Examples,
    ExampleTask,
    TrainedExamples,
    groups,
    length_batches,
    require_finite,
    require_texts,
)
from lmtrain.tasks.inputs import TOKENIZER_FILE, TextInputs

_TARGET_FILE = "target.json"
_PREVIEWED = 2
_BEAM = 5


@dataclass(frozen=True)
class Pairs(Examples):
    """Sentences and their translations, as ids and as text.

    Args:
        pairs: the texts, with tokens separated by spaces.
    """

    pairs: Sequence[Pair]


@dataclass(frozen=True)
class ParallelData(ExampleData):
    """The tokenizers of both languages, and the sentences of the splits."""

    source: TextInputs
    target: TextInputs

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the source."""
        return self.source.tokenizer

    def files(self) -> dict[str, str]:
        """Content of the files of both tokenizers."""
        return self.source.files() | {_TARGET_FILE: self.target.tokenizer.to_json()}

    def sizes(self) -> dict[str, int]:
        """The sizes of both vocabularies."""
        return {
            "vocab_size": self.source.tokenizer.vocab_size,
            "target_vocab_size": self.target.tokenizer.vocab_size,
        }

    def fingerprint(self, examples: Sequence[Pair]) -> str:
        """A hash of both languages."""
        return parallel.fingerprint(examples)

    def encode_examples(self, examples: Sequence[Pair], name: str) -> Pairs:
        """Encodes pairs of sentences; targets include the end token."""
        sources = [self.source.encode(each.source, name) for each in examples]
        end = [self.end_id]
        targets = [np.append(self.target.encode(each.target, name), end) for each in examples]
        key = self.fingerprint(examples)
        both = (self.source.tokenizer, self.target.tokenizer)
        pairs = [
            Pair(*(" ".join(t.words(x)) for t, x in zip(both, (p.source, p.target), strict=True)))
            for p in examples
        ]
        return Pairs(sources, targets, key, name, pairs)

    @property
    def end_id(self) -> int:
        """The token that starts and ends a translation."""
        end = self.target.tokenizer.eos_id
        assert end is not None  # noqa: S101  (translations are made of words)
        return end

    def translate(
        self, model: Translator, sources: Tensor, lengths: Tensor, width: int
    ) -> list[list[tuple[str, float]]]:
        """Translations of each source, tokens separated by spaces, with their scores."""
        vocabulary = self.target.tokenizer.vocabulary
        unknown = self.target.tokenizer.unk_id
        found = beam.search(
            model, sources, lengths, beam=width, end_id=self.end_id, unknown_id=unknown
        )
        return [
            [(" ".join(vocabulary[index] for index in each.ids), each.score) for each in some]
            for some in found
        ]


@dataclass(frozen=True)
class Translated:
    """The translations of a sentence.

    Args:
        source: the sentence.
        translations: the best one first.
        scores: mean log P of the tokens of each.
    """

    source: str
    translations: Sequence[str]
    scores: Sequence[float]

    def line(self) -> str:
        """The translation; for several, a line for each with its score before it."""
        if len(self.translations) == 1:
            return self.translations[0]
        pairs = zip(self.scores, self.translations, strict=True)
        return "\n".join(f"{score:.4f}\t{translation}" for score, translation in pairs)

    def fields(self) -> dict[str, Any]:
        """All fields by name, for JSON."""
        return {
            "source": self.source,
            "translation": self.translations[0],
            "translations": list(self.translations),
            "scores": list(self.scores),
        }


class TrainedTranslator(TrainedExamples):
    """A trained translator with its tokenizers and settings."""

    model: Translator
    data: ParallelData

    @property
    def task(self) -> "type[Translation]":
        """The task that the model was trained for."""
        return Translation

    def inputs(self, path: str) -> Iterator[str]:
        """Reads inputs for `predict`: a sentence on each line."""
        return parallel.read_sentences(path)

    def predict(
        self, sentences: Iterable[str], *, beam: int = _BEAM, nbest: int = 1
    ) -> Iterator[Translated]:
        """The translations of sentences.

        Args:
            sentences: the texts.
            beam: beam size, 1 or more; 1 is greedy.
            nbest: number of translations of each sentence, 1 to `beam`.

        Raises:
            ConfigError: an argument out of its range, or an item that is not a text.
            DivergedError: the model's probabilities are not finite.
        """
        if not 1 <= nbest <= beam:
            raise ConfigError(f"nbest {nbest} must be from 1 to beam {beam}")
        beam = min(beam, self.data.target.tokenizer.vocab_size)
        for group in groups(sentences):
            require_texts(group)
            arrays = [self.data.source.encode(text, "predict") for text in group]
            found: list[list[tuple[str, float]]] = [[]] * len(group)
            # With a wider beam, fewer sentences: the outputs followed at once are as many.
            at_once = max(1, EVAL_BATCH_SIZE * _BEAM // beam)
            for indices, inputs, lengths in length_batches(self.model, arrays, at_once):
                some = self.data.translate(self.model, inputs, lengths, beam)
                for index, each in zip(indices, some, strict=True):
                    found[index] = each[:nbest]
                    require_finite(np.array([score for _, score in found[index]]))
            for text, each in zip(group, found, strict=True):
                yield Translated(text, *map(list, zip(*each, strict=True)))

    def measure(self, data: Examples, *, batch_size: int = EVAL_BATCH_SIZE) -> Bleu:
        """The BLEU of beam search, of `batch_size` sentences at once."""
        measure = functools.partial(Translation.batch_metrics, width=_BEAM)
        found: Bleu = Translation.evaluate_examples(
            self.model, self.data, data, batch_size, measure=measure
        )
        return found


class Translation(ExampleTask):
    """Trains an encoder–decoder."""

    unit = "tokens"
    command = "predict"
    metrics = Bleu
    baseline_name = "the source left as it is"
    trained = TrainedTranslator
    model: Translator
    data: ParallelData

    @classmethod
    def read_files(cls, paths: Sequence[str], config: Config) -> list[Pair]:
        """The sentences of files with lines of source, tab and target."""
        return list(parallel.read(paths, ()))

    @classmethod
    def read_split(cls, config: Config, split: str) -> list[Pair]:
        """The sentences of a split with their translations.

        Raises:
            ConfigError: sacrebleu is not installed.
        """
        bleu.require()
        data = config.data
        targets = {"train": data.target, "valid": data.valid_target, "test": data.test_target}
        return list(parallel.read(getattr(data, split), targets[split]))

    @classmethod
    def build_vocabularies(cls, examples: Sequence[Pair], config: Config) -> ParallelData:
        """The tokens of both languages."""
        source = TextInputs.of((each.source for each in examples), config)
        return ParallelData(source, TextInputs.of((each.target for each in examples), config))

    @classmethod
    def restore(cls, files: Files, config: Config) -> ParallelData:
        """The tokenizers of a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        source, target = (
            TextInputs(Tokenizer.from_json(files.text(name)))
            for name in (TOKENIZER_FILE, _TARGET_FILE)
        )
        if target.tokenizer.eos_id is None:
            raise CheckpointError(f"{_TARGET_FILE} is damaged: its tokens are not words")
        return ParallelData(source, target)

    @classmethod
    def build(cls, config: Config, data: ParallelData) -> Translator:
        """The encoder–decoder with initial weights.

        Raises:
            ConfigError: sizes that do not fit.
        """
        network, builder = config.model, Builder(config)
        size = network.hidden_size
        encoder = builder.encoder(data.source.first_layer(builder))
        embedding = builder.embedding(data.target.tokenizer.vocab_size, can_freeze=False)
        decoder = builder.encoder(embedding, is_bidirectional=False)
        output = config.embedding_size if network.tied_embeddings else size
        attention = None
        if network.attention is not None:
            memory = encoder.recurrent.output_size
            attention = Attention(memory, size, output, network.attention)
        elif output != size:
            raise ConfigError(
                f"model.tied_embeddings without attention needs embedding_size {output} to equal "
                f"hidden_size {size}"
            )
        tied = embedding.weight if network.tied_embeddings else None
        head = Softmax(output, data.target.tokenizer.vocab_size, tied)
        model = Translator(
            encoder, decoder, attention, builder.dropout(network.output_dropout), head
        )
        model.initialize(network.init_scale, network.forget_bias)
        return model

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The sum over time and sentences; the objective is the mean over sentences."""
        sources, lengths, targets = batch.tensors
        hidden = self.model.hidden(sources, lengths, targets, self.data.end_id)
        loss = self.model.head.loss(hidden, targets, 1 / batch.rows)
        return self.mean_loss(loss, batch, targets)

    @staticmethod
    def batch_metrics(
        model: Translator,
        data: ParallelData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
        *,
        width: int = 1,
    ) -> Bleu:
        """BLEU of translations by beam search of that width, and the loss of the references."""
        sources, lengths, targets = tensors
        hidden = model.hidden(sources, lengths, targets, data.end_id)
        is_counted = targets != PADDING
        total = -model.head.log_probs(hidden, targets.clamp(min=0)).double()[is_counted].sum()
        found = data.translate(model, sources, lengths, width)
        references = [examples.pairs[index].target for index in indices]  # type: ignore[attr-defined]
        translations = [best[0][0] for best in found]
        sums = bleu.statistics(zip(translations, references, strict=True))
        return Bleu(float(total), int(is_counted.sum()), sums)

    def preview(self, step: int) -> str:
        """Some validation sentences with references and translations."""
        examples, indices = self.preview_examples(step, _PREVIEWED)
        self.model.eval()
        sources, lengths, _ = self.to_device(examples, indices)
        with torch.no_grad():
            found = self.data.translate(self.model, sources, lengths, 1)
        lines = []
        for index, best in zip(indices, found, strict=True):
            pair = examples.pairs[index]  # type: ignore[attr-defined]
            lines += [f"source: {pair.source}", f"reference: {pair.target}"]
            lines.append(f"translation: {best[0][0]}")
        return "\n".join(lines)

    def baseline(self, split: str) -> Bleu | None:
        """BLEU of copying the source, and the loss under token frequencies."""
        if split not in self.data.splits:
            return None
        size = self.data.target.tokenizer.vocab_size
        counts = np.bincount(np.concatenate(self._train.targets), minlength=size) + 1.0
        examples = self.data.splits[split]
        targets = np.concatenate(examples.targets)
        nats = -np.log(counts / counts.sum())[targets].sum()
        pairs = examples.pairs  # type: ignore[attr-defined]
        sums = bleu.statistics((pair.source, pair.target) for pair in pairs)
        return Bleu(float(nats), len(targets), sums)

    def described(self) -> str:
        """The number of sentences and the sizes of the vocabularies."""
        sizes = " and ".join(f"{size:,}" for size in self.data.sizes().values())
        return f"{len(self._train.inputs):,} sentences, vocabularies {sizes}"
