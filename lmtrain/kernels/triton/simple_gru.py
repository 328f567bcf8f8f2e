"""c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/simple_gru.py. Gates: candidate, update. State: c.

Legend: `rnn`.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.activations import tanh


@triton.jit
def forward(z0, z1, z2, z3, first, second, TANH: tl.constexpr):
    """Activations of the gates, and the state after a step."""
    candidate = tanh(z0)
    update = tl.sigmoid(z1)
    return candidate, update, z2, z3, first + update * (candidate - first), second


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             TANH: tl.constexpr):  # fmt: skip
    """Gradients at the pre-activations, and δ of the previous state without the products."""
    keep = 1.0 - g1
    dz0 = delta_first * g1 * (1.0 - g0 * g0)
    dz1 = delta_first * (g0 - first) * g1 * keep
    return dz0, dz1, g2, g3, delta_first * keep, delta_second
