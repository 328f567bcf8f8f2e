"""Softmax cross-entropy of rows of logits on CUDA, which become their gradients in place.

A program owns a row. It reads it once for log Σ e^z, keeping the largest logit so far so that no
exponential overflows, and a second time, from the nearest cache, to write the gradients.

Source: the sum that goes along with its largest term: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtrain.kernels.triton import engine

_BLOCK = 1024


@triton.jit
def _rows(
    logits, bias, targets, nats, log_sums, columns, scale,
    HAS_SUMS: tl.constexpr, WANTS_NATS: tl.constexpr, WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `cross_entropy`.

    Args:
        logits: (N, V), without the bias; with WANTS_GRADIENT, become dz.
        bias: (V).
        targets: (N).
        nats: (N): with WANTS_NATS, receives the losses.
        log_sums: (N): log Σ e^z, with HAS_SUMS, else receives it.
        columns: V.
        scale: of the gradients.
        HAS_SUMS: whether `log_sums` is known.
        WANTS_NATS: whether the losses are wanted.
        WANTS_GRADIENT: whether the gradients are wanted.
        BLOCK: logits at once.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    line = logits + row * columns
    target = tl.load(targets + row)
    # Read before the sums, at which all threads meet: after them, gradients take its place.
    score = tl.load(line + target, mask=target >= 0, other=0.0).to(tl.float32)
    score += tl.load(bias + target, mask=target >= 0, other=0.0)
    if HAS_SUMS:
        log_sum = tl.load(log_sums + row)
    else:
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + block
            z = tl.load(line + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            z += tl.load(bias + at, mask=at < columns, other=0.0)
            above = tl.maximum(largest, z)
            # Nothing came yet where all is −∞; there 0 stands for e^(−∞ − −∞).
            base = tl.where(above == -float("inf"), 0.0, above)
            total = total * tl.exp(largest - base) + tl.exp(z - base)
            largest = above
        most = tl.max(largest)
        log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most)))
        if WANTS_NATS:
            # Where there is nothing to predict, there is no loss and no gradient.
            log_sum = tl.where(target >= 0, log_sum, float("inf"))
            tl.store(nats + row, tl.where(target >= 0, log_sum - score, 0.0))
        else:
            tl.store(log_sums + row, log_sum)
    if WANTS_GRADIENT:
        one = tl.where(log_sum < float("inf"), 1.0, 0.0)
        for start in range(0, columns, BLOCK):
            at = start + block
            z = tl.load(line + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            z += tl.load(bias + at, mask=at < columns, other=0.0)
            dz = tl.exp(z - log_sum) - tl.where(at == target, one, 0.0)
            tl.store(line + at, (scale * dz).to(line.dtype.element_ty), mask=at < columns)


def cross_entropy(
    logits: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    nats: Tensor | None = None,
    log_sums: Tensor | None = None,
    grad_bias: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """As `kernels.native.library.cross_entropy`, of tensors on CUDA."""
    rows, columns = logits.shape
    _rows[(rows,)](
        logits, bias, targets, bias if nats is None else nats,
        bias if log_sums is None else log_sums, columns, scale,
        HAS_SUMS=log_sums is not None and grad_bias is not None, WANTS_NATS=nats is not None,
        WANTS_GRADIENT=grad_bias is not None, BLOCK=_BLOCK, **engine.OPTIONS,
    )  # fmt: skip
    if grad_bias is not None:
        grad_bias += logits.sum(0, dtype=torch.float32)
