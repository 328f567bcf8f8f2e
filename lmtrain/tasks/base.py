"""The interface between training and a task: batches, a loss, metrics and vocabularies.

Language modelling, classification and the other tasks each implement `Task` in one module.
Training, checkpoints and the command line know this interface only.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmtrain import checkpoint, screen
from lmtrain.data.word_vectors import read_word_vectors
from lmtrain.errors import CheckpointError
from lmtrain.kernels.native import library
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import State
from lmtrain.model.word_characters import WordCharacters
from lmtrain.schema import Config, TrainConfig

# Number of unknown characters that a warning names.
_NAMED = 5


class Loss(NamedTuple):
    """The loss of a batch; every tensor is ()."""

    objective: Tensor
    """The value to minimize: the total over the number of rows, plus penalties."""
    total: Tensor
    """Σ −log P of the targets, in nats, without penalties."""
    predictions: Tensor
    """Number of predictions in the total."""
    state: State | None
    """The state after the batch; None if the task carries none."""


@dataclass(frozen=True)
class Shard:
    """The part of each batch that one of several processes computes.

    Args:
        rank: index of the process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def of(self, rows: int) -> slice:
        """The rows of this process out of `rows`; shards differ by at most one row."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)


@dataclass(frozen=True)
class Batch:
    """The data of one step for one process.

    Args:
        tensors: the arguments of the task's loss, on the model's device.
        rows: rows of the whole batch divided by the number of processes. Totals are divided by it
            and gradients are averaged over processes, so that each row has the same weight.
        length: time steps relative to `train.seq_len`.
        is_continued: whether the state is carried over from the previous batch.
    """

    tensors: tuple[Tensor, ...]
    rows: float
    length: float = 1.0
    is_continued: bool = False


@dataclass(frozen=True)
class Metrics(abc.ABC):
    """Sums over predictions; figures are computed from them when read.

    Every field is a sum, so that the metrics of several processes can be added.

    Args:
        total_nats: Σ −log P of the targets.
        count: number of predictions.
    """

    headline: ClassVar[str]
    """The name of the figure by which models are compared."""
    is_higher_better: ClassVar[bool]
    digits: ClassVar[int] = 4
    """Decimals of the headline figure in text output."""

    total_nats: float
    count: float

    @property
    def loss(self) -> float:
        """Mean nats per prediction."""
        return self.total_nats / self.count

    @property
    def value(self) -> float:
        """The headline figure."""
        return float(getattr(self, self.headline))

    @abc.abstractmethod
    def values(self) -> dict[str, float | None]:
        """All figures by name."""

    @property
    def figures(self) -> dict[str, float | None]:
        """The values for JSON: None in place of values that are not finite."""
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in self.values().items()
        }

    @abc.abstractmethod
    def table(self) -> list[tuple[str, str]]:
        """Names and formatted values of all figures."""

    @classmethod
    def line(cls, figures: Mapping[str, float | None]) -> str:
        """The main figures in one line of text."""
        value, loss = figures.get(cls.headline), figures.get("loss")
        value, loss = (math.inf if each is None else each for each in (value, loss))
        return f"{cls.headline} {value:.{cls.digits}f}, loss {loss:.4f} nats"

    def summed(self, all_sums: Iterable[Sequence[float]]) -> Self:
        """The sum of the metrics whose fields are given, one sequence for each process."""
        return self.from_sums([math.fsum(each) for each in zip(*all_sums, strict=True)])

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> Self:
        """The metrics with these values of their fields."""
        return cls(*sums)

    @classmethod
    def zero(cls) -> Self:
        """The metrics of no predictions."""
        return cls.from_sums([0.0] * len(dataclasses.fields(cls)))

    @property
    def sums(self) -> list[float]:
        """The values of the fields."""
        return list(dataclasses.astuple(self))

    @classmethod
    def cost(cls, values: Mapping[str, float | None]) -> float:
        """The headline figure with its sign changed if higher is better: lower is better.

        A missing figure counts as infinite: a damaged file may lack it.
        """
        value = values.get(cls.headline)
        if value is None:
            return math.inf
        return -value if cls.is_higher_better else value

    @classmethod
    def sort_key(cls, values: Mapping[str, float | None]) -> tuple[float, float]:
        """The cost, then the loss for equal costs, as when no span is found yet."""
        loss = values.get("loss")
        return cls.cost(values), math.inf if loss is None else loss


class Files(Protocol):
    """The files of a checkpoint."""

    def text(self, name: str) -> str:
        """The content of a text file."""
        ...


class Data(Protocol):
    """The vocabularies of a task and, for training and evaluation, its splits."""

    def files(self) -> dict[str, str]:
        """Content of the vocabulary files of a checkpoint, by file name."""
        ...

    def sizes(self) -> dict[str, int]:
        """The sizes of the vocabularies by name."""
        ...

    def references(self) -> dict[str, dict[str, str]]:
        """The name and the hash of each split, for `Task.find`."""
        ...


class Trained(abc.ABC):
    """A trained model with its vocabularies and settings.

    Args:
        path: the checkpoint folder.
        config: the settings it was trained with.
        data: its vocabularies.
        model: the network, on its device.
        state: its state.json.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        data: Any,
        model: Any,
        state: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.config = config
        self.data = data
        self.model = model
        self.state = state
        self.step = int(state["step"])

    @abc.abstractmethod
    def read(self, paths: Sequence[str]) -> Any:
        """Reads data for `measure` from files, globs, `-` or named corpora.

        Raises:
            TextError: it cannot be read.
        """

    @abc.abstractmethod
    def own_data(self, splits: Sequence[str] = ("valid", "test")) -> Mapping[str, Any]:
        """The run's own splits for `measure`, as far as it has them, each with a `name`.

        Raises:
            TextError: a file is missing.
            CheckpointError: a file has changed.
        """

    @abc.abstractmethod
    def measure(self, data: Any, *, batch_size: int = 1) -> Metrics:
        """The metrics of data from `read` or `own_data`."""

    def evaluate(self, paths: str | Sequence[str], **options: Any) -> Metrics:
        """The metrics of one or more files: `read`, then `measure` with the options."""
        return self.measure(self.read([paths] if isinstance(paths, str) else paths), **options)


class Task(abc.ABC):
    """A task that a network is trained for.

    Args:
        config: the settings.
        data: the result of `read` or `find`.
        model: the result of `build`, on its device.
        shard: the rows of each batch that this process computes.
    """

    unit: ClassVar[str]
    """The unit of throughput, in the plural: tokens, examples."""
    command: ClassVar[str]
    """The command to use a trained model with: sample, predict."""
    metrics: ClassVar[type[Metrics]]
    baseline_name: ClassVar[str] = "from frequencies alone"
    """How the model of `baseline` predicts, for text output."""
    trained: ClassVar[type[Trained]]
    notice: str | None = None
    """What was changed in the settings so that they fit the data, in one line."""

    def __init__(self, config: Config, data: Any, model: Any, shard: Shard) -> None:
        self.config = config
        self.data = data
        self.model = model
        self.shard = shard

    @classmethod
    @abc.abstractmethod
    def read(cls, config: Config) -> Data:
        """Reads the training, validation and test data and makes the vocabularies.

        Raises:
            TextError: data is missing, unreadable or too short.
        """

    @classmethod
    @abc.abstractmethod
    def restore(cls, files: Files, config: Config) -> Data:
        """The vocabularies of a checkpoint, without any split.

        Raises:
            CheckpointError: a file is missing or damaged.
        """

    @classmethod
    @abc.abstractmethod
    def find(
        cls,
        config: Config,
        data: Any,
        references: Mapping[str, Mapping[str, str]],
        splits: Sequence[str] = ("train", "valid", "test"),
    ) -> Data:
        """Reads the splits of a run again and compares them with `Data.references`.

        Raises:
            TextError: a file is missing.
            CheckpointError: a file has changed.
        """

    @classmethod
    @abc.abstractmethod
    def build(cls, config: Config, data: Any) -> nn.Module:
        """The network with initial weights; its `generator` draws dropout masks.

        Args:
            config: the settings.
            data: the vocabularies.

        Raises:
            ConfigError: no such cell, or sizes that do not fit.
        """

    @classmethod
    def initialize(cls, config: Config, model: Any, data: Any) -> str:
        """Sets the initial weights of a new network that depend on data.

        Arguments, result and errors are those of `load_embeddings`.
        """
        return load_embeddings(config, model, data)

    @property
    def generator(self) -> ModelGenerator:
        """The random generator of the network's dropout."""
        generator: ModelGenerator = self.model.generator
        return generator

    @property
    @abc.abstractmethod
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass over the training split."""

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs; a function of seed and step."""

    def zero_state(self, rows: int) -> State | None:
        """The state before the first batch; None if the task carries none."""
        return None

    @abc.abstractmethod
    def loss(self, batch: Batch, state: State | None) -> Loss:
        """The loss of a batch."""

    @abc.abstractmethod
    def evaluate(
        self, split: str, between_batches: Callable[[], None] = lambda: None
    ) -> Metrics | None:
        """The metrics of this process's shard of a split; None if the run has no such split.

        Args:
            split: train, valid or test.
            between_batches: called before each batch.
        """

    @abc.abstractmethod
    def preview(self, step: int) -> str:
        """A sample or some predictions as text, logged at each validation."""

    def picture(self, preview: str) -> NDArray[np.uint8] | None:
        """An image of a preview, grey values (height, width); None if the task draws none."""
        return None

    @abc.abstractmethod
    def baseline(self, split: str) -> Metrics | None:
        """The metrics of a trivial model, such as one of frequencies only."""

    def gradient_figures(self) -> dict[str, float]:
        """Gradient norms over time lags, logged every `train.log_gradients` updates."""
        return {}

    def derived(self, loss: float) -> dict[str, float]:
        """A mean training loss, in nats, in the units of the task, by name."""
        return {}

    @abc.abstractmethod
    def described(self) -> str:
        """The sizes of the training data and of the vocabularies, for text output."""


def warn_of_unknown(characters: Mapping[str, int], name: str) -> None:
    """Warns of unknown characters of a text and names the most frequent ones.

    Args:
        characters: the unknown characters with their counts.
        name: the name of the text in messages.
    """
    if not characters:
        return
    ranked = sorted(characters.items(), key=lambda item: -item[1])
    named = ", ".join(f"{each!r} {number:,}" for each, number in ranked[:_NAMED])
    more = f" and {len(ranked) - _NAMED:,} others" if len(ranked) > _NAMED else ""
    count = sum(characters.values())
    number = f"{count:,} character{'' if count == 1 else 's'}"
    screen.note(f"warning: {name}: {number} not in the vocabulary, counted as <UNK>: {named}{more}")


def uses_bf16(train: TrainConfig) -> bool:
    """Whether training steps use bf16 on this machine."""
    if train.precision != "auto":
        return train.precision == "bf16"
    # A model trained with CUDA can be loaded on a machine without it.
    if train.device == "cuda" or (train.device == "auto" and torch.cuda.is_available()):
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return library.has_bf16()


def weight_shapes(task: type[Task], config: Config, data: Data) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a network, without allocating them.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
    """
    with torch.device("meta"):
        model = task.build(config, data)
    return {name: tuple(weight.shape) for name, weight in checkpoint.weights(model).items()}


def load_embeddings(config: Config, model: nn.Module, data: Any) -> str:
    """Initializes embeddings with the vectors of `model.embeddings`.

    Words that the file does not have keep theirs.

    Args:
        config: the settings; without model.embeddings nothing is done.
        model: a new network.
        data: its vocabularies; the first rows of the embedding belong to those of its tokenizer.

    Returns:
        The number of words that have a vector, for text output.

    Raises:
        ConfigError: the file has vectors of another size.
        TextError: the file cannot be read, or has no word of the vocabulary.
    """
    path = config.model.embeddings
    if path is None:
        return ""
    words = data.tokenizer.vocabulary
    indices, vectors = read_word_vectors(path, words, config.embedding_size)
    embedding: Any = model.get_submodule("encoder.embedding")
    weight = (embedding.words if isinstance(embedding, WordCharacters) else embedding).weight
    with torch.no_grad():
        rows = torch.from_numpy(indices).to(weight.device)
        weight[rows] = torch.from_numpy(vectors).to(weight.device)
    return f"{path} has vectors of {len(indices):,} of the {len(words):,} words of the vocabulary"


def require_unchanged(split: str, name: str, found: str | None, saved: str) -> None:
    """Checks that a split is the one that the run was trained with.

    Raises:
        CheckpointError: it has changed.
    """
    if found != saved:
        raise CheckpointError(f"the {split} text {name} is not the one this run was trained with")
