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
