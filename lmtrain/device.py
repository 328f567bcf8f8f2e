"""The device, threads, memory and random generators of torch."""

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

from lmtrain import torchrun
from lmtrain.errors import ConfigError, MachineError
from lmtrain.schema import canonical

# Parameters of mallopt, in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NAMES = ("auto", "cpu", "cuda")

_Result = TypeVar("_Result")


def choose(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; auto is CUDA where it is available.

    Raises:
        ConfigError: another name, or fewer GPUs than processes.
        MachineError: `cuda`, but CUDA is not available.
    """
    if (name := canonical(name, _NAMES)) not in _NAMES:
        raise ConfigError(f"device {name!r}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device on this machine", "try: --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torchrun.local_world_size() > (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"{torchrun.local_world_size()} processes need a GPU each, but this machine has {gpus}",
            "try: --device cpu",
        )
    # Each training process has its own current GPU.
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def threads() -> int:
    """Number of CPU threads that torch uses in this process."""
    return torch.get_num_threads()


def from_numpy(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor on `device` with the content of an array; the copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def is_asynchronous(device: torch.device) -> bool:
    """Whether the device computes asynchronously, so that reading a value waits for it."""
    return device.type == "cuda"


def capture_graph(
    function: Callable[[], _Result],
    generator: torch.Generator,
    pool_of: torch.cuda.CUDAGraph | None = None,
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """Captures the work of a function on the GPU as a CUDA graph, without running it.

    Args:
        function: reads and writes tensors whose addresses do not change.
        generator: the generator that it draws from.
        pool_of: another graph, whose memory pool is used; replaying one graph overwrites the
            results of the other.

    Returns:
        The graph, and the results of the function, which are valid after a replay.

    Raises:
        RuntimeError: the function reads a value from the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    pool = None if pool_of is None else pool_of.pool()
    capture = torch.cuda.graph(
        graph, pool=pool, stream=_capture_stream(torch.cuda.current_device())
    )
    # A capture that fails does not restore the stream that it started on.
    with torch.cuda.stream(torch.cuda.current_stream()), capture:
        results = function()
    return graph, results


@functools.cache
def _capture_stream(gpu: int) -> torch.cuda.Stream:
    # The default of torch.cuda.graph stays on the GPU of its first use.
    return torch.cuda.Stream(gpu)


def supports_graphs(device: torch.device) -> bool:
    """Whether the device supports CUDA graphs."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Whether work on the device is being captured as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class HostCopy:
    """An asynchronous copy of a tensor in host memory.

    Args:
        tensor: (N,), on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._event = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def tolist(self) -> list[float]:
        """The values; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._tensor.tolist()
        return values


def make_deterministic() -> None:
    """Restricts torch to deterministic operations in this process."""
    # cuBLAS reads it at its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_threads(threads: int | None, processes: int = 1) -> int:
    """Sets the number of CPU threads of torch and returns it.

    Args:
        threads: number of threads; None for every core that this process may use.
        processes: number of training processes that share the cores when `threads` is None.
    """
    # macOS has no sched_getaffinity.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    count = threads or max(1, cores // processes)
    torch.set_num_threads(count)
    return count


def keep_memory() -> None:
    """Makes glibc keep freed memory instead of returning it to the kernel.

    Each training step allocates the same sizes again. By default glibc returns every freed tensor
    above 32 MiB, and the kernel has to clear its pages again in the next step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_MMAP_MAX, 0)


def generator(seed: int, rank: int = 0) -> torch.Generator:
    """A random generator on the CPU, independent of global state and different for each rank."""
    if rank or seed >> 32:
        # torch's CPU generator uses only the lower 32 bits of a seed.
        seed = int(np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)
