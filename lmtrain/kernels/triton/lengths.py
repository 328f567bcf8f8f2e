"""Masks for rows that have ended: their state is kept, their outputs and gradients are 0."""

import triton
import triton.language as tl


@triton.jit
def is_running(lengths, row, t, rows):
    """Whether rows have not ended at time t."""
    return t < tl.load(lengths + row, mask=row < rows, other=0)


@triton.jit
def keep_ended(lengths, row, t, rows, first, second, old_first, old_second, LENGTHS: tl.constexpr):
    """The new state, with the old one in ended rows, and the hidden state, 0 in ended rows."""
    output = first
    if LENGTHS:
        running = is_running(lengths, row, t, rows)
        output = tl.where(running, first, 0.0)
        first = tl.where(running, first, old_first)
        second = tl.where(running, second, old_second)
    return first, second, output


@triton.jit
def mask_ended(lengths, row, t, rows, dz0, dz1, dz2, dz3, d_before, d_before_second, d_after,
               d_after_second, LENGTHS: tl.constexpr):  # fmt: skip
    """The gradients of a step: dz, 0 in ended rows, and δ of the state before the step.

    In ended rows δ of the state before the step is that of the state after it, `d_after`.
    """
    if LENGTHS:
        running = is_running(lengths, row, t, rows)
        dz0 = tl.where(running, dz0, 0.0)
        dz1 = tl.where(running, dz1, 0.0)
        dz2 = tl.where(running, dz2, 0.0)
        dz3 = tl.where(running, dz3, 0.0)
        d_before = tl.where(running, d_before, d_after)
        d_before_second = tl.where(running, d_before_second, d_after_second)
    return dz0, dz1, dz2, dz3, d_before, d_before_second
