"""The labels of a task: their ids, and the file that stores their names."""

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Len
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lmtrain import screen
from lmtrain.errors import CheckpointError, TextError
from lmtrain.tasks.base import Files

_FILE = "labels.json"
_CONTENT = TypeAdapter(dict[Literal["labels"], Annotated[list[str], Len(1)]])


def labels_of(labels: Collection[str], name: str) -> list[str]:
    """The distinct labels of training data, sorted.

    Raises:
        TextError: there is only one.
    """
    distinct = sorted(set(labels))
    if len(distinct) == 1:
        raise TextError(
            f"{name}: all examples have the label {screen.shorten(distinct[0])!r}",
            "at least two labels are needed",
        )
    return distinct


def label_files(labels: Sequence[str]) -> dict[str, str]:
    """Content of the label file of a checkpoint, by file name."""
    return {_FILE: json.dumps({"labels": list(labels)}, ensure_ascii=False)}


def restored_labels(files: Files) -> list[str]:
    """The labels of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        labels = _CONTENT.validate_json(files.text(_FILE))["labels"]
    except (ValidationError, KeyError) as error:
        where = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "no labels"
        raise CheckpointError(f"{_FILE} is damaged: {where}") from None
    if len(set(labels)) < len(labels) or any(name.splitlines() != [name] for name in labels):
        raise CheckpointError(f"{_FILE} is damaged: a label occurs twice or is not one line")
    return labels


def label_ids(names: Iterable[str], labels: Sequence[str], source: str) -> NDArray[np.int64]:
    """The ids of the labels of `source`, (N,).

    Raises:
        TextError: a label that the training data does not have.
    """
    ids = {label: index for index, label in enumerate(labels)}
    try:
        return np.array([ids[name] for name in names], np.int64)
    except KeyError as error:
        raise TextError(
            f"{source}: the label {screen.shorten(error.args[0])!r} is not in the training data",
            f"its labels: {screen.join_names(labels)}",
        ) from None
