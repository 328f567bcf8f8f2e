"""s = Γr ∘ c′, c̃ = tanh(W_cc s + W_cx x + b_c), c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/gru.py.

Gates: candidate, update, relevance. State: c. The candidate's product needs s of all units, so a
step has two halves. Legend: `rnn`.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.activations import tanh


@triton.jit
def prepare(z1, z2, first):
    """Γu, Γr, and s, the operand of the candidate's product."""
    relevance = tl.sigmoid(z2)
    return tl.sigmoid(z1), relevance, relevance * first


@triton.jit
def forward(z0, z1, z2, z3, first, second, TANH: tl.constexpr):
    """Activations of the gates, and the state after a step; z1 and z2 are already Γu and Γr."""
    candidate = tanh(z0)
    return candidate, z1, z2, z3, first + z1 * (candidate - first), second


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             TANH: tl.constexpr):  # fmt: skip
    """dz_c and dz_u, and δ of the previous state without the products."""
    keep = 1.0 - g1
    dz0 = delta_first * g1 * (1.0 - g0 * g0)
    dz1 = delta_first * (g0 - first) * g1 * keep
    return dz0, dz1, g2, g3, delta_first * keep, delta_second


@triton.jit
def finish(ds, g2, first):
    """dz_r and the term ds ∘ Γr of δc′, from ds = dz_c W_cc."""
    return ds * first * g2 * (1.0 - g2), ds * g2
