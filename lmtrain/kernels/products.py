"""Matrix products: those of torch, or on AMD processors the native ones where they are faster.

torch multiplies fp32 matrices by MKL. On AMD processors `native/product.h` was measured to be
faster, except for the numbers of rows and columns that the constants below exclude. Results differ
by rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.kernels.native import library

# With fewer rows, products of torch are faster unless both matrices are contiguous in K.
_MIN_ROWS = 48
# With fewer columns, products of torch are faster.
_MIN_COLUMNS = 48


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The product (..., N) of a tensor (..., K) and a matrix (K, N), in `out` if it is given."""
    product = _native_product(left, right, out)
    return torch.matmul(left, right, out=out) if product is None else product


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Inputs (..., K) times the transpose of a weight (N, K), plus a bias (N)."""
    product = _native_product(inputs, weight.T)
    return F.linear(inputs, weight, bias) if product is None else product.add_(bias)


def add_product_(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds the product of matrices (M, K) and (K, N) to sums (M, N) in place."""
    product = _native_product(left, right)
    return sums.addmm_(left, right) if product is None else sums.add_(product)


def are_native() -> bool:
    """Whether native fp32 products are used on the CPU, where they are faster."""
    return torch.backends.mkl.is_available() and library.is_amd()


def _native_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor | None:
    """The native product; None where that of torch is faster or has to be used."""
    # Tracing first: a comparison of sizes would specialize an exported program to them.
    if torch.compiler.is_compiling() or not all(map(_is_plain, (left, right))):
        return None
    rows, columns = left.shape[:-1].numel(), right.shape[1]
    if columns < _MIN_COLUMNS or not are_native():
        return None
    if rows < _MIN_ROWS and not left.stride(-1) == right.stride(0) == 1:
        return None
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return None
    return library.product(left.flatten(0, -2), right, out).view(*left.shape[:-1], columns)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is fp32 on the CPU, no subclass, and stored as its values are."""
    is_fp32 = tensor.dtype == torch.float32 and tensor.is_cpu and tensor.dim() > 1
    return is_fp32 and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg()
