"""What a launcher such as torchrun says, in the environment, to each process that it starts."""

import os

from lmtrain.errors import ConfigError


def is_worker() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process shows and writes the results."""
    return not is_worker() or number("RANK") == 0


def local_size() -> int:
    """The processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_worker() else 1


def name() -> str | None:
    """What tells this launch of processes from others; None for a process alone.

    It is torchrun's own name for it, which is new each time unless --rdzv-id gives it.
    """
    if not is_worker():
        return None
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # torchrun's word for a launch that has no name; its own process has a number then.
    return f"launcher {os.getppid()}" if given == "none" else given


def is_restarted() -> bool:
    """Whether the launcher started the processes anew because one of them had failed."""
    return is_worker() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def may_restart() -> bool:
    """Whether the launcher would start the processes anew if one of them failed."""
    return is_worker() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def number(name: str) -> int:
    """A variable that holds a number, such as RANK.

    Raises:
        ConfigError: the environment names a rank and not all that belongs to it.
    """
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"the environment sets RANK or WORLD_SIZE, and {name} is {text!r}",
            "start several processes with: lmtrain train --devices N, or torchrun",
        )
    return int(text)
