"""From a loss to an update: backward, clip, step, schedule."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

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
        loss: the loss, all parts together.
        grad_norm: before clipping.
        was_clipped: whether the gradient was limited.
        is_made: whether the update was made: loss and gradient were finite.
    """

    loss: Tensor
    grad_norm: Tensor
    was_clipped: Tensor
    is_made: Tensor


class Optimizer:
    """Updates the parameters of a model.

    Args:
        model: whose parameters.
        name: sgd, adam or adamw.
        weight_decay: as in torch.
        clip: l2 or l1, the norm that is limited.
        max_grad_norm: the limit; None for none.
        schedule: the learning rate of each step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        weight_decay: float,
        clip: str,
        max_grad_norm: float | None,
        schedule: Schedule,
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self.schedule = schedule
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
            lr=schedule(0),
            weight_decay=weight_decay,
            **({"foreach": True} if takes_sparse else {"fused": True}),
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.schedule(self.step)

    def update(self, losses: Iterable[Tensor], share: float = 1.0) -> Update:
        """One update: `begin`, then `make`."""
        self.begin(share)
        return self.make(losses)

    def begin(self, share: float = 1.0) -> None:
        """Counts the update that `make` will make next, and sets its learning rate.

        Args:
            share: time steps of its loss over those of most. The learning rate follows it; with
                sgd the gradient of a loss summed over time does already.
        """
        self._rate.fill_(self.learning_rate * (share if self._is_adaptive else 1.0))
        self.step += 1

    def make(
        self, losses: Iterable[Tensor], is_sound: Callable[[], Tensor] | None = None
    ) -> Update:
        """Differentiates a loss, clips, and makes one step if all numbers are finite.

        g ← g · θ/‖g‖ where ‖g‖ > θ, ‖g‖ the L2 or L1 norm over all parameters together. Where the
        device runs ahead, nothing here waits for it.

        Args:
            losses: the parts of the loss, computed as they are asked for, one after the other.
            is_sound: asked after the last part: whether the step may be made at all, ().

        Source: Pascanu, Mikolov & Bengio 2013.
        """
        self._rule.zero_grad(set_to_none=True)
        parts = []
        for part in losses:
            part.backward()
            parts.append(part.detach())
        gradients = self._gradients()
        loss, grad_norm = torch.stack(parts).sum(), _norm(gradients, self._clip)
        is_made = loss.isfinite() & grad_norm.isfinite()
        if is_sound is not None:
            is_made = is_made & is_sound()
        was_clipped, divisor = self._clipped(grad_norm)
        if self._runs_ahead:
            # The rule itself divides the gradients, or leaves all as it is.
            vars(self._rule).update(grad_scale=divisor.float(), found_inf=(~is_made).float())
            self._apply(self._rate)
        elif is_made:
            self._apply(float(self._rate) * self._divided(gradients, float(divisor)))
        return Update(loss, grad_norm, was_clipped, is_made)

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

    def state_tensors(self) -> dict[str, Tensor]:
        """What the update rule remembers, as tensors named `optimizer/PARAMETER/KEY`."""
        return {
            f"optimizer/{name}/{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._rule.state.get(parameter, {}).items()
        }

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on after `step` updates with what `state_tensors` gave then.

        Raises:
            CheckpointError: a tensor of another shape, or of a parameter that is not there.
        """
        self.step = step
        for path, value in tensors.items():
            kind, _, rest = path.partition("/")
            if kind != "optimizer":
                continue
            name, _, key = rest.rpartition("/")
            parameter = self._parameters.get(name)
            if (
                parameter is None
                or value.dtype not in (parameter.dtype, torch.float32)
                or value.shape not in (parameter.shape, torch.Size([]))
            ):
                raise CheckpointError(f"the optimizer state {path} does not fit the model")
            self._rule.state[parameter][key] = value.to(parameter.device)
