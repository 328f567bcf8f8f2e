"""Classification: a label for each text or sequence of vectors (many to one)."""

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
    data_names,
    groups,
    length_batches,
    require_finite,
    require_texts,
)
from lmtrain.tasks.inputs import TextInputs, VectorInputs, restored_inputs
from lmtrain.tasks.labels import label_files, label_ids, labels_of, restored_labels

_PREVIEWED = 3


@dataclass(frozen=True)
class Accuracy(Metrics):
    """Accuracy of the most likely label.

    Args:
        total_nats: Σ −log P of the correct labels.
        count: number of examples.
        correct: number of examples whose most likely label is correct.
    """

    headline = "accuracy"
    is_higher_better = True

    correct: float

    @property
    def accuracy(self) -> float:
        """The fraction of examples whose most likely label is correct."""
        return self.correct / self.count

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {"loss": self.loss, "accuracy": self.accuracy, "correct": round(self.correct)}

    def table(self) -> list[tuple[str, str]]:
        """Names and formatted values of all figures."""
        return [
            ("accuracy", f"{self.accuracy:.4f}"),
            ("loss (nats per example)", f"{self.loss:.5f}"),
            ("examples", f"{self.count:,.0f}"),
            ("correct", f"{self.correct:,.0f}"),
        ]


@dataclass(frozen=True)
class LabelledData(ExampleData):
    """The kind of inputs, the labels, and the examples of the splits.

    Args:
        inputs: text or vectors.
        labels: names of the labels by id.
    """

    inputs: TextInputs | VectorInputs
    labels: Sequence[str]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back; None for vectors."""
        return self.inputs.tokenizer if isinstance(self.inputs, TextInputs) else None

    def files(self) -> dict[str, str]:
        """Content of the files for the inputs and the labels."""
        return self.inputs.files() | label_files(self.labels)

    def sizes(self) -> dict[str, int]:
        """The size of the vocabulary or of vectors, and the number of labels."""
        return self.inputs.sizes() | {"labels": len(self.labels)}

    def fingerprint(self, examples: Sequence[Any]) -> str:
        """A hash of texts or vectors and their labels."""
        is_text = isinstance(self.inputs, TextInputs)
        return labelled.fingerprint(examples) if is_text else vectors.fingerprint(examples)

    def encode_examples(self, examples: Sequence[Any], name: str) -> Examples:
        """Encodes examples.

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
        probabilities: probability of each label.
    """

    text: str | None
    label: str
    probabilities: Mapping[str, float]

    @property
    def probability(self) -> float:
        """The probability of the label."""
        return self.probabilities[self.label]

    def line(self) -> str:
        """The label, the text if there is one, and the probability, separated by tabs."""
        text = [] if self.text is None else [self.text]
        return "\t".join([self.label, *text, f"{self.probability:.4f}"])

    def fields(self) -> dict[str, Any]:
        """All fields by name, for JSON."""
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
        """The task that the model was trained for."""
        return Classification

    def inputs(self, path: str) -> Iterator[Any]:
        """Reads inputs for `predict`: a text on each line, or the sequences of an .npz file.

        Raises:
            TextError: the file cannot be read.
        """
        if isinstance(self.data.inputs, TextInputs):
            return labelled.read_texts(path)
        return (each.vectors for each in vectors.read([path], labels=False))

    def predict(self, examples: Iterable[Any]) -> Iterator[Prediction]:
        """The most likely label and all probabilities for each example, in order.

        Args:
            examples: texts, or arrays of vectors (T, F).

        Raises:
            ConfigError: a single text instead of a list, or an item that is not a text.
            TextError: vectors of another size.
            DivergedError: the model's probabilities are not finite.
        """
        unknown = Counter[str]()
        for group in groups(examples):
            yield from self._predict_group(group)
            unknown.update(self.data.inputs.unknown_characters(map(labelled.cleaned, group)))
        warn_of_unknown(unknown, "the text")

    @torch.no_grad()
    def _predict_group(self, group: Sequence[Any]) -> Iterator[Prediction]:
        texts, arrays = self._encode(group)
        probabilities = np.empty((len(group), len(self.data.labels)))
        for indices, inputs, lengths in length_batches(self.model, arrays):
            logits = self.model(inputs, lengths)
            probabilities[indices] = logits.double().softmax(-1).cpu().numpy()
        require_finite(probabilities)
        for text, row in zip(texts, probabilities, strict=True):
            label = self.data.labels[int(row.argmax())]
            yield Prediction(text, label, dict(zip(self.data.labels, row.tolist(), strict=True)))

    def _encode(self, group: Sequence[Any]) -> tuple[Sequence[str | None], list[NDArray[Any]]]:
        """The texts, or None for vectors, and the encoded examples.

        Raises:
            ConfigError: an item is not a text.
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
    def read_files(cls, paths: Sequence[str], config: Config) -> list[Any]:
        """Reads vectors if the training data are vectors, or else text."""
        if is_vectors(config.data.train[0]):
            return list(vectors.read(paths, labels=True))
        return list(labelled.read(paths))

    @staticmethod
    def labels_in(example: Example | VectorSequence) -> Collection[str]:
        """The label of the example."""
        return (example.label,)

    @classmethod
    def build_vocabularies(cls, examples: Sequence[Any], config: Config) -> LabelledData:
        """Builds the vocabulary, or reads the size of vectors, and collects the labels.

        Raises:
            TextError: there is only one label.
        """
        labels = labels_of([each.label for each in examples], data_names(config, "train"))
        if is_vectors(config.data.train[0]):
            size = examples[0].vectors.shape[1]
            return LabelledData(VectorInputs.of(size, config), labels)
        return LabelledData(TextInputs.of((each.text for each in examples), config), labels)

    @classmethod
    def restore(cls, files: Files, config: Config) -> LabelledData:
        """The inputs and labels of a checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        inputs = restored_inputs(files, vectors=is_vectors(config.data.train[0]))
        return LabelledData(inputs, restored_labels(files))

    @classmethod
    def build(cls, config: Config, data: LabelledData) -> Classifier:
        """The classifier with initial weights."""
        network, builder = config.model, Builder(config)
        encoder = builder.encoder(data.inputs.first_layer(builder))
        head = Softmax(encoder.recurrent.output_size, len(data.labels))
        dropout = builder.dropout(network.output_dropout)
        model = Classifier(encoder, dropout, head, network.pooling)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    @staticmethod
    def collate(examples: Examples, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Token ids (T, B) or vectors (T, B, F), lengths (B,) and labels (1, B)."""
        inputs, lengths = pad([examples.inputs[index] for index in indices])
        return inputs, lengths, cast("NDArray[np.int64]", examples.targets)[indices][None]

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The sum over examples; the objective is the mean."""
        inputs, lengths, labels = batch.tensors
        pooled = self.model.pooled(inputs, lengths)
        loss = self.model.head.loss(pooled, labels, 1 / batch.rows)
        return self.mean_loss(loss, batch, labels)

    @staticmethod
    def batch_metrics(
        model: Classifier,
        data: LabelledData,
        tensors: tuple[Tensor, ...],
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> Accuracy:
        """The accuracy of a batch."""
        inputs, lengths, labels = tensors
        log_probs = model(inputs, lengths).double().log_softmax(-1)  # (B, C)
        total = -float(log_probs.gather(1, labels.T).sum())
        return Accuracy(total, len(lengths), int((log_probs.argmax(-1) == labels[0]).sum()))

    def preview(self, step: int) -> str:
        """Some validation examples with their predicted and correct labels."""
        examples, indices = self.preview_examples(step, _PREVIEWED)
        self.model.eval()
        inputs, lengths, labels = self.to_device(examples, indices)
        with torch.no_grad():
            predicted = self.model(inputs, lengths).argmax(-1)
        lines = []
        for index, prediction, label in zip(indices, predicted, labels[0], strict=True):
            name, correct = self.data.labels[int(prediction)], self.data.labels[int(label)]
            text = self.data.inputs.shown(examples.inputs[int(index)])
            truth = "correct" if name == correct else f"wrong, is {correct}"
            lines.append(f"predicted {name} ({truth}): {text}")
        return "\n".join(lines)

    def baseline(self, split: str) -> Accuracy | None:
        """Predicts the frequencies of the labels, and the most frequent label."""
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
