"""Averages of the weights over updates, evaluated and kept in place of the last weights."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmtrain import checkpoint
from lmtrain.errors import CheckpointError


class Average:
    """The average of a model's weights; the last weights while there is none.

    ema: m ← d m + (1 − d) w after each update, d = min(decay, (1 + n) / (10 + n))
    after n updates before. nt-asgd: the mean of the weights after every update since a
    validation was worse than the best one more than `patience` validations before it.

    Args:
        model: whose weights.
        kind: ema, nt-asgd, or None for the last weights.
        decay: of ema.
        patience: of nt-asgd.

    Source: averaged SGD: Polyak & Juditsky 1992; NT-ASGD: Merity, Keskar & Socher 2018.
    """

    def __init__(self, model: nn.Module, *, kind: str | None, decay: float, patience: int) -> None:
        self._weights = dict(model.named_parameters())
        self._kind = kind
        self._decay = decay
        self._patience = patience
        self._average: dict[str, Tensor] = {}
        self._count = 0
        self._costs: list[float] = []
        if kind == "ema":
            self._begin()

    @property
    def is_active(self) -> bool:
        """Whether there is an average of weights."""
        return bool(self._average)

    def _begin(self) -> None:
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after an update."""
        if not self._average:
            return
        if self._kind == "ema":
            kept = min(self._decay, (1 + self._count) / (10 + self._count))
        else:
            kept = 1 - 1 / (1 + self._count)
        self._count += 1
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - kept)

    def validated(self, cost: float) -> None:
        """Takes note of a validation, smaller being better; begins NT-ASGD when it is due."""
        if self._kind != "nt-asgd" or self._average:
            return
        before = self._costs[: -self._patience]
        if cost > min(before, default=math.inf):
            self._begin()
        self._costs.append(cost)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
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
        """The weights of the model that a checkpoint stores: the average, where there is one."""
        return {**checkpoint.weights(model), **self._average}

    def state_dict(self) -> dict[str, Any]:
        """What is averaged over, and the last weights beside an average, named `last/PARAMETER`."""
        last = {f"last/{name}": self._weights[name] for name in self._average}
        return {"count": self._count, "costs": self._costs, **last}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the model has the averaged weights.

        Raises:
            CheckpointError: a weight of another shape, or missing.
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
            raise CheckpointError("the weights beside the averaged ones do not fit the model")
        if self._kind is not None and (last or self._average):
            self._begin()
        for name, tensor in last.items():
            self._weights[name].copy_(tensor)
        self._count = int(state["count"])
        self._costs = [float(cost) for cost in state["costs"]]
