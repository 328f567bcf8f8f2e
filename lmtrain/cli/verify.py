"""`lmtrain verify`: whether checkpoints are whole."""

from pathlib import Path
from typing import Annotated

import typer

from lmtrain.cli.output import JsonOption, print_json, shown
from lmtrain.errors import CheckpointError


def command(
    path: Annotated[Path, typer.Argument(help="A run or checkpoint folder.")],
    json: JsonOption = False,
) -> None:
    """Compare every byte of a run's checkpoints with what was saved.

    \b
    lmtrain verify runs/python-docs-lstm-1
    """
    from lmtrain import checkpoint

    results = [(str(each), problem) for each, problem in checkpoint.verify(path)]
    if json:
        entries = [{"checkpoint": each, "problem": problem} for each, problem in results]
        print_json("lmtrain.verify/1", {"results": entries})
    else:
        for each, problem in results:
            print(shown(f"{each}: {'intact' if problem is None else problem}"))
    damaged = sum(problem is not None for _, problem in results)
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(results)} checkpoints are damaged or cannot be read"
        )
