"""Dropout: y = m · x with a random mask m of 0 and 1 / (1 − p).

On the CPU the native kernel computes the mask from a seed, and again for the gradient; elsewhere
torch draws it.
"""

from typing import Any

import torch
from torch import Tensor

from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.native import library


# torch.compile does not trace random generators.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def dropout(
    inputs: Tensor, p: float, generator: torch.Generator, *, is_locked: bool = False
) -> Tensor:
    """Inputs times a mask: 0 with probability p, otherwise 1 / (1 − p).

    Args:
        inputs: (T, ...).
        p: dropout probability, 0 to 1.
        generator: random generator on the device of the inputs.
        is_locked: whether all T share one mask.
    """
    mask_size = (inputs[:1] if is_locked else inputs).numel()
    if kernels_for(inputs) == "native":
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        return _apply(inputs, mask_size, p, seed)
    mask = _mask(mask_size, p, generator, inputs)
    return (inputs.reshape(-1, mask_size) * mask).view(inputs.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(inputs: Tensor, *options: Any) -> Tensor:
        return library.dropout(inputs.contiguous(), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(grad, *ctx.options), None, None, None


def _apply(inputs: Tensor, mask_size: int, p: float, seed: int) -> Tensor:
    outputs: Tensor = _Dropout.apply(inputs, mask_size, p, seed)  # type: ignore[no-untyped-call]
    return outputs


def _mask(size: int, p: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """A mask, (size), of the dtype and on the device of `like`; p is rounded to 16 bits."""
    # One draw of 64 bits serves four elements: drawing is most of the cost.
    draws = torch.empty(-(-size // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(1 << 63), None, generator=generator)
    dropped = min(round(p * 65536), 65535)  # of the 65,536 values of 16 bits
    keep = draws.view(torch.int16)[:size] >= dropped - 32768
    return keep.to(like.dtype).mul_(65536 / (65536 - dropped))
