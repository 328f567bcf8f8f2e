"""a = g(z), g = tanh, or relu as the other form; see cells/rnn.py. Gate: candidate. State: a."""

import triton
import triton.language as tl

from lmtrain.kernels.triton.numbers import tanh


@triton.jit
def forward(z0, z1, z2, z3, first, second, OTHER: tl.constexpr):
    """The activations and the state after a step."""
    a = tl.maximum(z0, 0.0) if OTHER else tanh(z0)
    return a, z1, z2, z3, a, second


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             OTHER: tl.constexpr):  # fmt: skip
    """Gradients at the pre-activations, and what of the deltas goes past the products."""
    slope = (g0 > 0).to(tl.float32) if OTHER else 1.0 - g0 * g0
    return delta_first * slope, g1, g2, g3, delta_first * 0.0, delta_second
