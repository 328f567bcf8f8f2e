"""The tasks whose data are examples, each with tiny settings and made-up data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from run_folders import load_settings

from lmtrain.schema import Config
from lmtrain.tasks.base import Shard
from lmtrain.tasks.examples import ExampleTask
from lmtrain.tasks.registry import task_of

_SMALL = {
    "model.hidden_size": 6, "model.num_layers": 1, "train.batch_size": 5, "train.max_steps": 8,
    "train.eval_every": 4, "train.log_every": 2, "train.threads": 1, "train.precision": "fp32",
    "optimizer.learning_rate": 0.05,
}  # fmt: skip
_SIZES = {"train": 12, "valid": 6, "test": 3}
_TAGS = ("O", "B-X", "I-X", "B-Y")


@dataclass(frozen=True)
class Case:
    """A task with the settings that are its own.

    Args:
        settings: by path, without data.
        suffix: of the names of its files.
        written: a file's content, of so many examples that a generator draws.
        predicted: what `predict` takes; nothing where it composes.
    """

    settings: Mapping[str, Any]
    suffix: str
    written: Callable[[Path, int, np.random.Generator], None]
    predicted: tuple[Any, ...]


def _words(generator: np.random.Generator) -> list[str]:
    return [f"w{index}" for index in generator.integers(8, size=generator.integers(1, 8))]


def _tagged(path: Path, count: int, generator: np.random.Generator) -> None:
    sentences = ["".join(f"w{index}\t{tag}\n" for index, tag in enumerate(_TAGS))]
    for _ in range(count - 1):
        tags = generator.choice(_TAGS, 8)
        pairs = zip(_words(generator), tags, strict=False)
        sentences.append("".join(f"{word}\t{tag}\n" for word, tag in pairs))
    path.write_text("\n".join(sentences))


def _translated(path: Path, count: int, generator: np.random.Generator) -> None:
    lines = []
    for _ in range(count):
        words = _words(generator)
        target = [word.upper() for word in words[::-1] + words[: generator.integers(3)]]
        lines.append(f"{' '.join(words)}\t{' '.join(target)}\n")
    path.write_text("".join(lines))


def _labelled(path: Path, count: int, generator: np.random.Generator) -> None:
    lines = [f"{'ab'[index % 2]}\t{' '.join(_words(generator))}\n" for index in range(count)]
    path.write_text("".join(lines))


def _vectors(path: Path, count: int, generator: np.random.Generator) -> None:
    lengths = generator.integers(1, 8, count)
    inputs = generator.standard_normal((lengths.sum(), 3))
    np.savez(path, inputs=inputs, lengths=lengths, labels=np.arange(count) % 2)


def _frames(path: Path, count: int, generator: np.random.Generator) -> None:
    lengths = generator.integers(1, 8, count)
    np.savez(path, inputs=generator.random((lengths.sum(), 4)) < 0.4, lengths=lengths)


_SENTENCES = ("w1 w2 w3", "w4", "w5 new w5 w6 w7 w1")
_SEQUENCES = (np.ones((4, 3)), np.zeros((1, 3)), np.arange(21.0).reshape(7, 3) / 10)
CASES = {
    "tag": Case({"data.task": "tag", "model.bidirectional": True}, "conll", _tagged, _SENTENCES),
    "tag-characters": Case(
        {"data.task": "tag", "model.bidirectional": True, "model.characters": True},
        "conll", _tagged, _SENTENCES,
    ),
    "labelled": Case({"data.labelled": True}, "tsv", _labelled, ()),
    "frames": Case({"data.task": "frames", "model.num_layers": 2}, "npz", _frames, ()),
    "translate-none": Case(
        {"data.task": "translate", "model.attention": "none", "model.cell": "gru"},
        "tsv", _translated, _SENTENCES,
    ),
    "translate-dot": Case(
        {"data.task": "translate", "model.attention": "dot", "model.bidirectional": True},
        "tsv", _translated, _SENTENCES,
    ),
    "translate-additive": Case(
        {
            "data.task": "translate", "model.attention": "additive", "model.num_layers": 2,
            "model.embedding_size": 5, "model.tied_embeddings": True,
        },
        "tsv", _translated, _SENTENCES,
    ),
    "classify-last": Case(
        {"data.task": "classify", "model.bidirectional": True, "optimizer.name": "sgd"},
        "tsv", _labelled, _SENTENCES,
    ),
    "classify-max": Case(
        {"data.task": "classify", "model.pooling": "max", "model.cell": "gru"},
        "tsv", _labelled, _SENTENCES,
    ),
    "vectors": Case(
        {"data.task": "classify", "model.pooling": "mean"}, "npz", _vectors, _SEQUENCES
    ),
}  # fmt: skip


def write(name: str, folder: Path, seed: int = 1) -> dict[str, list[str]]:
    """Writes a task's data into a folder; gives the settings that name it."""
    case, places = CASES[name], {}
    for split, count in _SIZES.items():
        path = folder / f"{split}.{case.suffix}"
        case.written(path, count, np.random.default_rng([seed, count]))
        places[f"data.{split}"] = [str(path)]
    return places


def settings(name: str, places: Mapping[str, Any], **changes: Any) -> Config:
    """A task's settings; the point in the paths of changes is two underscores."""
    return load_settings({**_SMALL, **CASES[name].settings, **places}, **changes)


def task(chosen: Config, shard: Shard | None = None) -> ExampleTask:
    """A task with the data of its settings."""
    kind: Any = task_of(chosen)
    data = kind.read(chosen)
    found: ExampleTask = kind(chosen, data, kind.build(chosen, data), shard or Shard())
    return found
