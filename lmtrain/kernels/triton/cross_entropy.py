"""Softmax cross-entropy of rows of logits on CUDA, which the gradients overwrite.

    L = log Σ_v e^(z_v + b_v) − (z_y + b_y),   dz_v = scale · (softmax(z + b)_v − [v = y])

One program per row. It reads the row once for log Σ e^z, with a running maximum against overflow,
and once more, from the cache, to write the gradients.

Source: online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtrain.kernels.triton import engine

_BLOCK = 1024


@triton.jit
def _cross_entropy(
    logits, bias, targets, losses, log_sums, vocab_size, scale,
    HAS_LOG_SUMS: tl.constexpr, STORE_LOSSES: tl.constexpr, STORE_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `cross_entropy`.

    Args:
        logits: (N, V), without the bias; overwritten with dz if STORE_GRADIENTS.
        bias: (V).
        targets: (N).
        losses: output, (N), if STORE_LOSSES.
        log_sums: log Σ e^z, (N): an input if HAS_LOG_SUMS, an output if neither that nor
            STORE_LOSSES.
        vocab_size: V.
        scale: factor of the gradients.
        HAS_LOG_SUMS: whether `log_sums` is an input.
        STORE_LOSSES: whether to write the losses.
        STORE_GRADIENTS: whether to write the gradients.
        BLOCK: logits per iteration.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    row_logits = logits + row * vocab_size
    target = tl.load(targets + row)
    # A target of another slice of the vocabulary is outside of the row.
    is_here = (target >= 0) & (target < vocab_size)
    # Read before the reduction, which is a barrier: after it, gradients overwrite the logit.
    score = tl.load(row_logits + target, mask=is_here, other=0.0).to(tl.float32)
    score += tl.load(bias + target, mask=is_here, other=0.0)
    if HAS_LOG_SUMS:
        log_sum = tl.load(log_sums + row)
    else:
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            v = start + block
            z = tl.load(row_logits + v, mask=v < vocab_size, other=-float("inf")).to(tl.float32)
            z += tl.load(bias + v, mask=v < vocab_size, other=0.0)
            above = tl.maximum(largest, z)
            # Where all logits so far are −∞, subtract 0 to avoid −∞ − −∞.
            base = tl.where(above == -float("inf"), 0.0, above)
            total = total * tl.exp(largest - base) + tl.exp(z - base)
            largest = above
        maximum = tl.max(largest)
        log_sum = maximum + tl.log(tl.sum(total * tl.exp(largest - maximum)))
        if STORE_LOSSES:
            # An infinite sum gives no loss and no gradient to a row without a target.
            log_sum = tl.where(target >= 0, log_sum, float("inf"))
            tl.store(losses + row, tl.where(target >= 0, log_sum - score, 0.0))
        else:
            tl.store(log_sums + row, log_sum)
    if STORE_GRADIENTS:
        one = tl.where(log_sum < float("inf"), 1.0, 0.0)
        for start in range(0, vocab_size, BLOCK):
            v = start + block
            z = tl.load(row_logits + v, mask=v < vocab_size, other=-float("inf")).to(tl.float32)
            z += tl.load(bias + v, mask=v < vocab_size, other=0.0)
            dz = tl.exp(z - log_sum) - tl.where(v == target, one, 0.0)
            tl.store(
                row_logits + v, (scale * dz).to(row_logits.dtype.element_ty), mask=v < vocab_size
            )


def cross_entropy(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    losses: Tensor | None = None,
    log_sums: Tensor | None = None,
    grad_bias: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """See `kernels.native.library.cross_entropy`; for CUDA tensors."""
    rows, vocab_size = logits.shape
    _cross_entropy[(rows,)](
        logits, bias, targets, bias if losses is None else losses,
        bias if log_sums is None else log_sums, vocab_size, scale,
        HAS_LOG_SUMS=log_sums is not None and grad_bias is not None,
        STORE_LOSSES=losses is not None, STORE_GRADIENTS=grad_bias is not None,
        BLOCK=_BLOCK, **engine.COMPILE_OPTIONS,
    )  # fmt: skip
    if grad_bias is not None:
        grad_bias += logits.sum(0, dtype=torch.float32)
