"""The run folder: its name, whether it is new or resumable, and run.json."""

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

CONFIG = "config.toml"
_STARTS = "run.json"

# Entries of run.json that must not change for a resumed run to be exact.
_ENVIRONMENT = ("torch", "device", "processes", "threads", "precision", "kernels")


def new_path(text: str, cell: str) -> Path:
    """The path of a new folder under runs/, named after the training text and the cell."""
    stem = text if corpus.named(text) else Path(text).name.partition(".")[0]
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "text"
    taken = {entry.name for entry in Path("runs").glob("*")}
    stem = f"{name[:60]}-{cell}"
    number = next(n for n in range(1, len(taken) + 2) if f"{stem}-{n}" not in taken)
    return Path("runs") / f"{stem}-{number}"


def require_unicode(run: Path) -> None:
    """Checks that the name of a run folder is valid UTF-8, which TensorBoard needs.

    Raises:
        ConfigError: it is not.
    """
    try:
        str(run).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"invalid name of a run folder: {str(run)!a} is not valid Unicode"
        ) from None


def require_new(run: Path) -> None:
    """Checks that a run folder does not exist or is empty.

    Raises:
        RunBusyError: it contains files, or there is a file in place of it or of a folder above.
        MachineError: it could not be read.
    """
    with files.map_os_errors(run, "read"):
        nearest = files.nearest_existing(run)
        if not nearest.is_dir():
            raise RunBusyError(f"{nearest} is not a folder", "choose another folder: --out DIR")
        is_new = nearest != run or not any(map(_is_content, run.iterdir()))
    if not is_new:
        resume = f"resume it: lmtrain train --resume {run}, or "
        raise RunBusyError(
            f"{run} already exists and is not empty",
            (resume if is_resumable(run) else "") + "choose another folder: --out DIR",
        )


def _is_content(entry: Path) -> bool:
    # A process that was killed while it started may leave the lock and temporary files.
    return entry.name != ".lock" and not files.is_leftover(entry)


def is_resumable(run: Path) -> bool:
    """Whether a folder contains a run that can be resumed.

    Raises:
        CheckpointError: the folder could not be read.
    """
    if checkpoint.is_checkpoint(run):
        return False
    return bool(checkpoint.steps(run)) or untrusted.exists(run / CONFIG)


def record_start(run: Path, from_step: int | None, **environment: Any) -> None:
    """Adds this start to run.json; prints a warning if a resumed run will not be exact.

    Args:
        run: the run folder.
        from_step: updates done before; None for a new run.
        environment: device, processes, threads, precision and kernels.

    Raises:
        UnreadableError: run.json exists but could not be read.
        MachineError: run.json could not be written.
    """
    entry = {
        "lmtrain": lmtrain.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "argv": sys.argv,
        **environment,
        "from_step": from_step or 0,
        "time": round(time.time(), 3),
    }
    starts = _read_starts(run)
    for name in _ENVIRONMENT:
        if from_step is not None and starts and (before := starts[-1].get(name)) != entry[name]:
            screen.note(f"not bit for bit: {name} was {before} and is now {entry[name]}")
    content = json.dumps({"format": checkpoint.FORMAT, "starts": [*starts, entry]}, indent=1)
    files.write(run / _STARTS, content.encode())


def _read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts in run.json; none if it is missing or damaged.

    Raises:
        UnreadableError: it exists but could not be read, so that it must not be replaced.
    """
    try:
        starts = json.loads(untrusted.read(run / _STARTS))["starts"]
        iter(starts)
    except UnreadableError:
        raise
    except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [start for start in starts if isinstance(start, dict)]
