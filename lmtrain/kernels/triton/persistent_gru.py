"""A whole scan of the GRU in one launch: two halves a step, since its candidate waits for s.

As `persistent`; programs meet after each half. All sums are fp32.

T steps, B rows, H units; gates: candidate, update, relevance.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.memory import (
    load,
    load_gate,
    load_rows,
    meet,
    store,
    store_gate,
    weights_from,
    weights_to,
)


@triton.jit
def forward(
    gates, recurrent, bias, history, hidden, operand, operand_gated, counters,
    begin, end, steps, rows, H,
    PREPARE: tl.constexpr, CELL: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Half steps `begin` to `end` in the order of time; the state before them is in the history.

    Args:
        gates: (T, B, 3H): the inputs' share of the pre-activations; receives the activations.
        recurrent: (3H, H), in the precision of products.
        bias: (3H).
        history: the state, (T + 1, B, H).
        hidden: (T, B, H): receives the hidden states.
        operand: (B, H): the state that products take.
        operand_gated: (B, H): receives s, which the candidate's product takes.
        counters: a number for each group of rows, 0.
        begin: the first half step.
        end: the half step after the last.
        steps: T.
        rows: B.
        H: units.
        PREPARE: the cell's `prepare`, of the first half.
        CELL: the cell's `forward`, of the second.
        REVERSE: whether time runs from T to 1.
        PRECISION: of fp32 products.
        ROWS: rows of a program.
        UNITS: units of a program.
        K: H, or the power of two above it.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = tl.arange(0, K)
    mask = (row < rows)[:, None] & (unit < H)[None, :]
    line, own = row[:, None], unit[None, :]
    at = line * H + own
    size = rows * H
    # Columns: update and relevance of a unit side by side, so that halving tells them apart.
    column = tl.arange(0, 2 * UNITS)
    owner = tl.program_id(0) * UNITS + column // 2
    w_gates = weights_from(recurrent, k, owner, 1 + column % 2, H, 3)
    w_candidate = weights_from(recurrent, k, unit, unit * 0, H, 3)
    b0 = load(bias, unit, unit < H)[None, :]
    b1 = load(bias, H + unit, unit < H)[None, :]
    b2 = load(bias, 2 * H + unit, unit < H)[None, :]
    start = tl.cast(steps - begin // 2 if REVERSE else begin // 2, tl.int64) * size
    first = load(history + start, at, mask)
    for half in range(begin, end):
        step = half // 2
        # Places in tensors of T steps take more than 32 bits.
        t = tl.cast(steps - 1 - step if REVERSE else step, tl.int64)
        here = gates + t * size * 3
        if half % 2 == 0:
            state = load_rows(operand, row, k, rows, H, H)
            product = tl.dot(state, w_gates, input_precision=PRECISION)
            s1, s2 = tl.split(tl.reshape(product, (ROWS, UNITS, 2)))
            z1 = load_gate(here, line, own, mask, H, 1, 3) + b1
            z2 = load_gate(here, line, own, mask, H, 2, 3) + b2
            g1, g2, gated = PREPARE(z1 + s1, z2 + s2, first)
            store_gate(here, g1, line, own, mask, H, 1, 3, 3)
            store_gate(here, g2, line, own, mask, H, 2, 3, 3)
            store(operand_gated, at, gated, mask)
        else:
            state = load_rows(operand_gated, row, k, rows, H, H)
            z0 = load_gate(here, line, own, mask, H, 0, 3) + b0
            z0 += tl.dot(state, w_candidate, input_precision=PRECISION)
            g1 = load_gate(here, line, own, mask, H, 1, 3)
            # The cell's page has room for four gates and two parts of a state.
            g0, g1, _g, _g, first, _s = CELL(z0, g1, g1, g1, first, first, False)
            store_gate(here, g0, line, own, mask, H, 0, 3, 3)
            store(history + (t if REVERSE else t + 1) * size, at, first, mask)
            store(hidden + t * size, at, first, mask)
            store(operand, at, first, mask)
        if half + 1 < end:
            meet(counters + tl.program_id(1), (half + 1 - begin) * tl.num_programs(0))


@triton.jit
def backward(
    gates, recurrent, history, grad_hidden, dz, delta, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, FINISH: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Half steps `begin` to `end` against the order of time; 2T makes the first state's gradient.

    Args:
        gates: (T, B, 3H): the activations.
        recurrent: (3H, H), in the precision of products.
        history: the state, (T + 1, B, H).
        grad_hidden: (T, B, H): the gradients of the hidden states.
        dz: (T, B, 3H): receives the gradients at the pre-activations.
        delta: (B, H): the gradient of the last state; receives that of the first.
        counters: a number for each group of rows, 0.
        begin: the first half step, counted from the end of time.
        end: the half step after the last, 2T + 1 at most.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `backward`, of the first half.
        FINISH: the cell's `finish`, of the second.
        REVERSE: whether time runs from T to 1.
        PRECISION: of fp32 products.
        ROWS: rows of a program.
        UNITS: units of a program.
        K: H, or the power of two above it.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    k = tl.arange(0, K)
    mask = (row < rows)[:, None] & (unit < H)[None, :]
    line, own = row[:, None], unit[None, :]
    at = line * H + own
    size = rows * H
    w0 = weights_to(recurrent, k, unit, H, 0, 3)
    w1 = weights_to(recurrent, k, unit, H, 1, 3)
    w2 = weights_to(recurrent, k, unit, H, 2, 3)
    past = load(delta, at, mask)
    for half in range(begin, end):
        step = half // 2
        # Places in tensors of T steps take more than 32 bits.
        t = tl.cast(step if REVERSE else steps - 1 - step, tl.int64)
        here = gates + t * size * 3
        target = dz + t * size * 3
        before = (t + 1 if REVERSE else t) * size
        if half % 2 == 0:
            if step > 0:
                later = dz + (t - 1 if REVERSE else t + 1) * size * 3
                d1 = load_rows(later + H, row, k, rows, H, 3 * H)
                past = tl.dot(d1, w1, past, input_precision=PRECISION)
                d2 = load_rows(later + 2 * H, row, k, rows, H, 3 * H)
                past = tl.dot(d2, w2, past, input_precision=PRECISION)
            if step < steps:
                past += load(grad_hidden + t * size, at, mask)
                first = load(history + before, at, mask)
                g0 = load_gate(here, line, own, mask, H, 0, 3)
                g1 = load_gate(here, line, own, mask, H, 1, 3)
                dz0, dz1, _g, _g, past, _s = CELL(
                    g0, g1, g1, g1, first, first, first, past, past, False
                )
                store_gate(target, dz0, line, own, mask, H, 0, 3, 3)
                store_gate(target, dz1, line, own, mask, H, 1, 3, 3)
        else:
            d0 = load_rows(target, row, k, rows, H, 3 * H)
            ds = tl.dot(d0, w0, input_precision=PRECISION)
            g2 = load_gate(here, line, own, mask, H, 2, 3)
            dz2, through = FINISH(ds, g2, load(history + before, at, mask))
            store_gate(target, dz2, line, own, mask, H, 2, 3, 3)
            past += through
        if half + 1 < end:
            meet(counters + tl.program_id(1), (half + 1 - begin) * tl.num_programs(0))
    store(delta, at, past, mask)
