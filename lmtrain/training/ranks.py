"""The processes that train one model together, each with its shard of every batch.

Ranks are counted from 0. Rank 0 reads the data, prints and writes; its results and errors are
broadcast to the other ranks. torch's DistributedDataParallel averages gradients; numbers that
control the loop are exchanged through gloo, in host memory.

Source: Li et al. 2020, PyTorch Distributed.
"""

import contextlib
import datetime
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lmtrain import errors, torchrun
from lmtrain.errors import (
    ConfigError,
    DivergedError,
    LmtrainError,
    MachineError,
    RunInterruptedError,
    TextError,
)
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch, Loss, Shard, Task

_Result = TypeVar("_Result")
LossFunction = Callable[[Batch, State | None], Loss]

# Collective operations fail if a process does not respond within this time.
_TIMEOUT = datetime.timedelta(seconds=120)
# Reading a text, and saving or checking a checkpoint, can take much longer.
_SLOW_TIMEOUT = datetime.timedelta(days=7)
# Words in the messages of gloo when the connection to another process is lost.
_CONNECTION_WORDS = ("gloo", "Connection", "connection", "Socket")


class Ranks:
    """A single training process; the interface of several.

    Attributes:
        rank: rank of this process, from 0.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """The shard of each batch that this process computes."""
        return Shard(self.rank, self.size)

    def run_on_rank_zero(self, action: Callable[[], _Result], *, is_slow: bool = False) -> _Result:
        """Calls `action` in rank 0 only; every process returns its result or raises its error.

        Args:
            action: returns something that JSON can represent.
            is_slow: whether it may take longer than the usual timeout.

        Raises:
            LmtrainError: raised by `action`.
        """
        return action()

    def barrier(self) -> None:
        """Waits until all processes have reached this call, without the usual timeout."""

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in rank order."""
        return [list(numbers)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor, (N,), over all processes, on its device."""
        return tensor

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of every process, in rank order; shapes must be the same everywhere."""
        return [dict(tensors)]

    def loss_function(self, task: Task) -> LossFunction:
        """The loss of a task; its backward averages gradients over all processes."""
        return task.loss


class _DistributedRanks(Ranks):
    """One of several training processes.

    Args:
        rank: rank of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._slow_group = dist.new_group(backend="gloo", timeout=_SLOW_TIMEOUT)

    def run_on_rank_zero(self, action: Callable[[], _Result], *, is_slow: bool = False) -> _Result:
        message: dict[str, Any] = {}
        result: Any = None
        failure: LmtrainError | None = None
        if self.is_rank_zero:
            try:
                result = action()
                message = {"result": result}
            except LmtrainError as error:
                failure = error
                message = {"error": type(error).__name__, "lines": str(error).split("\n  ")}
                message["code"] = error.exit_code
        message = self._broadcast(message, self._slow_group if is_slow else self._group)
        if failure is not None:
            raise failure
        if "error" in message:
            raise _error_from(message)
        return cast("_Result", result if self.is_rank_zero else message["result"])

    def _broadcast(self, message: Any, group: dist.ProcessGroup | None) -> Any:
        """The message of rank 0, in every process."""
        content = json.dumps(message).encode()
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=group)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_rank_zero:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=group)
        return json.loads(buffer.numpy().tobytes())

    def barrier(self) -> None:
        dist.barrier(group=self._slow_group)

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return [other.tolist() for other in gathered]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered).sum(0)

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        by_rank: list[dict[str, Tensor]] = [{} for _ in range(self.size)]
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            gathered = [torch.empty_like(tensor) for _ in range(self.size)]
            # As bytes, since gloo does not support every dtype.
            dist.all_gather(
                [other.view(torch.uint8) for other in gathered],
                tensor.view(torch.uint8),
                group=self._group,
            )
            for named, other in zip(by_rank, gathered, strict=True):
                named[name] = other
        return by_rank

    def loss_function(self, task: Task) -> LossFunction:
        with warnings.catch_warnings():
            # Deprecated in torch 2.13, but the only option that broadcasts no buffers at all.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(_LossModule(task), broadcast_buffers=False)


class _LossModule(nn.Module):
    """Wraps the loss of a task as the forward of a module, for DistributedDataParallel."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch, state: State | None) -> Loss:
        return self._task.loss(batch, state)


def _error_from(message: Mapping[str, Any]) -> LmtrainError:
    """The error that rank 0 broadcast and shows."""
    error_class = getattr(errors, message["error"])
    lines = message["lines"]
    error: LmtrainError = (
        error_class(message["code"] - 128, *lines)
        if error_class is errors.RunInterruptedError
        else error_class(*lines)
    )
    error.is_reported = True
    return error


@contextlib.contextmanager
def connect() -> Iterator[Ranks]:
    """Connects to the processes that torchrun started with this one; without it, to none.

    If there are enough GPUs, each process of a machine uses its own.

    Raises:
        ConfigError: variables of torchrun are missing, or the processes could not connect, for
            example because the port is in use.
        MachineError: another process exited or did not respond.
    """
    if not torchrun.is_worker():
        yield Ranks()
        return
    rank, size = torchrun.integer("RANK"), torchrun.integer("WORLD_SIZE")
    backend = "gloo"
    if torch.cuda.is_available() and torchrun.local_world_size() <= torch.cuda.device_count():
        torch.cuda.set_device(torchrun.integer("LOCAL_RANK"))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(
            backend, timeout=_TIMEOUT, store=_store(), rank=rank, world_size=size
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"rank {rank} of {size} could not connect to the other processes: {reason}"
        ) from error
    try:
        with _map_connection_errors(rank), _report_once(rank):
            yield _DistributedRanks(rank, size)
    finally:
        dist.destroy_process_group()


def _store() -> dist.Store:
    """The store at which the processes connect, hosted by the launcher or by rank 0."""
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ.get("MASTER_ADDR", "localhost"),
        torchrun.integer("MASTER_PORT"),
        is_master=not is_hosted and torchrun.integer("RANK") == 0,
        timeout=_TIMEOUT,
    )


@contextlib.contextmanager
def _map_connection_errors(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which only their text identifies.
        text = str(error)
        is_lost = any(word in text for word in _CONNECTION_WORDS)
        if not isinstance(error, dist.DistError) and not is_lost:
            raise
        raise MachineError(
            f"rank {rank}: another training process exited or did not respond",
            text.splitlines()[0][:200],
        ) from error


@contextlib.contextmanager
def _report_once(rank: int) -> Iterator[None]:
    try:
        yield
    except (ConfigError, TextError, DivergedError, RunInterruptedError) as error:
        # Every process raises these at the same point; only rank 0 shows them.
        error.is_reported = rank > 0
        raise
