"""Which kernels run on a tensor: C++ on the CPU, Triton on CUDA."""

from typing import Literal

import torch
from torch import Tensor

from lmtrain.kernels.native import library
from lmtrain.kernels.triton import engine as triton


def kernels_for(operand: Tensor, bias: Tensor | None = None) -> Literal["native", "triton"] | None:
    """The kernels for operands like this; None for torch.

    Args:
        operand: a tensor that the kernels read; fp32, or bf16 where the kernels support it.
        bias: the bias, if there is one; kernels need fp32.
    """
    if bias is not None and bias.dtype != torch.float32:
        return None
    if triton.supports(operand):
        return "triton"
    if operand.device.type != "cpu" or library.unavailable_reason():
        return None
    is_bf16 = operand.dtype == torch.bfloat16 and library.has_bf16()
    return "native" if is_bf16 or operand.dtype == torch.float32 else None
