"""From an objective to an update: backward, clip, apply, schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmtrain import device
from lmtrain.errors import CheckpointError

Schedule = Callable[[int], float]

_RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def schedule(
    kind: str,
    *,
    peak: float,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int,
    decay: float,
    decay_after_epochs: int,
) -> Schedule:
    """The learning rate of each step, counted from 0.

    constant is `peak`; step is peak · decay^max(0, epoch + 1 − decay_after_epochs), epochs counted
    from 0; cosine falls from `peak` to 0 at the end. Any of them rises linearly first.

    Args:
        kind: constant, step or cosine.
        peak: the highest learning rate.
        total_steps: updates of the whole training.
        steps_per_epoch: updates of one epoch.
        warmup_steps: updates of the rise.
        decay: factor of step for each epoch.
        decay_after_epochs: epochs before step decays.

    Source: step: Zaremba, Sutskever & Vinyals 2014; cosine: Loshchilov & Hutter 2017.
    """

    def learning_rate(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if kind == "step":
            return rise * peak * decay ** max(0, step // steps_per_epoch + 1 - decay_after_epochs)
        if kind == "cosine":
            done = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
            return rise * peak * (1 + math.cos(math.pi * min(1.0, done))) / 2
        return rise * peak

    return learning_rate


def _norm(gradients: list[Tensor], clip: str) -> Tensor:
    """The L1 norm over all gradients for clip l1, else the L2 norm."""
    if clip == "l1":
        return torch.stack([gradient.abs().sum() for gradient in gradients]).sum()
    # A product with itself is several times as fast as torch's norm of a long vector.
    flat = [gradient.flatten() for gradient in gradients]
    return torch.stack([numbers.dot(numbers) for numbers in flat]).sum().sqrt()


@dataclass(frozen=True)
class Update:
    """What came of an update, () each, where the model is.

    Args:
        grad_norm: before clipping.
        was_clipped: whether the gradient was limited.
        is_made: whether the update was made: the gradient was finite, and the loss sound.
    """

    grad_norm: Tensor
    was_clipped: Tensor
    is_made: Tensor


class Optimizer:
    """Updates the parameters of a model.

    Args:
        model: whose parameters, but those that are frozen.
        name: sgd, adam or adamw.
        weight_decay: as in torch.
        clip: l2 or l1, the norm that is limited.
        max_grad_norm: the limit; None for none.
        schedule: the learning rates of a training of so many steps.
        total_steps: updates of the training.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        weight_decay: float,
        clip: str,
        max_grad_norm: float | None,
        schedule: Callable[[int], Schedule],
        total_steps: int,
    ) -> None:
        self._parameters = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self._schedules = schedule
        self.expect(total_steps)
        self._clip = clip
        self._limit = max_grad_norm
        self.step = 0
        self._is_adaptive = name != "sgd"
        self._is_linear = name == "sgd" and weight_decay == 0
        place = next(iter(self._parameters.values())).device
        self._runs_ahead = device.runs_ahead(place)
        # Where the update, recorded or not, reads its rate. The rules of CUDA take it in fp32.
        kind = torch.float32 if place.type == "cuda" else torch.float64
        self._rate = torch.zeros((), dtype=kind, device=place)
        # The fused rules take no sparse gradients; sgd over several tensors at once does.
        takes_sparse = name == "sgd" and not self._runs_ahead
        self._rule = _RULES[name](
            self._parameters.values(),
            lr=self._schedule(0),
            weight_decay=weight_decay,
            **({"foreach": True} if takes_sparse else {"fused": True}),
        )

    def expect(self, total_steps: int) -> None:
        """Sets how many updates there will be: the learning rate falls to its end with them."""
        self._schedule = self._schedules(total_steps)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self._schedule(self.step)

    def begin(self, length: float = 1.0) -> None:
        """Counts the next update and sets its learning rate.

        Args:
            length: time steps of its batch over those of a usual one. The learning rate follows
                it; with sgd the gradient of a loss summed over time does already.
        """
        self._rate.fill_(self.learning_rate * (length if self._is_adaptive else 1.0))
        self.step += 1

    def backward(self, objective: Tensor) -> None:
        """Differentiates what is minimized, ()."""
        self._rule.zero_grad(set_to_none=True)
        objective.backward()

    def apply(self, is_sound: Tensor) -> Update:
        """Clips the gradient and updates the weights, if all numbers are finite.

        g ← g · θ/‖g‖ where ‖g‖ > θ, ‖g‖ the L2 or L1 norm over all parameters together. Where the
        device runs ahead, nothing here waits for it.

        Args:
            is_sound: whether the update may be made as far as the loss is concerned, ().

        Source: Pascanu, Mikolov & Bengio 2013.
        """
        gradients = self._gradients()
        grad_norm = _norm(gradients, self._clip)
        is_made = is_sound & grad_norm.isfinite()
        was_clipped, divisor = self._clipped(grad_norm)
        if self._runs_ahead:
            # The rule itself divides the gradients, or leaves everything as it is.
            vars(self._rule).update(grad_scale=divisor.float(), found_inf=(~is_made).float())
            self._apply(self._rate)
        elif is_made:
            self._apply(float(self._rate) * self._divided(gradients, float(divisor)))
        return Update(grad_norm, was_clipped, is_made)

    def _apply(self, rate: float | Tensor) -> None:
        is_recorded = device.is_recording(self._rate.device)
        for group in self._rule.param_groups:
            # The fused rules are capturable, whether told so or not; told, they warn elsewhere.
            group.update(lr=rate, capturable=is_recorded)
        self._rule.step()

    def _gradients(self) -> list[Tensor]:
        """The numbers of all gradients; of sparse ones those that are not 0."""
        gradients = []
        for parameter in self._parameters.values():
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                parameter.grad = gradient = gradient.coalesce()
                gradient = gradient.values()
            if gradient is not None:
                gradients.append(gradient)
        return gradients

    def _clipped(self, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the limit was passed, and what the gradients are still to be divided by."""
        one = torch.ones_like(grad_norm, dtype=torch.float64)
        if self._limit is None:
            return one > 1, one
        return grad_norm > self._limit, (grad_norm.double() / self._limit).clamp(min=1)

    def _divided(self, gradients: list[Tensor], divisor: float) -> float:
        """Divides the gradients; returns what is left to multiply the learning rate with."""
        if self._is_linear:
            # One pass less over the gradients: p − r · (g / d) = p − (r / d) · g.
            return 1 / divisor
        if divisor > 1:
            torch._foreach_mul_(gradients, 1 / divisor)
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """The updates done, and what the update rule remembers, named `PARAMETER/KEY`."""
        return {"step": self.step} | {
            f"{name}/{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._rule.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            CheckpointError: a tensor of another shape, or of a parameter that is not there.
        """
        self.step = int(state["step"])
        for path in state.keys() - {"step"}:
            value, (name, _, key) = state[path], path.rpartition("/")
            parameter = self._parameters.get(name)
            if (
                parameter is None
                or not isinstance(value, Tensor)
                or value.dtype not in (parameter.dtype, torch.float32)
                or value.shape not in (parameter.shape, torch.Size([]))
            ):
                raise CheckpointError(f"the optimizer state {path} does not fit the model")
            self._rule.state[parameter][key] = value.to(parameter.device)
