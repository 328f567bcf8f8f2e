"""Activation functions that the cells share."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent, with an absolute error of about 10⁻⁷."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
