"""Dropout whose random generator is part of the training state."""

import math

import torch
from torch import Tensor, nn

from lmtrain.model.generator import ModelGenerator


def keep_mask(shape: tuple[int, ...], p: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """A mask of `shape`: 0 with probability p, rounded to 16 bits, otherwise 1 / (1 − p).

    Args:
        shape: shape of the mask.
        p: dropout probability, 0 to 1.
        generator: random generator on the device of `like`.
        like: tensor with the dtype and the device of the mask.
    """
    count = math.prod(shape)
    # One draw of 64 bits serves four elements: drawing is most of the cost.
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(1 << 63), None, generator=generator)
    dropped = min(round(p * 65536), 65535)  # of the 65,536 values of 16 bits
    keep = draws.view(torch.int16)[:count].view(shape) >= dropped - 32768
    return keep.to(like.dtype).mul_(65536 / (65536 - dropped))


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
        shape = (1, *inputs.shape[1:]) if self.is_locked else tuple(inputs.shape)
        return inputs * keep_mask(shape, self.p, self.generator.on(inputs.device), inputs)
