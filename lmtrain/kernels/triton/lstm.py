"""c = Γu ∘ c̃ + Γf ∘ c′, a = Γo ∘ h(c), h = tanh or the identity; see cells/lstm.py.

With peephole terms in the pre-activations: cells/peephole_lstm.py. Gates: candidate, update,
forget, output. State: a, c. Legend: `rnn`.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.activations import tanh


@triton.jit
def forward(z0, z1, z2, z3, first, second, TANH: tl.constexpr):
    """Activations of the gates, and the state after a step."""
    candidate = tanh(z0)
    update = tl.sigmoid(z1)
    forget = tl.sigmoid(z2)
    output = tl.sigmoid(z3)
    c = update * candidate + forget * second
    h = tanh(c) if TANH else c
    return candidate, update, forget, output, output * h, c


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             TANH: tl.constexpr):  # fmt: skip
    """Gradients at the pre-activations, and δ of the previous state without the products."""
    h = tanh(new_second) if TANH else new_second
    slope = 1.0 - h * h if TANH else 1.0 + h * 0.0
    delta = delta_second + delta_first * g3 * slope
    dz0 = delta * g1 * (1.0 - g0 * g0)
    dz1 = delta * g0 * g1 * (1.0 - g1)
    dz2 = delta * second * g2 * (1.0 - g2)
    dz3 = delta_first * h * g3 * (1.0 - g3)
    return dz0, dz1, dz2, dz3, delta_first * 0.0, delta * g2
