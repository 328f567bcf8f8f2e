"""Long short-term memory with peephole connections."""

from typing import Literal

import torch
from torch import Tensor, nn

from lmtrain.cells.base import CellState, Weights, check_argument, product_over_time, register
from lmtrain.cells.lstm import LSTM, CellOutput
from lmtrain.kernels.products import add_product_, matmul

Peephole = Literal["full", "diagonal"]


@register("peephole-lstm")
class PeepholeLSTM(LSTM):
    """LSTM whose three gates also depend on the previous cell state, c′ = c⟨t−1⟩.

        candidate   c̃ = tanh(W_ca a′ + W_cx x + b_c)
        update     Γu = σ(W_ua a′ + W_ux x + P_u c′ + b_u)
        forget     Γf = σ(W_fa a′ + W_fx x + P_f c′ + b_f)
        output     Γo = σ(W_oa a′ + W_ox x + P_o c′ + b_o)
        cell_state  c = Γu ∘ c̃ + Γf ∘ c′
        hidden      a = Γo ∘ h(c)

    Shapes: as LSTM; `weight_peephole` holds P_u, P_f, P_o: (3H, H) in the full form, or (3H) in
    the diagonal form, in which P_g c′ is p_g ∘ c′.

    Args:
        input_size: I, features of one input, at least 1.
        hidden_size: H, features of each part of the state, at least 1.
        cell_output: h: tanh, or linear for the identity.
        peephole: full or diagonal.

    Raises:
        ConfigError: an argument outside these values.

    Source: Gers & Schmidhuber 2000 (diagonal); full: Ng's notes on sequence models.
    """

    options = ("cell_output", "peephole")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell_output: CellOutput = "tanh",
        peephole: Peephole = "full",
    ) -> None:
        super().__init__(input_size, hidden_size, cell_output)
        check_argument("peephole", peephole, Peephole)
        self.peephole = peephole
        shape = (3 * hidden_size, hidden_size) if peephole == "full" else (3 * hidden_size,)
        self.weight_peephole = nn.Parameter(torch.empty(shape))

    def step(self, x: Tensor, state: CellState) -> CellState:
        """One step of the equations above."""
        a, c = state
        peephole_update, peephole_forget, peephole_output = self._peephole_terms(
            c, self.weight_peephole
        ).chunk(3, dim=1)
        candidate = torch.tanh(self.affine("candidate", x, a))
        update = torch.sigmoid(self.affine("update", x, a) + peephole_update)
        forget = torch.sigmoid(self.affine("forget", x, a) + peephole_forget)
        output = torch.sigmoid(self.affine("output", x, a) + peephole_output)
        c = update * candidate + forget * c
        return output * self._output_activation(c), c

    def _peephole_terms(self, c: Tensor, weight_peephole: Tensor) -> Tensor:
        """P_u c′, P_f c′ and P_o c′, (B, 3H)."""
        if self.peephole == "full":
            return matmul(c, weight_peephole.T)
        return c.repeat(1, 3) * weight_peephole

    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """Same as `step`; see DifferentiatedCell."""
        a, c = state
        add_product_(z, a, weights["weight_recurrent"].T)
        z[:, self.hidden_size :].add_(self._peephole_terms(c, weights["weight_peephole"]))
        return self._activate(z, c)

    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """As LSTM, with δc′ ← δc′ + Σ_g dz_g P_g, or + Σ_g dz_g ∘ p_g."""
        delta_a, delta_c = super().backward_step(grad_state, local, weights)
        dz_gates = local[0][:, self.hidden_size :]
        peephole = weights["weight_peephole"]
        if self.peephole == "full":
            return delta_a, torch.addmm(delta_c, dz_gates, peephole)
        return delta_a, delta_c + (dz_gates * peephole).unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def recurrent_gradients(
        dz: Tensor, activations: Tensor, previous: CellState, weights: Weights
    ) -> dict[str, Tensor]:
        """dP_g = Σ_t dz_gᵀ c′, or dp_g = Σ_t Σ_B dz_g ∘ c′."""
        a, c = previous
        dz_gates = dz[..., c.shape[-1] :]
        if weights["weight_peephole"].dim() == 2:
            peephole = product_over_time(dz_gates, c)
        else:
            peephole = (dz_gates.unflatten(-1, (3, -1)) * c.unsqueeze(-2)).sum((0, 1)).flatten()
        return {"weight_recurrent": product_over_time(dz, a), "weight_peephole": peephole}
