"""Softmax cross-entropy of hidden states against the words that came, in nats.

ŷ⟨t⟩ = softmax(W_y a⟨t⟩ + b_y),  L⟨t⟩ = −log ŷ⟨t⟩[y⟨t⟩]

Loss and gradients come together, piece by piece, and a piece's logits become its gradients
dz = ŷ − [y] in place, so that the logits are never whole in memory. Pieces are rows; with a large
vocabulary they are slices of it, met twice: for log Σ e^z first, then for the gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.errors import ConfigError
from lmtrain.kernels.native import library
from lmtrain.kernels.triton import engine as triton

# Bytes of logits held at once.
_MOST_BYTES = 24 << 20
# The same for slices of the vocabulary, beside which the gradients of all rows are held.
_SLICE_BYTES = 4 << 20
# Pieces of rows beyond which adding up gradients of all weights costs more than computing the
# logits of all rows twice.
_MOST_PIECES = 8


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> Tensor:
    """Scale · Σ L over all predictions: the mean with scale 1 / (T·B).

    Args:
        hidden: (T, B, H); in bf16, the operands of all products are bf16.
        weight: output weights W_y, (V, H).
        bias: b_y, (V).
        targets: the words that came, (T, B); below 0 where there is nothing to predict.
        scale: factor of the sum, and so of all gradients.

    Raises:
        ConfigError: a target that is no token.
    """
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, scale
    )
    return loss


@torch.no_grad()
def log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Log ŷ⟨t⟩[y⟨t⟩] of each prediction, (T, B), in nats.

    Args:
        hidden: (T, B, H).
        weight: output weights W_y, (V, H).
        bias: b_y, (V).
        targets: the words that came, (T, B).
    """
    weight = weight.to(hidden.dtype)
    nats = [
        _nats(rows @ weight.T, bias, came, None, 1.0)
        for rows, came in _pieces(hidden, weight, targets)
    ]
    return -torch.cat(nats).view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
    ) -> Tensor:
        pieces = _pieces(hidden, weight, targets)
        if len(pieces) <= _MOST_PIECES:
            total, *gradients = _by_rows(pieces, weight, bias, scale)
        else:
            rows = hidden.flatten(0, 1)
            total, *gradients = _by_slices(rows, weight, bias, targets.flatten(), scale)
        ctx.save_for_backward(gradients[0].view_as(hidden), *gradients[1:])
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        # The gradient of a loss that is the objective itself is 1; to ask would wait for a GPU.
        if grad.is_cuda or float(grad) != 1:
            gradients = tuple(gradient * grad.to(gradient.dtype) for gradient in gradients)
        return (*gradients, None, None)


def _pieces(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows of hidden states (N, H) and their targets (N), so many that their logits fit.

    Raises:
        ConfigError: a target that is no token.
    """
    if targets.device.type == "cpu" and int(targets.max()) >= len(weight):
        raise ConfigError(f"a target of {int(targets.max())}: there are {len(weight)} tokens")
    rows = max(1, _MOST_BYTES // (len(weight) * hidden.element_size()))
    flat = hidden.flatten(0, 1)
    pieces = -(-len(flat) // rows)
    return list(zip(flat.chunk(pieces), targets.flatten().chunk(pieces), strict=True))


def _by_rows(
    pieces: list[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Σ L, and the scaled gradients of hidden states, weights and bias."""
    operand = weight.to(pieces[0][0].dtype)
    total, grad_bias = bias.new_zeros(()), torch.zeros_like(bias)
    grad_weight = torch.empty(0)
    grad_hidden = []
    for rows, came in pieces:
        logits = rows @ operand.T  # (N, V)
        total += _nats(logits, bias, came, grad_bias, scale).sum()
        grad_hidden.append(logits @ operand)
        piece = (library.transposed(logits) @ rows).to(weight.dtype)
        grad_weight = grad_weight.add_(piece) if len(grad_hidden) > 1 else piece
    return total, torch.cat(grad_hidden), grad_weight, grad_bias


def _by_slices(
    rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """As `_by_rows`, for all rows (N, H) and targets (N) at once."""
    width = max(1, _SLICE_BYTES // (len(rows) * rows.element_size()))
    log_sums = bias.new_full((len(rows),), -torch.inf)
    score = bias.new_zeros(len(rows))
    for first in range(0, len(weight), width):
        part = slice(first, first + width)
        logits = rows @ weight[part].to(rows.dtype).T  # (N, width)
        came = (targets - first).clamp(0, logits.shape[1] - 1)
        inside = came == targets - first
        z = logits.gather(1, came.unsqueeze(1)).squeeze(1).to(bias.dtype) + bias[part][came]
        score = torch.where(inside, z, score)
        log_sums = torch.logaddexp(log_sums, _slice_log_sums(logits, bias[part]))
    known = targets >= 0
    total = torch.where(known, log_sums - score, 0).sum()
    log_sums = torch.where(known, log_sums, torch.inf)
    grad_hidden = torch.zeros_like(rows, dtype=bias.dtype)
    grad_weight, grad_bias = torch.empty_like(weight), torch.zeros_like(bias)
    for first in range(0, len(weight), width):
        part = slice(first, first + width)
        operand = weight[part].to(rows.dtype)
        logits = rows @ operand.T
        _slice_gradient(logits, bias[part], targets - first, log_sums, grad_bias[part], scale)
        grad_weight[part] = library.transposed(logits) @ rows
        grad_hidden += logits @ operand
    return total, grad_hidden.to(rows.dtype), grad_weight, grad_bias


def _nats(
    logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None, scale: float
) -> Tensor:
    """L of each row of logits (N, V); with `grad_bias`, which is added to, they become dz."""
    targets = targets.contiguous()
    if (kernel := _kernel(logits, bias)) is not None:
        nats = bias.new_empty(len(logits))
        kernel(logits, bias, targets, nats=nats, grad_bias=grad_bias, scale=scale)
        return nats
    z = logits.to(bias.dtype) + bias
    known = targets >= 0
    log_sums = torch.where(known, z.logsumexp(1), torch.inf)
    came = targets.clamp(min=0).unsqueeze(1)
    nats = torch.where(known, log_sums - z.gather(1, came).squeeze(1), 0)
    if grad_bias is not None:
        _slice_gradient(logits, bias, targets, log_sums, grad_bias, scale)
    return nats


def _slice_log_sums(logits: Tensor, bias: Tensor) -> Tensor:
    """Log Σ e^z of each row over a slice of the vocabulary."""
    if (kernel := _kernel(logits, bias)) is not None:
        log_sums = bias.new_empty(len(logits))
        nowhere = torch.full((len(logits),), -1, device=bias.device)
        kernel(logits, bias, nowhere, log_sums=log_sums)
        return log_sums
    return (logits.to(bias.dtype) + bias).logsumexp(1)


def _slice_gradient(
    logits: Tensor, bias: Tensor, came: Tensor, log_sums: Tensor, grad_bias: Tensor, scale: float
) -> None:
    """Turns a slice's logits into dz = scale · (e^(z − log Σ e^z) − [y]), 0 where log Σ is ∞."""
    if (kernel := _kernel(logits, bias)) is not None:
        kernel(logits, bias, came, log_sums=log_sums, grad_bias=grad_bias, scale=scale)
        return
    dz = (logits.to(bias.dtype) + bias).sub_(log_sums.unsqueeze(1)).exp_()
    inside = ((came >= 0) & (came < len(bias)) & log_sums.isfinite()).nonzero().squeeze(1)
    dz[inside, came[inside]] -= 1
    grad_bias += dz.mul_(scale).sum(0)
    logits.copy_(dz)


def _kernel(logits: Tensor, bias: Tensor) -> Callable[..., None] | None:
    """What does this where the logits are; None for torch."""
    if bias.dtype != torch.float32:
        return None
    if triton.runs(logits):
        kernel: Callable[..., None] = triton.module("cross_entropy").cross_entropy
        return kernel
    if logits.device.type != "cpu" or library.absence():
        return None
    is_bf16 = logits.dtype == torch.bfloat16 and library.has_bf16()
    return library.cross_entropy if is_bf16 or logits.dtype == torch.float32 else None
