"""The checkpoints of a training: what they hold, and how it goes on from one.

Each part of a training that a checkpoint holds saves and restores itself. The weights of the model
are stored beside them, as a trained model needs them alone.
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
from lmtrain.training.average import Average
from lmtrain.training.logger import NullLogger
from lmtrain.training.ranks import Ranks


class Part(Protocol):
    """A part of a training that checkpoints hold."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, and values that JSON holds, by name; called in all processes at once."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        ...


class Generators:
    """The random generator of each process, which dropout draws from.

    Args:
        generator: that of this process.
        ranks: the processes.
    """

    def __init__(self, generator: ModelGenerator, ranks: Ranks) -> None:
        self._generator = generator
        self._ranks = ranks

    def state_dict(self) -> dict[str, Any]:
        """The state of each process's generator, by rank."""
        everyone = self._ranks.gathered({"state": self._generator.generator.get_state()})
        return {str(rank): own["state"] for rank, own in enumerate(everyone)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the state of this process's; one that is new keeps its first state."""
        if (rank := str(self._ranks.rank)) in state or self._ranks.is_first:
            self._generator.generator.set_state(state[rank])


@dataclass(frozen=True)
class Documents:
    """What a checkpoint stores of the run that it belongs to.

    Args:
        texts: config.toml and the vocabularies, by the name of the file.
        data: what finds the run's data again; see `Data.references`.
    """

    texts: Mapping[str, str]
    data: Mapping[str, Mapping[str, str]]


class Checkpoints:
    """Writes the checkpoints of a training and restores it from one.

    Args:
        run: the run folder.
        keep: newest checkpoints that stay, beside the best.
        documents: what each stores of the run.
        ranks: the processes that train together; the first one writes.
    """

    def __init__(self, run: Path, keep: int, documents: Documents, ranks: Ranks) -> None:
        self.run = run
        self._keep = keep
        self._documents = documents
        self._ranks = ranks

    def save(
        self, step: int, average: Average, task: Task, parts: Mapping[str, Part], log: NullLogger
    ) -> Path:
        """Writes a checkpoint of this step, if there is none, and removes old ones.

        Args:
            step: updates done.
            average: gives the weights that are stored.
            task: whose model it is.
            parts: what else of the training is stored, by name.
            log: is made durable first: a checkpoint must not outlive the record of its steps.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the disk or the permissions refused; what was saved before is intact.
        """
        states = {name: part.state_dict() for name, part in parts.items()}
        weights = average.weights(task.model)
        self._ranks.agreed(lambda: self._save(step, weights, states, log))
        return checkpoint.folder(self.run, step)

    def _save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Any]],
        log: NullLogger,
    ) -> None:
        if checkpoint.folder(self.run, step).exists():
            return
        began = time.monotonic()
        log.sync()
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise DivergedError(f"step {step:,}: {name} is not finite")
        tensors, values = _divided(states)
        checkpoint.save(
            self.run,
            step,
            texts=self._documents.texts,
            weights=weights,
            state_tensors=tensors,
            state={"step": step, "data": self._documents.data, "parts": values},
        )
        checkpoint.rotate(self.run, self._keep)
        log.save_seconds += time.monotonic() - began

    def restore(self, saved: checkpoint.Checkpoint, task: Task, parts: Mapping[str, Part]) -> None:
        """Puts the model and the parts of the training where a checkpoint has them.

        Raises:
            CheckpointError: it does not fit this training.
        """
        saved.load_weights(task.model)
        tensors = saved.tensors("state.safetensors")
        try:
            for name, part in parts.items():
                own = {
                    path.removeprefix(f"{name}/"): tensor
                    for path, tensor in tensors.items()
                    if path.startswith(f"{name}/")
                }
                part.load_state_dict({**saved.state["parts"][name], **own})
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{saved.path} does not fit this training: {reason}") from None

    def write_best(self, step: int, metric: str, value: float | None) -> None:
        """Notes which checkpoint is the best so far.

        Raises:
            MachineError: the disk or the permissions refused.
        """
        self._ranks.agreed(lambda: checkpoint.write_best(self.run, step, metric, value))


def _divided(
    states: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of the parts, named `PART/NAME`, and their other values by part."""
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
