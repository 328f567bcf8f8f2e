"""Averages of the weights over updates, which are validated and saved instead of the last ones."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmtrain import checkpoint
from lmtrain.errors import CheckpointError


class WeightAverage:
    """The average of a model's weights over updates.

    ema: m ← d m + (1 − d) w after each update, d = min(decay, (1 + n) / (10 + n)) after n updates.
    nt-asgd: the mean of the weights after every update since averaging started, which is when a
    validation is worse than the best one more than `patience` validations before it.
    The last weights are used instead if there is no method, or before averaging starts.

    Args:
        model: the model whose weights are averaged.
        method: ema, nt-asgd, or None for no average.
        decay: decay d of ema, 0 to 1.
        patience: validations, 1 or more, for nt-asgd.

    Source: averaged SGD: Polyak & Juditsky 1992; NT-ASGD: Merity, Keskar & Socher 2018.
    """

    def __init__(
        self, model: nn.Module, *, method: str | None, decay: float, patience: int
    ) -> None:
        self._weights = dict(model.named_parameters())
        self._method = method
        self._decay = decay
        self._patience = patience
        self._average: dict[str, Tensor] = {}
        self._count = 0
        self._costs: list[float] = []
        if method == "ema":
            self._start()

    @property
    def is_active(self) -> bool:
        """Whether averaging has started."""
        return bool(self._average)

    def _start(self) -> None:
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights to the average; call it after each update."""
        if not self._average:
            return
        if self._method == "ema":
            decay = min(self._decay, (1 + self._count) / (10 + self._count))
        else:
            decay = 1 - 1 / (1 + self._count)
        self._count += 1
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    def record_validation(self, cost: float) -> None:
        """Starts nt-asgd if this validation is worse than the best of long before.

        Args:
            cost: the result of the validation; lower is better.
        """
        if self._method != "nt-asgd" or self._average:
            return
        earlier = self._costs[: -self._patience]
        if cost > min(earlier, default=math.inf):
            self._start()
        self._costs.append(cost)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replaces the weights of the model by their average during the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._average.items():
            weight = self._weights[name]
            weight.data, self._average[name] = average, weight.data

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that a checkpoint stores: averaged ones if averaging has started."""
        return {**checkpoint.weights(model), **self._average}

    def state_dict(self) -> dict[str, Any]:
        """The count of averaged updates, earlier costs, and the last weights as `last/NAME`."""
        last = {f"last/{name}": self._weights[name] for name in self._average}
        # JSON has no infinity, the cost of a validation without metrics.
        costs = [cost if math.isfinite(cost) else None for cost in self._costs]
        return {"count": self._count, "costs": costs, **last}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict` and the last weights.

        The weights of the model must be those that the checkpoint stores, see `weights`.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        last = {
            name.removeprefix("last/"): tensor
            for name, tensor in state.items()
            if name.startswith("last/")
        }
        if last and any(
            name not in last or last[name].shape != weight.shape
            for name, weight in self._weights.items()
        ):
            raise CheckpointError(
                "the last weights beside the averaged ones do not match the model"
            )
        if self._method is not None and (last or self._average):
            self._start()
        for name, tensor in last.items():
            self._weights[name].copy_(tensor)
        self._count = int(state["count"])
        self._costs = [math.inf if cost is None else float(cost) for cost in state["costs"]]
