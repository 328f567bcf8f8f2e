"""Which kernels run on a tensor: C++ on the processor, Triton on CUDA."""

from typing import Literal

import torch
from torch import Tensor

from lmtrain.kernels.native import library
from lmtrain.kernels.triton import engine as triton


def kernels_for(operand: Tensor, bias: Tensor) -> Literal["native", "triton"] | None:
    """The kernels that take operands of products and a bias like these; None for torch."""
    if bias.dtype != torch.float32:
        return None
    if triton.runs(operand):
        return "triton"
    if operand.device.type != "cpu" or library.absence():
        return None
    is_bf16 = operand.dtype == torch.bfloat16 and library.has_bf16()
    return "native" if is_bf16 or operand.dtype == torch.float32 else None
