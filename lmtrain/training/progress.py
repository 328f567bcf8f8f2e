"""Where a training stands."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Where training stands; all of it is in every checkpoint.

    Args:
        seconds: time spent before this process, preparation included.
        train_seconds: time spent in training steps.
        tokens: tokens trained on.
        best_loss: the lowest validation loss.
        best_step: where it was reached.
        last_loss: the newest validation loss.
        validations_since_best: validations after the best.
        skipped: updates left out because a number was not finite.
        skipped_in_a_row: those since the last update that was made.
    """

    seconds: float = 0.0
    train_seconds: float = 0.0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    last_loss: float | None = None
    validations_since_best: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
