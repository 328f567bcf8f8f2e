"""What tasks share whose data are examples of different lengths, not one long text.

Batches are padded and hold examples of similar length. A task says how examples become tensors and
what a batch of them measures; here is the rest.
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
from lmtrain.data.padded import NOTHING, PaddedBatches, in_order, pad
from lmtrain.errors import ConfigError, DivergedError, TextError
from lmtrain.schema import Config
from lmtrain.tasks.base import Batch, Loss, Shard, Task, Trained, require_same, warn_of_unknown

_VALID_FRACTION = 0.1
AT_ONCE = 64
"""Examples that are measured or predicted at once."""
# Out of so many that are sorted by length together.
_SORTED = 512
_MOST_STEPS = 1 << 16
SPLITS = ("train", "valid", "test")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Examples:
    """The examples of a split, as numbers.

    Args:
        inputs: the steps of each, at least one: ids (T,) or vectors (T, F).
        targets: what is predicted of each: its label (N,), or an array for each.
        key: a hash of the examples.
        name: what messages call them.
        unknown_characters: those that are `<UNK>` at character level, with their counts.
    """

    inputs: Sequence[NDArray[Any]]
    targets: Sequence[NDArray[Any]] | NDArray[Any]
    key: str
    name: str
    unknown_characters: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each, (N,)."""
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
        """A hash of examples as they were read."""

    @abc.abstractmethod
    def encoded(self, examples: Sequence[Any], name: str) -> Examples:
        """Examples as numbers.

        Raises:
            TextError: they have what the training data does not have.
        """

    def references(self) -> dict[str, dict[str, str]]:
        """The splits' names and the hashes of their examples."""
        return {split: {"name": each.name, "key": each.key} for split, each in self.splits.items()}


class TrainedExamples(Trained):
    """A trained model of a task whose data are examples."""

    @property
    @abc.abstractmethod
    def task(self) -> "type[ExampleTask]":
        """The task it was trained for."""

    def read(self, places: Sequence[str]) -> Examples:
        """The examples of files in the form of the training data.

        Raises:
            TextError: they cannot be read, or have what the model does not know.
        """
        examples: Examples = self.data.encoded(
            self.task.read_files(places, self.config), ", ".join(places)
        )
        warn_of_unknown(examples.unknown_characters, examples.name)
        return examples

    def own(self, splits: Sequence[str] = ("valid", "test")) -> Mapping[str, Examples]:
        """The run's own examples, read again.

        Raises:
            TextError: they are gone.
            CheckpointError: they are not what they were.
        """
        return self.task.find(self.config, self.data, self.state["data"], splits).splits

    def measure(self, data: Examples, *, batch_size: int = AT_ONCE) -> Any:
        """The metrics of examples, `batch_size` of them at once."""
        return self.task.evaluated(self.model, self.data, data, batch_size)


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
    def read_files(cls, places: Sequence[str], config: Config) -> list[Any]:
        """The examples of files, one after the other.

        Raises:
            TextError: a file is missing or not of the task's form.
        """

    @classmethod
    def read_split(cls, config: Config, split: str) -> list[Any]:
        """The examples of the files of a split."""
        return cls.read_files(getattr(config.data, split), config)

    @staticmethod
    def kinds(example: Any) -> Collection[str]:
        """The labels of an example; one example at least of each stays in the training data."""
        return ()

    @classmethod
    @abc.abstractmethod
    def vocabularies(cls, examples: Sequence[Any], config: Config) -> ExampleData:
        """The vocabularies of training examples, without any split.

        Raises:
            TextError: nothing can be learned from them.
        """

    @staticmethod
    def collated(examples: Examples, indices: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Inputs (T, B, ...), their lengths (B,), and targets, NOTHING where there are none."""
        inputs, lengths = pad([examples.inputs[index] for index in indices])
        targets, _ = pad([examples.targets[index] for index in indices])
        return inputs, lengths, targets

    @staticmethod
    @abc.abstractmethod
    def measured(
        model: Any,
        data: Any,
        tensors: tuple[Tensor, ...],
        examples: Any,
        indices: NDArray[np.int64],
    ) -> Any:
        """The metrics of a batch: of the examples at some indices, which are the tensors."""

    @classmethod
    def read(cls, config: Config) -> ExampleData:
        """Reads the examples; the vocabularies are those of the training split."""
        splits = cls._read_splits(config)
        data = _encoded(cls.vocabularies(splits["train"], config), splits, config)
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
        """The examples of a run, read again."""
        wanted = {split: references[split] for split in splits if split in references}
        read = cls._read_splits(config, tuple(wanted))
        for split, reference in wanted.items():
            key = data.fingerprint(read[split]) if split in read else None
            require_same(split, reference["name"], key, reference["key"])
        return _encoded(data, {split: read[split] for split in wanted}, config)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training example once."""
        return int(self._batches.steps_per_epoch)

    def batch(self, step: int) -> Batch:
        """Examples of similar length."""
        indices = self._batches.indices(step)
        own = indices[self.shard.of(len(indices))]
        *arrays, targets = self.collated(self._train, own if len(own) else indices[:1])
        if not len(own):
            # A process without a part of the batch takes one example that counts nothing.
            targets = np.full_like(targets, NOTHING)
        return Batch(_placed(self.model, (*arrays, targets)), rows=len(indices) / self.shard.size)

    @staticmethod
    def mean(nats: Tensor, batch: Batch, targets: Tensor) -> Loss:
        """The loss of a batch whose objective, in nats, is the mean over its rows.

        Args:
            nats: Σ −log P of the targets over the rows of the batch.
            batch: the batch.
            targets: what is predicted, NOTHING where nothing is.
        """
        count = (targets != NOTHING).sum().double()
        return Loss(nats, nats.detach().double() * batch.rows, count, None)

    def evaluate(self, split: str, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """The metrics of this process's shard of a split."""
        if split not in self.data.splits:
            return None
        batch_size = self.config.train.batch_size
        return self.evaluated(
            self.model, self.data, self.data.splits[split], batch_size, self.shard, meanwhile
        )

    @classmethod
    def evaluated(
        cls,
        model: Any,
        data: ExampleData,
        examples: Examples,
        batch_size: int,
        shard: Shard | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        measure: Callable[..., Any] | None = None,
    ) -> Any:
        """The metrics of a shard of examples, so many of them at once.

        Args:
            model: the network.
            data: its vocabularies.
            examples: the examples.
            batch_size: how many at once.
            shard: the rows of each batch that are measured; None for all.
            meanwhile: is called between batches.
            measure: what stands for `measured`.
        """
        was_training = model.training
        model.eval()
        found = []
        for indices in in_order(examples.lengths, batch_size):
            meanwhile()
            own = indices[(shard or Shard()).of(len(indices))]
            if len(own):
                with torch.no_grad():
                    tensors = _placed(model, cls.collated(examples, own))
                    found.append((measure or cls.measured)(model, data, tensors, examples, own))
        model.train(was_training)
        nothing = cls.metrics.nothing()
        return nothing.summed([each.sums for each in found]) if found else nothing

    @classmethod
    def _read_splits(cls, config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, list[Any]]:
        """The examples of splits; those that have no file are drawn from the training data.

        Raises:
            TextError: a file is missing or unreadable, or there are too few examples.
            ConfigError: several processes would read standard input.
        """
        data = config.data
        _require_one_reader(config)
        places = {"valid": data.valid, "test": data.test}
        splits = {s: cls.read_split(config, s) for s in wanted if places.get(s)}
        if splits.keys() == set(wanted):
            return splits
        train = cls.read_split(config, "train")
        fractions = {
            "valid": _VALID_FRACTION if data.valid_fraction is None else data.valid_fraction,
            "test": data.test_fraction or 0.0,
        }
        # Drawn at random: files are often sorted by label.
        order = np.random.default_rng(len(train)).permutation(len(train)).tolist()
        kept = set({kind: index for index in order for kind in cls.kinds(train[index])}.values())
        kept = kept or set(order[-1:])
        free = [index for index in order if index not in kept]
        for split, fraction in fractions.items():
            if fraction and not places[split]:
                size = max(1, round(fraction * len(train)))
                drawn, free = free[:size], free[size:]
                if not drawn:
                    raise TextError(
                        f"{place_names(config, 'train')} has too few examples to be split: "
                        f"{len(train):,}",
                        "give validation data of its own: --valid FILE",
                    )
                splits[split] = [train[index] for index in sorted(drawn)]
        return {"train": [train[index] for index in sorted([*kept, *free])], **splits}

    def previewed(self, step: int, count: int) -> tuple[Examples, NDArray[np.int64]]:
        """The next validation examples; after the last ones, the first."""
        examples: Examples = self.data.splits.get("valid", self._train)
        first = step * count % len(examples.inputs)
        return examples, np.arange(first, min(first + count, len(examples.inputs)))

    def placed(self, examples: Examples, indices: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Examples as tensors on the model's device."""
        return _placed(self.model, self.collated(examples, indices))


def grouped(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in groups that are large enough to be sorted by length, and small enough to wait for.

    Raises:
        ConfigError: a single text in place of a list.
    """
    if isinstance(items, str):
        raise ConfigError("predict takes a list of texts, not one text", "try: predict([text])")
    source = iter(items)
    while group := list(itertools.islice(source, _SORTED)):
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


def batched(
    model: Any, inputs: Sequence[NDArray[Any]], at_once: int = AT_ONCE
) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
    """Batches of similar length and limited size: indices, padded inputs and lengths."""
    sizes = np.array([len(each) for each in inputs], np.int64)
    for indices in in_order(sizes, at_once, _MOST_STEPS):
        padded, lengths = pad([inputs[index] for index in indices])
        inputs_of, lengths_of = _placed(model, (padded, lengths))
        yield indices, inputs_of, lengths_of


def _placed(model: Any, arrays: Sequence[NDArray[Any]]) -> tuple[Tensor, ...]:
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
    if not is_alone and any("-" in places for places in (*splits, *targets)):
        raise ConfigError(
            "several processes cannot read examples from standard input", "try: a file"
        )


def place_names(config: Config, split: str) -> str:
    """What messages call the data of a split."""
    places = getattr(config.data, split) or config.data.train
    return ", ".join(places)


def _encoded(data: ExampleData, splits: Mapping[str, Sequence[Any]], config: Config) -> ExampleData:
    """The data with the examples of splits as numbers."""
    found = {}
    for split, examples in splits.items():
        found[split] = data.encoded(examples, place_names(config, split))
    return replace(data, splits=found)
