"""Long short-term memory."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lmtrain.cells.base import CellState, DifferentiatedCell, Weights, check_argument, register

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

    Args:
        input_size: I, numbers in one input, at least 1.
        hidden_size: H, numbers in each part of the state, at least 1.
        cell_output: h: tanh or linear.

    Raises:
        ConfigError: an argument that is none of these.

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
        return output * self._squash(c), c

    def _squash(self, c: Tensor) -> Tensor:
        return torch.tanh(c) if self.cell_output == "tanh" else c

    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """As `step`; see DifferentiatedCell."""
        a, c = state
        z.addmm_(a, weights["weight_recurrent"].T)
        return self._activate(z, c)

    def _activate(self, z: Tensor, c: Tensor) -> CellState:
        candidate, update, forget, output = z.chunk(4, dim=1)
        candidate.tanh_()
        z[:, self.hidden_size :].sigmoid_()
        c = torch.addcmul(forget * c, update, candidate)
        return output * self._squash(c), c

    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """∂c/∂z for candidate, update and forget; ∂a/∂z_o; ∂a/∂c = Γo ∘ h′(c); ∂c/∂c′ = Γf."""
        candidate, update, forget, output = activations.chunk(4, dim=-1)
        squashed = self._squash(current[1])
        into_candidate = update * (1 - candidate * candidate)
        into_update = candidate * update * (1 - update)
        into_forget = previous[1] * forget * (1 - forget)
        into_output = squashed * output * (1 - output)
        into_cell = output * (1 - squashed * squashed) if self.cell_output == "tanh" else output
        gates = torch.cat([into_candidate, into_update, into_forget, into_output], dim=-1)
        return gates, into_cell, forget

    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """δc ← δc + δa ∘ Γo ∘ h′(c); δa′ = Σ_g dz_g W_ga; δc′ = δc ∘ Γf."""
        delta_a, delta_c = grad_state
        gates, into_cell, forget = local
        delta_c = torch.addcmul(delta_c, delta_a, into_cell)
        into_memory, into_output = gates.split([3 * self.hidden_size, self.hidden_size], dim=1)
        into_memory.unflatten(1, (3, -1)).mul_(delta_c.unsqueeze(1))
        into_output.mul_(delta_a)
        return gates @ weights["weight_recurrent"], delta_c * forget
