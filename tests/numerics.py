"""The tolerances of all tests, relative to the largest expected value."""

import torch
from torch import Tensor

TOLERANCE = {
    # Two orders of summing the same few dozen float64 products.
    torch.float64: 1e-10,
    # Sums of up to a few thousand float32 products in another order.
    torch.float32: 1e-5,
}


def assert_same(actual: Tensor, expected: Tensor, label: str = "") -> None:
    """Asserts equal shape and dtype, and equal values within the tolerance of the dtype."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, label
    assert actual.dtype == expected.dtype, label
    scale = float(expected.abs().max().clamp(min=1e-3)) if expected.numel() else 1.0
    difference = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= TOLERANCE[expected.dtype] * scale, f"{label}: {difference} of {scale}"
