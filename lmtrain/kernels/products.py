"""Matrix products: those of torch, or on processors of AMD the native ones.

torch multiplies fp32 matrices by MKL, which is slower on processors of AMD than
`native/product.h`, except where there are few rows.
"""

import torch
from torch import Tensor

from lmtrain.kernels.native import library

# With fewer rows or columns, packing the other matrix costs more than is gained.
_MIN_SIZE = 48


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product (..., N) of a tensor (..., K) and a matrix (K, N)."""
    if _is_large(left, right) and not _needs_gradient(left, right) and are_native():
        rows = left.flatten(0, -2)
        return library.product(rows, right).view(*left.shape[:-1], right.shape[1])
    return left @ right


def are_native() -> bool:
    """Whether large fp32 products on the CPU are the native ones."""
    return torch.backends.mkl.is_available() and library.is_amd()


def _is_large(left: Tensor, right: Tensor) -> bool:
    is_fp32 = left.dtype == right.dtype == torch.float32 and left.is_cpu
    return is_fp32 and min(left.shape[:-1].numel(), right.shape[1]) >= _MIN_SIZE


def _needs_gradient(left: Tensor, right: Tensor) -> bool:
    return torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
