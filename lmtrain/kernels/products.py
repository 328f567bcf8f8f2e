"""Matrix products: those of torch, or on processors of AMD the native ones.

torch multiplies fp32 matrices by MKL, which is slower on processors of AMD than
`native/product.h`, except for numbers of rows between a few and many.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.kernels.native import library

# From this number of rows and columns on, packing both matrices pays.
_MANY = 48
# Up to this number of rows the native product packs nothing, if both matrices are contiguous in
# K: FEW_ROWS of product.h.
_FEW = 16


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product (..., N) of a tensor (..., K) and a matrix (K, N)."""
    product = _native(left, right)
    return left @ right if product is None else product


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Inputs (..., K) times the transpose of a weight (N, K), plus a bias (N)."""
    product = _native(inputs, weight.T)
    return F.linear(inputs, weight, bias) if product is None else product + bias


def add_product_(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds the product of matrices (M, K) and (K, N) to sums (M, N) in place."""
    product = _native(left, right)
    return sums.addmm_(left, right) if product is None else sums.add_(product)


def are_native() -> bool:
    """Whether native fp32 products are used on the CPU, where they are faster."""
    return torch.backends.mkl.is_available() and library.is_amd()


def _native(left: Tensor, right: Tensor) -> Tensor | None:
    """The native product; None where that of torch is faster or has to be used."""
    is_fp32 = left.dtype == right.dtype == torch.float32 and left.is_cpu and left.dim() > 1
    # Tracing first: a comparison of sizes would fix them in an exported program.
    if torch.compiler.is_compiling() or not is_fp32 or not are_native():
        return None
    rows, columns = left.shape[:-1].numel(), right.shape[1]
    is_contiguous = left.stride(-1) == right.stride(0) == 1
    if columns < _MANY or not (rows >= _MANY or (rows <= _FEW and is_contiguous)):
        return None
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return None
    return library.product(left.flatten(0, -2), right).view(*left.shape[:-1], columns)
