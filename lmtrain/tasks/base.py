"""What training needs of a task, and nothing more: batches, a loss, metrics, and what to store.

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

# So many unknown characters are named.
_NAMED = 5


class Loss(NamedTuple):
    """The loss of a batch; every tensor is ()."""

    objective: Tensor
    """What is minimized: the total over the rows of the batch, and penalties."""
    total: Tensor
    """Σ −log P of what was predicted, in nats, without penalties."""
    predictions: Tensor
    """How many predictions are in the total."""
    state: State | None
    """The state after the batch; None where none is carried."""


@dataclass(frozen=True)
class Shard:
    """The part of a batch that belongs to one of several processes.

    Args:
        rank: which process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def of(self, rows: int) -> slice:
        """This process's of so many rows; the parts differ by one row at most."""
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)


@dataclass(frozen=True)
class Batch:
    """The data of one process for a step.

    Args:
        tensors: what the task's loss reads, on the model's device.
        rows: rows of the whole batch over the number of processes. Totals are divided by it, and
            gradients averaged over the processes: the sum over all processes is divided once.
        length: time steps over those of a usual batch.
        is_continued: whether the state goes on from the batch before.
    """

    tensors: tuple[Tensor, ...]
    rows: float
    length: float = 1.0
    is_continued: bool = False


@dataclass(frozen=True)
class Metrics(abc.ABC):
    """Sums over what was predicted; they are divided when the figures are read.

    Every field is a sum, so that the metrics of several processes add up.

    Args:
        total_nats: Σ −log P of what was predicted.
        count: predictions.
    """

    headline: ClassVar[str]
    """The name of the figure that says how good a model is."""
    is_higher_better: ClassVar[bool]
    digits: ClassVar[int] = 4
    """Decimals of the headline figure, as a person reads it."""

    total_nats: float
    count: float

    @property
    def loss(self) -> float:
        """Mean nats a prediction."""
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
        """The values as JSON holds them: None for what is not finite."""
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in self.values().items()
        }

    @abc.abstractmethod
    def table(self) -> list[tuple[str, str]]:
        """All figures with their names, as a person reads them."""

    @classmethod
    def line(cls, figures: Mapping[str, float | None]) -> str:
        """The figures in one line, as a person reads them."""
        value, loss = figures.get(cls.headline), figures.get("loss")
        value, loss = (math.inf if each is None else each for each in (value, loss))
        return f"{cls.headline} {value:.{cls.digits}f}, loss {loss:.4f} nats"

    def summed(self, everyone: Iterable[Sequence[float]]) -> Self:
        """The metrics over the fields of all processes."""
        return self.of([math.fsum(each) for each in zip(*everyone, strict=True)])

    @classmethod
    def of(cls, sums: Sequence[float]) -> Self:
        """The metrics with these fields."""
        return cls(*sums)

    @classmethod
    def nothing(cls) -> Self:
        """The metrics of no predictions at all."""
        return cls.of([0.0] * len(dataclasses.fields(cls)))

    @property
    def sums(self) -> list[float]:
        """The fields."""
        return list(dataclasses.astuple(self))

    @classmethod
    def cost(cls, values: Mapping[str, float | None]) -> float:
        """What makes one model better than another, from its figures: smaller is better.

        A figure that is missing, which a damaged file may lack, counts as one that is not finite.
        """
        value = values.get(cls.headline)
        if value is None:
            return math.inf
        return -value if cls.is_higher_better else value

    @classmethod
    def rank(cls, values: Mapping[str, float | None]) -> tuple[float, float]:
        """The cost, and the loss where costs are equal, as when no span is found yet."""
        loss = values.get("loss")
        return cls.cost(values), math.inf if loss is None else loss


class Files(Protocol):
    """The files of a checkpoint."""

    def text(self, name: str) -> str:
        """The content of a text file."""
        ...


class Data(Protocol):
    """What a task reads: its vocabularies, and the texts of its splits where they are needed."""

    def files(self) -> dict[str, str]:
        """The vocabularies that a checkpoint stores, by the name of the file."""
        ...

    def sizes(self) -> dict[str, int]:
        """The sizes of the vocabularies by name."""
        ...

    def references(self) -> dict[str, dict[str, str]]:
        """The name and the hash of each split, by which `Task.find` finds it again."""
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
    def read(self, places: Sequence[str]) -> Any:
        """What `measure` takes of files, globs, `-` or names of corpora, one after the other.

        Raises:
            TextError: it cannot be read.
        """

    @abc.abstractmethod
    def own(self, splits: Sequence[str] = ("valid", "test")) -> Mapping[str, Any]:
        """What `measure` takes of the run's own splits, those that it has, each with its `name`.

        Raises:
            TextError: a text is gone.
            CheckpointError: a text is not what it was.
        """

    @abc.abstractmethod
    def measure(self, data: Any, *, batch_size: int = 1) -> Metrics:
        """The metrics of what `read` or `own` gave."""

    def evaluate(self, places: Sequence[str], **options: Any) -> Metrics:
        """The metrics of texts; `read` and then `measure`, whose options it takes."""
        return self.measure(self.read(places), **options)


class Task(abc.ABC):
    """Something a network is trained for.

    Args:
        config: the settings.
        data: what `read` or `find` gave.
        model: what `build` gave, on its device.
        shard: the rows of each batch that this process computes.
    """

    unit: ClassVar[str]
    """What is counted, in the plural: tokens, examples."""
    command: ClassVar[str]
    """The command that uses a trained model: sample, predict."""
    metrics: ClassVar[type[Metrics]]
    trivial: ClassVar[str] = "from frequencies alone"
    """How the trivial model of `baseline` predicts."""
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
        """The splits of a run again, as `Data.references` named them.

        Raises:
            TextError: a text is gone.
            CheckpointError: a text is not what it was.
        """

    @classmethod
    @abc.abstractmethod
    def build(cls, config: Config, data: Any, *, is_shared: bool = False) -> nn.Module:
        """The network with its first weights; its `generator` draws dropout.

        Args:
            config: the settings.
            data: the vocabularies.
            is_shared: whether several processes train it, which exchange whole gradients.

        Raises:
            ConfigError: no such cell, or sizes that do not fit.
        """

    @property
    def generator(self) -> ModelGenerator:
        """What the network's dropout draws from."""
        generator: ModelGenerator = self.model.generator
        return generator

    @property
    @abc.abstractmethod
    def steps_per_epoch(self) -> int:
        """Steps that see the whole training split once."""

    @abc.abstractmethod
    def batch(self, step: int) -> Batch:
        """What a step, counted from 0 over all epochs, trains on: a function of seed and step."""

    def zero_state(self, rows: int) -> State | None:
        """The state before the first batch; None where none is carried."""
        return None

    @abc.abstractmethod
    def loss(self, batch: Batch, state: State | None) -> Loss:
        """What the model pays for a batch."""

    @abc.abstractmethod
    def evaluate(self, split: str, meanwhile: Callable[[], None] = lambda: None) -> Metrics | None:
        """The metrics of this process's shard of a split; None if the run has no such split.

        Args:
            split: train, valid or test.
            meanwhile: is called between batches.
        """

    @abc.abstractmethod
    def preview(self, step: int) -> str:
        """Text that shows what the model does, logged at each validation."""

    def picture(self, preview: str) -> NDArray[np.uint8] | None:
        """What a preview looks like, (height, width) grey values; None where words say it all."""
        return None

    @abc.abstractmethod
    def baseline(self, split: str) -> Metrics | None:
        """The metrics of a trivial model, which knows frequencies only."""

    def gradient_figures(self) -> dict[str, float]:
        """How the gradient travels through time, logged every `train.log_gradients` updates."""
        return {}

    def derived(self, loss: float) -> dict[str, float]:
        """What a mean training loss, in nats, is in the task's own units."""
        return {}

    def described(self) -> str:
        """The size of the training data and of the vocabularies, for a person."""
        return f"{self.steps_per_epoch:,} steps an epoch"


def warn_of_unknown(characters: Mapping[str, int], name: str) -> None:
    """Names the most frequent characters of a text that are `<UNK>` to a model, in one line.

    Args:
        characters: those characters with their counts.
        name: what messages call the text.
    """
    if not characters:
        return
    ranked = sorted(characters.items(), key=lambda item: -item[1])
    named = ", ".join(f"{each!r} {count:,}" for each, count in ranked[:_NAMED])
    more = f" and {len(ranked) - _NAMED:,} others" if len(ranked) > _NAMED else ""
    screen.note(
        f"warning: {name} has {sum(characters.values()):,} characters that are not in the "
        f"vocabulary and count as <UNK>: {named}{more}"
    )


def uses_bf16(train: TrainConfig) -> bool:
    """Whether training steps take bf16 on this machine."""
    if train.precision != "auto":
        return train.precision == "bf16"
    # A model trained with CUDA is loaded where there is none, too.
    if train.device == "cuda" or (train.device == "auto" and torch.cuda.is_available()):
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return library.has_bf16()


def weight_shapes(task: type[Task], config: Config, data: Data) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that the settings make; no memory is taken for them.

    Raises:
        ConfigError: no such cell, or sizes that do not fit.
    """
    with torch.device("meta"):
        model = task.build(config, data)
    return {name: tuple(weight.shape) for name, weight in checkpoint.weights(model).items()}


def load_embeddings(config: Config, model: nn.Module, data: Any) -> str:
    """Puts the vectors of model.embeddings in the place of first weights.

    Words that the file does not have keep theirs.

    Args:
        config: the settings; without model.embeddings nothing is done.
        model: a new network.
        data: its vocabularies; the first rows of the embedding belong to those of its tokenizer.

    Returns:
        How many words have a vector, for a person.

    Raises:
        ConfigError: the file has vectors of another size.
        TextError: it cannot be read, or has no word of the vocabulary.
    """
    place = config.model.embeddings
    if place is None:
        return ""
    words = data.tokenizer.vocabulary
    indices, vectors = read_word_vectors(place, words, config.embedding_size)
    embedding: Any = model.get_submodule("encoder.embedding")
    weight = (embedding.words if isinstance(embedding, WordCharacters) else embedding).weight
    with torch.no_grad():
        rows = torch.from_numpy(indices).to(weight.device)
        weight[rows] = torch.from_numpy(vectors).to(weight.device)
    return f"{place} has vectors of {len(indices):,} of the {len(words):,} words of the vocabulary"


def require_same(split: str, name: str, found: str | None, saved: str) -> None:
    """Checks that a split read again is the one that a run was trained with.

    Raises:
        CheckpointError: it is another.
    """
    if found != saved:
        raise CheckpointError(f"the {split} text {name} is not the one this run was trained with")
