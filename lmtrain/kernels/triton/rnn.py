"""a = g(W_aa a′ + W_ax x + b_a), g = tanh or ReLU; see cells/rnn.py. Gates: candidate. State: a.

Legend of all cells: z0 to z3 are the pre-activations of up to four gates, g0 to g3 their
activations, first and second the parts of the state before a step, new_second the second part after
it, delta_first and delta_second the gradients δ of the parts after it. Gates and parts that a cell
does not have are returned unchanged.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.activations import tanh


@triton.jit
def forward(z0, z1, z2, z3, first, second, TANH: tl.constexpr):
    """Activations of the gates, and the state after a step."""
    a = tanh(z0) if TANH else tl.maximum(z0, 0.0)
    return a, z1, z2, z3, a, second


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             TANH: tl.constexpr):  # fmt: skip
    """Gradients at the pre-activations, and δ of the previous state without the products."""
    slope = 1.0 - g0 * g0 if TANH else (g0 > 0).to(tl.float32)
    return delta_first * slope, g1, g2, g3, delta_first * 0.0, delta_second
