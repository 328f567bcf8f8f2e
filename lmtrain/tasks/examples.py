"""The common part of tasks whose data are examples of different lengths, not one long text.

Batches are padded and hold examples of similar length. A task defines how examples become tensors
and computes the metrics of a batch.
"""

import abc
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain import device, torchrun
from lmtrain.data.division import require_training_part
from lmtrain.data.padded import PADDING, PaddedBatches, by_length, pad
from lmtrain.errors import ConfigError, DivergedError, TextError
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Loss, Shard, Task, Trained, require_unchanged, warn_of_unknown

_VALID_FRACTION = 0.1
EVAL_BATCH_SIZE = 64
"""Number of examples in a batch of evaluation and prediction."""
# Number of examples that are sorted by length together.
_GROUP_SIZE = 512
_MAX_STEPS = 1 << 16
_ADVICE = {
    "valid": "give validation data of its own: --valid FILE",
    "test": "give test data of its own: --set data.test=FILE",
}
SPLITS = ("train", "valid", "test")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Examples:
    """The encoded examples of a split.

    Args:
        inputs: for each example token ids (T,) or vectors (T, F), T at least 1.
        targets: labels (N,), or an array for each example.
        key: a hash of the examples.
        name: their name in messages.
        unknown_characters: those that are `<UNK>` at character level, with their counts.
    """

    inputs: Sequence[NDArray[Any]]
    targets: Sequence[NDArray[Any]] | NDArray[Any]
    key: str
    name: str
    unknown_characters: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of steps of each example, (N,)."""
        return np.array([len(steps) for steps in self.inputs], np.int64)


@dataclass(frozen=True)
class ExampleData(abc.ABC):
    """The vocabularies of a task, and the examples of the splits.

    Args:
        splits: the examples of each split.
    """

    splits: Mapping[str, Examples] = field(default_factory=dict, kw_only=True)

    @abc.abstractmethod
    def files(self) -> dict[str, str]:
        """The vocabularies that a checkpoint stores, by the name of the file."""

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes of the vocabularies by name."""

    @abc.abstractmethod
    def fingerprint(self, examples: Sequence[Any]) -> str:
        """A hash of examples as read from files."""

    @abc.abstractmethod
    def encode_examples(self, examples: Sequence[Any], name: str) -> Examples:
        """Encodes examples.

        Raises:
            TextError: a label or a size that the training data does not have.
        """

    def references(self) -> dict[str, dict[str, str]]:
        """The name and the hash of each split."""
        return {split: {"name": each.name, "key": each.key} for split, each in self.splits.items()}


class TrainedExamples(Trained):
    """A trained model of a task whose data are examples."""

    @property
    @abc.abstractmethod
    def task(self) -> "type[ExampleTask]":
        """The task that the model was trained for."""

    def read(self, paths: Sequence[str]) -> Examples:
        """Reads and encodes files in the form of the training data.

        Raises:
            TextError: they cannot be read, or have an unknown label or another size.
        """
        examples: Examples = self.data.encode_examples(
            self.task.read_files(paths, self.config), ", ".join(paths)
        )
        warn_of_unknown(examples.unknown_characters, examples.name)
        return examples

    def own_data(self, splits: Sequence[str] = ("valid", "test")) -> Mapping[str, Examples]:
        """Reads the run's own examples again.

        Raises:
            TextError: a file is missing.
            CheckpointError: a file has changed.
        """
        return self.task.find(self.config, self.data, self.state["data"], splits).splits

    def measure(self, data: Examples, *, batch_size: int = EVAL_BATCH_SIZE) -> Any:
        """The metrics of examples, computed in batches."""
        return self.task.evaluate_examples(self.model, self.data, data, batch_size)


class ExampleTask(Task):
    """A task whose data are examples."""

    data: Any

    def __init__(self, config: Config, data: Any, model: Any, shard: Shard) -> None:
        super().__init__(config, data, model, shard)
        train = config.train
        self._train: Examples = data.splits["train"]
        self._batches = PaddedBatches(self._train.lengths, train.batch_size, train.seed)

    @classmethod
    @abc.abstractmethod
    def read_files(cls, paths: Sequence[str], config: Config) -> list[Any]:
        """Reads the examples of files in order.

        Raises:
            TextError: a file is missing or not of the task's form.
        """

    @classmethod
    def read_split(cls, config: Config, split: str) -> list[Any]:
        """Reads the examples of the files of a split."""
        return cls.read_files(getattr(config.data, split), config)

    @staticmethod
    def labels_in(example: Any) -> Collection[str]:
        """The labels of an example; training data keeps at least one example of each label."""
        return ()

    @classmethod
    @abc.abstractmethod
    def build_vocabularies(cls, examples: Sequence[Any], config: Config) -> ExampleData:
        """Builds the vocabularies from training examples.

        Raises:
            TextError: all examples have the same label.
        """

    @staticmethod
    def collate(examples: Examples, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Padded inputs (T, B, ...), their lengths (B,), and targets, padded by PADDING."""
        inputs, lengths = pad([examples.inputs[index] for index in indices])
        targets, _ = pad([examples.targets[index] for index in indices])
        return inputs, lengths, targets

    @staticmethod
    @abc.abstractmethod
    def batch_metrics(
        model: Any,
        data: Any,
        tensors: tuple[Tensor, ...],
        examples: Any,
        indices: NDArray[np.int64],
    ) -> Any:
        """The metrics of a batch: `tensors` are the collated examples at `indices`."""

    @classmethod
    def read(cls, config: Config) -> ExampleData:
        """Reads the examples and builds the vocabularies from the training split."""
        splits = cls._read_splits(config)
        data = _encode_splits(cls.build_vocabularies(splits["train"], config), splits, config)
        for split in ("valid", "test"):
            if split in data.splits:
                warn_of_unknown(data.splits[split].unknown_characters, data.splits[split].name)
        return data

    @classmethod
    def find(
        cls,
        config: Config,
        data: ExampleData,
        references: Mapping[str, Mapping[str, str]],
        splits: Sequence[str] = SPLITS,
    ) -> ExampleData:
        """Reads the examples of a run again."""
        chosen = {split: references[split] for split in splits if split in references}
        read = cls._read_splits(config, tuple(chosen))
        for split, reference in chosen.items():
            key = data.fingerprint(read[split]) if split in read else None
            require_unchanged(split, reference["name"], key, reference["key"])
        return _encode_splits(data, {split: read[split] for split in chosen}, config)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one pass over the training examples."""
        return int(self._batches.steps_per_epoch)

    def batch(self, step: int) -> Batch:
        """A batch of examples of similar length."""
        indices = self._batches.indices(step)
        shard = indices[self.shard.of(len(indices))]
        *arrays, targets = self.collate(self._train, shard if len(shard) else indices[:1])
        if not len(shard):
            # A process with an empty shard computes one example without targets.
            targets = np.full_like(targets, PADDING)
        return Batch(
            _to_device(self.model, (*arrays, targets)), rows=len(indices) / self.shard.size
        )

    @staticmethod
    def mean_loss(nats: Tensor, batch: Batch, targets: Tensor) -> Loss:
        """The loss of a batch; the objective is the mean over rows, in nats.

        Args:
            nats: Σ −log P of the targets, divided by `batch.rows`.
            batch: the batch.
            targets: the targets, PADDING where there are none.
        """
        count = (targets != PADDING).sum().double()
        return Loss(nats, nats.detach().double() * batch.rows, count, None)

    def evaluate(self, split: str, between_batches: Callable[[], None] = lambda: None) -> Any:
        """The metrics of this process's shard of a split."""
        if split not in self.data.splits:
            return None
        batch_size = self.config.train.batch_size
        return self.evaluate_examples(
            self.model, self.data, self.data.splits[split], batch_size, self.shard, between_batches
        )

    @classmethod
    def evaluate_examples(
        cls,
        model: Any,
        data: ExampleData,
        examples: Examples,
        batch_size: int,
        shard: Shard | None = None,
        between_batches: Callable[[], None] = lambda: None,
        measure: Callable[..., Any] | None = None,
    ) -> Any:
        """The metrics of a shard of examples.

        Args:
            model: the network.
            data: its vocabularies.
            examples: the examples.
            batch_size: number of examples in a batch.
            shard: the rows of each batch to evaluate; None for all.
            between_batches: called before each batch.
            measure: used instead of `batch_metrics`.
        """
        was_training = model.training
        model.eval()
        found = []
        for indices in by_length(examples.lengths, batch_size):
            between_batches()
            rows = indices[(shard or Shard()).of(len(indices))]
            if len(rows):
                with torch.no_grad():
                    tensors = _to_device(model, cls.collate(examples, rows))
                    found.append(
                        (measure or cls.batch_metrics)(model, data, tensors, examples, rows)
                    )
        model.train(was_training)
        zero = cls.metrics.zero()
        return zero.summed([each.sums for each in found]) if found else zero

    @classmethod
    def _read_splits(cls, config: Config, names: Sequence[str] = SPLITS) -> dict[str, list[Any]]:
        """Reads splits; splits without a file are drawn from the training data.

        Raises:
            TextError: a file is missing or unreadable, or there are too few examples.
            ConfigError: several processes would read standard input.
        """
        data = config.data
        _require_one_reader(config)
        paths = {"valid": data.valid, "test": data.test}
        splits = {s: cls.read_split(config, s) for s in names if paths.get(s)}
        if splits.keys() == set(names):
            return splits
        train = cls.read_split(config, "train")
        fractions = {
            "valid": _VALID_FRACTION if data.valid_fraction is None else data.valid_fraction,
            "test": data.test_fraction or 0.0,
        }
        require_training_part(fractions[split] for split in fractions if not paths[split])
        # Drawn at random: files are often sorted by label.
        order = np.random.default_rng(len(train)).permutation(len(train)).tolist()
        kept = set(
            {name: index for index in order for name in cls.labels_in(train[index])}.values()
        )
        kept = kept or set(order[-1:])
        free = [index for index in order if index not in kept]
        for split, fraction in fractions.items():
            if fraction and not paths[split]:
                size = max(1, round(fraction * len(train)))
                drawn, free = free[:size], free[size:]
                if not drawn:
                    raise TextError(
                        f"{data_names(config, 'train')} has too few examples to be split: "
                        f"{len(train):,}",
                        _ADVICE[split],
                    )
                splits[split] = [train[index] for index in sorted(drawn)]
        return {"train": [train[index] for index in sorted([*kept, *free])], **splits}

    def preview_examples(self, step: int, count: int) -> tuple[Examples, NDArray[np.int64]]:
        """The next validation examples, starting again after the last."""
        examples: Examples = self.data.splits.get("valid", self._train)
        first = step * count % len(examples.inputs)
        return examples, np.arange(first, min(first + count, len(examples.inputs)))

    def to_device(self, examples: Examples, indices: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Collated examples as tensors on the model's device."""
        return _to_device(self.model, self.collate(examples, indices))


def groups(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups of items: large enough to sort by length, small enough to show results early.

    Raises:
        ConfigError: a single text instead of a list.
    """
    if isinstance(items, str):
        raise ConfigError("predict takes a list of texts, not one text", "try: predict([text])")
    source = iter(items)
    while group := list(itertools.islice(source, _GROUP_SIZE)):
        yield group


def require_texts(items: Sequence[Any]) -> None:
    """Checks that all items are texts.

    Raises:
        ConfigError: one is not.
    """
    for item in items:
        if not isinstance(item, str):
            raise ConfigError(f"predict takes texts, not {type(item).__name__}")


def require_finite(numbers: NDArray[np.float64]) -> None:
    """Checks the probabilities that a model predicts with.

    Raises:
        DivergedError: one is not a finite number.
    """
    if not np.isfinite(numbers).all():
        raise DivergedError("the model's probabilities are not finite numbers")


def length_batches(
    model: Any, inputs: Sequence[NDArray[Any]], at_once: int = EVAL_BATCH_SIZE
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Batches of similar length: indices, padded inputs and lengths."""
    sizes = np.array([len(each) for each in inputs], np.int64)
    for indices in by_length(sizes, at_once, _MAX_STEPS):
        padded, lengths = pad([inputs[index] for index in indices])
        tensors = _to_device(model, (padded, lengths))
        yield indices, tensors[0], tensors[1]


def _to_device(model: Any, arrays: Sequence[NDArray[Any]]) -> tuple[Tensor, ...]:
    return tuple(device.from_numpy(array, device.of(model)) for array in arrays)


def _require_one_reader(config: Config) -> None:
    """Checks that several processes do not share standard input: all of them read the examples.

    Raises:
        ConfigError: they do.
    """
    data = config.data
    splits = (data.train, data.valid, data.test)
    targets = (data.target, data.valid_target, data.test_target)
    is_alone = not torchrun.is_worker() or torchrun.integer("WORLD_SIZE") == 1
    if not is_alone and any("-" in paths for paths in (*splits, *targets)):
        raise ConfigError(
            "several processes cannot read examples from standard input", "try: a file"
        )


def data_names(config: Config, split: str) -> str:
    """The name of the data of a split in messages."""
    return ", ".join(getattr(config.data, split) or config.data.train)


def _encode_splits(
    data: ExampleData, splits: Mapping[str, Sequence[Any]], config: Config
) -> ExampleData:
    """The data with the encoded examples of splits."""
    encoded = {
        split: data.encode_examples(examples, data_names(config, split))
        for split, examples in splits.items()
    }
    return replace(data, splits=encoded)
