"""Classification: one label for each text or sequence of vectors (many to one)."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data import labelled, vectors
from lmtrain.data.labelled import Example
from lmtrain.data.padded import pad
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.vectors import VectorSequence, is_vectors
from lmtrain.model.classifier import Classifier
from lmtrain.model.head import Softmax
from lmtrain.model.recurrent import State
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Files, Loss, Metrics, warn_of_unknown
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
    require_texts,
)
from lmtrain.tasks.inputs import TextInputs, VectorInputs, restored_inputs
from lmtrain.tasks.labels import label_files, label_ids, labels_of, restored_labels

_PREVIEWED = 3


@dataclass(frozen=True)
class Accuracy(Metrics):
    """How often the most likely label is the right one.

    Args:
        total_nats: Σ −log P of the right labels.
        count: examples.
        correct: those whose most likely label is right.
    """

    headline = "accuracy"
    is_higher_better = True

    correct: float

    @property
    def accuracy(self) -> float:
        """The fraction of examples whose most likely label is right."""
        return self.correct / self.count

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {"loss": self.loss, "accuracy": self.accuracy, "correct": round(self.correct)}

    def table(self) -> list[tuple[str, str]]:
        """All figures, as a person reads them."""
        return [
            ("accuracy", f"{self.accuracy:.4f}"),
            ("loss (nats per example)", f"{self.loss:.5f}"),
            ("examples", f"{self.count:,.0f}"),
            ("correct", f"{self.correct:,.0f}"),
        ]


@dataclass(frozen=True)
class LabelledData(ExampleData):
    """What examples are made of, the labels, and the examples of the splits.

    Args:
        inputs: text or vectors.
        labels: the names of the labels in the order of their ids.
    """

    inputs: TextInputs | VectorInputs
    labels: Sequence[str]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back; None for vectors."""
        return self.inputs.tokenizer if isinstance(self.inputs, TextInputs) else None

    def files(self) -> dict[str, str]:
        """The tokenizer or the size of vectors, and the labels."""
        return self.inputs.files() | label_files(self.labels)

    def sizes(self) -> dict[str, int]:
        """The size of the vocabulary or of vectors, and of the set of labels."""
        return self.inputs.sizes() | {"labels": len(self.labels)}

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """A hash of texts or vectors and their labels."""
        is_text = isinstance(self.inputs, TextInputs)
        return labelled.fingerprint(examples) if is_text else vectors.fingerprint(examples)

    def encoded(self, examples: Sequence[Any], name: str) -> Examples:
        """Examples as numbers.

        Raises:
            TextError: a label that the training data does not have, or vectors of another size.
        """
        labels = label_ids([each.label for each in examples], self.labels, name)
        if isinstance(self.inputs, TextInputs):
            inputs: list[NDArray[Any]] = [self.inputs.encode(each.text, name) for each in examples]
        else:
            inputs = [self.inputs.encode(each.vectors, name) for each in examples]
        unknown = self.inputs.unknown_characters(each.text for each in examples)
        return Examples(
            inputs, labels, self.fingerprint(examples), name, unknown_characters=unknown
        )


@dataclass(frozen=True)
class Prediction:
    """The label that a model predicts for an example.

    Args:
        text: the text; None for vectors.
        label: the most likely label.
        probabilities: of each label.
    """

    text: str | None
    label: str
    probabilities: Mapping[str, float]

    @property
    def probability(self) -> float:
        """The probability of the label."""
        return self.probabilities[self.label]

    def line(self) -> str:
        """The label, the text if it is one, and the probability, with tabs between them."""
        text = [] if self.text is None else [self.text]
        return "\t".join([self.label, *text, f"{self.probability:.4f}"])

    def fields(self) -> dict[str, Any]:
        """All of it by name."""
        return {
            **({} if self.text is None else {"text": self.text}),
            "label": self.label,
            "probability": self.probability,
            "probabilities": dict(self.probabilities),
        }


class TrainedClassifier(TrainedExamples):
    """A trained classifier with its vocabularies and settings."""

    model: Classifier
    data: LabelledData

    @property
    def task(self) -> "type[Classification]":
        """Its task."""
        return Classification

    def inputs(self, place: str) -> Iterator[Any]:
        """What `predict` takes, of a file: a text a line, or the sequences of an .npz.

        Raises:
            TextError: it cannot be read.
        """
        if isinstance(self.data.inputs, TextInputs):
            return labelled.read_texts(place)
        return (each.vectors for each in vectors.read([place], labels=False))

    def predict(self, examples: Iterable[Any]) -> Iterator[Prediction]:
        """The most likely label of each example, and the probabilities of all, in their order.

        Args:
            examples: texts, or arrays of vectors (T, F).

        Raises:
            ConfigError: a single text, or what is no text.
            TextError: vectors of another size.
            DivergedError: the model's probabilities are not finite.
        """
        unknown = Counter[str]()
        for group in grouped(examples):
            yield from self._predicted(group)
            unknown.update(self.data.inputs.unknown_characters(map(labelled.cleaned, group)))
        warn_of_unknown(unknown, "the text")

    @torch.no_grad()
    def _predicted(self, group: Sequence[Any]) -> Iterator[Prediction]:
        texts, arrays = self._encoded(group)
        probabilities = np.empty((len(group), len(self.data.labels)))
        for indices, inputs, lengths in batched(self.model, arrays):
            logits = self.model(inputs, lengths)
            probabilities[indices] = logits.double().softmax(-1).cpu().numpy()
        require_finite(probabilities)
        for text, row in zip(texts, probabilities, strict=True):
            label = self.data.labels[int(row.argmax())]
            yield Prediction(text, label, dict(zip(self.data.labels, row.tolist(), strict=True)))

    def _encoded(self, group: Sequence[Any]) -> tuple[Sequence[str | None], list[NDArray[Any]]]:
        """The texts as they are read, if there are any, and all examples as numbers.

        Raises:
            ConfigError: one is no text.
        """
        inputs = self.data.inputs
        if isinstance(inputs, VectorInputs):
            return [None] * len(group), [inputs.encode(each, "predict") for each in group]
        require_texts(group)
        texts = [labelled.cleaned(text) for text in group]
        return texts, [inputs.encode(text, "predict") for text in texts]


class Classification(ExampleTask):
    """Trains a classifier."""

    unit = "examples"
    command = "predict"
    metrics = Accuracy
    trained = TrainedClassifier
    model: Classifier
    data: LabelledData

    @classmethod
    def read_files(cls, places: Sequence[str], config: Config) -> list[Any]:
        """The examples of files: vectors if the training data is, else text."""
        if is_vectors(config.data.train[0]):
            return list(vectors.read(places, labels=True))
        return list(labelled.read(places))

    @staticmethod
    def kinds(example: Example | VectorSequence) -> Collection[str]:
        """Its label."""
        return (example.label,)

    @classmethod
    def vocabularies(cls, examples: Sequence[Any], config: Config) -> LabelledData:
        """The tokens or the size of vectors, and the labels.

        Raises:
            TextError: there is only one label.
        """
        labels = labels_of([each.label for each in examples], place_names(config, "train"))
        if is_vectors(config.data.train[0]):
            size = examples[0].vectors.shape[1]
            return LabelledData(VectorInputs.of(size, config), labels)
        return LabelledData(TextInputs.of((each.text for each in examples), config), labels)

    @classmethod
    def restore(cls, files: Files, config: Config) -> LabelledData:
        """What a checkpoint holds of inputs and labels.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        inputs = restored_inputs(files, vectors=is_vectors(config.data.train[0]))
        return LabelledData(inputs, restored_labels(files))

    @classmethod
    def build(cls, config: Config, data: LabelledData, *, is_shared: bool = False) -> Classifier:
        """The classifier with its first weights."""
        network, builder = config.model, Builder(config, is_shared=is_shared)
        encoder = builder.encoder(data.inputs.first_layer(builder))
        head = Softmax(encoder.recurrent.output_size, len(data.labels))
        dropout = builder.dropout(network.output_dropout)
        model = Classifier(encoder, dropout, head, network.pooling)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    @staticmethod
    def collated(examples: Examples, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Ids (T, B) or vectors (T, B, F), lengths (B,) and labels (1, B)."""
        inputs, lengths = pad([examples.inputs[index] for index in indices])
        return inputs, lengths, cast("NDArray[np.int64]", examples.targets)[indices][None]

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The total over examples; the objective is its mean."""
        inputs, lengths, labels = batch.tensors
        pooled = self.model.pooled(inputs, lengths)
        loss = self.model.head.loss(pooled, labels, 1 / batch.rows)
        return self.mean(loss, batch, labels)

    @staticmethod
    def measured(
        model: Classifier,
        data: LabelledData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> Accuracy:
        """The accuracy on a batch."""
        inputs, lengths, labels = tensors
        log_probs = model(inputs, lengths).double().log_softmax(-1)  # (B, C)
        total = -float(log_probs.gather(1, labels.T).sum())
        return Accuracy(total, len(lengths), int((log_probs.argmax(-1) == labels[0]).sum()))

    def preview(self, step: int) -> str:
        """Some validation examples with the predicted and the right label."""
        examples, indices = self.previewed(step, _PREVIEWED)
        self.model.eval()
        inputs, lengths, labels = self.placed(examples, indices)
        with torch.no_grad():
            predicted = self.model(inputs, lengths).argmax(-1)
        lines = []
        for index, found, label in zip(indices, predicted, labels[0], strict=True):
            name, right = self.data.labels[int(found)], self.data.labels[int(label)]
            text = self.data.inputs.shown(examples.inputs[int(index)])
            truth = "right" if name == right else f"wrong, is {right}"
            lines.append(f"predicted {name} ({truth}): {text}")
        return "\n".join(lines)

    def baseline(self, split: str) -> Accuracy | None:
        """The frequencies of the labels, and the most frequent one."""
        if split not in self.data.splits:
            return None
        train = cast("NDArray[np.int64]", self._train.targets)
        counts = np.bincount(train, minlength=len(self.data.labels)) + 1.0
        labels = cast("NDArray[np.int64]", self.data.splits[split].targets)
        nats = -np.log(counts / counts.sum())[labels]
        return Accuracy(float(nats.sum()), len(labels), int((labels == counts.argmax()).sum()))

    def described(self) -> str:
        """The number of examples and the sizes of the vocabularies."""
        return (
            f"{len(self._train.inputs):,} examples, {self.data.inputs.described()}, "
            f"{len(self.data.labels):,} labels"
        )
