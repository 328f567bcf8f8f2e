"""The only tolerances, relative to the scale of what is compared."""

import torch
from torch import Tensor

TOLERANCE = {
    # Two ways of summing the same few dozen float64 products.
    torch.float64: 1e-10,
    # Sums of up to a few thousand float32 products in another order.
    torch.float32: 1e-5,
}


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """`actual` equals `expected` to the tolerance of its type, relative to the largest value."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    scale = float(expected.abs().max().clamp(min=1e-3)) if expected.numel() else 1.0
    difference = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= TOLERANCE[expected.dtype] * scale, f"{what}: {difference} of {scale}"
