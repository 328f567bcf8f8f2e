"""The gated recurrent unit with its relevance gate before the product (arXiv 1406.1078v3)."""

import torch
from torch import Tensor

from lmtrain.cells.base import (
    CellState,
    DifferentiatedCell,
    Weights,
    product_over_time,
    register,
)
from lmtrain.kernels.products import add_product_


@register("gru")
class GRU(DifferentiatedCell):
    """Gated recurrent unit whose relevance gate acts before the matrix product.

        relevance Γr = σ(W_rc c′ + W_rx x + b_r)          torch calls it r
        update    Γu = σ(W_uc c′ + W_ux x + b_u)          1 − z of torch
        candidate  c̃ = tanh(W_cc (Γr ∘ c′) + W_cx x + b_c)
        hidden     c = Γu ∘ c̃ + (1 − Γu) ∘ c′

    torch.nn.GRU multiplies by Γr after the product W_cc c′ (arXiv 1406.1078v1): a different cell.

    c′ is the state before the step.

    Shapes: x (B, I), c (B, H); parameters as in `Cell`, in the order c̃, Γu, Γr.

    Args:
        input_size: I, features of one input, at least 1.
        hidden_size: H, features of the state, at least 1.

    Raises:
        ConfigError: a size that is not an integer of at least 1.

    Source: Cho et al. 2014 (arXiv 1406.1078v3).
    """

    gates = ("candidate", "update", "relevance")
    state_names = ("hidden",)

    def step(self, x: Tensor, state: CellState) -> CellState:
        """One step of the equations above."""
        (c,) = state
        relevance = torch.sigmoid(self.affine("relevance", x, c))
        update = torch.sigmoid(self.affine("update", x, c))
        candidate = torch.tanh(self.affine("candidate", x, relevance * c))
        return (update * candidate + (1 - update) * c,)

    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """Same as `step`; see DifferentiatedCell."""
        (c,) = state
        recurrent = weights["weight_recurrent"]
        candidate, gates = z.split([self.hidden_size, 2 * self.hidden_size], dim=1)
        add_product_(gates, c, recurrent[self.hidden_size :].T).sigmoid_()
        update, relevance = gates.chunk(2, dim=1)
        add_product_(candidate, relevance * c, recurrent[: self.hidden_size].T).tanh_()
        return (torch.lerp(c, candidate, update),)

    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """[∂c/∂z_c, ∂c/∂z_u, ∂s/∂z_r] with s = Γr ∘ c′; ∂c/∂c′ = 1 − Γu; ∂s/∂c′ = Γr."""
        (c,) = previous
        candidate, update, relevance = activations.chunk(3, dim=-1)
        keep = 1 - update
        dc_dz_candidate = update * (1 - candidate * candidate)
        dc_dz_update = (candidate - c) * update * keep
        ds_dz_relevance = c * relevance * (1 - relevance)
        gates = torch.cat([dc_dz_candidate, dc_dz_update, ds_dz_relevance], dim=-1)
        return gates, keep, relevance

    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """Ds = dz_c W_cc; δc′ = δc ∘ (1 − Γu) + ds ∘ Γr + dz_u W_uc + dz_r W_rc."""
        (delta,) = grad_state
        gates, keep, relevance = local
        recurrent = weights["weight_recurrent"]
        H = self.hidden_size
        gates[:, : 2 * H].unflatten(1, (2, H)).mul_(delta.unsqueeze(1))
        ds = gates[:, :H] @ recurrent[:H]
        gates[:, 2 * H :].mul_(ds)
        delta_previous = torch.addcmul(delta * keep, ds, relevance)
        return (torch.addmm(delta_previous, gates[:, H:], recurrent[H:]),)

    @staticmethod
    def recurrent_gradients(
        dz: Tensor, activations: Tensor, previous: CellState, weights: Weights
    ) -> dict[str, Tensor]:
        """dW_cc = Σ_t dz_cᵀ s; dW_uc and dW_rc as in every cell."""
        (c,) = previous
        H = c.shape[-1]
        s = activations[..., 2 * H :] * c
        candidate = product_over_time(dz[..., :H], s)
        gates = product_over_time(dz[..., H:], c)
        return {"weight_recurrent": torch.cat([candidate, gates])}
