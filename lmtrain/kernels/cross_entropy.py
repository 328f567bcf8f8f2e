"""Linear layer and softmax cross-entropy, fused: the loss and its gradients in one pass.

    ŷ⟨t⟩ = softmax(W_y a⟨t⟩ + b_y),  L⟨t⟩ = −log ŷ⟨t⟩[y⟨t⟩],  dz = ŷ − [y]

The forward computes the gradients too, chunk by chunk: the logits of a chunk become dz in place, so
that the logits (N, V) are never all in memory. A chunk is a number of rows or, with a large
vocabulary, a slice of it.

N = T·B rows, H hidden_size, V vocab_size.

Kept for backward: the gradients, N·H + V·H + V scalars. Cost: 3·N·H·V multiply-adds for chunks of
rows, 4·N·H·V for slices, whose logits are computed twice (first for log Σ e^z, then for dz).
Not supported: second derivatives, label smoothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.errors import ConfigError
from lmtrain.kernels.custom_op import CustomOp
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.native import library
from lmtrain.kernels.products import matmul, operand
from lmtrain.kernels.triton import engine as triton

# Most bytes of logits in a chunk of rows.
_MAX_CHUNK_BYTES = 24 << 20
# Most bytes of logits in a slice of the vocabulary.
_MAX_SLICE_BYTES = 4 << 20
# With more chunks, accumulating the gradient of all weights costs more than computing the logits
# twice.
_MAX_CHUNKS = 8


def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> Tensor:
    """Scale · Σ L over all predictions, a scalar in nats; the mean with scale 1 / (T·B).

    Args:
        hidden: a, (T, B, H); if bf16, the operands of all products are bf16.
        weight: W_y, (V, H).
        bias: b_y, (V).
        targets: y, (T, B); a target below 0 is ignored.
        scale: factor of the sum and of all gradients.

    Raises:
        ConfigError: a target of V or above, if it is on the CPU.
    """
    loss: Tensor = _loss(hidden, weight, bias, targets, scale)[0]
    return loss


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_weight: Tensor,
    target_bias: Tensor,
    is_target: Tensor,
    scale: float,
) -> Tensor:
    """Scale · Σ L over all predictions, a scalar; each target competes with K sampled words.

        L = log(e^(z_y) + Σ_k e^(z_k)) − z_y,    z_y = w_y a + b_y,    z_k = w_k a + b_k

    All logits, (N, K + 1), are in memory at once, in the dtype of `hidden`.

    Args:
        hidden: a, (N, H); if bf16, so are the other operands of products.
        weight: w_k, (K, H), of the dtype of `hidden`.
        bias: b_k, (K).
        target_weight: w_y, (N, H), of the dtype of `hidden`.
        target_bias: b_y, (N).
        is_target: whether a word is the target and left out of the sum, (N, K).
        scale: factor of the sum and of all gradients.
    """
    operands = (hidden, weight, bias, target_weight, target_bias)
    loss: Tensor = _sampled_loss(*operands, is_target, scale)[0]
    return loss


@torch.no_grad()
def log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Log ŷ⟨t⟩[y⟨t⟩] of each prediction, (T, B), in nats; no gradient.

    Args:
        hidden: a, (T, B, H).
        weight: W_y, (V, H).
        bias: b_y, (V).
        targets: y, (T, B); 0 is returned for a target below 0.

    Raises:
        ConfigError: a target of V or above, if it is on the CPU.
    """
    result: Tensor = _log_likelihood(hidden, weight, bias, targets)
    return result


def _row_log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    weight = operand(weight, hidden.dtype)
    losses = [
        _losses(matmul(rows, weight.T), bias, row_targets, None, 1.0)
        for rows, row_targets in _chunks(hidden, weight, targets)
    ]
    return -torch.cat(losses).view(targets.shape)


def _fake_log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    del hidden, weight
    return bias.new_empty(targets.shape)


_log_likelihood = CustomOp("log_likelihood", _row_log_likelihood, _fake_log_likelihood)


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale · Σ L, and its gradients with respect to a, W_y and b_y."""
    chunks = _chunks(hidden, weight, targets)
    if len(chunks) <= _MAX_CHUNKS:
        total, grad_hidden, *gradients = _by_rows(chunks, weight, bias, scale)
    else:
        rows = hidden.flatten(0, 1)
        total, grad_hidden, *gradients = _by_slices(rows, weight, bias, targets.flatten(), scale)
    return total * scale, grad_hidden.view_as(hidden), gradients[0], gradients[1]


def _fake_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del targets, scale
    gradients = [tensor.new_empty(tensor.shape) for tensor in (hidden, weight, bias)]
    return bias.new_empty(()), gradients[0], gradients[1], gradients[2]


def _sampled_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_weight: Tensor,
    target_bias: Tensor,
    is_target: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to a, w_k, b_k, w_y and b_y."""
    num_words = len(weight)
    score = (hidden * target_weight).sum(1, dtype=bias.dtype) + target_bias
    words = matmul(hidden, weight.T).masked_fill_(is_target, -torch.inf)
    # The last column is that of the targets.
    logits = torch.cat([words, score.to(words.dtype).unsqueeze(1)], 1)  # (N, K + 1)
    extended, grad_bias = torch.cat([bias, bias.new_zeros(1)]), bias.new_zeros(num_words + 1)
    targets = torch.full((len(hidden),), num_words, device=hidden.device)
    total = _losses(logits, extended, targets, grad_bias, scale).sum()
    grad_words, grad_score = logits[:, :num_words], logits[:, num_words:]
    grad_hidden = torch.addcmul(matmul(grad_words, weight), grad_score, target_weight)
    grad_weight = matmul(grad_words.T, hidden)
    return (
        *(total * scale, grad_hidden, grad_weight, grad_bias[:num_words]),
        *(grad_score * hidden, grad_score[:, 0].to(bias.dtype, copy=True)),
    )


def _fake_sampled_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    operands = (hidden, weight, bias, *others[:2])
    return bias.new_empty(()), *(torch.empty_like(operand) for operand in operands)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_unused: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (len(ctx.saved_tensors) + 2)
    gradients: tuple[Tensor, ...] = ctx.saved_tensors
    # A factor of 1 is skipped. Reading it would synchronize with a GPU, and a traced tensor has no
    # value.
    if grad.is_cuda or type(grad) is not Tensor or float(grad) != 1:
        gradients = tuple(gradient * grad.to(gradient.dtype) for gradient in gradients)
    return (*gradients, None, None)


_loss = CustomOp("cross_entropy", _loss_and_gradients, _fake_loss)
_sampled_loss = CustomOp("sampled_cross_entropy", _sampled_loss_and_gradients, _fake_sampled_loss)
for _operator in (_loss, _sampled_loss):
    _operator.differentiate(_setup_context, _backward)


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Chunks of the rows: hidden states (·, H) and targets (·), within _MAX_CHUNK_BYTES of logits.

    Raises:
        ConfigError: a target of V or above, if it is on the CPU.
    """
    if targets.device.type == "cpu" and int(targets.max()) >= len(weight):
        raise ConfigError(f"target {int(targets.max())}: the vocabulary has {len(weight)} tokens")
    rows = max(1, _MAX_CHUNK_BYTES // (len(weight) * hidden.element_size()))
    flat = hidden.flatten(0, 1)
    count = -(-len(flat) // rows)
    return list(zip(flat.chunk(count), targets.flatten().chunk(count), strict=True))


def _by_rows(
    chunks: list[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Σ L, and the scaled gradients with respect to a, W_y and b_y."""
    words = operand(weight, chunks[0][0].dtype)
    total, grad_bias = bias.new_zeros(()), torch.zeros_like(bias)
    grad_weight = torch.empty(0)
    grad_hidden = []
    for rows, targets in chunks:
        logits = matmul(rows, words.T)  # (·, V)
        total += _losses(logits, bias, targets, grad_bias, scale).sum()
        grad_hidden.append(matmul(logits, words))
        product = matmul(logits.T, rows, dtype=weight.dtype)
        grad_weight = grad_weight.add_(product) if len(grad_hidden) > 1 else product
    return total, torch.cat(grad_hidden), grad_weight, grad_bias


def _by_slices(
    rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """As `_by_rows`, from all rows (N, H) and targets (N), slice by slice of the vocabulary."""
    width = max(1, _MAX_SLICE_BYTES // (len(rows) * rows.element_size()))
    log_sums = bias.new_full((len(rows),), -torch.inf)
    score = bias.new_zeros(len(rows))
    for first in range(0, len(weight), width):
        part = slice(first, first + width)
        logits = matmul(rows, weight[part].T)  # (N, width)
        index = (targets - first).clamp(0, logits.shape[1] - 1)
        is_inside = index == targets - first
        z = logits.gather(1, index.unsqueeze(1)).squeeze(1).to(bias.dtype) + bias[part][index]
        score = torch.where(is_inside, z, score)
        log_sums = torch.logaddexp(log_sums, _slice_log_sums(logits, bias[part]))
    has_target = targets >= 0
    total = torch.where(has_target, log_sums - score, 0).sum()
    log_sums = torch.where(has_target, log_sums, torch.inf)
    grad_hidden = torch.zeros_like(rows, dtype=bias.dtype)
    grad_weight, grad_bias = torch.empty_like(weight), torch.zeros_like(bias)
    for first in range(0, len(weight), width):
        part = slice(first, first + width)
        words = operand(weight[part], rows.dtype)
        logits = matmul(rows, words.T)
        _slice_gradient(logits, bias[part], targets - first, log_sums, grad_bias[part], scale)
        grad_weight[part] = matmul(logits.T, rows)
        grad_hidden += matmul(logits, words)
    return total, grad_hidden.to(rows.dtype), grad_weight, grad_bias


def _losses(
    logits: Tensor, bias: Tensor, targets: Tensor, grad_bias: Tensor | None, scale: float
) -> Tensor:
    """L of each row of logits (·, V).

    With `grad_bias`, adds the gradient of the bias to it and overwrites the logits with dz.
    """
    targets = targets.contiguous()
    if (kernel := _kernel(logits, bias)) is not None:
        losses = bias.new_empty(len(logits))
        kernel(logits, bias, targets, losses=losses, grad_bias=grad_bias, scale=scale)
        return losses
    z = logits.to(bias.dtype) + bias
    has_target = targets >= 0
    log_sums = torch.where(has_target, z.logsumexp(1), torch.inf)
    index = targets.clamp(min=0).unsqueeze(1)
    losses = torch.where(has_target, log_sums - z.gather(1, index).squeeze(1), 0)
    if grad_bias is not None:
        _slice_gradient(logits, bias, targets, log_sums, grad_bias, scale)
    return losses


def _slice_log_sums(logits: Tensor, bias: Tensor) -> Tensor:
    """Log Σ e^z of each row over a slice of the vocabulary, (N)."""
    if (kernel := _kernel(logits, bias)) is not None:
        log_sums = bias.new_empty(len(logits))
        no_targets = torch.full((len(logits),), -1, device=bias.device)
        kernel(logits, bias, no_targets, log_sums=log_sums)
        return log_sums
    return (logits.to(bias.dtype) + bias).logsumexp(1)


def _slice_gradient(
    logits: Tensor, bias: Tensor, targets: Tensor, log_sums: Tensor, grad_bias: Tensor, scale: float
) -> None:
    """Overwrites the logits of a slice with dz = scale · (e^(z − log Σ e^z) − [y]).

    Targets count from the first token of the slice. dz is 0 where log Σ e^z is infinite.
    """
    if (kernel := _kernel(logits, bias)) is not None:
        kernel(logits, bias, targets, log_sums=log_sums, grad_bias=grad_bias, scale=scale)
        return
    dz = (logits.to(bias.dtype) + bias).sub_(log_sums.unsqueeze(1)).exp_()
    is_inside = (targets >= 0) & (targets < len(bias)) & log_sums.isfinite()
    rows = is_inside.nonzero().squeeze(1)
    dz[rows, targets[rows]] -= 1
    grad_bias += dz.mul_(scale).sum(0)
    logits.copy_(dz)


def _kernel(logits: Tensor, bias: Tensor) -> Callable[..., None] | None:
    """The kernel for logits and bias like these; None for torch."""
    kernels = kernels_for(logits, bias)
    if kernels == "triton":
        kernel: Callable[..., None] = triton.module("cross_entropy").cross_entropy
        return kernel
    return library.cross_entropy if kernels == "native" else None
