"""Dropout whose chance comes from a generator that a checkpoint can hold."""

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Sets each number to 0 with probability p and scales the others by 1 / (1 − p).

    Args:
        p: probability, 0 to 1.
        generator: the source of chance, on the processor.

    Source: Srivastava et al. 2014; on the connections between layers alone: Zaremba et al. 2014.
    """

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p = p
        self.generator = generator

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` of any shape; unchanged outside training."""
        if not self.training or self.p == 0:
            return inputs
        keep = torch.empty(inputs.shape, dtype=inputs.dtype)
        keep.bernoulli_(1 - self.p, generator=self.generator).div_(1 - self.p)
        return inputs * keep.to(inputs.device)
