"""The labels of a task: their ids, and the file of a checkpoint that holds their names."""

import json
from collections.abc import Collection, Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Len
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lmtrain.errors import CheckpointError, TextError
from lmtrain.tasks.base import Files

_FILE = "labels.json"
_CONTENT = TypeAdapter(dict[Literal["labels"], Annotated[list[str], Len(1)]])
# How much of labels stands in messages.
_SHOWN, _SHOWN_LENGTH = 10, 40


def labels_of(found: Collection[str], name: str) -> list[str]:
    """The labels of training data, sorted.

    Raises:
        TextError: there is only one, so that there is nothing to learn.
    """
    labels = sorted(set(found))
    if len(labels) == 1:
        raise TextError(
            f"{name}: all examples have the label {_shortened(labels[0])!r}",
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


def label_ids(found: Sequence[str], labels: Sequence[str], name: str) -> NDArray[np.int64]:
    """The ids of labels that were found in `name`.

    Raises:
        TextError: one that the training data does not have.
    """
    ids = {label: index for index, label in enumerate(labels)}
    unknown = next((label for label in found if label not in ids), None)
    if unknown is not None:
        raise TextError(
            f"{name}: the label {_shortened(unknown)!r} is not in the training data",
            f"its labels: {_listed(labels)}",
        )
    return np.array([ids[label] for label in found], np.int64)


def _shortened(label: str) -> str:
    return label if len(label) <= _SHOWN_LENGTH else label[: _SHOWN_LENGTH - 1] + "…"


def _listed(labels: Sequence[str]) -> str:
    """The first labels, for messages."""
    more = f" and {len(labels) - _SHOWN:,} more" if len(labels) > _SHOWN else ""
    return ", ".join(map(_shortened, labels[:_SHOWN])) + more
