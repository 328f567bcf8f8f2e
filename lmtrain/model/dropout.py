"""Dropout whose chance a checkpoint can hold."""

import math

import torch
from torch import Tensor, nn

from lmtrain.model.generator import ModelGenerator


def keep_mask(shape: tuple[int, ...], p: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Numbers that are 0 with probability p, to 16 binary digits, and 1 / (1 − p) otherwise.

    Args:
        shape: how many.
        p: probability, 0 to 1.
        generator: the source of chance, on the device of `like`.
        like: gives the type and the device.
    """
    count = math.prod(shape)
    # One draw of 64 bits decides for four numbers: drawing is most of the cost.
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(1 << 63), None, generator=generator)
    dropped = min(round(p * 65536), 65535)  # of the 65,536 values of 16 bits
    keep = draws.view(torch.int16)[:count].view(shape) >= dropped - 32768
    return keep.to(like.dtype).mul_(65536 / (65536 - dropped))


class Dropout(nn.Module):
    """Sets each number to 0 with probability p and scales the others by 1 / (1 − p).

    Args:
        p: probability, 0 to 1.
        chance: where it comes from.
        is_locked: whether what is dropped is dropped at all time steps, the first dimension.

    Source: Srivastava et al. 2014; on the connections between layers alone: Zaremba et al. 2014;
    locked, or variational: Gal & Ghahramani 2016.
    """

    def __init__(self, p: float, chance: ModelGenerator, *, is_locked: bool = False) -> None:
        super().__init__()
        self.p = p
        self.chance = chance
        self.is_locked = is_locked

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` of any shape, time first; unchanged outside training."""
        if not self.training or self.p == 0:
            return inputs
        shape = (1, *inputs.shape[1:]) if self.is_locked else tuple(inputs.shape)
        return inputs * keep_mask(shape, self.p, self.chance.on(inputs.device), inputs)
