"""A training step that a GPU records once and repeats: one launch instead of hundreds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch

Work = Callable[[Batch, State | None], tuple[State | None, Tensor]]


@dataclass(frozen=True)
class _Recording:
    """A recorded piece of work.

    Args:
        batch: where it reads the batch.
        state: where it reads the state.
        graph: all of it.
        results: where they are after that.
    """

    batch: Batch
    state: State | None
    graph: torch.cuda.CUDAGraph
    results: tuple[State | None, Tensor]

    def __call__(self, batch: Batch, state: State | None) -> tuple[State | None, Tensor]:
        for own, given in zip(self.batch.tensors, batch.tensors, strict=True):
            own.copy_(given, non_blocking=True)
        for own_parts, parts in zip(self.state or (), state or (), strict=True):
            for part, numbers in zip(own_parts, parts, strict=True):
                part.copy_(numbers, non_blocking=True)
        self.graph.replay()
        return self.results


class Recorder:
    """Does a piece of work on a GPU, by a recording where it has met a batch of that shape.

    The first batch of a shape is computed eagerly: kernels are compiled for it, and the update
    rule allocates its memory. The second is recorded; from then on its tensors and its state are
    copied to where the recording reads them. Results stand until the next batch.

    Args:
        work: from a batch and the state before it. Whatever else changes from step to step must
            reach it through tensors that stay where they are.
        generator: what it draws from.
        tell: gets a message if the work cannot be recorded, because it reads numbers from the GPU;
            it then stays eager.
    """

    def __init__(self, work: Work, generator: ModelGenerator, tell: Callable[[str], None]) -> None:
        self._work = work
        self._generator = generator
        self._tell = tell
        self._met: set[tuple[object, ...]] = set()
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._is_refused = False

    def __call__(self, batch: Batch, state: State | None) -> tuple[State | None, Tensor]:
        """`work`, recorded or not."""
        shape = (batch.rows, *(tensor.shape for tensor in batch.tensors))
        if shape not in self._met or self._is_refused:
            self._met.add(shape)
            return self._work(batch, state)
        if shape not in self._recordings:
            try:
                self._recordings[shape] = self._recorded(batch, state)
            except RuntimeError as error:
                # CUDA says that it failed; what was asked of it stands behind that.
                self._refuse(error.__context__ or error)
        # Not within `except`, which holds on to all that the recording took.
        work = self._work if self._is_refused else self._recordings[shape]
        return work(batch, state)

    def _refuse(self, reason: BaseException) -> None:
        self._is_refused = True
        self._recordings.clear()
        self._generator.rewind()
        self._tell(f"no CUDA graph of this model's steps: {str(reason).splitlines()[0]}")

    def _recorded(self, batch: Batch, state: State | None) -> _Recording:
        place = batch.tensors[0].device
        batch = replace(batch, tensors=tuple(tensor.clone() for tensor in batch.tensors))
        state = state and state.map(torch.clone)
        others = [recording.graph for recording in self._recordings.values()]
        graph, results = device.record(
            lambda: self._work(batch, state),
            self._generator.on(place),
            beside=others[0] if others else None,
        )
        return _Recording(batch, state, graph, results)
