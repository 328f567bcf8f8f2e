"""Saving and restoring the state of a training.

Each part of the training state implements `Stateful`. The weights of the model are stored
separately, since a trained model is loaded without the training state.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lmtrain import checkpoint
from lmtrain.errors import CheckpointError, DivergedError
from lmtrain.model.generator import ModelGenerator
from lmtrain.tasks.base import Task
from lmtrain.training.average import WeightAverage
from lmtrain.training.logger import NullLogger
from lmtrain.training.ranks import Ranks


class Stateful(Protocol):
    """A part of the training state that checkpoints store."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values by name; called in all processes at the same time."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        ...


class GeneratorStates:
    """The states of the random generators of all processes.

    Args:
        generator: the generator of this process, which dropout draws from.
        ranks: the training processes.
    """

    def __init__(self, generator: ModelGenerator, ranks: Ranks) -> None:
        self._generator = generator
        self._ranks = ranks

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator of each process, by rank."""
        tensors = {"state": self._generator.generator.get_state()}
        by_rank = self._ranks.all_gather_tensors(tensors)
        return {str(rank): gathered["state"] for rank, gathered in enumerate(by_rank)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the generator of this process; a new rank keeps its initial state."""
        if (rank := str(self._ranks.rank)) in state or self._ranks.is_rank_zero:
            self._generator.generator.set_state(state[rank])


@dataclass(frozen=True)
class RunFiles:
    """What every checkpoint of a run stores beside weights and training state.

    Args:
        texts: content of config.toml and of the vocabularies, by file name.
        references: name and hash of each split; see `Data.references`.
    """

    texts: Mapping[str, str]
    references: Mapping[str, Mapping[str, str]]


class Checkpoints:
    """Saves checkpoints and restores the training from one.

    Args:
        run: the run folder.
        keep: number of newest checkpoints to keep, besides the best.
        run_files: what each checkpoint stores of the run.
        ranks: the training processes; rank 0 writes.
    """

    def __init__(self, run: Path, keep: int, run_files: RunFiles, ranks: Ranks) -> None:
        self.run = run
        self._keep = keep
        self._run_files = run_files
        self._ranks = ranks

    def save(
        self,
        step: int,
        average: WeightAverage,
        task: Task,
        parts: Mapping[str, Stateful],
        log: NullLogger,
    ) -> Path:
        """Writes a checkpoint of this step, unless it exists, and deletes old ones.

        Args:
            step: updates done.
            average: provides the weights to store.
            task: has the model.
            parts: the training state, by name.
            log: synced first, so that a checkpoint never has steps that the log lost.

        Returns:
            The folder of the checkpoint.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the checkpoint could not be written; earlier checkpoints are intact.
        """
        states = {name: part.state_dict() for name, part in parts.items()}
        weights = average.weights(task.model)
        self._ranks.run_on_rank_zero(lambda: self._write(step, weights, states, log), is_slow=True)
        return checkpoint.folder(self.run, step)

    def _write(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Any]],
        log: NullLogger,
    ) -> None:
        if checkpoint.folder(self.run, step).exists():
            return
        start = time.monotonic()
        log.sync()
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise DivergedError(f"step {step:,}: {name} is not finite")
        tensors, values = _split_tensors(states)
        checkpoint.save(
            self.run,
            step,
            texts=self._run_files.texts,
            weights=weights,
            state_tensors=tensors,
            state={"step": step, "data": self._run_files.references, "parts": values},
        )
        checkpoint.rotate(self.run, self._keep)
        log.save_seconds += time.monotonic() - start

    def restore(
        self, saved: checkpoint.Checkpoint, task: Task, parts: Mapping[str, Stateful]
    ) -> None:
        """Restores the model and the training state from a checkpoint.

        Args:
            saved: the checkpoint.
            task: has the model.
            parts: the training state, by name.

        Raises:
            CheckpointError: the checkpoint does not match this training.
        """
        saved.load_weights(task.model)
        tensors = saved.tensors("state.safetensors")
        try:
            for name, part in parts.items():
                part_tensors = {
                    path.removeprefix(f"{name}/"): tensor
                    for path, tensor in tensors.items()
                    if path.startswith(f"{name}/")
                }
                part.load_state_dict({**saved.state["parts"][name], **part_tensors})
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{saved.path} does not match this training: {reason}") from None

    def write_best(self, step: int, metric: str, value: float | None) -> None:
        """Writes which checkpoint is the best so far; see `checkpoint.write_best`.

        Raises:
            MachineError: the file could not be written.
        """
        self._ranks.run_on_rank_zero(lambda: checkpoint.write_best(self.run, step, metric, value))


def _split_tensors(
    states: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of all parts as `PART/NAME`, and their other values by part."""
    tensors = {
        f"{part}/{name}": value
        for part, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    values = {
        part: {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for part, state in states.items()
    }
    return tensors, values
