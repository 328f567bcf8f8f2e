"""The processes that train one model together, each with its shard of every batch.

A rank is one of them, counted from 0; torchrun says which one this is. Rank 0 alone reads the data,
shows and writes; its results and errors reach all. Gradients are averaged by torch's
DistributedDataParallel; numbers that steer the loop are exchanged on the processor.

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

from lmtrain import errors, launched
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

# A process that neither answers nor dies is given up after this.
_TIMEOUT = datetime.timedelta(seconds=120)
# Reading a large text takes longer than anything that comes after.
_PATIENCE = datetime.timedelta(days=7)
_LOST = ("gloo", "Connection", "connection", "Socket")


class Ranks:
    """A single process, which exchanges nothing.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's part of each batch."""
        return Shard(self.rank, self.size)

    def agreed(self, action: Callable[[], _Result], *, is_long: bool = False) -> _Result:
        """What `action`, done by rank 0, returns or raises, in every process.

        Args:
            action: its result is something JSON can tell.
            is_long: whether the others wait as long as it takes.

        Raises:
            LmtrainError: `action` raised it.
        """
        return action()

    def wait_for_all(self) -> None:
        """Returns when all processes have come to this call, however long it takes."""

    def exchanged(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in the order of the ranks."""
        return [list(numbers)]

    def summed(self, numbers: Tensor) -> Tensor:
        """The sums of numbers, (N,), over all processes, on their device."""
        return numbers

    def gathered(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of every process, shaped alike, in the order of the ranks."""
        return [dict(tensors)]

    def loss_of(self, task: Task) -> LossFunction:
        """The task's loss, whose backward averages gradients over all processes."""
        return task.loss


class _Together(Ranks):
    """One of several processes.

    Args:
        rank: which one.
        size: how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._control = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def agreed(self, action: Callable[[], _Result], *, is_long: bool = False) -> _Result:
        message: dict[str, Any] = {}
        result: Any = None
        failure: LmtrainError | None = None
        if self.is_first:
            try:
                result = action()
                message = {"result": result}
            except LmtrainError as error:
                failure = error
                message = {"error": type(error).__name__, "lines": str(error).split("\n  ")}
                message["code"] = error.exit_code
        told = self._told(message, self._patient if is_long else self._control)
        if failure is not None:
            raise failure
        if "error" in told:
            raise _same_error(told)
        return cast("_Result", result if self.is_first else told["result"])

    def _told(self, message: Any, group: dist.ProcessGroup | None) -> Any:
        """Rank 0's message."""
        content = json.dumps(message).encode()
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=group)
        told = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            told = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(told, 0, group=group)
        return json.loads(told.numpy().tobytes())

    def wait_for_all(self) -> None:
        dist.barrier(group=self._patient)

    def exchanged(self, numbers: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(numbers, dtype=torch.float64)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(theirs, mine, group=self._control)
        return [each.tolist() for each in theirs]

    def summed(self, numbers: Tensor) -> Tensor:
        theirs = [torch.empty_like(numbers) for _ in range(self.size)]
        dist.all_gather(theirs, numbers.contiguous())
        return torch.stack(theirs).sum(0)

    def gathered(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        everyone: list[dict[str, Tensor]] = [{} for _ in range(self.size)]
        for name in sorted(tensors):
            mine = tensors[name].detach().cpu().contiguous()
            theirs = [torch.empty_like(mine) for _ in range(self.size)]
            # Bytes travel whatever the type.
            dist.all_gather(
                [each.view(torch.uint8) for each in theirs],
                mine.view(torch.uint8),
                group=self._control,
            )
            for each, tensor in zip(everyone, theirs, strict=True):
                each[name] = tensor
        return everyone

    def loss_of(self, task: Task) -> LossFunction:
        with warnings.catch_warnings():
            # torch 2.13 says so of the only way there is to send no buffers at the start either.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(_LossModule(task), broadcast_buffers=False)


class _LossModule(nn.Module):
    """A task's loss as a module's forward, where DistributedDataParallel hooks in."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch, state: State | None) -> Loss:
        return self._task.loss(batch, state)


def _same_error(told: Mapping[str, Any]) -> LmtrainError:
    """Rank 0's error, which rank 0 shows."""
    kind = getattr(errors, told["error"])
    lines = told["lines"]
    error: LmtrainError = (
        kind(told["code"] - 128, *lines) if kind is errors.RunInterruptedError else kind(*lines)
    )
    error.is_told = True
    return error


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started with this one, or this process alone.

    Where there are GPUs enough, each process of a machine takes one of its own.

    Raises:
        ConfigError: the environment names a rank and not all that belongs to it, or the port that
            the processes should meet at is in use.
        MachineError: another process ended.
    """
    if not launched.is_worker():
        yield Ranks()
        return
    rank, size = launched.number("RANK"), launched.number("WORLD_SIZE")
    backend = "gloo"
    if torch.cuda.is_available() and launched.local_size() <= torch.cuda.device_count():
        torch.cuda.set_device(launched.number("LOCAL_RANK"))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(
            backend, timeout=_TIMEOUT, store=_store(), rank=rank, world_size=size
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"rank {rank} of {size} could not meet the others: {reason}") from error
    try:
        with _losses_explained(rank), _told_once(rank):
            yield _Together(rank, size)
    finally:
        dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the processes find one another: at the launcher's or at rank 0's."""
    is_launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ.get("MASTER_ADDR", "localhost"),
        launched.number("MASTER_PORT"),
        is_master=not is_launched and launched.number("RANK") == 0,
        timeout=_TIMEOUT,
    )


@contextlib.contextmanager
def _losses_explained(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # What gloo raises has no class of its own.
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(word in text for word in _LOST):
            raise
        raise MachineError(
            f"rank {rank}: another process of this training ended or did not answer",
            text.splitlines()[0][:200],
        ) from error


@contextlib.contextmanager
def _told_once(rank: int) -> Iterator[None]:
    try:
        yield
    except (ConfigError, TextError, DivergedError, RunInterruptedError) as error:
        # These every process raises alike.
        error.is_told = rank > 0
        raise
