"""Persistent kernels: a whole scan, forward or backward, in one launch.

A program computes a tile of units, with all their gates, and rows. It loads its recurrent weights
into shared memory once and keeps its part of the state in registers. After each step it stores its
part of the next operand and arrives at a grid barrier for the programs of the same rows. Before it
waits there, it stores the results of the step and loads the other inputs of the next.

For cells whose recurrent products only take the state; the GRU is in `persistent_gru`.

T steps, B rows, H units, G gates; matrices are row-major, accumulation is fp32. Operands are padded
to R rows of K units, so that loads need no mask. The caller (`scan`) owns all buffers.

Shared memory: `scan._shared_memory_bytes`. Cost: 4·T·R·K·K multiply-adds forward, whatever the
number of gates, and G·T·R·K·K backward; full peepholes add as many again forward, and 3·T·R·K·K
backward.

Source: persistent RNNs (Diamos et al. 2016); FlashRNN's fused kernels (Pöppel et al. 2024).
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
def _load_peepholes(peephole, unit, H, PEEPHOLE: tl.constexpr):
    """p_u, p_f and p_o, (1, UNITS) each; 0 without diagonal peepholes."""
    mask = (unit < H) & (PEEPHOLE == "diagonal")
    return (
        load(peephole, unit, mask)[None, :],
        load(peephole, H + unit, mask)[None, :],
        load(peephole, 2 * H + unit, mask)[None, :],
    )


@triton.jit
def _load_biases(bias, unit, H, GATES: tl.constexpr):
    """Biases of four gates, (1, UNITS) each; 0 for gates that the cell lacks."""
    mask = unit < H
    return (
        load(bias, unit, mask)[None, :],
        load(bias, H + unit, mask & (GATES > 1))[None, :],
        load(bias, 2 * H + unit, mask & (GATES > 2))[None, :],
        load(bias, 3 * H + unit, mask & (GATES > 3))[None, :],
    )


@triton.jit
def _load_gates(gates, t, m, n, mask, rows, H, GATES: tl.constexpr):
    """Elements of four gates at time t; 0 for gates that the cell lacks."""
    at_t = gates + t * rows * GATES * H
    return (
        load_gate(at_t, m, n, mask, H, 0, GATES),
        load_gate(at_t, m, n, mask, H, 1, GATES),
        load_gate(at_t, m, n, mask, H, 2, GATES),
        load_gate(at_t, m, n, mask, H, 3, GATES),
    )


@triton.jit
def _store_gates(gates, t, g0, g1, g2, g3, m, n, mask, rows, H, GATES: tl.constexpr):
    """Stores elements of the gates of the cell at time t."""
    at_t = gates + t * rows * GATES * H
    store_gate(at_t, g0, m, n, mask, H, 0, GATES, GATES)
    store_gate(at_t, g1, m, n, mask, H, 1, GATES, GATES)
    store_gate(at_t, g2, m, n, mask, H, 2, GATES, GATES)
    store_gate(at_t, g3, m, n, mask, H, 3, GATES, GATES)


@triton.jit
def _split_gates(sums, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Splits columns of interleaved gates (ROWS, 4·UNITS) into four gates (ROWS, UNITS)."""
    even, odd = tl.split(tl.reshape(sums, (ROWS, UNITS, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0, s1, s2, s3


@triton.jit(do_not_specialize=["begin", "end", "steps"])
def forward(
    gates, recurrent, bias, peephole, history_first, history_second, hidden, operands,
    operands_second, lengths, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr,
    PEEPHOLE: tl.constexpr, TANH: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """Runs the steps `begin` to `end` − 1, from the state in the history.

    Args:
        gates: (T, B, G·H): input products; overwritten with the activations.
        recurrent: (G·H, H), in the dtype of operands.
        bias: (G·H).
        peephole: (3H): diagonal peepholes; (3H, H), in the dtype of operands: full peepholes.
        history_first: (T + 1, B, H): the first part of the state.
        history_second: (T + 1, B, H): the second part.
        hidden: output, (T, B, H): hidden states.
        operands: (2, R, K): the first part of the state as operand, by parity of the step.
        operands_second: (2, R, K): the second part, with full peepholes.
        lengths: steps of each row, (B,).
        counters: barrier counters, 0, one for each group of rows at every 32nd element.
        begin: the first step.
        end: the step after the last.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `forward`.
        LENGTHS: whether rows have lengths.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, diagonal or full.
        TANH: whether the cell's activation is tanh; see `kernels.variant`.
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
    padded = tl.num_programs(1) * ROWS * K
    counter = counters + tl.program_id(1) * 32
    # Columns: the four gates of each unit, interleaved.
    column = tl.arange(0, 4 * UNITS)
    column_unit = tl.program_id(0) * UNITS + column // 4
    weights = load_weights(recurrent, k, column_unit, column % 4, H, GATES)
    if PEEPHOLE == "full":
        # The candidate has no peephole.
        weights_second = load_weights(peephole, k, column_unit, column % 4 - 1, H, 3)
    p1, p2, p3 = _load_peepholes(peephole, unit, H, PEEPHOLE)
    b0, b1, b2, b3 = _load_biases(bias, unit, H, GATES)
    t = time_index(begin, steps, not REVERSE)
    z0, z1, z2, z3 = _load_gates(gates, t, m, n, mask, rows, H, GATES)
    before = (t + 1 if REVERSE else t) * size
    first = load(history_first + before, offset, mask)
    second = load(history_second + before, offset, mask)
    for step in range(begin, end):
        t = time_index(step, steps, not REVERSE)
        slot = (step % 2) * padded
        state = load_operand(operands + slot, row, k, K)
        if (PEEPHOLE == "full") & PREFETCH:
            state_second = load_operand(operands_second + slot, row, k, K)
        product = tl.dot(state, weights, input_precision=PRECISION)
        if PEEPHOLE == "full":
            if not PREFETCH:
                state_second = load_operand(operands_second + slot, row, k, K)
            product = tl.dot(state_second, weights_second, product, input_precision=PRECISION)
        s0, s1, s2, s3 = _split_gates(reduce_splits(product, ROWS, 4 * UNITS, SPLIT), ROWS, UNITS)
        g0, g1, g2, g3, new_first, new_second = CELL(
            z0 + b0 + s0,
            z1 + b1 + s1 + p1 * second,
            z2 + b2 + s2 + p2 * second,
            z3 + b3 + s3 + p3 * second,
            first,
            second,
            TANH,
        )
        first, second, output = keep_ended(
            lengths, m, t, rows, new_first, new_second, first, second, LENGTHS
        )
        store(operands + padded - slot, m * K + n, first, mask)
        if PEEPHOLE == "full":
            store(operands_second + padded - slot, m * K + n, second, mask)
        if step + 1 < end:
            arrive(counter)
        _store_gates(gates, t, g0, g1, g2, g3, m, n, mask, rows, H, GATES)
        after = (t if REVERSE else t + 1) * size
        store(history_first + after, offset, first, mask)
        if PARTS > 1:
            store(history_second + after, offset, second, mask)
        store(hidden + t * size, offset, output, mask)
        if step + 1 < end:
            t = time_index(step + 1, steps, not REVERSE)
            z0, z1, z2, z3 = _load_gates(gates, t, m, n, mask, rows, H, GATES)
            wait(counter, (step + 1 - begin) * tl.num_programs(0))


@triton.jit
def _load_weight_pair(recurrent, peephole, k, unit, H, GATE: tl.constexpr, GATES: tl.constexpr,
                      PEEPHOLE: tl.constexpr):  # fmt: skip
    """W_ga and, with full peepholes, P_g: all rows of a gate, columns of this program's units."""
    weights = load_weights_transposed(recurrent, k, unit, H, GATE, GATES)
    peepholes = weights
    if (PEEPHOLE == "full") & (GATE > 0):
        peepholes = load_weights_transposed(peephole, k, unit, H, GATE - 1, 3)
    return weights, peepholes


@triton.jit
def _load_dz(operands, row, k, K, GATE: tl.constexpr, GATES: tl.constexpr):
    """Dz of a gate, for all units; dz of the first gate if the cell has no such gate."""
    return load_operand(operands + (GATE if GATE < GATES else 0) * K, row, k, GATES * K)


@triton.jit
def _add_product(sums, sums_second, dz, weights, peepholes, GATE: tl.constexpr,
                 GATES: tl.constexpr, PEEPHOLE: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Adds dz_g W_ga to `sums` and, with full peepholes, dz_g P_g to `sums_second`."""
    if GATE < GATES:
        sums = tl.dot(dz, weights, sums, input_precision=PRECISION)
        if (PEEPHOLE == "full") & (GATE > 0):
            sums_second = tl.dot(dz, peepholes, sums_second, input_precision=PRECISION)
    return sums, sums_second


@triton.jit
def _add_product_pair(
    sums, sums_second, operands, row, k, K, weights, peepholes, next_weights, next_peepholes,
    GATE: tl.constexpr, GATES: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """As `_add_product`, for a gate and the next one."""
    if GATE < GATES:
        dz = _load_dz(operands, row, k, K, GATE, GATES)
        if PREFETCH:
            next_dz = _load_dz(operands, row, k, K, GATE + 1, GATES)
        sums, sums_second = _add_product(
            sums, sums_second, dz, weights, peepholes, GATE, GATES, PEEPHOLE, PRECISION
        )
        if not PREFETCH:
            next_dz = _load_dz(operands, row, k, K, GATE + 1, GATES)
        sums, sums_second = _add_product(
            sums, sums_second, next_dz, next_weights, next_peepholes, GATE + 1, GATES, PEEPHOLE,
            PRECISION,
        )  # fmt: skip
    return sums, sums_second


@triton.jit
def _load_states(
    grad_hidden, history_first, history_second, t, offset, mask, size, REVERSE: tl.constexpr
):
    """The gradient of the hidden state at time t, and the state before t."""
    before = (t + 1 if REVERSE else t) * size
    return (
        load(grad_hidden + t * size, offset, mask),
        load(history_first + before, offset, mask),
        load(history_second + before, offset, mask),
    )


@triton.jit(do_not_specialize=["begin", "end", "steps"])
def backward(
    gates, recurrent, peephole, history_first, history_second, grad_hidden, dz, delta_first,
    delta_second, operands, lengths, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr,
    PEEPHOLE: tl.constexpr, TANH: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """Runs the backward steps `begin` to `end` − 1, counted from the last step of the forward.

    Step T has no cell: it adds the last products to the gradient of the initial state.

    Args:
        gates: (T, B, G·H): activations.
        recurrent: (G·H, H), in the dtype of operands.
        peephole: as in `forward`.
        history_first: (T + 1, B, H): the first part of the state.
        history_second: (T + 1, B, H): the second part.
        grad_hidden: (T, B, H): gradients of the hidden states.
        dz: output, (T, B, G·H): gradients at the pre-activations.
        delta_first: (B, H): gradient of the first part of the final state; overwritten with that
            of the initial state.
        delta_second: (B, H): the same for the second part.
        operands: (2, R, G·K): dz as operand, by parity of the step.
        lengths: steps of each row, (B,).
        counters: barrier counters, 0, one for each group of rows at every 32nd element.
        begin: the first step.
        end: the step after the last, at most T + 1.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `backward`.
        LENGTHS: whether rows have lengths.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, diagonal or full.
        TANH: whether the cell's activation is tanh; see `kernels.variant`.
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
    padded = tl.num_programs(1) * ROWS * GATES * K
    counter = counters + tl.program_id(1) * 32
    w0, v0 = _load_weight_pair(recurrent, peephole, k, unit, H, 0, GATES, PEEPHOLE)
    w1, v1 = _load_weight_pair(recurrent, peephole, k, unit, H, 1, GATES, PEEPHOLE)
    w2, v2 = _load_weight_pair(recurrent, peephole, k, unit, H, 2, GATES, PEEPHOLE)
    w3, v3 = _load_weight_pair(recurrent, peephole, k, unit, H, 3, GATES, PEEPHOLE)
    p1, p2, p3 = _load_peepholes(peephole, unit, H, PEEPHOLE)
    d_before = load(delta_first, offset, mask)
    d_before_second = load(delta_second, offset, mask)
    t = time_index(begin, steps, REVERSE)
    g0, g1, g2, g3 = _load_gates(gates, t, m, n, mask, rows, H, GATES)
    d_hidden, first, second = _load_states(
        grad_hidden, history_first, history_second, t, offset, mask, size, REVERSE
    )
    new_second = load(history_second + (t if REVERSE else t + 1) * size, offset, mask)
    for step in range(begin, end):
        t = time_index(step, steps, REVERSE)
        slot = (step % 2) * padded
        if step > 0:
            previous = operands + padded - slot
            sums = tl.zeros((SPLIT, ROWS, UNITS), tl.float32)
            sums_second = sums
            sums, sums_second = _add_product_pair(
                sums, sums_second, previous, row, k, K, w0, v0, w1, v1,
                0, GATES, PEEPHOLE, PRECISION, PREFETCH,
            )  # fmt: skip
            sums, sums_second = _add_product_pair(
                sums, sums_second, previous, row, k, K, w2, v2, w3, v3,
                2, GATES, PEEPHOLE, PRECISION, PREFETCH,
            )  # fmt: skip
            d_before += reduce_splits(sums, ROWS, UNITS, SPLIT)
            if PEEPHOLE == "full":
                d_before_second += reduce_splits(sums_second, ROWS, UNITS, SPLIT)
        if step < steps:
            d_after, d_after_second = d_before, d_before_second
            dz0, dz1, dz2, dz3, d_before, d_before_second = CELL(
                g0, g1, g2, g3, first, second, new_second, d_before + d_hidden, d_before_second,
                TANH,
            )  # fmt: skip
            d_before_second += dz1 * p1 + dz2 * p2 + dz3 * p3
            dz0, dz1, dz2, dz3, d_before, d_before_second = mask_ended(
                lengths, m, t, rows, dz0, dz1, dz2, dz3, d_before, d_before_second, d_after,
                d_after_second, LENGTHS,
            )  # fmt: skip
            _store_gates(operands + slot, 0, dz0, dz1, dz2, dz3, m, n, mask, rows, K, GATES)
            if step + 1 < end:
                arrive(counter)
            _store_gates(dz, t, dz0, dz1, dz2, dz3, m, n, mask, rows, H, GATES)
            if step + 1 < end:
                t = time_index(step + 1, steps, REVERSE)
                g0, g1, g2, g3 = _load_gates(gates, t, m, n, mask, rows, H, GATES)
                new_second = second
                d_hidden, first, second = _load_states(
                    grad_hidden, history_first, history_second, t, offset, mask, size, REVERSE
                )
                wait(counter, (step + 1 - begin) * tl.num_programs(0))
    store(delta_first, offset, d_before, mask)
    if PARTS > 1:
        store(delta_second, offset, d_before_second, mask)
