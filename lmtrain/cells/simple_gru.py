"""The gated recurrent unit with an update gate and no relevance gate."""

import torch
from torch import Tensor

from lmtrain.cells.base import CellState, DifferentiatedCell, Weights, register
from lmtrain.kernels.products import add_product_


@register("simple-gru")
class SimpleGRU(DifferentiatedCell):
    """Gated recurrent unit with an update gate and no relevance gate.

        candidate  c̃ = tanh(W_cc c′ + W_cx x + b_c)
        update    Γu = σ(W_uc c′ + W_ux x + b_u)
        hidden     c = Γu ∘ c̃ + (1 − Γu) ∘ c′

    c′ is the state before the step.

    Shapes: x (B, I), c (B, H); parameters as in `Cell`, in the order c̃, Γu.

    Args:
        input_size: I, features of one input, at least 1.
        hidden_size: H, features of the state, at least 1.

    Raises:
        ConfigError: a size that is not an integer of at least 1.

    Source: the simplified GRU of Ng's notes on sequence models, after Cho et al. 2014.
    """

    gates = ("candidate", "update")
    state_names = ("hidden",)

    def step(self, x: Tensor, state: CellState) -> CellState:
        """One step of the equations above."""
        (c,) = state
        candidate = torch.tanh(self.affine("candidate", x, c))
        update = torch.sigmoid(self.affine("update", x, c))
        return (update * candidate + (1 - update) * c,)

    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """Same as `step`; see DifferentiatedCell."""
        (c,) = state
        add_product_(z, c, weights["weight_recurrent"].T)
        candidate, update = z.chunk(2, dim=1)
        return (torch.lerp(c, candidate.tanh_(), update.sigmoid_()),)

    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """[∂c/∂z_c, ∂c/∂z_u] = [Γu ∘ (1 − c̃²), (c̃ − c′) ∘ Γu ∘ (1 − Γu)]; ∂c/∂c′ = 1 − Γu."""
        (c,) = previous
        candidate, update = activations.chunk(2, dim=-1)
        keep = 1 - update
        dc_dz_candidate = update * (1 - candidate * candidate)
        dc_dz_update = (candidate - c) * update * keep
        return torch.cat([dc_dz_candidate, dc_dz_update], dim=-1), keep

    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """δc′ = δc ∘ (1 − Γu) + dz_c W_cc + dz_u W_uc."""
        (delta,) = grad_state
        gates, keep = local
        dz = gates.unflatten(1, (2, -1)).mul_(delta.unsqueeze(1)).flatten(1)
        return (torch.addmm(delta * keep, dz, weights["weight_recurrent"]),)
