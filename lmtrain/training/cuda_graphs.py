"""Training steps as CUDA graphs: captured once, then replayed with a single launch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import State
from lmtrain.tasks.base import Batch

StepFunction = Callable[[Batch, State | None], tuple[State | None, Tensor]]


@dataclass(frozen=True)
class _CapturedStep:
    """A captured step.

    Args:
        batch: tensors that the graph reads the batch from.
        state: tensors that the graph reads the state from.
        graph: the CUDA graph.
        results: tensors that the graph writes the results to.
    """

    batch: Batch
    state: State | None
    graph: torch.cuda.CUDAGraph
    results: tuple[State | None, Tensor]

    def __call__(self, batch: Batch, state: State | None) -> tuple[State | None, Tensor]:
        for static, tensor in zip(self.batch.tensors, batch.tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        for static_parts, parts in zip(self.state or (), state or (), strict=True):
            for static, tensor in zip(static_parts, parts, strict=True):
                static.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.results


class GraphedStep:
    """Runs a step function as a CUDA graph, one graph for each shape of batch.

    The first batch of a shape runs eagerly, so that kernels are compiled and the optimizer
    allocates its state. The second is captured; it and all later batches are copied to the tensors
    that the graph reads. Results are valid until the next call.

    Args:
        step: from a batch and the state before it to the state after it and a tensor. Everything
            else that changes from step to step must be in tensors whose addresses do not change.
        generator: the generator that it draws from.
        report: called with a message if the step cannot be captured because it reads values from
            the GPU; it then always runs eagerly.
    """

    def __init__(
        self, step: StepFunction, generator: ModelGenerator, report: Callable[[str], None]
    ) -> None:
        self._step = step
        self._generator = generator
        self._report = report
        self._seen_shapes: set[tuple[object, ...]] = set()
        self._captured: dict[tuple[object, ...], _CapturedStep] = {}
        self._is_eager = False

    def __call__(self, batch: Batch, state: State | None) -> tuple[State | None, Tensor]:
        """The results of the step."""
        shape = (batch.rows, *(tensor.shape for tensor in batch.tensors))
        if shape not in self._seen_shapes or self._is_eager:
            self._seen_shapes.add(shape)
            return self._step(batch, state)
        if shape not in self._captured:
            try:
                self._captured[shape] = self._capture(batch, state)
            except RuntimeError as error:
                # CUDA reports that the capture failed; its context is the operation at fault.
                self._give_up(error.__context__ or error)
        # Outside of `except`: the exception keeps the memory of the failed capture alive.
        step = self._step if self._is_eager else self._captured[shape]
        return step(batch, state)

    def _give_up(self, reason: BaseException) -> None:
        self._is_eager = True
        self._captured.clear()
        self._generator.rewind()
        self._report(f"training steps run without CUDA graphs: {str(reason).splitlines()[0]}")

    def _capture(self, batch: Batch, state: State | None) -> _CapturedStep:
        generator = self._generator.on(batch.tensors[0].device)
        batch = replace(batch, tensors=tuple(tensor.clone() for tensor in batch.tensors))
        state = state and state.map(torch.clone)
        graphs = [captured.graph for captured in self._captured.values()]
        graph, results = device.capture_graph(
            lambda: self._step(batch, state), generator, pool_of=graphs[0] if graphs else None
        )
        return _CapturedStep(batch, state, graph, results)
