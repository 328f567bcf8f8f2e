"""Trained models for the commands that use them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from lmtrain.tasks.base import Trained

RunArgument = Annotated[
    str, typer.Argument(help="A run, meaning its best checkpoint, or a checkpoint.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def load(run: str, device: str) -> "Trained":
    """The model of a run or checkpoint.

    Raises:
        LmtrainError: it cannot be loaded.
    """
    # torch is imported only now, so that wrong options are answered at once.
    from lmtrain import api

    return api.load(run, device_name=device)


def load_for(use: str, run: str, device: str) -> Any:
    """The model of a run or checkpoint that has the method `use`.

    Raises:
        ConfigError: its task has no such use.
    """
    from lmtrain.tasks.registry import task_of

    trained = load(run, device)
    if not hasattr(trained, use):
        command = task_of(trained.config).command
        raise ConfigError(
            f"{run} was trained with data.task = {trained.config.data.task}, which has no {use}",
            f"try: lmtrain {command} {run}",
        )
    return trained
