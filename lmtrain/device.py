"""Where and how wide torch computes, in what memory, and what random numbers it draws."""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmtrain import launched
from lmtrain.errors import ConfigError, MachineError
from lmtrain.schema import canonical

# Parameters of mallopt, in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NAMES = ("auto", "cpu", "cuda")

_Result = TypeVar("_Result")


def choose(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means on this machine.

    Raises:
        ConfigError: another name, or fewer GPUs than processes.
        MachineError: CUDA was asked for and there is none.
    """
    if (name := canonical(name, _NAMES)) not in _NAMES:
        raise ConfigError(f"device {name!r}: auto, cpu or cuda is needed")
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device on this machine", "try: --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched.local_size() > (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"{launched.local_size()} processes want a GPU each; this machine has {gpus}",
            "try: --device cpu",
        )
    # Each process of a training has a current GPU of its own.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def threads() -> int:
    """Processor threads that torch takes in this process."""
    return torch.get_num_threads()


def place(array: NDArray[Any], where: torch.device) -> Tensor:
    """The numbers of an array on a device; a GPU takes them while this process goes on."""
    tensor = torch.from_numpy(array)
    if where.type != "cuda":
        return tensor
    return tensor.pin_memory().to(where, non_blocking=True)


def runs_ahead(place: torch.device) -> bool:
    """Whether the device computes on its own, so that to read a number is to wait for it."""
    return place.type == "cuda"


def record(
    work: Callable[[], _Result],
    generator: torch.Generator,
    beside: torch.cuda.CUDAGraph | None = None,
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """Records what a piece of work gives the GPU to do, as a CUDA graph, and does nothing of it.

    Args:
        work: reads and writes tensors that stay where they are.
        generator: what it draws from.
        beside: another graph that is never run at the same time: they share memory, so that each
            spoils the results of the other.

    Returns:
        The graph, which does all of it in one launch, and what its results will be then.

    Raises:
        RuntimeError: it asks the GPU for a number.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    pool = None if beside is None else beside.pool()
    recording = torch.cuda.graph(
        graph, pool=pool, stream=_recording_stream(torch.cuda.current_device())
    )
    # A recording that fails does not go back to the stream that it began on.
    with torch.cuda.stream(torch.cuda.current_stream()), recording:
        results = work()
    return graph, results


@functools.cache
def _recording_stream(gpu: int) -> torch.cuda.Stream:
    # Torch's own stays on the GPU that it was first asked for on.
    return torch.cuda.Stream(gpu)


def can_record(place: torch.device) -> bool:
    """Whether the device repeats recorded work."""
    return place.type == "cuda"


def is_recording(place: torch.device) -> bool:
    """Whether work given to the device is being recorded."""
    return place.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Reading:
    """Numbers on their way from a device, which is not waited for until they are asked for.

    Args:
        numbers: (N,).
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrival = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.current_stream(numbers.device).record_event()

    def values(self) -> list[float]:
        """The numbers, when they have arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
        values: list[float] = self._numbers.tolist()
        return values


def make_deterministic() -> None:
    """Lets torch take only operations that give the same bits each time, in this process."""
    # Read when the library of products is first called.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_threads(threads: int | None, processes: int = 1) -> int:
    """Sets the processor threads of torch and returns their number.

    Args:
        threads: how many; None takes every core that this process may use.
        processes: how many processes of a training divide the cores.
    """
    # macOS has no sched_getaffinity.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    count = threads or max(1, cores // processes)
    torch.set_num_threads(count)
    return count


def keep_memory() -> None:
    """Lets this process keep the memory it frees, where the C library is glibc.

    A training step needs what the one before it needed. Left to itself, glibc gives every tensor
    above 32 MiB back, and the kernel clears each page of it anew in the next step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_MMAP_MAX, 0)


def generator(seed: int, rank: int = 0) -> torch.Generator:
    """A random generator on the processor, free of global state; each rank has its own."""
    if rank or seed >> 32:
        # Torch's own heeds the lower 32 bits of a seed alone.
        seed = int(np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)
