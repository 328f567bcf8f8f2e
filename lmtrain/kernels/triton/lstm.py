"""c = Γu ∘ c̃ + Γf ∘ c′, a = Γo ∘ h(c), h = tanh, or the identity as the other form.

See cells/lstm.py; with what the peepholes see in the pre-activations, cells/peephole_lstm.py.
Gates: candidate, update, forget, output. State: a, c.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.numbers import tanh


@triton.jit
def forward(z0, z1, z2, z3, first, second, OTHER: tl.constexpr):
    """The activations and the state after a step."""
    candidate = tanh(z0)
    update = tl.sigmoid(z1)
    forget = tl.sigmoid(z2)
    output = tl.sigmoid(z3)
    c = update * candidate + forget * second
    h = c if OTHER else tanh(c)
    return candidate, update, forget, output, output * h, c


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             OTHER: tl.constexpr):  # fmt: skip
    """Gradients at the pre-activations, and what of the deltas goes past the products."""
    h = new_second if OTHER else tanh(new_second)
    slope = 1.0 + h * 0.0 if OTHER else 1.0 - h * h
    delta = delta_second + delta_first * g3 * slope
    dz0 = delta * g1 * (1.0 - g0 * g0)
    dz1 = delta * g0 * g1 * (1.0 - g1)
    dz2 = delta * second * g2 * (1.0 - g2)
    dz3 = delta_first * h * g3 * (1.0 - g3)
    return dz0, dz1, dz2, dz3, delta_first * 0.0, delta * g2
