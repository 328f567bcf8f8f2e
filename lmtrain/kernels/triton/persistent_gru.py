"""Persistent kernels of the GRU: a whole scan in one launch, with two halves per step.

As `persistent`, with a grid barrier after each half: the candidate's product needs s of all units.

T steps, B rows, H units; gates: candidate, update, relevance.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.lengths import keep_ended, mask_ended
from lmtrain.kernels.triton.memory import (
    arrive,
    load,
    load_gate,
    load_operand,
    load_weights,
    load_weights_transposed,
    reduce_splits,
    split_units,
    store,
    store_gate,
    time_index,
    wait,
)


@triton.jit
def _load_gates(gates, t, m, n, mask, rows, H):
    """Elements of the three gates at time t."""
    at_t = gates + t * rows * 3 * H
    return (
        load_gate(at_t, m, n, mask, H, 0, 3),
        load_gate(at_t, m, n, mask, H, 1, 3),
        load_gate(at_t, m, n, mask, H, 2, 3),
    )


@triton.jit(do_not_specialize=["begin", "end", "steps"])
def forward(
    gates, recurrent, bias, history, hidden, operand, operand_gated, lengths, counters,
    begin, end, steps, rows, H,
    PREPARE: tl.constexpr, CELL: tl.constexpr, LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Runs the half steps `begin` to `end` − 1, from the state in the history.

    Args:
        gates: (T, B, 3H): input products; overwritten with the activations.
        recurrent: (3H, H), in the dtype of operands.
        bias: (3H).
        history: (T + 1, B, H): the state.
        hidden: output, (T, B, H): hidden states.
        operand: (R, K): the state as operand.
        operand_gated: (R, K): s as operand of the candidate's product.
        lengths: steps of each row, (B,).
        counters: barrier counters, 0, one for each group of rows at every 32nd element.
        begin: the first half step.
        end: the half step after the last.
        steps: T.
        rows: B.
        H: units.
        PREPARE: the cell's `prepare`, for the first half of a step.
        CELL: the cell's `forward`, for the second half.
        LENGTHS: whether rows have lengths.
        REVERSE: whether time runs from T to 1.
        PRECISION: input precision of fp32 products.
        ROWS: rows per program.
        UNITS: units per program.
        K: units with padding, a power of two.
        SPLIT: parts of K that the warps multiply separately.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = split_units(K, SPLIT)
    mask = (row < rows)[:, None] & (unit < H)[None, :]
    m, n = row[:, None], unit[None, :]  # (ROWS, 1), (1, UNITS)
    offset = m * H + n
    size = rows * H
    counter = counters + tl.program_id(1) * 32
    # Columns: update and relevance of each unit, interleaved, so that tl.split separates them.
    column = tl.arange(0, 2 * UNITS)
    column_unit = tl.program_id(0) * UNITS + column // 2
    w_gates = load_weights(recurrent, k, column_unit, 1 + column % 2, H, 3)
    w_candidate = load_weights(recurrent, k, unit, unit * 0, H, 3)
    b0 = load(bias, unit, unit < H)[None, :]
    b1 = load(bias, H + unit, unit < H)[None, :]
    b2 = load(bias, 2 * H + unit, unit < H)[None, :]
    t = time_index(begin // 2, steps, not REVERSE)
    # In the second half of a step, z1 is Γu.
    z0, z1, z2 = _load_gates(gates, t, m, n, mask, rows, H)
    first = load(history + (t + 1 if REVERSE else t) * size, offset, mask)
    for half in range(begin, end):
        t = time_index(half // 2, steps, not REVERSE)
        at_t = gates + t * size * 3
        if half % 2 == 0:
            product = tl.dot(load_operand(operand, row, k, K), w_gates, input_precision=PRECISION)
            pairs = tl.reshape(reduce_splits(product, ROWS, 2 * UNITS, SPLIT), (ROWS, UNITS, 2))
            s1, s2 = tl.split(pairs)
            z1, g2, gated = PREPARE(z1 + b1 + s1, z2 + b2 + s2, first)
            store(operand_gated, m * K + n, gated, mask)
            if half + 1 < end:
                arrive(counter)
            store_gate(at_t, z1, m, n, mask, H, 1, 3, 3)
            store_gate(at_t, g2, m, n, mask, H, 2, 3, 3)
        else:
            state = load_operand(operand_gated, row, k, K)
            sums = tl.dot(state, w_candidate, input_precision=PRECISION)
            z0 += b0 + reduce_splits(sums, ROWS, UNITS, SPLIT)
            # The function of the cell takes and returns four gates and two parts of the state.
            g0, _g, _g, _g, new, _s = CELL(z0, z1, z1, z1, first, first, True)
            first, _s, output = keep_ended(lengths, m, t, rows, new, new, first, first, LENGTHS)
            store(operand, m * K + n, first, mask)
            if half + 1 < end:
                arrive(counter)
            store_gate(at_t, g0, m, n, mask, H, 0, 3, 3)
            store(history + (t if REVERSE else t + 1) * size, offset, first, mask)
            store(hidden + t * size, offset, output, mask)
            if half + 1 < end:
                t = time_index(half // 2 + 1, steps, not REVERSE)
                z0, z1, z2 = _load_gates(gates, t, m, n, mask, rows, H)
        if half + 1 < end:
            wait(counter, (half + 1 - begin) * tl.num_programs(0))


@triton.jit
def _load_step(gates, grad_hidden, history, t, m, n, mask, rows, H, REVERSE: tl.constexpr):
    """Activations at time t, the gradient of the hidden state, and the state before t."""
    g0, g1, g2 = _load_gates(gates, t, m, n, mask, rows, H)
    offset = m * H + n
    d_hidden = load(grad_hidden + t * rows * H, offset, mask)
    first = load(history + (t + 1 if REVERSE else t) * rows * H, offset, mask)
    return g0, g1, g2, d_hidden, first


@triton.jit
def _gate_products(operands, w1, w2, row, k, K, PRECISION: tl.constexpr, PREFETCH: tl.constexpr):
    """dz_u W_uc + dz_r W_rc, as partial sums (SPLIT, ROWS, UNITS)."""
    d1 = load_operand(operands + K, row, k, 3 * K)
    if PREFETCH:
        d2 = load_operand(operands + 2 * K, row, k, 3 * K)
    sums = tl.dot(d1, w1, input_precision=PRECISION)
    if not PREFETCH:
        d2 = load_operand(operands + 2 * K, row, k, 3 * K)
    return tl.dot(d2, w2, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=["begin", "end", "steps"])
def backward(
    gates, recurrent, history, grad_hidden, dz, delta, operands, lengths, counters, begin, end,
    steps, rows, H,
    CELL: tl.constexpr, FINISH: tl.constexpr, LENGTHS: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """Runs the backward half steps `begin` to `end` − 1, counted from the last of the forward.

    Half step 2T adds the last products to the gradient of the initial state.

    Args:
        gates: (T, B, 3H): activations.
        recurrent: (3H, H), in the dtype of operands.
        history: (T + 1, B, H): the state.
        grad_hidden: (T, B, H): gradients of the hidden states.
        dz: output, (T, B, 3H): gradients at the pre-activations.
        delta: (B, H): gradient of the final state; overwritten with that of the initial state.
        operands: (2, R, 3K): dz as operand, by parity of the step.
        lengths: steps of each row, (B,).
        counters: barrier counters, 0, one for each group of rows at every 32nd element.
        begin: the first half step.
        end: the half step after the last, at most 2T + 1.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `backward`, for the first half of a step.
        FINISH: the cell's `finish`, for the second half.
        LENGTHS: whether rows have lengths.
        REVERSE: whether time runs from T to 1.
        PRECISION: input precision of fp32 products.
        ROWS: rows per program.
        UNITS: units per program.
        K: units with padding, a power of two.
        SPLIT: parts of K that the warps multiply separately.
        PREFETCH: whether two operands are loaded before the first product.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = split_units(K, SPLIT)
    mask = (row < rows)[:, None] & (unit < H)[None, :]
    m, n = row[:, None], unit[None, :]  # (ROWS, 1), (1, UNITS)
    offset = m * H + n
    size = rows * H
    counter = counters + tl.program_id(1) * 32
    w0 = load_weights_transposed(recurrent, k, unit, H, 0, 3)
    w1 = load_weights_transposed(recurrent, k, unit, H, 1, 3)
    w2 = load_weights_transposed(recurrent, k, unit, H, 2, 3)
    padded = tl.num_programs(1) * ROWS * 3 * K
    operand_offset = m * 3 * K + n
    d_before = load(delta, offset, mask)
    t = time_index(begin // 2, steps, REVERSE)
    g0, g1, g2, d_hidden, first = _load_step(
        gates, grad_hidden, history, t, m, n, mask, rows, H, REVERSE
    )
    for half in range(begin, end):
        step = half // 2
        t = time_index(step, steps, REVERSE)
        dz_t = dz + t * size * 3
        current = operands + (step % 2) * padded
        if half % 2 == 0:
            if step > 0:
                previous = operands + padded - (step % 2) * padded
                sums = _gate_products(previous, w1, w2, row, k, K, PRECISION, PREFETCH)
                d_before += reduce_splits(sums, ROWS, UNITS, SPLIT)
            if step < steps:
                d_after = d_before
                dz0, dz1, _g, _g, d_before, _s = CELL(
                    g0, g1, g1, g1, first, first, first, d_before + d_hidden, d_before, True
                )
                # dz_r needs no mask: it is a product with dz_c, which is 0 in ended rows.
                dz0, dz1, _g, _g, d_before, _s = mask_ended(
                    lengths, m, t, rows, dz0, dz1, dz1, dz1, d_before, d_before, d_after, d_after,
                    LENGTHS,
                )  # fmt: skip
                store(current, operand_offset, dz0, mask)
                store(current + K, operand_offset, dz1, mask)
                if half + 1 < end:
                    arrive(counter)
                store_gate(dz_t, dz0, m, n, mask, H, 0, 3, 3)
                store_gate(dz_t, dz1, m, n, mask, H, 1, 3, 3)
        else:
            sums = tl.dot(load_operand(current, row, k, 3 * K), w0, input_precision=PRECISION)
            dz2, ds_relevance = FINISH(reduce_splits(sums, ROWS, UNITS, SPLIT), g2, first)
            store(current + 2 * K, operand_offset, dz2, mask)
            if half + 1 < end:
                arrive(counter)
            store_gate(dz_t, dz2, m, n, mask, H, 2, 3, 3)
            d_before += ds_relevance
            if half + 1 < end:
                t = time_index(step + 1, steps, REVERSE)
                g0, g1, g2, d_hidden, first = _load_step(
                    gates, grad_hidden, history, t, m, n, mask, rows, H, REVERSE
                )
        if half + 1 < end:
            wait(counter, (half + 1 - begin) * tl.num_programs(0))
    store(delta, offset, d_before, mask)
