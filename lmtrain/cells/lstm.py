"""Long short-term memory."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmtrain.cells.base import CellState, DifferentiatedCell, Weights, check_argument, register
from lmtrain.kernels.products import add_product_

CellOutput = Literal["tanh", "linear"]


@register("lstm")
class LSTM(DifferentiatedCell):
    """Long short-term memory with separate update, forget and output gates.

        candidate   c̃ = tanh(W_ca a′ + W_cx x + b_c)      torch calls it g
        update     Γu = σ(W_ua a′ + W_ux x + b_u)         torch calls it i
        forget     Γf = σ(W_fa a′ + W_fx x + b_f)         f
        output     Γo = σ(W_oa a′ + W_ox x + b_o)         o
        cell_state  c = Γu ∘ c̃ + Γf ∘ c′
        hidden      a = Γo ∘ h(c)                         h = tanh, or the identity

    a′ and c′ are the state before the step.

    Shapes: x (B, I), a and c (B, H); parameters as in `Cell`, in the order c̃, Γu, Γf, Γo.

    Args:
        input_size: I, features of one input, at least 1.
        hidden_size: H, features of each part of the state, at least 1.
        cell_output: h: tanh, or linear for the identity.

    Raises:
        ConfigError: an argument outside these values.

    Source: Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000.
    """

    gates = ("candidate", "update", "forget", "output")
    state_names = ("hidden", "cell_state")
    options: ClassVar[tuple[str, ...]] = ("cell_output",)

    def __init__(self, input_size: int, hidden_size: int, cell_output: CellOutput = "tanh") -> None:
        super().__init__(input_size, hidden_size)
        check_argument("cell_output", cell_output, CellOutput)
        self.cell_output = cell_output

    def step(self, x: Tensor, state: CellState) -> CellState:
        """One step of the equations above."""
        a, c = state
        candidate = torch.tanh(self.affine("candidate", x, a))
        update = torch.sigmoid(self.affine("update", x, a))
        forget = torch.sigmoid(self.affine("forget", x, a))
        output = torch.sigmoid(self.affine("output", x, a))
        c = update * candidate + forget * c
        return output * self._output_activation(c), c

    def _output_activation(self, c: Tensor) -> Tensor:
        return torch.tanh(c) if self.cell_output == "tanh" else c

    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """Same as `step`; see DifferentiatedCell."""
        a, c = state
        add_product_(z, a, weights["weight_recurrent"].T)
        return self._activate(z, c)

    def _activate(self, z: Tensor, c: Tensor) -> CellState:
        candidate, update, forget, output = z.chunk(4, dim=1)
        candidate.tanh_()
        z[:, self.hidden_size :].sigmoid_()
        c = torch.addcmul(forget * c, update, candidate)
        return output * self._output_activation(c), c

    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """[∂c/∂z_c, ∂c/∂z_u, ∂c/∂z_f, ∂a/∂z_o]; ∂a/∂c = Γo ∘ h′(c); ∂c/∂c′ = Γf."""
        candidate, update, forget, output = activations.chunk(4, dim=-1)
        h = self._output_activation(current[1])
        dc_dz_candidate = update * (1 - candidate * candidate)
        dc_dz_update = candidate * update * (1 - update)
        dc_dz_forget = previous[1] * forget * (1 - forget)
        da_dz_output = h * output * (1 - output)
        da_dc = output * (1 - h * h) if self.cell_output == "tanh" else output
        gates = torch.cat([dc_dz_candidate, dc_dz_update, dc_dz_forget, da_dz_output], dim=-1)
        return gates, da_dc, forget

    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """δc ← δc + δa ∘ Γo ∘ h′(c); δa′ = Σ_g dz_g W_ga; δc′ = δc ∘ Γf."""
        delta_a, delta_c = grad_state
        gates, da_dc, forget = local
        delta_c = torch.addcmul(delta_c, delta_a, da_dc)
        into_c, into_a = gates.split([3 * self.hidden_size, self.hidden_size], dim=1)
        into_c.unflatten(1, (3, -1)).mul_(delta_c.unsqueeze(1))
        into_a.mul_(delta_a)
        return gates @ weights["weight_recurrent"], delta_c * forget
