"""The labels of a task: their ids, and the file of a checkpoint that holds their names."""

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


def labels_of(found: Collection[str], name: str) -> list[str]:
    """The labels of training data, sorted.

    Raises:
        TextError: there is only one, so that there is nothing to learn.
    """
    labels = sorted(set(found))
    if len(labels) == 1:
        raise TextError(
            f"{name}: all examples have the label {screen.shorten(labels[0])!r}",
            "at least two labels are needed",
        )
    return labels


def label_files(labels: Sequence[str]) -> dict[str, str]:
    """The file of a checkpoint, by its name."""
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
        raise CheckpointError(f"{_FILE} is damaged: a label stands twice or is not one line")
    return labels


def label_ids(found: Iterable[str], labels: Sequence[str], name: str) -> NDArray[np.int64]:
    """The ids of labels that were found in `name`, (N,).

    Raises:
        TextError: one that the training data does not have.
    """
    ids = {label: index for index, label in enumerate(labels)}
    try:
        return np.array([ids[label] for label in found], np.int64)
    except KeyError as error:
        raise TextError(
            f"{name}: the label {screen.shorten(error.args[0])!r} is not in the training data",
            f"its labels: {screen.join_names(labels)}",
        ) from None
