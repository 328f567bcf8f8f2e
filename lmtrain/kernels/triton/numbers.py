"""Functions of numbers that every cell takes."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """The hyperbolic tangent, exact to some 10⁻⁷."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
