"""A whole scan of the GRU in one launch: two halves a step, since its candidate waits for s.

As `persistent`; programs wait for each other after each half. All sums are fp32.

T steps, B rows, H units; gates: candidate, update, relevance.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.lengths import held, stopped
from lmtrain.kernels.triton.memory import (
    all_units,
    arrive,
    load,
    load_all,
    load_gate,
    store,
    store_gate,
    time_of,
    total,
    wait,
    weights_from,
    weights_to,
)


@triton.jit
def _gates(gates, t, line, own, mask, rows, H):
    """What stands at the gates at a time."""
    here = gates + t * rows * 3 * H
    return (
        load_gate(here, line, own, mask, H, 0, 3),
        load_gate(here, line, own, mask, H, 1, 3),
        load_gate(here, line, own, mask, H, 2, 3),
    )


@triton.jit
def forward(
    gates, recurrent, bias, history, hidden, operand, operand_gated, lengths, counters,
    begin, end, steps, rows, H,
    PREPARE: tl.constexpr, CELL: tl.constexpr, LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Half steps `begin` to `end` in the order of time; the state before them is in the history.

    Args:
        gates: (T, B, 3H): the inputs' share of the pre-activations; receives the activations.
        recurrent: (3H, H), in the precision of products.
        bias: (3H).
        history: the state, (T + 1, B, H).
        hidden: (T, B, H): receives the hidden states.
        operand: (R, K): the state that products take.
        operand_gated: (R, K): receives s, which the candidate's product takes.
        lengths: steps of each row, (B,).
        counters: a number for each group of rows, 0, with 31 others between.
        begin: the first half step.
        end: the half step after the last.
        steps: T.
        rows: B.
        H: units.
        PREPARE: the cell's `prepare`, of the first half.
        CELL: the cell's `forward`, of the second.
        LENGTHS: whether rows have lengths.
        REVERSE: whether time runs from T to 1.
        PRECISION: of fp32 products.
        ROWS: rows of a program.
        UNITS: units of a program.
        K: H, or the power of two above it.
        SPLIT: parts of the units that warps multiply on their own.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = all_units(K, SPLIT)
    mask = (row < rows)[:, None] & (unit < H)[None, :]
    line, own = row[:, None], unit[None, :]
    at = line * H + own
    size = rows * H
    counter = counters + tl.program_id(1) * 32
    # Columns: update and relevance of a unit side by side, so that halving tells them apart.
    column = tl.arange(0, 2 * UNITS)
    owner = tl.program_id(0) * UNITS + column // 2
    w_gates = weights_from(recurrent, k, owner, 1 + column % 2, H, 3)
    w_candidate = weights_from(recurrent, k, unit, unit * 0, H, 3)
    b0 = load(bias, unit, unit < H)[None, :]
    b1 = load(bias, H + unit, unit < H)[None, :]
    b2 = load(bias, 2 * H + unit, unit < H)[None, :]
    t = time_of(begin // 2, steps, not REVERSE)
    # At the second half of a step, Γu stands where z1 stood.
    z0, z1, z2 = _gates(gates, t, line, own, mask, rows, H)
    first = load(history + (t + 1 if REVERSE else t) * size, at, mask)
    for half in range(begin, end):
        t = time_of(half // 2, steps, not REVERSE)
        here = gates + t * size * 3
        if half % 2 == 0:
            product = tl.dot(load_all(operand, row, k, K), w_gates, input_precision=PRECISION)
            pairs = tl.reshape(total(product, ROWS, 2 * UNITS, SPLIT), (ROWS, UNITS, 2))
            s1, s2 = tl.split(pairs)
            z1, g2, gated = PREPARE(z1 + b1 + s1, z2 + b2 + s2, first)
            store(operand_gated, line * K + own, gated, mask)
            if half + 1 < end:
                arrive(counter)
            store_gate(here, z1, line, own, mask, H, 1, 3, 3)
            store_gate(here, g2, line, own, mask, H, 2, 3, 3)
        else:
            state = load_all(operand_gated, row, k, K)
            sums = tl.dot(state, w_candidate, input_precision=PRECISION)
            z0 += b0 + total(sums, ROWS, UNITS, SPLIT)
            # The cell's page has room for four gates and two parts of a state.
            g0, _g, _g, _g, new, _s = CELL(z0, z1, z1, z1, first, first, False)
            first, _s, output = held(lengths, line, t, rows, new, new, first, first, LENGTHS)
            store(operand, line * K + own, first, mask)
            if half + 1 < end:
                arrive(counter)
            store_gate(here, g0, line, own, mask, H, 0, 3, 3)
            store(history + (t if REVERSE else t + 1) * size, at, first, mask)
            store(hidden + t * size, at, output, mask)
            if half + 1 < end:
                t = time_of(half // 2 + 1, steps, not REVERSE)
                z0, z1, z2 = _gates(gates, t, line, own, mask, rows, H)
        if half + 1 < end:
            wait(counter, (half + 1 - begin) * tl.num_programs(0))


@triton.jit
def _known(gates, grad_hidden, history, t, line, own, mask, rows, H, REVERSE: tl.constexpr):
    """What a backward step takes besides dz: activations, dL/dh, and the state before it."""
    g0, g1, g2 = _gates(gates, t, line, own, mask, rows, H)
    at = line * H + own
    upstream = load(grad_hidden + t * rows * H, at, mask)
    first = load(history + (t + 1 if REVERSE else t) * rows * H, at, mask)
    return g0, g1, g2, upstream, first


@triton.jit
def _through(operands, w1, w2, row, k, K, PRECISION: tl.constexpr, AHEAD: tl.constexpr):
    """dz_u W_ua + dz_r W_ra, as sums of the warps."""
    d1 = load_all(operands + K, row, k, 3 * K)
    if AHEAD:
        d2 = load_all(operands + 2 * K, row, k, 3 * K)
    sums = tl.dot(d1, w1, input_precision=PRECISION)
    if not AHEAD:
        d2 = load_all(operands + 2 * K, row, k, 3 * K)
    return tl.dot(d2, w2, sums, input_precision=PRECISION)


@triton.jit
def backward(
    gates, recurrent, history, grad_hidden, dz, delta, operands, lengths, counters, begin, end,
    steps, rows, H,
    CELL: tl.constexpr, FINISH: tl.constexpr, LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Half steps `begin` to `end` against the order of time; 2T makes the first state's gradient.

    Args:
        gates: (T, B, 3H): the activations.
        recurrent: (3H, H), in the precision of products.
        history: the state, (T + 1, B, H).
        grad_hidden: (T, B, H): the gradients of the hidden states.
        dz: (T, B, 3H): receives the gradients at the pre-activations.
        delta: (B, H): the gradient of the last state; receives that of the first.
        operands: (2, R, 3K): dz as products take it, of the steps with even and odd number.
        lengths: steps of each row, (B,).
        counters: a number for each group of rows, 0, with 31 others between.
        begin: the first half step, counted from the end of time.
        end: the half step after the last, 2T + 1 at most.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `backward`, of the first half.
        FINISH: the cell's `finish`, of the second.
        LENGTHS: whether rows have lengths.
        REVERSE: whether time runs from T to 1.
        PRECISION: of fp32 products.
        ROWS: rows of a program.
        UNITS: units of a program.
        K: H, or the power of two above it.
        SPLIT: parts of the units that warps multiply on their own.
        AHEAD: whether two operands are read at once.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = all_units(K, SPLIT)
    mask = (row < rows)[:, None] & (unit < H)[None, :]
    line, own = row[:, None], unit[None, :]
    at = line * H + own
    size = rows * H
    counter = counters + tl.program_id(1) * 32
    w0 = weights_to(recurrent, k, unit, H, 0, 3)
    w1 = weights_to(recurrent, k, unit, H, 1, 3)
    w2 = weights_to(recurrent, k, unit, H, 2, 3)
    padded = tl.num_programs(1) * ROWS * 3 * K
    across = line * 3 * K + own
    past = load(delta, at, mask)
    t = time_of(begin // 2, steps, REVERSE)
    g0, g1, g2, upstream, first = _known(
        gates, grad_hidden, history, t, line, own, mask, rows, H, REVERSE
    )
    for half in range(begin, end):
        step = half // 2
        t = time_of(step, steps, REVERSE)
        target = dz + t * size * 3
        here = operands + (step % 2) * padded
        if half % 2 == 0:
            if step > 0:
                written = operands + padded - (step % 2) * padded
                sums = _through(written, w1, w2, row, k, K, PRECISION, AHEAD)
                past += total(sums, ROWS, UNITS, SPLIT)
            if step < steps:
                later = past
                dz0, dz1, _g, _g, past, _s = CELL(
                    g0, g1, g1, g1, first, first, first, past + upstream, past, False
                )
                # The relevance's gradient is a product with dz0, and so 0 where that is.
                dz0, dz1, _g, _g, past, _s = stopped(
                    lengths, line, t, rows, dz0, dz1, dz1, dz1, past, past, later, later, LENGTHS
                )
                store(here, across, dz0, mask)
                store(here + K, across, dz1, mask)
                if half + 1 < end:
                    arrive(counter)
                store_gate(target, dz0, line, own, mask, H, 0, 3, 3)
                store_gate(target, dz1, line, own, mask, H, 1, 3, 3)
        else:
            sums = tl.dot(load_all(here, row, k, 3 * K), w0, input_precision=PRECISION)
            dz2, through = FINISH(total(sums, ROWS, UNITS, SPLIT), g2, first)
            store(here + 2 * K, across, dz2, mask)
            if half + 1 < end:
                arrive(counter)
            store_gate(target, dz2, line, own, mask, H, 2, 3, 3)
            past += through
            if half + 1 < end:
                t = time_of(step + 1, steps, REVERSE)
                g0, g1, g2, upstream, first = _known(
                    gates, grad_hidden, history, t, line, own, mask, rows, H, REVERSE
                )
        if half + 1 < end:
            wait(counter, (half + 1 - begin) * tl.num_programs(0))
    store(delta, at, past, mask)
