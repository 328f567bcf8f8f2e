"""Trained models, and cells of a user's own, for the commands that use them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain import screen
from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from lmtrain.tasks.base import Trained

RunArgument = Annotated[
    str, typer.Argument(help="A run, meaning its best checkpoint, or a checkpoint.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


CellsOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="A Python file whose cells are registered first. It is run: name only files you "
        "trust.",
        metavar="FILE",
        show_default=False,
    ),
]


def load_cells(path: Path) -> None:
    """Runs a Python file of the user's, which registers cells.

    Raises:
        ConfigError: it is missing, fails, or registers none.
    """
    from lmtrain.cells.loading import load_file

    names = ", ".join(load_file(path))
    screen.note(f"running {path}, which registers: {names}")


def load_named_cell(typed: Mapping[str, object]) -> None:
    """Runs the Python file that `model.cell` names as FILE.py:NAME among the settings typed here.

    What a settings file or a run names is not run: it may come from anyone.

    Raises:
        ConfigError: it is missing, fails, or registers none.
    """
    path, colon, _ = str(typed.get("model.cell", "")).rpartition(":")
    if colon:
        load_cells(Path(path))


def load(run: str, device: str) -> "Trained":
    """The model of a run or checkpoint.

    Raises:
        LmtrainError: it cannot be loaded.
    """
    # torch is imported only now, so that wrong options are answered at once.
    from lmtrain import api

    return api.load(run, device_name=device)


def load_for(use: str, run: str, device: str, *, named: str = "") -> Any:
    """The model of a run or checkpoint that has the method `use`.

    Args:
        use: the method.
        run: the run or checkpoint.
        device: auto, cpu or cuda.
        named: what the user asked for, where it is not called like the method.

    Raises:
        ConfigError: its task has no such use.
    """
    from lmtrain.tasks.registry import task_of

    trained = load(run, device)
    if not hasattr(trained, use):
        command, data = task_of(trained.config).command, trained.config.data
        kind = "data.labelled = true" if data.labelled else f"data.task = {data.task}"
        raise ConfigError(
            f"{run} was trained with {kind}: {named or use} does not work with it",
            f"try: lmtrain {command} {run}",
        )
    return trained
