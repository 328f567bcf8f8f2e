"""Starts a training as several processes of this machine, by torch's own launcher."""

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
    """Runs `lmtrain` with these arguments in so many processes, until all have ended.

    Args:
        arguments: the command line of each.
        devices: processes, each with a GPU of its own where they train on CUDA.

    Raises:
        MachineError: a process was killed.
        RunInterruptedError: a signal asked for the end.
        LmtrainError: a process failed, and has said why.
    """
    # What it would say of failed processes, they say themselves.
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
        interrupted.is_told = True
        raise interrupted from error
    except ChildFailedError as error:
        # Who was killed could say nothing; the others often end in the same moment, for want of it.
        killed = [each for each in error.failures.values() if each.exitcode < 0]
        if killed:
            name = signal.Signals(-killed[0].exitcode).name
            raise MachineError(f"rank {killed[0].local_rank} was ended by {name}") from error
        _, first = error.get_first_failure()
        failed = LmtrainError(f"rank {first.local_rank} failed")
        failed.exit_code = first.exitcode
        failed.is_told = True
        raise failed from error


def require_size(devices: int) -> None:
    """Checks, in a process that a launcher started, that there are as many as were asked for.

    Raises:
        ConfigError: there are not.
    """
    if os.environ.get("WORLD_SIZE") != str(devices):
        raise ConfigError(
            f"--devices {devices}, but {os.environ.get('WORLD_SIZE')} processes were started",
            "leave --devices out under torchrun",
        )
