"""What becomes of rows that have ended: their states stand still, all else of them is 0."""

import triton
import triton.language as tl


@triton.jit
def is_running(lengths, row, t, rows):
    """Whether rows have not ended at a time."""
    return t < tl.load(lengths + row, mask=row < rows, other=0)


@triton.jit
def held(lengths, row, t, rows, first, second, old_first, old_second, LENGTHS: tl.constexpr):
    """The state after a step and the hidden state, of a state that the step gives and the old."""
    output = first
    if LENGTHS:
        is_on = is_running(lengths, row, t, rows)
        output = tl.where(is_on, first, 0.0)
        first = tl.where(is_on, first, old_first)
        second = tl.where(is_on, second, old_second)
    return first, second, output


@triton.jit
def stopped(lengths, row, t, rows, dz0, dz1, dz2, dz3, past, past_second, later, later_second,
            LENGTHS: tl.constexpr):  # fmt: skip
    """The gradients at a step: those at pre-activations, and of the state before it.

    Of a row that has ended, the state before it has the gradient of the state after it, `later`.
    """
    if LENGTHS:
        is_on = is_running(lengths, row, t, rows)
        dz0 = tl.where(is_on, dz0, 0.0)
        dz1 = tl.where(is_on, dz1, 0.0)
        dz2 = tl.where(is_on, dz2, 0.0)
        dz3 = tl.where(is_on, dz3, 0.0)
        past = tl.where(is_on, past, later)
        past_second = tl.where(is_on, past_second, later_second)
    return dz0, dz1, dz2, dz3, past, past_second
