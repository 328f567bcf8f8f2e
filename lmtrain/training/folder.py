"""The run folder as a whole: its name, whether it is used, and the record of who trained in it."""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmtrain
from lmtrain import checkpoint, files, screen, untrusted
from lmtrain.data import corpus
from lmtrain.errors import CheckpointError, ConfigError, RunBusyError, UnreadableError

SETTINGS = "config.toml"
_STARTS = "run.json"

# What must be the same for a resumed run to go on bit for bit.
_SURROUNDINGS = ("torch", "device", "processes", "threads", "precision")


def new_run(text: str, cell: str) -> Path:
    """A folder under runs/ that is not there yet, named after the text and the cell."""
    stem = text if corpus.named(text) else Path(text).name.partition(".")[0]
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "text"
    taken = {entry.name for entry in Path("runs").glob("*")}
    stem = f"{name[:60]}-{cell}"
    number = next(n for n in range(1, len(taken) + 2) if f"{stem}-{n}" not in taken)
    return Path("runs") / f"{stem}-{number}"


def require_unicode(run: Path) -> None:
    """Checks the name of a run folder: TensorBoard writes in none that is not UTF-8.

    Raises:
        ConfigError: it is not.
    """
    try:
        str(run).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"no run can be called {str(run)!a}: not valid Unicode") from None


def refuse_used(run: Path) -> None:
    """Checks that nothing is in the folder that a new run could spoil.

    Raises:
        RunBusyError: something is.
        MachineError: it cannot be looked into.
    """
    with files.explained(run, "look into"):
        is_used = run.exists() and (not run.is_dir() or any(map(_is_used, run.iterdir())))
    if is_used:
        resumable = f"go on with it: lmtrain train --resume {run}, or "
        raise RunBusyError(
            f"{run} is used already",
            (resumable if is_begun(run) else "") + "train elsewhere: --out DIR",
        )


def _is_used(entry: Path) -> bool:
    # What a process that was killed at its very start may leave.
    return entry.name != ".lock" and not files.is_leftover(entry)


def is_begun(run: Path) -> bool:
    """Whether there is a run to go on with.

    Raises:
        CheckpointError: it cannot be looked into.
    """
    if checkpoint.is_checkpoint(run):
        return False
    return bool(checkpoint.steps(run)) or untrusted.is_there(run / SETTINGS)


def record_start(run: Path, from_step: int | None, **surroundings: Any) -> None:
    """Adds this start to run.json; says so where it cannot go on bit for bit as before.

    Args:
        run: the run folder.
        from_step: updates done before; None for a new run.
        surroundings: device, processes, threads and precision.

    Raises:
        UnreadableError: the starts before cannot be read.
        MachineError: the disk or the permissions refused.
    """
    entry = {
        "lmtrain": lmtrain.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "argv": sys.argv,
        **surroundings,
        "from_step": from_step or 0,
        "time": round(time.time(), 3),
    }
    starts = _starts(run)
    for what in _SURROUNDINGS:
        if from_step is not None and starts and (was := starts[-1].get(what)) != entry[what]:
            screen.note(f"not bit for bit as before: {what} {was} then, {entry[what]} now")
    content = json.dumps({"format": checkpoint.FORMAT, "starts": [*starts, entry]}, indent=1)
    files.write(run / _STARTS, content.encode())


def _starts(run: Path) -> list[dict[str, Any]]:
    """The starts that run.json lists.

    Raises:
        UnreadableError: it is there and cannot be read: it must not be written anew.
    """
    try:
        starts = json.loads(untrusted.read(run / _STARTS))["starts"]
        iter(starts)
    except UnreadableError:
        raise
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [start for start in starts if isinstance(start, dict)]
