"""The progress of a training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, TypeAdapter


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

    train_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    count: NonNegativeInt = 0
    best: dict[str, float | None] | None = None
    best_step: NonNegativeInt | None = None
    validations_since_best: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0

    def state_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`.

        Raises:
            ValueError: a field is missing, has another type or is negative.
        """
        vars(self).update(vars(TypeAdapter(Progress).validate_python(state)))
