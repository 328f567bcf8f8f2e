"""Dropout whose random generator is part of the training state."""

from torch import Tensor, nn

from lmtrain.kernels.dropout import dropout
from lmtrain.model.generator import ModelGenerator


class Dropout(nn.Module):
    """In training, zeroes elements with probability p and scales the others by 1 / (1 − p).

    Args:
        p: dropout probability, 0 to 1.
        generator: the model's random generator.
        is_locked: whether all time steps (the first dimension) share one mask.

    Source: Srivastava et al. 2014; between layers, not across time steps: Zaremba et al. 2014;
    one mask for all time steps (variational): Gal & Ghahramani 2016.
    """

    def __init__(self, p: float, generator: ModelGenerator, *, is_locked: bool = False) -> None:
        super().__init__()
        self.p = p
        self.generator = generator
        self.is_locked = is_locked

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` (T, ...) after dropout; `inputs` itself in evaluation mode or if p is 0."""
        if not self.training or self.p == 0:
            return inputs
        generator = self.generator.on(inputs.device)
        return dropout(inputs, self.p, generator, is_locked=self.is_locked)
