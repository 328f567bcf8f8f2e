"""The simple (Elman) recurrent cell."""

from typing import Literal

import torch
from torch import Tensor

from lmtrain.cells.base import CellState, DifferentiatedCell, Weights, check_argument, register
from lmtrain.kernels.products import add_product_

Activation = Literal["tanh", "relu"]


@register("rnn")
class RNN(DifferentiatedCell):
    """Simple recurrent cell with a tanh or ReLU activation.

        hidden  a = g(W_aa a′ + W_ax x + b_a)

    a′ is the state before the step.

    Shapes: x (B, I), a (B, H); parameters as in `Cell`.

    Args:
        input_size: I, features of one input, at least 1.
        hidden_size: H, features of the state, at least 1.
        activation: g: tanh or relu.

    Raises:
        ConfigError: an argument outside these values.

    Source: Elman 1990.
    """

    gates = ("candidate",)
    state_names = ("hidden",)
    options = ("activation",)

    def __init__(self, input_size: int, hidden_size: int, activation: Activation = "tanh") -> None:
        super().__init__(input_size, hidden_size)
        check_argument("activation", activation, Activation)
        self.activation = activation

    def step(self, x: Tensor, state: CellState) -> CellState:
        """One step of the equation above."""
        (a,) = state
        z = self.affine("candidate", x, a)
        return (torch.relu(z) if self.activation == "relu" else torch.tanh(z),)

    def forward_step(self, z: Tensor, state: CellState, weights: Weights) -> CellState:
        """Same as `step`; see DifferentiatedCell."""
        (a,) = state
        add_product_(z, a, weights["weight_recurrent"].T)
        return (z.relu_() if self.activation == "relu" else z.tanh_(),)

    def local_gradients(
        self, activations: Tensor, previous: CellState, current: CellState
    ) -> tuple[Tensor, ...]:
        """∂a/∂z: 1 − a² for tanh; for ReLU 1 where a > 0, else 0."""
        if self.activation == "relu":
            return ((activations > 0).to(activations.dtype),)
        return (1 - activations * activations,)

    def backward_step(
        self, grad_state: CellState, local: tuple[Tensor, ...], weights: Weights
    ) -> CellState:
        """δa′ = dz W_aa, with dz = δa ∘ ∂a/∂z."""
        (delta,) = grad_state
        dz = local[0].mul_(delta)
        return (dz @ weights["weight_recurrent"],)
