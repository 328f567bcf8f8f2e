"""How far a training is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter


@dataclass
class Progress:
    """How far a training is; all of it is in every checkpoint.

    Args:
        train_seconds: time spent in training steps.
        count: predictions trained on.
        best: the figures of the best validation.
        best_step: its step.
        validations_since_best: validations after the best.
        skipped: updates left out because a number was not finite.
        skipped_in_a_row: those since the last update that was made.
    """

    train_seconds: float = 0.0
    count: int = 0
    best: dict[str, float | None] | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            ValueError: something else.
        """
        vars(self).update(vars(TypeAdapter(Progress).validate_python(state)))
