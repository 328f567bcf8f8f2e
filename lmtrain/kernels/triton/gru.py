"""s = Γr ∘ c′, c̃ = tanh(W_cc s + ...), c = Γu ∘ c̃ + (1 − Γu) ∘ c′; see cells/gru.py.

Gates: candidate, update, relevance. State: c. The candidate's product waits for s of all units.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.numbers import tanh


@triton.jit
def prepare(z1, z2, first):
    """Γu and Γr, and s, which the candidate's product takes."""
    relevance = tl.sigmoid(z2)
    return tl.sigmoid(z1), relevance, relevance * first


@triton.jit
def forward(z0, z1, z2, z3, first, second, OTHER: tl.constexpr):
    """The activations and the state after a step; z1 and z2 are Γu and Γr already."""
    candidate = tanh(z0)
    return candidate, z1, z2, z3, first + z1 * (candidate - first), second


@triton.jit
def backward(g0, g1, g2, g3, first, second, new_second, delta_first, delta_second,
             OTHER: tl.constexpr):  # fmt: skip
    """Gradients at the pre-activations but the relevance's, and what goes past the products."""
    keep = 1.0 - g1
    dz0 = delta_first * g1 * (1.0 - g0 * g0)
    dz1 = delta_first * (g0 - first) * g1 * keep
    return dz0, dz1, g2, g3, delta_first * keep, delta_second


@triton.jit
def finish(ds, g2, first):
    """From ds = dz_c W_cc: the relevance's dz, and what goes on to c′."""
    return ds * first * g2 * (1.0 - g2), ds * g2
