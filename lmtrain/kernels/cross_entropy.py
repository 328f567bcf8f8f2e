"""Softmax cross-entropy of hidden states against the words that came, in nats.

ŷ⟨t⟩ = softmax(W_y a⟨t⟩ + b_y),  L⟨t⟩ = −log ŷ⟨t⟩[y⟨t⟩]

Loss and gradients come from one pass over pieces of rows: a piece's logits become its gradients
dz = ŷ − [y] in place and are then forgotten, so that the logits are never whole in memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.errors import ConfigError
from lmtrain.kernels.native import library

# Bytes of logits held at once.
_MOST_BYTES = 32 << 20


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
        operand = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=bias.dtype, device=bias.device)
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias)
        grad_hidden = []
        for rows, came in _pieces(hidden, weight, targets):
            logits = rows @ operand.T  # (N, V)
            total += _nats(logits, bias, came, grad_bias, scale).sum()
            grad_hidden.append(logits @ operand)
            piece = (logits.T @ rows).to(weight.dtype)
            grad_weight = piece if grad_weight is None else grad_weight.add_(piece)
        ctx.save_for_backward(torch.cat(grad_hidden).view_as(hidden), grad_weight, grad_bias)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        # The gradient of a loss that is the objective itself is 1.
        if float(grad) != 1:
            gradients = tuple(gradient * grad.to(gradient.dtype) for gradient in gradients)
        return (*gradients, None, None)


def _pieces(hidden: Tensor, weight: Tensor, targets: Tensor) -> "zip[tuple[Tensor, Tensor]]":
    """Rows of hidden states (N, H) and their targets (N), so many that their logits fit.

    Raises:
        ConfigError: a target that is no token.
    """
    if targets.device.type == "cpu" and int(targets.max()) >= len(weight):
        raise ConfigError(f"a target of {int(targets.max())}: there are {len(weight)} tokens")
    rows = max(1, _MOST_BYTES // (len(weight) * hidden.element_size()))
    flat = hidden.flatten(0, 1)
    pieces = -(-len(flat) // rows)
    return zip(flat.chunk(pieces), targets.flatten().chunk(pieces), strict=True)


def _nats(
    logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None, scale: float
) -> Tensor:
    """As `library.cross_entropy`, which does it where it can."""
    if _is_native(logits, bias):
        return library.cross_entropy(logits, bias, targets.contiguous(), grad_bias, scale)
    z = logits.to(bias.dtype) + bias
    log_sum = z.logsumexp(1)
    known = targets >= 0
    came = targets.clamp(min=0).unsqueeze(1)
    nats = torch.where(known, log_sum - z.gather(1, came).squeeze(1), 0)
    if grad_bias is not None:
        dz = z.sub_(log_sum.unsqueeze(1)).exp_()
        dz.scatter_add_(1, came, torch.full_like(dz[:, :1], -1)).mul_(scale)
        dz.masked_fill_(~known.unsqueeze(1), 0)
        grad_bias += dz.sum(0)
        logits.copy_(dz)
    return nats


def _is_native(logits: Tensor, bias: Tensor) -> bool:
    if logits.device.type != "cpu" or bias.dtype != torch.float32 or library.absence():
        return False
    return logits.dtype == torch.float32 or (logits.dtype == torch.bfloat16 and library.has_bf16())
