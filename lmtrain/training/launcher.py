"""Starts several training processes on this machine with torch's elastic launcher."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lmtrain.errors import ConfigError, LmtrainError, MachineError, RunInterruptedError


def launch(arguments: Sequence[str], devices: int) -> None:
    """Runs `lmtrain` in several processes and waits until all have exited.

    Args:
        arguments: command-line arguments of each process.
        devices: number of processes; on CUDA each has its own GPU.

    Raises:
        MachineError: a process was killed.
        RunInterruptedError: a signal ended the training.
        LmtrainError: a process failed and has printed its error.
    """
    # The launcher would log failed processes, which print their own errors.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lmtrain", *arguments)
    except SignalException as error:
        interrupted = RunInterruptedError(error.sigval.value, "interrupted")
        interrupted.is_reported = True
        raise interrupted from error
    except ChildFailedError as error:
        # A killed process is reported first: it printed nothing, and the others fail because of it.
        killed = [failure for failure in error.failures.values() if failure.exitcode < 0]
        if killed:
            name = signal.Signals(-killed[0].exitcode).name
            raise MachineError(f"rank {killed[0].local_rank} was killed by {name}") from error
        _, first = error.get_first_failure()
        failed = LmtrainError(f"rank {first.local_rank} failed")
        failed.exit_code = first.exitcode
        failed.is_reported = True
        raise failed from error


def require_size(devices: int) -> None:
    """Checks that a launcher started as many processes as `--devices` says.

    Raises:
        ConfigError: it started another number.
    """
    if os.environ.get("WORLD_SIZE") != str(devices):
        raise ConfigError(
            f"--devices {devices}, but {os.environ.get('WORLD_SIZE')} processes were started",
            "do not combine --devices with torchrun",
        )
