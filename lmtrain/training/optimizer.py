"""Backward, gradient clipping, the update rule and the learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmtrain import device
from lmtrain.errors import CheckpointError
from lmtrain.model.embedding import Embedding

Schedule = Callable[[int], float]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

# Number of parts of the rows of a weight with a sparse gradient; an update decays one part.
_DECAY_PARTS = 16


def schedule(
    name: str,
    *,
    peak: float,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int,
    decay: float,
    decay_after_epochs: int,
) -> Schedule:
    """A function from a step, counted from 0, to its learning rate.

    constant: peak. step: peak · decay^max(0, epoch + 1 − decay_after_epochs), epochs counted from
    0. cosine: half a cosine from peak to 0 at `total_steps`. All three start with a linear warm-up.

    Args:
        name: constant, step or cosine.
        peak: the maximum learning rate.
        total_steps: updates of the whole training.
        steps_per_epoch: updates in one epoch.
        warmup_steps: updates of the linear warm-up.
        decay: factor per epoch, for step.
        decay_after_epochs: epochs before the decay starts, for step.

    Source: step: Zaremba, Sutskever & Vinyals 2014; cosine: Loshchilov & Hutter 2017.
    """

    def learning_rate(step: int) -> float:
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if name == "step":
            return warmup * peak * decay ** max(0, step // steps_per_epoch + 1 - decay_after_epochs)
        if name == "cosine":
            fraction = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
            return warmup * peak * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
        return warmup * peak

    return learning_rate


def _norm(gradients: list[Tensor], clip: str) -> Tensor:
    """The L1 norm of all gradients together if `clip` is l1, else the L2 norm; ()."""
    if clip == "l1":
        return torch.stack([gradient.abs().sum() for gradient in gradients]).sum()
    # The dot product is several times faster than torch's norm for long vectors.
    flat = [gradient.flatten() for gradient in gradients]
    return torch.stack([vector.dot(vector) for vector in flat]).sum().sqrt()


def _divisor(norm: Tensor, limit: float | None) -> Tensor:
    """By what to divide a gradient of this norm to clip it, 1 or more; ()."""
    if limit is None:
        return torch.ones_like(norm, dtype=torch.float64)
    return (norm.double() / limit).clamp(min=1)


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update; every tensor is () on the device of the model.

    Args:
        grad_norm: gradient norm before clipping, without embeddings that are clipped apart.
        was_clipped: whether this gradient was clipped.
        was_applied: whether the weights were updated, since loss and gradient were valid.
    """

    grad_norm: Tensor
    was_clipped: Tensor
    was_applied: Tensor


class Optimizer:
    """Updates the parameters of a model.

    Args:
        model: the model; frozen parameters are not updated.
        name: sgd, adam or adamw.
        weight_decay: as in torch.optim, but an update by SGD decays only a sixteenth of the rows of
            a weight with a sparse gradient, sixteen times as strongly.
        clip: l2 or l1, the norm for gradient clipping.
        max_grad_norm: the maximum norm; None for no clipping.
        max_embedding_grad_norm: the maximum norm for the gradients of embeddings, which are clipped
            apart; None to clip all gradients together.
        schedule: the learning-rate schedule as a function of the total number of steps.
        total_steps: updates of the whole training.

    Attributes:
        step: updates started.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        weight_decay: float,
        clip: str,
        max_grad_norm: float | None,
        max_embedding_grad_norm: float | None,
        schedule: Callable[[int], Schedule],
        total_steps: int,
    ) -> None:
        self._parameters = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self._make_schedule = schedule
        self.set_total_steps(total_steps)
        self._clip = clip
        self._max_grad_norm = max_grad_norm
        self._max_embedding_grad_norm = max_embedding_grad_norm
        modules = [] if max_embedding_grad_norm is None else model.modules()
        embeddings = {id(module.weight) for module in modules if isinstance(module, Embedding)}
        self._clipped_apart = {
            name for name, weight in self._parameters.items() if id(weight) in embeddings
        }
        self.step = 0
        self._is_adaptive = name != "sgd"
        model_device = device.of(model)
        self._is_asynchronous = device.is_asynchronous(model_device)
        # A tensor, so that a CUDA graph reads its current value. On CUDA it must be fp32.
        dtype = torch.float32 if model_device.type == "cuda" else torch.float64
        self._learning_rate = torch.zeros((), dtype=dtype, device=model_device)
        self._weight_decay = weight_decay
        self._optimizer = _OPTIMIZERS[name](
            self._parameters.values(), lr=self._schedule(0), fused=True
        )

    def set_total_steps(self, total_steps: int) -> None:
        """Sets the total number of updates, at which the schedule ends."""
        self._schedule = self._make_schedule(total_steps)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self._schedule(self.step)

    def start_step(self, length: float = 1.0) -> None:
        """Sets the learning rate of the next update and increments `step`.

        Args:
            length: time steps of the batch divided by those of a usual batch. The learning rate of
                adaptive optimizers is multiplied by it; for SGD the gradient of a loss that is
                summed over time is already proportional to it.
        """
        self._learning_rate.fill_(self.learning_rate * (length if self._is_adaptive else 1.0))
        self.step += 1

    def backward(self, objective: Tensor) -> None:
        """Computes the gradients of the objective, ()."""
        self._optimizer.zero_grad(set_to_none=True)
        objective.backward()

    def apply(self, is_loss_valid: Tensor) -> UpdateResult:
        """Clips the gradient and updates the weights if the loss is valid and the gradient finite.

        g ← g · θ/‖g‖ if ‖g‖ > θ, where ‖g‖ is the L2 or L1 norm over all parameters together;
        embeddings with a limit of their own are clipped in the same way, apart from the others.
        Does not wait for an asynchronous device.

        Args:
            is_loss_valid: whether the loss allows an update, ().

        Source: Pascanu, Mikolov & Bengio 2013.
        """
        gradients, of_embeddings = self._gradients()
        grad_norm = _norm(gradients, self._clip)
        is_valid = is_loss_valid & grad_norm.isfinite()
        divisor = _divisor(grad_norm, self._max_grad_norm)
        was_clipped = divisor > 1
        if of_embeddings:
            norm = _norm(of_embeddings, self._clip)
            is_valid = is_valid & norm.isfinite()
            # The update divides all gradients by `divisor`.
            factor = divisor / _divisor(norm, self._max_embedding_grad_norm)
            torch._foreach_mul_(of_embeddings, factor)
        if self._is_asynchronous:
            # The fused step divides the gradients, or skips the update, on the device.
            vars(self._optimizer).update(grad_scale=divisor.float(), found_inf=(~is_valid).float())
            self._run_optimizer(self._learning_rate, self._weight_decay)
        elif is_valid and self._is_adaptive:
            if divisor > 1:
                torch._foreach_mul_([*gradients, *of_embeddings], 1 / float(divisor))
            self._run_optimizer(float(self._learning_rate), self._weight_decay)
        elif is_valid:
            # Saves a pass over the gradients: p − r · (g / d + λp) = p − (r / d) · (g + dλp).
            self._update_sparse(float(divisor))
            self._run_optimizer(
                float(self._learning_rate / divisor), float(divisor * self._weight_decay)
            )
        return UpdateResult(grad_norm, was_clipped, is_valid)

    @torch.no_grad()
    def _update_sparse(self, divisor: float) -> None:
        """Updates by SGD the weights with a sparse gradient, which the fused step does not support.

        An update decays only one of P parts of the rows, P times as strongly, so that it does not
        have to pass over all rows.
        """
        # A tensor becomes infinite where a float would raise an error.
        decay = float((1 - self._learning_rate * self._weight_decay) ** _DECAY_PARTS)
        for weight in self._parameters.values():
            if weight.grad is not None and weight.grad.is_sparse:
                if decay != 1:
                    weight.tensor_split(_DECAY_PARTS)[self.step % _DECAY_PARTS].mul_(decay)
                weight.add_(weight.grad, alpha=-float(self._learning_rate) / divisor)
                weight.grad = None

    def _run_optimizer(self, learning_rate: float | Tensor, weight_decay: float) -> None:
        is_capturing = device.is_capturing(self._learning_rate.device)
        for group in self._optimizer.param_groups:
            # Set during capture only: outside of it, torch warns about capturable.
            group.update(lr=learning_rate, weight_decay=weight_decay, capturable=is_capturing)
        self._optimizer.step()

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that are clipped together, and those of embeddings clipped apart.

        For a sparse gradient, its values.
        """
        gradients: list[Tensor] = []
        of_embeddings: list[Tensor] = []
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                parameter.grad = gradient = gradient.coalesce()
                gradient = gradient.values()
            if gradient is not None:
                (of_embeddings if name in self._clipped_apart else gradients).append(gradient)
        return gradients, of_embeddings

    def state_dict(self) -> dict[str, Any]:
        """The updates done, and the state of the torch optimizer as `PARAMETER/KEY`."""
        return {"step": self.step} | {
            f"{name}/{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `state_dict`.

        Raises:
            CheckpointError: a tensor has another shape, or belongs to no parameter.
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
                raise CheckpointError(f"the optimizer state {path} does not match the model")
            self._optimizer.state[parameter][key] = value.to(parameter.device)
