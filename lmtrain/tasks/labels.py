"""The labels of a task: their ids, and the file of a checkpoint that holds their names."""

import json
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Len
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from lmtrain.errors import CheckpointError, TextError
from lmtrain.tasks.base import Files

LABELS_FILE = "labels.json"
_CONTENT = TypeAdapter(dict[Literal["labels"], Annotated[list[str], Len(1)]])
_MOST_SHOWN = 10


def labels_json(labels: Sequence[str]) -> str:
    """The content of the file."""
    return json.dumps({"labels": list(labels)}, ensure_ascii=False)


def restored_labels(files: Files) -> list[str]:
    """The labels of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return _CONTENT.validate_json(files.text(LABELS_FILE))["labels"]
    except ValidationError as error:
        where = error.errors()[0]["msg"]
        raise CheckpointError(f"{LABELS_FILE} is damaged: {where}") from None


def label_ids(found: Sequence[str], labels: Sequence[str], name: str) -> NDArray[np.int64]:
    """The ids of labels that were found in `name`.

    Raises:
        TextError: one that the training data does not have.
    """
    ids = {label: index for index, label in enumerate(labels)}
    unknown = next((label for label in found if label not in ids), None)
    if unknown is not None:
        raise TextError(
            f"{name}: the label {unknown!a} is not in the training data",
            f"its labels: {', '.join(labels[:_MOST_SHOWN])}",
        )
    return np.array([ids[label] for label in found], np.int64)
