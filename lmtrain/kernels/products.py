"""Matrix products: those of torch, or native ones where these are faster.

torch multiplies fp32 matrices by MKL. On AMD processors `native/product.h` was measured to be
faster, except for the numbers of rows and columns that the constants below exclude. torch
multiplies bf16 matrices by oneDNN, some of them with one thread, and writes results in bf16 only.
With AMX, `native/amx_product.h` also reads weights in fp32 and writes their gradients in fp32,
without copies in bf16. Results differ by rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from lmtrain.kernels.native import library

# With fewer rows, products of torch are faster unless both matrices are contiguous in K.
_MIN_ROWS = 48
# With fewer columns, products of torch are faster.
_MIN_COLUMNS = 48
# With fewer rows or columns, bf16 products of torch are faster.
_MIN_BF16_SIZE = 32


def matmul(
    left: Tensor, right: Tensor, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The product (..., N) of a tensor (..., K) and a matrix (K, N).

    Args:
        left: (..., K).
        right: (K, N); an operand in the dtype of `left`, whatever its own.
        out: a contiguous tensor for the result, of the dtype of `left`, in other memory than the
            operands; None for a new one.
        dtype: that of the result; None for that of `left`.
    """
    product = _native_product(left, right, out, dtype)
    if product is None:
        product = torch.matmul(left, right.to(left.dtype), out=out)
    return product if dtype is None else product.to(dtype)


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight for products in a dtype: converted to it, unless they do so as they read it."""
    if torch.compiler.is_compiling() or dtype != torch.bfloat16 or not _can_be_native(weight):
        return weight.to(dtype)
    return weight if are_native(dtype) else weight.to(dtype)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Inputs (..., K) times the transpose of a weight (N, K), plus a bias (N).

    Weight and bias are operands in the dtype of the inputs, whatever their own.
    """
    product = _native_product(inputs, weight.T)
    if product is not None:
        return product.add_(bias)
    return F.linear(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype))


def add_product_(sums: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds the product of matrices (M, K) and (K, N) to sums (M, N) in place."""
    product = _native_product(left, right)
    return sums.addmm_(left, right) if product is None else sums.add_(product)


def are_native(dtype: torch.dtype) -> bool:
    """Whether products of a dtype on the CPU are native, where these are faster."""
    if dtype == torch.bfloat16:
        return library.multiplies_bf16()
    return dtype == torch.float32 and torch.backends.mkl.is_available() and library.is_amd()


def native_dtypes() -> list[str]:
    """The precisions whose products on the CPU are native."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return [name for name, dtype in dtypes.items() if are_native(dtype)]


def _native_product(
    left: Tensor, right: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """The native product; None where that of torch is faster or has to be used."""
    # Tracing first: a comparison of sizes would specialize an exported program to them.
    if torch.compiler.is_compiling() or not all(map(_can_be_native, (left, right))):
        return None
    if _is_transformed():
        return None
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return None
    if not are_native(left.dtype):
        return None
    rows, columns = left.shape[:-1].numel(), right.shape[1]
    flat = left.flatten(0, -2)
    if left.dtype == torch.bfloat16:
        is_faster = min(rows, columns) >= _MIN_BF16_SIZE
        is_faster = is_faster and 1 in flat.stride() and 1 in right.stride()
    else:
        is_faster = columns >= _MIN_COLUMNS and right.dtype == left.dtype
        is_faster = is_faster and (rows >= _MIN_ROWS or flat.stride(-1) == right.stride(0) == 1)
    if not is_faster:
        return None
    if out is None and dtype not in (None, left.dtype):
        # The caller converts it to other dtypes.
        out = flat.new_empty(rows, columns, dtype=torch.float32)
    return library.product(flat, right, out).view(*left.shape[:-1], columns)


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return maybe_current_level() is not None or forward_ad._current_level >= 0


def _can_be_native(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU, bf16 or fp32, no subclass, and stored as its values are."""
    is_matrix = tensor.dtype in (torch.bfloat16, torch.float32) and tensor.dim() > 1
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg()
    return is_matrix and is_plain and tensor.is_cpu
