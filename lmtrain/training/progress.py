"""The progress of a training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter


@dataclass
class Progress:
    """The progress of a training, which every checkpoint stores.

    Args:
        train_seconds: time spent in training steps.
        count: predictions trained on.
        best: metrics of the best validation, by name.
        best_step: step of the best validation.
        validations_since_best: validations after the best.
        skipped: updates skipped because the loss or the gradient was out of bounds.
        skipped_in_a_row: updates skipped since the last one that was applied.
    """

    train_seconds: float = 0.0
    count: int = 0
    best: dict[str, float | None] | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`.

        Raises:
            ValueError: a field is missing or has another type.
        """
        vars(self).update(vars(TypeAdapter(Progress).validate_python(state)))
