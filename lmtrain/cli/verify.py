"""`lmtrain verify`: checks checkpoints for corruption."""

from pathlib import Path
from typing import Annotated

import typer

from lmtrain.cli.output import JsonOption, print_json, shown
from lmtrain.errors import CheckpointError


def command(
    path: Annotated[Path, typer.Argument(help="A run or checkpoint folder.")],
    json: JsonOption = False,
) -> None:
    """Check that the checkpoints of a run are unchanged.

    The files are compared with the hashes that were saved with them.

    \b
    lmtrain verify runs/python-docs-lstm-1
    """
    from lmtrain import checkpoint

    results = [(str(folder), problem) for folder, problem in checkpoint.verify(path)]
    if json:
        entries = [{"checkpoint": folder, "problem": problem} for folder, problem in results]
        print_json("lmtrain.verify/1", {"results": entries})
    else:
        for folder, problem in results:
            print(shown(f"{folder}: {'intact' if problem is None else problem}"))
    damaged = sum(problem is not None for _, problem in results)
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(results)} checkpoints are damaged or cannot be read"
        )
