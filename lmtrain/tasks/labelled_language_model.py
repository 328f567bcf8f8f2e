"""Labelled language modelling: generate a text from a label, which is x⟨1⟩ (one to many)."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import screen
from lmtrain.data import labelled
from lmtrain.data.labelled import Example
from lmtrain.data.padded import PADDING
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.model.head import Softmax
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.schema import Config
from lmtrain.tasks import perplexity, sampling
from lmtrain.tasks.base import Batch, Files, Loss
from lmtrain.tasks.building import Builder
from lmtrain.tasks.examples import ExampleData, Examples, ExampleTask, TrainedExamples, data_names
from lmtrain.tasks.inputs import TOKENIZER_FILE, TextInputs
from lmtrain.tasks.labels import label_files, label_ids, labels_of, restored_labels
from lmtrain.tasks.perplexity import Perplexity
from lmtrain.tasks.sampling import Ends, Sampling

_PREVIEW_TOKENS = 60
_PREVIEWED = 4


@dataclass(frozen=True)
class TextExamples(Examples):
    """Encoded texts.

    Args:
        characters: number of characters of each text, with one for its end, (N,).
    """

    characters: NDArray[np.int64]


@dataclass(frozen=True)
class LabelledTextData(ExampleData):
    """A tokenizer, the labels, and the examples of the splits.

    The inputs of an example are its label and its tokens; ids of labels follow the ids of tokens.
    The targets are its tokens and the end token.

    Args:
        text: the vocabulary of tokens.
        labels: names of the labels by id.
    """

    text: TextInputs
    labels: Sequence[str]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the texts."""
        return self.text.tokenizer

    @property
    def end_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.line_end_id
        assert end is not None  # noqa: S101  (the training text has line ends)
        return end

    def label_id(self, label: str) -> int:
        """The input id of a label.

        Raises:
            ConfigError: the training data does not have the label.
        """
        if label not in self.labels:
            raise ConfigError(
                f"no label {screen.shorten(label)!r}", f"labels: {screen.join_names(self.labels)}"
            )
        return self.tokenizer.vocab_size + self.labels.index(label)

    def files(self) -> dict[str, str]:
        """Content of the files for the tokenizer and the labels."""
        return self.text.files() | label_files(self.labels)

    def sizes(self) -> dict[str, int]:
        """The size of the vocabulary and the number of labels."""
        return self.text.sizes() | {"labels": len(self.labels)}

    def fingerprint(self, examples: Sequence[Example]) -> str:
        """A hash of labels and texts."""
        return labelled.fingerprint(examples)

    def encode_examples(self, examples: Sequence[Example], name: str) -> TextExamples:
        """Encodes examples.

        Raises:
            TextError: a label that the training data does not have.
        """
        labels = label_ids([each.label for each in examples], self.labels, name)
        texts = [self.tokenizer.encode(each.text) for each in examples]
        first = self.tokenizer.vocab_size + labels
        inputs = [np.append(label, ids) for label, ids in zip(first, texts, strict=True)]
        targets = [np.append(ids, [self.end_id]) for ids in texts]
        unknown = self.tokenizer.unknown_characters(each.text for each in examples)
        # At character level, a character that is normalized to several counts as these.
        is_char = self.tokenizer.level == "char"
        sizes = map(len, texts if is_char else (each.text for each in examples))
        return TextExamples(
            *(inputs, targets, self.fingerprint(examples), name),
            np.fromiter((size + 1 for size in sizes), np.int64, len(examples)),
            unknown_characters=unknown,
        )


class TrainedLabelledLanguageModel(TrainedExamples):
    """A trained language model with labels, its tokenizer and settings."""

    model: LanguageModel
    data: LabelledTextData

    @property
    def task(self) -> "type[LabelledLanguageModelling]":
        """The task that the model was trained for."""
        return LabelledLanguageModelling

    def sample(self, label: str, prompt: str = "", **settings: Any) -> list[str]:
        """Samples texts for a label; the same seed gives the same texts.

        Args:
            label: a label of the training data.
            prompt: text before the first drawn token; may be empty.
            settings: those of `Sampling`: num, max_tokens, temperature, top_k, top_p, seed, stop.

        Raises:
            ConfigError: no such label, or an argument out of its range.
        """
        texts = [""] * Sampling(**settings).num
        for row, piece in self.stream(prompt, label=label, **settings):
            texts[row] += piece
        return texts

    def stream(
        self, prompt: str = "", *, label: str | None = None, **settings: Any
    ) -> Iterator[tuple[int, str]]:
        """As `sample`, in pieces as they are sampled: the index of a text and its next piece.

        Raises:
            ConfigError: no label, no such label, or an argument out of its range.
        """
        if label is None:
            labels = screen.join_names(self.data.labels)
            raise ConfigError(
                f"{self.path} was trained with labels, and no label is given", f"labels: {labels}"
            )
        ends = Ends(self.data.label_id(label), self.data.end_id)
        return sampling.stream(self.model, self.data.tokenizer, prompt, Sampling(**settings), ends)


class LabelledLanguageModelling(ExampleTask):
    """Trains a language model with labels."""

    unit = "tokens"
    command = "sample --label LABEL"
    metrics = Perplexity
    trained = TrainedLabelledLanguageModel
    model: LanguageModel
    data: LabelledTextData

    @classmethod
    def read_files(cls, paths: Sequence[str], config: Config) -> list[Example]:
        """Reads the examples of files."""
        return list(labelled.read(paths))

    @staticmethod
    def labels_in(example: Example) -> Collection[str]:
        """The label of the example."""
        return (example.label,)

    @classmethod
    def build_vocabularies(cls, examples: Sequence[Example], config: Config) -> LabelledTextData:
        """Builds the vocabulary and collects the labels.

        Raises:
            TextError: there is only one label, or there are too few texts for data.min_count.
        """
        name = data_names(config, "train")
        labels = labels_of([each.label for each in examples], name)
        text = TextInputs.of((each.text for each in examples), config)
        if text.tokenizer.line_end_id is None:
            raise TextError(
                f"{name} has {len(examples):,} texts: the ends of texts are rarer than "
                f"data.min_count = {config.data.min_count:,}",
                "try: a smaller data.min_count",
            )
        return LabelledTextData(text, labels)

    @classmethod
    def restore(cls, files: Files, config: Config) -> LabelledTextData:
        """The tokenizer and the labels of a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        tokenizer = Tokenizer.from_json(files.text(TOKENIZER_FILE))
        if tokenizer.line_end_id is None:
            raise CheckpointError(f"{TOKENIZER_FILE} is damaged: it has no newline")
        return LabelledTextData(TextInputs(tokenizer), restored_labels(files))

    @classmethod
    def build(cls, config: Config, data: LabelledTextData) -> LanguageModel:
        """The language model with initial weights; labels have embeddings after those of tokens."""
        network, builder = config.model, Builder(config)
        vocab_size = data.tokenizer.vocab_size
        embedding = builder.embedding(vocab_size + len(data.labels))
        encoder = builder.encoder(embedding)
        head = Softmax(network.hidden_size, vocab_size)
        model = LanguageModel(encoder, builder.dropout(network.output_dropout), head)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The sum over time and texts; the objective is the mean over texts."""
        inputs, lengths, targets = batch.tensors
        hidden, _ = self.model.encoder(inputs, None, lengths)
        loss = self.model.head.loss(self.model.dropout(hidden), targets, 1 / batch.rows)
        return self.mean_loss(loss, batch, targets)

    @staticmethod
    def batch_metrics(
        model: LanguageModel,
        data: LabelledTextData,
        tensors: tuple[Tensor, ...],
        examples: TextExamples,
        indices: NDArray[np.int64],
    ) -> Perplexity:
        """Perplexity of a batch; the end of a text counts as a character."""
        inputs, lengths, targets = tensors
        hidden, _ = model.encoder(inputs, None, lengths)
        log_probs = model.head.log_probs(hidden, targets.clamp(min=0)).double()
        is_counted = targets != PADDING
        is_unknown = targets == (-2 if data.tokenizer.unk_id is None else data.tokenizer.unk_id)
        return Perplexity(
            -float(log_probs[is_counted].sum()),
            int(is_counted.sum()),
            int(examples.characters[indices].sum()),
            int(is_unknown.sum()),
            -float(log_probs[is_unknown].sum()),
        )

    def preview(self, step: int) -> str:
        """Samples for some labels, which change with the step."""
        tokenizer, seed = self.data.tokenizer, self.config.train.seed + step
        chosen = Sampling(num=1, max_tokens=_PREVIEW_TOKENS, seed=seed)
        lines = []
        for offset in range(_PREVIEWED):
            label = self.data.labels[(step + offset) % len(self.data.labels)]
            ends = Ends(self.data.label_id(label), self.data.end_id)
            pieces = sampling.stream(self.model, tokenizer, "", chosen, ends)
            lines.append(f"{label}: {''.join(piece for _, piece in pieces)}")
        return "\n".join(lines)

    def baseline(self, split: str) -> Perplexity | None:
        """Perplexity under token frequencies."""
        if split not in self.data.splits:
            return None
        size = self.data.tokenizer.vocab_size
        targets = np.concatenate(self.data.splits[split].targets)
        nats = -perplexity.log_frequencies(np.concatenate(self._train.targets), size)[targets]
        is_unknown = targets == self.data.tokenizer.unk_id
        characters = int(cast(TextExamples, self.data.splits[split]).characters.sum())
        return Perplexity(
            float(nats.sum()), len(targets), characters, int(is_unknown.sum()),
            float(nats[is_unknown].sum()),
        )  # fmt: skip

    def derived(self, loss: float) -> dict[str, float]:
        """Perplexity."""
        return {"perplexity": perplexity.perplexity(loss)}

    def described(self) -> str:
        """The number of texts and the sizes of the vocabularies."""
        return (
            f"{len(self._train.inputs):,} texts, {self.data.text.described()}, "
            f"{len(self.data.labels):,} labels"
        )
