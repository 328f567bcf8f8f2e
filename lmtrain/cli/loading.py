"""Loads settings, trained models and user-defined cells for the commands."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain import config as configuration
from lmtrain import screen
from lmtrain.errors import ConfigError
from lmtrain.schema import Config

if TYPE_CHECKING:
    from lmtrain.tasks.base import Trained

RunArgument = Annotated[
    str, typer.Argument(help="A run (its best checkpoint is used) or a checkpoint.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


CellsOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="A Python file that registers cells. It is executed: name only files you trust.",
        metavar="FILE",
        show_default=False,
    ),
]


def load_cells(path: Path) -> None:
    """Executes a Python file that registers cells.

    Raises:
        ConfigError: it is missing, fails, or registers none.
    """
    from lmtrain.cells.loading import load_file

    names = ", ".join(load_file(path))
    screen.note(f"{path} registered: {names}")


def load_user_cell(overrides: Mapping[str, object]) -> None:
    """Executes the file if `model.cell` is FILE.py:NAME in settings from the command line.

    Files named in a settings file or a run are not executed: these may come from anyone.

    Raises:
        ConfigError: it is missing, fails, or registers none.
    """
    path, colon, _ = str(overrides.get("model.cell", "")).rpartition(":")
    if colon:
        load_cells(Path(path))


def load_settings(
    corpus: list[str] | None, recipe: str | None, overrides: Mapping[str, object]
) -> Config:
    """The settings of a new training; executes the file of a user-defined cell.

    Args:
        corpus: the text; None for that of the recipe.
        recipe: a recipe or a settings file; None for the default one, unless there is a corpus.
        overrides: settings from the command line.

    Raises:
        ConfigError: invalid settings, or a file without the cell.
    """
    recipe = recipe or (None if corpus else configuration.DEFAULT_RECIPE)
    texts = {"data.train": corpus} if corpus else {}
    chosen = configuration.load(recipe, {**overrides, **texts})
    load_user_cell(overrides)
    return chosen


def load(run: str, device: str) -> "Trained":
    """The model of a run or checkpoint.

    Raises:
        LmtrainError: it cannot be loaded.
    """
    # torch is imported only here, so that wrong options are reported at once.
    from lmtrain import api

    return api.load(run, device_name=device)


def load_with(method: str, run: str, device: str, *, feature: str = "") -> Any:
    """The model of a run or checkpoint, which must have a method.

    Args:
        method: the name of the method.
        run: the run or checkpoint.
        device: auto, cpu or cuda.
        feature: the command or option for the error message, if not named as the method.

    Raises:
        ConfigError: models of this task do not have the method.
    """
    from lmtrain.tasks.registry import task_of

    trained = load(run, device)
    if not hasattr(trained, method):
        command, data = task_of(trained.config).command, trained.config.data
        task = "data.labelled = true" if data.labelled else f"data.task = {data.task}"
        raise ConfigError(
            f"{run} was trained with {task}: {feature or method} does not work with it",
            f"try: lmtrain {command} {run}",
        )
    return trained
