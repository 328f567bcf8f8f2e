"""Softmax cross-entropy of hidden states against the words that came, in nats.

ŷ⟨t⟩ = softmax(W_y a⟨t⟩ + b_y),  L⟨t⟩ = −log ŷ⟨t⟩[y⟨t⟩]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of logits held at once where no gradient is wanted: 2^24 numbers are 64 MB in fp32.
_MOST_LOGITS = 1 << 24


def mean_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The mean loss over all predictions, in nats.

    Args:
        hidden: (T, B, H).
        weight: output weights W_y, (V, H).
        bias: b_y, (V).
        targets: the words that came, (T, B).
    """
    logits = F.linear(hidden.flatten(0, 1), weight, bias)  # (T·B, V)
    return F.cross_entropy(logits, targets.flatten())


@torch.no_grad()
def log_likelihood(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Log ŷ⟨t⟩[y⟨t⟩] of each prediction, (T, B), in nats, without keeping all logits.

    Args:
        hidden: (T, B, H).
        weight: output weights W_y, (V, H).
        bias: b_y, (V).
        targets: the words that came, (T, B).
    """
    rows = max(1, _MOST_LOGITS // len(weight))
    pieces = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    nats = [
        F.cross_entropy(F.linear(piece, weight, bias), came, reduction="none")
        for piece, came in pieces
    ]
    return -torch.cat(nats).view(targets.shape)
