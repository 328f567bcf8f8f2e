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
from lmtrain.kernels.engines import kernels_for
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
    needs_operator = torch.is_grad_enabled() or torch.compiler.is_compiling()
    run = _loss if needs_operator else _loss_and_gradients
    return run(hidden, weight, bias, targets, scale)[0]


@torch.no_grad()
def log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Log ŷ⟨t⟩[y⟨t⟩] of each prediction, (T, B), in nats.

    Args:
        hidden: (T, B, H).
        weight: output weights W_y, (V, H).
        bias: b_y, (V).
        targets: the words that came, (T, B).
    """
    run = _log_likelihood_operator if torch.compiler.is_compiling() else _log_likelihood
    return run(hidden, weight, bias, targets)


def _log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    weight = weight.to(hidden.dtype)
    nats = [
        _nats(rows @ weight.T, bias, came, None, 1.0)
        for rows, came in _pieces(hidden, weight, targets)
    ]
    return -torch.cat(nats).view(targets.shape)


_log_likelihood_operator = torch.library.custom_op(
    "lmtrain::log_likelihood", _log_likelihood, mutates_args=()
)


@_log_likelihood_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return bias.new_empty(targets.shape)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale · Σ L, and its gradients: of the hidden states, of W_y and of b_y."""
    pieces = _pieces(hidden, weight, targets)
    if len(pieces) <= _MOST_PIECES:
        total, grad_hidden, *gradients = _by_rows(pieces, weight, bias, scale)
    else:
        rows = hidden.flatten(0, 1)
        total, grad_hidden, *gradients = _by_slices(rows, weight, bias, targets.flatten(), scale)
    return total * scale, grad_hidden.view_as(hidden), gradients[0], gradients[1]


_loss = torch.library.custom_op("lmtrain::cross_entropy", _loss_and_gradients, mutates_args=())


@_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)
    return bias.new_empty(()), *given, bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    gradients: tuple[Tensor, ...] = ctx.saved_tensors
    # The gradient of a loss that is the objective itself is 1. To ask would wait for a GPU, and
    # a tensor that is traced has no number.
    if grad.is_cuda or type(grad) is not Tensor or float(grad) != 1:
        gradients = tuple(gradient * grad.to(gradient.dtype) for gradient in gradients)
    return (*gradients, None, None)


torch.library.register_autograd("lmtrain::cross_entropy", _backward, setup_context=_setup_context)


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
    kernels = kernels_for(logits, bias)
    if kernels == "triton":
        kernel: Callable[..., None] = triton.module("cross_entropy").cross_entropy
        return kernel
    return library.cross_entropy if kernels == "native" else None
