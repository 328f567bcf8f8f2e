"""A training step that a GPU records once and repeats: one launch instead of hundreds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import State

Work = Callable[[Tensor, Tensor, State], tuple[State, Tensor]]


@dataclass(frozen=True)
class _Recording:
    """A recorded piece of work.

    Args:
        inputs: (T, B), where it reads them.
        targets: (T, B), likewise.
        before: likewise.
        graph: all of it.
        results: where they are after that.
    """

    inputs: Tensor
    targets: Tensor
    before: State
    graph: torch.cuda.CUDAGraph
    results: tuple[State, Tensor]

    def __call__(self, inputs: Tensor, targets: Tensor, before: State) -> tuple[State, Tensor]:
        self.inputs.copy_(inputs, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        for own, given in zip(self.before, before, strict=True):
            for part, numbers in zip(own, given, strict=True):
                part.copy_(numbers, non_blocking=True)
        self.graph.replay()
        return self.results


class Recorder:
    """Does a piece of work on a GPU, by a recording where it has met a window of that length.

    The first window of a length is computed as ever: kernels are compiled for it, and the update
    rule gets its memory. The second is recorded; from then on its tokens and its state are copied
    to where the recording reads them. Results stand until the next window.

    Args:
        work: from inputs (T, B), targets (T, B) and the state before. Whatever else changes from
            step to step must reach it through tensors that stay where they are.
        chance: what it draws from.
        tell: is told if it cannot be recorded, since it asks the GPU for numbers; it is then
            computed as ever.
    """

    def __init__(self, work: Work, chance: ModelGenerator, tell: Callable[[str], None]) -> None:
        self._work = work
        self._chance = chance
        self._tell = tell
        self._met: set[int] = set()
        self._recordings: dict[int, _Recording] = {}
        self._is_refused = False

    def __call__(self, inputs: Tensor, targets: Tensor, before: State) -> tuple[State, Tensor]:
        """`work`, however it is done."""
        window, steps = (inputs, targets, before), len(inputs)
        if steps not in self._met or self._is_refused:
            self._met.add(steps)
            return self._work(*window)
        if steps not in self._recordings:
            try:
                self._recordings[steps] = self._recorded(*window)
            except RuntimeError as error:
                # CUDA says that it failed; what was asked of it stands behind that.
                self._refuse(error.__context__ or error)
        # Not within `except`, which holds on to all that the recording took.
        return self._work(*window) if self._is_refused else self._recordings[steps](*window)

    def _refuse(self, reason: BaseException) -> None:
        self._is_refused = True
        self._recordings.clear()
        self._chance.restart()
        self._tell(f"no CUDA graph of this model's steps: {str(reason).splitlines()[0]}")

    def _recorded(self, inputs: Tensor, targets: Tensor, before: State) -> _Recording:
        place = inputs.device
        window = (inputs.clone(), targets.clone(), before.map(torch.clone))
        others = [recording.graph for recording in self._recordings.values()]
        graph, results = device.record(
            lambda: self._work(*window),
            self._chance.on(place),
            beside=others[0] if others else None,
        )
        return _Recording(*window, graph, results)
