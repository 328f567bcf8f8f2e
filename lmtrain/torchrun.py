"""The environment variables that a launcher such as torchrun sets in each worker process."""

import os

from lmtrain.errors import ConfigError


def is_worker() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def is_rank_zero() -> bool:
    """Whether this process prints and writes the results; true without a launcher."""
    return not is_worker() or integer("RANK") == 0


def local_world_size() -> int:
    """Number of training processes on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_worker() else 1


def integer(name: str) -> int:
    """The value of an environment variable that holds a number, such as RANK.

    Raises:
        ConfigError: the variable is missing or not a number.
    """
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"RANK or WORLD_SIZE is set in the environment, but {name} is {text!r}",
            "start several processes with: lmtrain train --devices N, or torchrun",
        )
    return int(text)
