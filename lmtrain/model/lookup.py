"""Rows of a weight by their ids, with a gradient that may be sparse."""

import torch.nn.functional as F
from torch import Tensor, nn


class Lookup(nn.Module):
    """A module that uses some rows of its `weight`, (V, E), in a training step.

    Attributes:
        is_sparse: whether the gradient is sparse, with one row for each id, if there are fewer ids
            than rows; in training on the CPU only.
    """

    weight: nn.Parameter
    is_sparse = False

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows of these ids, (..., E)."""
        is_smaller = ids.numel() < len(self.weight)
        is_sparse = self.is_sparse and self.training and is_smaller and not ids.is_cuda
        return F.embedding(ids, self.weight, sparse=is_sparse)


def allow_sparse_gradients(model: nn.Module) -> None:
    """Makes the gradients of all lookups of a model sparse; its optimizer must support them."""
    for module in model.modules():
        if isinstance(module, Lookup):
            module.is_sparse = True
