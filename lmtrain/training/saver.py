"""What of a training is kept on disk, and how it goes on from that as if it had never stopped."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lmtrain import checkpoint
from lmtrain.errors import CheckpointError, DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.recurrent import State
from lmtrain.training.average import Average
from lmtrain.training.monitor import Silent
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.progress import Progress
from lmtrain.training.ranks import Ranks

_CHANCE = "chance"


class Saver:
    """Writes checkpoints of a training and restores it from one.

    Args:
        run: the run folder.
        keep: checkpoints that stay, beside the best.
        model: the model.
        optimizer: the update.
        average: the weights that are kept.
        monitor: the record.
        ranks: the processes that train together; the first one writes.
        documents: config.toml, tokenizer.json and what a resumed run needs to find its text.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        *,
        model: LanguageModel,
        optimizer: Optimizer,
        average: Average,
        monitor: Silent,
        ranks: Ranks,
        documents: tuple[str, str, Mapping[str, Any]],
    ) -> None:
        self._run = run
        self._keep = keep
        self._model = model
        self._optimizer = optimizer
        self._average = average
        self._monitor = monitor
        self._ranks = ranks
        self._documents = documents

    def save(self, progress: Progress, state: State | None) -> Path:
        """Writes a checkpoint of this step, if there is none, and removes old ones.

        Args:
            progress: how far training is.
            state: what the streams carry into the next step, (own B, H) each.

        Raises:
            DivergedError: a weight is not finite; nothing was written.
            MachineError: the disk or the permissions refused.
        """
        tensors = self._gathered(state)
        self._ranks.agreed(lambda: self._save(progress, tensors))
        return checkpoint.folder(self._run, self._optimizer.step)

    def _gathered(self, state: State | None) -> dict[str, Tensor]:
        """What every process goes on from: the state of all rows, the chance of each."""
        chance = self._model.chance.generator.get_state()
        everyone = self._ranks.gathered({**(state or State()).named(), _CHANCE: chance})
        tensors = {_chance(rank): own.pop(_CHANCE) for rank, own in enumerate(everyone)}
        return tensors | {name: torch.cat([own[name] for own in everyone]) for name in everyone[0]}

    def _save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        if checkpoint.folder(self._run, self._optimizer.step).exists():
            return
        began = time.monotonic()
        self._monitor.sync()
        self._write(self._run, progress, tensors)
        checkpoint.rotate(self._run, self._keep)
        self._monitor.save_seconds += time.monotonic() - began

    def _write(self, run: Path, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        with self._average.in_place():
            weights = self._model.state_dict()
            for name, weight in weights.items():
                if not weight.isfinite().all():
                    step = self._optimizer.step
                    raise DivergedError(f"step {step:,}: {name} is not finite")
            config, tokenizer, texts = self._documents
            checkpoint.save(
                run,
                self._optimizer.step,
                config=config,
                tokenizer=tokenizer,
                weights=weights,
                state_tensors={
                    **self._optimizer.state_tensors(),
                    **self._average.state_tensors(),
                    **tensors,
                },
                state={
                    "step": self._optimizer.step,
                    "progress": vars(progress),
                    "average": self._average.state(),
                    "window": self._monitor.state(),
                    "texts": texts,
                },
            )

    def restore(
        self, saved: checkpoint.Checkpoint, batch_size: int
    ) -> tuple[Progress, State | None]:
        """Puts everything where a checkpoint has it; returns how far it is and the carried state.

        Args:
            saved: the checkpoint.
            batch_size: streams of all processes together.

        Raises:
            CheckpointError: it does not fit the model.
        """
        saved.load_weights(self._model)
        tensors = saved.tensors("state.safetensors")
        try:
            self._optimizer.restore(int(saved.state["step"]), tensors)
            self._average.restore(saved.state["average"], tensors)
            self._monitor.restore(saved.state["window"])
            # A process that was not there before goes on from its own first chance.
            if (name := _chance(self._ranks.rank)) in tensors or self._ranks.is_first:
                self._model.chance.generator.set_state(tensors[name])
            zeros = self._model.recurrent.zero_state(batch_size)
            carried, rows = zeros.restored(tensors), self._ranks.share(batch_size)
            progress = TypeAdapter(Progress).validate_python(saved.state["progress"])
            return progress, carried and carried.map(lambda part: part[rows])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{saved.path} does not fit this training: {reason}") from None


def _chance(rank: int) -> str:
    """The name in a checkpoint of where a process's chance stands."""
    return f"{_CHANCE}/{rank}" if rank else _CHANCE
