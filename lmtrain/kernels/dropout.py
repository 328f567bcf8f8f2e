"""Dropout: y = m ∘ x with a random mask m of 0 and 1 / (1 − p).

On the CPU the mask is a function of a seed, which the backward computes again; in traced programs
this is the PyTorch operator `lmtrain::dropout`. On CUDA torch draws the mask and keeps it for the
backward.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lmtrain.kernels.custom_op import CustomOp
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.native import library


def dropout(
    inputs: Tensor, p: float, generator: torch.Generator, *, is_locked: bool = False
) -> Tensor:
    """Inputs times a mask: 0 with probability p, otherwise 1 / (1 − p).

    Masks with and without native kernels differ.

    Args:
        inputs: (T, ...).
        p: dropout probability, at least 0 and below 1.
        generator: random generator on the device of the inputs.
        is_locked: whether all T share one mask.
    """
    if not _is_seeded(inputs):
        return inputs * mask(_mask_shape(inputs, is_locked), p, generator, inputs)
    seed = torch.empty((), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    outputs: Tensor = _seeded(inputs, is_locked, p, int(seed))
    return outputs


def mask(shape: tuple[int, ...], p: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """A mask of `shape`: 0 with probability p, rounded to 16 bits, otherwise 1 / (1 − p).

    Args:
        shape: shape of the mask.
        p: dropout probability, at least 0 and below 1.
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


def _is_seeded(inputs: Tensor) -> bool:
    """Whether the mask is a function of a seed; a CUDA graph would repeat the seed."""
    return not inputs.is_cuda


def _mask_shape(inputs: Tensor, is_locked: bool) -> tuple[int, ...]:
    return (1, *inputs.shape[1:]) if is_locked else tuple(inputs.shape)


def _dropout(inputs: Tensor, is_locked: bool, p: float, seed: int) -> Tensor:
    inputs, shape = inputs.contiguous(), _mask_shape(inputs, is_locked)
    if kernels_for(inputs) == "native":
        return library.dropout(inputs, math.prod(shape), p, seed)
    return inputs * mask(shape, p, torch.Generator().manual_seed(seed), inputs)


def _fake(inputs: Tensor, is_locked: bool, p: float, seed: int) -> Tensor:
    del is_locked, p, seed
    return inputs.new_empty(inputs.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, *ctx.options = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _seeded(grad, *ctx.options), None, None, None


_seeded = CustomOp("dropout", _dropout, _fake)
_seeded.differentiate(_setup_context, _backward)
