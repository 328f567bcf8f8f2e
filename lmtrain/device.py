"""Where and how wide torch computes, and where its chance comes from."""

import os

import torch

from lmtrain.errors import MachineError


def choose(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means on this machine.

    Raises:
        MachineError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device on this machine", "try: --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def set_threads(threads: int | None) -> int:
    """Sets the processor threads of torch and returns their number; None takes every core."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def generator(seed: int) -> torch.Generator:
    """A source of chance on the processor, free of any global state."""
    chance = torch.Generator()
    chance.manual_seed(seed)
    return chance
