"""Classification of text: one label for each sequence of tokens (many to one)."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Len
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lmtrain import device
from lmtrain.data import labelled
from lmtrain.data.labelled import Example
from lmtrain.data.padded import PaddedBatches, in_order, pad
from lmtrain.data.tokenizer import Tokenizer, build_tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.model.classifier import Classifier
from lmtrain.model.head import Softmax
from lmtrain.model.recurrent import State
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Files, Loss, Metrics, Shard, Task, Trained, require_same
from lmtrain.tasks.building import Builder

_TOKENIZER, _LABELS = "tokenizer.json", "labels.json"
# Texts that are predicted at once, out of so many that are sorted by length together.
_AT_ONCE, _SORTED = 64, 512
_MOST_TOKENS = 1 << 16
_PREVIEWED = 3
# How much of labels stands in messages.
_SHOWN, _SHOWN_LENGTH = 10, 40
_VALID_FRACTION = 0.1
_NO_LABEL = -1
_LABELS_FILE = TypeAdapter(dict[Literal["labels"], Annotated[list[str], Len(1)]])


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
        return {"loss": self.loss, "accuracy": self.accuracy, "correct": self.correct}

    def table(self) -> list[tuple[str, str]]:
        """All figures, as a person reads them."""
        return [
            ("accuracy", f"{self.accuracy:.4f}"),
            ("loss (nats per example)", f"{self.loss:.5f}"),
            ("examples", f"{self.count:,.0f}"),
            ("correct", f"{self.correct:,.0f}"),
        ]


@dataclass(frozen=True)
class Examples:
    """The examples of a split as ids.

    Args:
        tokens: the token ids of each text, at least one.
        labels: the label id of each, (N,).
        key: the hash of labels and texts.
        name: what messages call them.
    """

    tokens: Sequence[NDArray[np.int64]]
    labels: NDArray[np.int64]
    key: str
    name: str

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text, (N,)."""
        return np.array([len(ids) for ids in self.tokens], np.int64)


@dataclass(frozen=True)
class LabelledData:
    """A tokenizer, the labels, and the examples of the splits.

    Args:
        tokenizer: text to ids.
        labels: the names of the labels in the order of their ids.
        splits: the examples of each split.
    """

    tokenizer: Tokenizer
    labels: Sequence[str]
    splits: Mapping[str, Examples] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        """The tokenizer and the labels."""
        labels = json.dumps({"labels": list(self.labels)}, ensure_ascii=False)
        return {_TOKENIZER: self.tokenizer.to_json(), _LABELS: labels}

    def sizes(self) -> dict[str, int]:
        """The sizes of the vocabulary and of the set of labels."""
        return {"vocab_size": self.tokenizer.vocab_size, "labels": len(self.labels)}

    def references(self) -> dict[str, dict[str, str]]:
        """The splits' names and the hashes of their examples."""
        return {split: {"name": each.name, "key": each.key} for split, each in self.splits.items()}

    def encoded(self, examples: Sequence[Example], name: str) -> Examples:
        """Examples as ids.

        Raises:
            TextError: a label that the training data does not have.
        """
        ids = {label: index for index, label in enumerate(self.labels)}
        for example in examples:
            if example.label not in ids:
                raise TextError(
                    f"{name}: the label {_shortened(example.label)!r} is not in the training data",
                    f"its labels: {_listed(self.labels)}",
                )
        labels = np.array([ids[example.label] for example in examples], np.int64)
        tokens = [self.tokens(example.text) for example in examples]
        return Examples(tokens, labels, labelled.fingerprint(examples), name)

    def tokens(self, text: str) -> NDArray[np.int64]:
        """The ids of a text; of one that has no token, `<UNK>` or a blank."""
        ids = self.tokenizer.encode(text)
        return ids if len(ids) else np.array([self.tokenizer.unk_id or 0], np.int64)


@dataclass(frozen=True)
class Prediction:
    """The label that a model predicts for a text.

    Args:
        text: the text.
        label: the most likely label.
        probabilities: of each label.
    """

    text: str
    label: str
    probabilities: Mapping[str, float]

    @property
    def probability(self) -> float:
        """The probability of the label."""
        return self.probabilities[self.label]

    def line(self) -> str:
        """The label, the text and the probability, with tabs between them."""
        return f"{self.label}\t{self.text}\t{self.probability:.4f}"

    def fields(self) -> dict[str, Any]:
        """All of it by name."""
        return {
            "text": self.text,
            "label": self.label,
            "probability": self.probability,
            "probabilities": dict(self.probabilities),
        }


class TrainedClassifier(Trained):
    """A trained classifier with its tokenizer, labels and settings."""

    model: Classifier
    data: LabelledData

    def predict(self, texts: Iterable[str]) -> Iterator[Prediction]:
        """The most likely label of each text, and the probabilities of all, in their order.

        Raises:
            ConfigError: a single text, or what is no text.
            TextError: at byte level, a text that is not valid Unicode.
        """
        if isinstance(texts, str):
            raise ConfigError("predict takes a list of texts, not one text", "try: predict([text])")
        return itertools.chain.from_iterable(map(self._predicted, _groups(texts)))

    @torch.no_grad()
    def _predicted(self, texts: Sequence[str]) -> Iterator[Prediction]:
        tokens = [self.data.tokens(text) for text in texts]
        place, labels = device.of(self.model), self.data.labels
        probabilities = np.empty((len(texts), len(labels)))
        sizes = np.array([len(ids) for ids in tokens], np.int64)
        for indices in in_order(sizes, _AT_ONCE, _MOST_TOKENS):
            ids, lengths = pad([tokens[index] for index in indices])
            logits = self.model(device.place(ids, place), device.place(lengths, place))
            probabilities[indices] = logits.double().softmax(-1).cpu().numpy()
        for text, row in zip(texts, probabilities, strict=True):
            label = labels[int(row.argmax())]
            yield Prediction(text, label, dict(zip(labels, row.tolist(), strict=True)))

    def read(self, places: Sequence[str]) -> Examples:
        """The examples of files in the form of the training data.

        Raises:
            TextError: they cannot be read, or have a label that the model does not know.
        """
        return self.data.encoded(list(labelled.read(places)), ", ".join(places))

    def own(self, splits: Sequence[str] = ("valid", "test")) -> Mapping[str, Examples]:
        """The run's own examples, read again.

        Raises:
            TextError: they are gone.
            CheckpointError: they are not what they were.
        """
        return Classification.find(self.config, self.data, self.state["data"], splits).splits

    def measure(self, data: Examples, *, batch_size: int = 1) -> Accuracy:
        """The accuracy on examples, `batch_size` of them at once."""
        return _measured(self.model, data, batch_size, Shard(), lambda: None)


class Classification(Task):
    """Trains a classifier."""

    unit = "examples"
    command = "predict"
    metrics = Accuracy
    trained = TrainedClassifier
    model: Classifier
    data: LabelledData

    def __init__(self, config: Config, data: LabelledData, model: Classifier, shard: Shard) -> None:
        super().__init__(config, data, model, shard)
        train = config.train
        self._train = data.splits["train"]
        self._batches = PaddedBatches(self._train.lengths, train.batch_size, train.seed)

    @classmethod
    def read(cls, config: Config) -> LabelledData:
        """Reads the examples; the vocabulary and the labels are those of the training split.

        Raises:
            TextError: data is missing or unreadable, or has too few examples or labels.
        """
        splits, data = _read_splits(config), config.data
        tokenizer = build_tokenizer(
            (f"{example.text}\n" for example in splits["train"]),
            data.level,
            data.splitter,
            vocab_size=data.vocab_size,
            min_count=data.min_count,
            lowercase=data.lowercase,
            # A text with a new character has a label all the same.
            has_unk=True,
        )
        labels = sorted({example.label for example in splits["train"]})
        if len(labels) == 1:
            raise TextError(
                f"{_name(config, 'train')}: all examples have the label {_shortened(labels[0])!r}",
                "at least two labels are needed",
            )
        found = LabelledData(tokenizer, labels)
        return LabelledData(
            tokenizer,
            labels,
            {split: found.encoded(each, _name(config, split)) for split, each in splits.items()},
        )

    @classmethod
    def restore(cls, files: Files) -> LabelledData:
        """The tokenizer and the labels of a checkpoint.

        Raises:
            CheckpointError: one of them is missing or damaged.
        """
        try:
            labels = _LABELS_FILE.validate_json(files.text(_LABELS))["labels"]
        except ValidationError as error:
            where = error.errors()[0]["msg"]
            raise CheckpointError(f"{_LABELS} is damaged: {where}") from None
        if len(set(labels)) < len(labels) or any(name.splitlines() != [name] for name in labels):
            raise CheckpointError(f"{_LABELS} is damaged: a label stands twice or is not one line")
        return LabelledData(Tokenizer.from_json(files.text(_TOKENIZER)), labels)

    @classmethod
    def find(
        cls,
        config: Config,
        data: LabelledData,
        references: Mapping[str, Mapping[str, str]],
        splits: Sequence[str] = ("train", "valid", "test"),
    ) -> LabelledData:
        """The examples of a run, read again."""
        wanted = {split: references[split] for split in splits if split in references}
        read = _read_splits(config, tuple(wanted))
        for split, reference in wanted.items():
            key = labelled.fingerprint(read[split]) if split in read else None
            require_same(split, reference["name"], key, reference["key"])
        found = {split: data.encoded(read[split], _name(config, split)) for split in wanted}
        return LabelledData(data.tokenizer, data.labels, found)

    @classmethod
    def build(cls, config: Config, data: LabelledData, *, is_shared: bool = False) -> Classifier:
        """The classifier with its first weights."""
        network, builder = config.model, Builder(config, is_shared=is_shared)
        sizes = [network.hidden_size] * network.num_layers
        encoder = builder.encoder(data.tokenizer.vocab_size, sizes)
        head = Softmax(encoder.recurrent.directions * network.hidden_size, len(data.labels))
        dropout = builder.dropout(network.output_dropout)
        model = Classifier(encoder, dropout, head, network.pooling)
        model.initialize(network.init_scale, network.forget_bias)
        return model

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training example once."""
        return int(self._batches.steps_per_epoch)

    def batch(self, step: int) -> Batch:
        """Examples of similar length."""
        indices = self._batches.indices(step)
        tensors = _padded(self.model, self._train, indices, self.shard)
        return Batch(tensors, rows=len(indices) / self.shard.size)

    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The total over examples; the objective is its mean."""
        tokens, lengths, labels = batch.tensors
        pooled = self.model.pooled(tokens, lengths)
        nats = self.model.head.nats(pooled, labels, 1 / batch.rows)
        total = nats.detach().double() * batch.rows
        return Loss(nats, total, (labels != _NO_LABEL).sum().double(), None)

    def evaluate(self, split: str, meanwhile: Callable[[], None] = lambda: None) -> Accuracy | None:
        """The accuracy on this process's shard of a split."""
        if split not in self.data.splits:
            return None
        batch_size = self.config.train.batch_size
        return _measured(self.model, self.data.splits[split], batch_size, self.shard, meanwhile)

    def preview(self, step: int) -> str:
        """Some validation examples with the predicted and the right label."""
        examples = self.data.splits.get("valid", self._train)
        first = step * _PREVIEWED % len(examples.tokens)
        indices = np.arange(first, min(first + _PREVIEWED, len(examples.tokens)))
        self.model.eval()
        tokens, lengths, labels = _padded(self.model, examples, indices, Shard())
        with torch.no_grad():
            predicted = self.model(tokens, lengths).argmax(-1)
        lines = []
        for index, found, label in zip(indices, predicted, labels[0], strict=True):
            name, right = self.data.labels[int(found)], self.data.labels[int(label)]
            text = self.data.tokenizer.decode(examples.tokens[int(index)])
            truth = "right" if name == right else f"is {right}"
            lines.append(f"predicted {name}, {truth}: {text}")
        return "\n".join(lines)

    def baseline(self, split: str) -> Accuracy | None:
        """The frequencies of the labels, and the most frequent one."""
        if split not in self.data.splits:
            return None
        counts = np.bincount(self._train.labels, minlength=len(self.data.labels)) + 1.0
        labels = self.data.splits[split].labels
        nats = -np.log(counts / counts.sum())[labels]
        return Accuracy(float(nats.sum()), len(labels), int((labels == counts.argmax()).sum()))

    def described(self) -> str:
        """The number of examples and the sizes of the vocabularies."""
        return (
            f"{len(self._train.tokens):,} examples, vocabulary "
            f"{self.data.tokenizer.vocab_size:,}, {len(self.data.labels):,} labels"
        )


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, as readers of files give them, in groups that are predicted together.

    Raises:
        ConfigError: one is no text.
    """
    source = iter(texts)
    while group := list(itertools.islice(source, _SORTED)):
        for text in group:
            if not isinstance(text, str):
                raise ConfigError(f"predict takes texts, not {type(text).__name__}")
        yield [labelled.cleaned(text) for text in group]


def _padded(
    model: Classifier, examples: Examples, indices: NDArray[np.int64], shard: Shard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A process's examples of a batch: tokens (T, B), lengths (B,) and labels (1, B).

    A process whose part is empty gets one example without a label, which counts nothing.
    """
    own = indices[shard.of(len(indices))]
    labels = examples.labels[own] if len(own) else np.array([_NO_LABEL])
    own = own if len(own) else indices[:1]
    ids, lengths = pad([examples.tokens[index] for index in own])
    place = device.of(model)
    return (
        device.place(ids, place),
        device.place(lengths, place),
        device.place(labels[None], place),
    )


def _measured(
    model: Classifier,
    examples: Examples,
    batch_size: int,
    shard: Shard,
    meanwhile: Callable[[], None],
) -> Accuracy:
    was_training = model.training
    model.eval()
    total, count, correct = 0.0, 0, 0
    for indices in in_order(examples.lengths, batch_size):
        meanwhile()
        tokens, lengths, labels = _padded(model, examples, indices, shard)
        is_counted = labels[0] != _NO_LABEL
        with torch.no_grad():
            log_probs = model(tokens, lengths).double().log_softmax(-1)  # (B, C)
        right = log_probs.gather(1, labels.clamp(min=0).T).squeeze(1)
        total -= float(right[is_counted].sum())
        count += int(is_counted.sum())
        correct += int((log_probs.argmax(-1) == labels[0])[is_counted].sum())
    model.train(was_training)
    return Accuracy(total, count, correct)


def _shortened(label: str) -> str:
    return label if len(label) <= _SHOWN_LENGTH else label[: _SHOWN_LENGTH - 1] + "…"


def _listed(labels: Sequence[str]) -> str:
    """The first labels, for messages."""
    more = f" and {len(labels) - _SHOWN:,} more" if len(labels) > _SHOWN else ""
    return ", ".join(map(_shortened, labels[:_SHOWN])) + more


def _name(config: Config, split: str) -> str:
    places = getattr(config.data, split) or config.data.train
    return ", ".join(places)


def _read_splits(
    config: Config, wanted: Sequence[str] = ("train", "valid", "test")
) -> dict[str, list[Example]]:
    """The examples of splits; those that have no file are drawn from the training data.

    Raises:
        TextError: a file is missing or unreadable, or there are too few examples.
    """
    data = config.data
    places = {"valid": data.valid, "test": data.test}
    splits = {s: list(labelled.read(places[s])) for s in wanted if places.get(s)}
    if splits.keys() == set(wanted):
        return splits
    train = list(labelled.read(data.train))
    fractions = {
        "valid": _VALID_FRACTION if data.valid_fraction is None else data.valid_fraction,
        "test": data.test_fraction or 0.0,
    }
    # Files are often sorted by label, so that their tail would not do.
    order = np.random.default_rng(len(train)).permutation(len(train)).tolist()
    # One example of each label stays in training, or the label would be unknown there.
    kept = set({train[index].label: index for index in order}.values())
    free = [index for index in order if index not in kept]
    for split, fraction in fractions.items():
        if fraction and not places[split]:
            size = max(1, round(fraction * len(train)))
            drawn, free = free[:size], free[size:]
            if not drawn:
                raise TextError(
                    f"{_name(config, 'train')} has too few examples to be split: {len(train):,}",
                    "give validation data of its own: --valid FILE",
                )
            splits[split] = [train[index] for index in sorted(drawn)]
    return {"train": [train[index] for index in sorted([*kept, *free])], **splits}
