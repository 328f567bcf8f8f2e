"""Matrix products: those of torch, or on processors of AMD the native ones.

torch multiplies fp32 matrices by MKL, which was measured to be slow on processors of AMD. Those use
`native/product.h`, which was measured on processors of Intel only.
"""

import torch
from torch import Tensor

from lmtrain.kernels.native import library


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product (..., N) of a tensor (..., K) and a matrix (K, N)."""
    if left.dtype == right.dtype == torch.float32 and left.is_cpu and are_native():
        rows = left.flatten(0, -2)
        return library.product(rows, right).view(*left.shape[:-1], right.shape[1])
    return left @ right


def are_native() -> bool:
    """Whether fp32 products on the CPU are the native ones."""
    return torch.backends.mkl.is_available() and library.is_amd()
