"""A whole scan in one launch: the kernel pair of the persistent schedule.

A program owns some units with all their gates, and some rows. It loads its share of the recurrent
weights once and keeps it in shared memory; its part of the state never leaves its registers. After
each step it writes what the others need, is counted, and goes on when the programs of the same rows
are. In between it writes what nobody waits for and reads what the next step takes besides.

For cells whose products take the state alone; the GRU's, which waits for s, is `persistent_gru`.

T steps, B rows, H units, G gates; matrices lie row after row. What programs write for each other
has R rows of K units, padding included, so that any H is read in whole lines. All sums are fp32.

Source: persistent RNNs (Diamos et al. 2016); FlashRNN's fused kernels (Pöppel et al. 2024).
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
def _peepholes(peephole, unit, H, KIND: tl.constexpr):
    """p_u, p_f and p_o, (1, UNITS) each; 0 without peepholes."""
    mask = (unit < H) & (KIND == "diagonal")
    return (
        load(peephole, unit, mask)[None, :],
        load(peephole, H + unit, mask)[None, :],
        load(peephole, 2 * H + unit, mask)[None, :],
    )


@triton.jit
def _biases(bias, unit, H, GATES: tl.constexpr):
    """The biases of up to four gates, (1, UNITS) each; 0 for gates that there are not."""
    mask = unit < H
    return (
        load(bias, unit, mask)[None, :],
        load(bias, H + unit, mask & (GATES > 1))[None, :],
        load(bias, 2 * H + unit, mask & (GATES > 2))[None, :],
        load(bias, 3 * H + unit, mask & (GATES > 3))[None, :],
    )


@triton.jit
def _gates(gates, t, line, own, mask, rows, H, GATES: tl.constexpr):
    """What stands at up to four gates at a time; 0 for gates that there are not."""
    here = gates + t * rows * GATES * H
    return (
        load_gate(here, line, own, mask, H, 0, GATES),
        load_gate(here, line, own, mask, H, 1, GATES),
        load_gate(here, line, own, mask, H, 2, GATES),
        load_gate(here, line, own, mask, H, 3, GATES),
    )


@triton.jit
def _store_gates(gates, t, g0, g1, g2, g3, line, own, mask, rows, H, GATES: tl.constexpr):
    """Puts numbers at all gates that there are."""
    here = gates + t * rows * GATES * H
    store_gate(here, g0, line, own, mask, H, 0, GATES, GATES)
    store_gate(here, g1, line, own, mask, H, 1, GATES, GATES)
    store_gate(here, g2, line, own, mask, H, 2, GATES, GATES)
    store_gate(here, g3, line, own, mask, H, 3, GATES, GATES)


@triton.jit
def _by_gate(sums, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The sums (ROWS, 4 UNITS) of four gates of each unit, side by side, as one for each gate."""
    even, odd = tl.split(tl.reshape(sums, (ROWS, UNITS, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0, s1, s2, s3


@triton.jit
def forward(
    gates, recurrent, bias, peephole, history_first, history_second, hidden, operands,
    operands_second, lengths, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr,
    PEEPHOLE: tl.constexpr, OTHER: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Steps `begin` to `end` in the order of time; the state before them is in the history.

    Args:
        gates: (T, B, G·H): the inputs' share of the pre-activations; receives the activations.
        recurrent: (G·H, H), in the precision of products.
        bias: (G·H).
        peephole: (3H): diagonal peepholes; (3H, H), in the precision of products: full ones.
        history_first: the first part of the state, (T + 1, B, H).
        history_second: the second.
        hidden: (T, B, H): receives the hidden states.
        operands: (2, R, K): what products take, of the steps with even and odd number.
        operands_second: the same of the second part, with full peepholes.
        lengths: steps of each row, (B,).
        counters: a number for each group of rows, 0, with 31 others between.
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
        OTHER: whether the cell has its other form.
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
    padded = tl.num_programs(1) * ROWS * K
    counter = counters + tl.program_id(1) * 32
    # Columns: the four gates of a unit side by side.
    column = tl.arange(0, 4 * UNITS)
    owner = tl.program_id(0) * UNITS + column // 4
    weights = weights_from(recurrent, k, owner, column % 4, H, GATES)
    if PEEPHOLE == "full":
        # The candidate sees no cell.
        weights_second = weights_from(peephole, k, owner, column % 4 - 1, H, 3)
    p1, p2, p3 = _peepholes(peephole, unit, H, PEEPHOLE)
    b0, b1, b2, b3 = _biases(bias, unit, H, GATES)
    t = time_of(begin, steps, not REVERSE)
    z0, z1, z2, z3 = _gates(gates, t, line, own, mask, rows, H, GATES)
    before = (t + 1 if REVERSE else t) * size
    first = load(history_first + before, at, mask)
    second = load(history_second + before, at, mask)
    for step in range(begin, end):
        t = time_of(step, steps, not REVERSE)
        place = (step % 2) * padded
        state = load_all(operands + place, row, k, K)
        if (PEEPHOLE == "full") & AHEAD:
            state_second = load_all(operands_second + place, row, k, K)
        product = tl.dot(state, weights, input_precision=PRECISION)
        if PEEPHOLE == "full":
            if not AHEAD:
                state_second = load_all(operands_second + place, row, k, K)
            product = tl.dot(state_second, weights_second, product, input_precision=PRECISION)
        s0, s1, s2, s3 = _by_gate(total(product, ROWS, 4 * UNITS, SPLIT), ROWS, UNITS)
        g0, g1, g2, g3, new_first, new_second = CELL(
            z0 + b0 + s0,
            z1 + b1 + s1 + p1 * second,
            z2 + b2 + s2 + p2 * second,
            z3 + b3 + s3 + p3 * second,
            first,
            second,
            OTHER,
        )
        first, second, output = held(
            lengths, line, t, rows, new_first, new_second, first, second, LENGTHS
        )
        store(operands + padded - place, line * K + own, first, mask)
        if PEEPHOLE == "full":
            store(operands_second + padded - place, line * K + own, second, mask)
        if step + 1 < end:
            arrive(counter)
        _store_gates(gates, t, g0, g1, g2, g3, line, own, mask, rows, H, GATES)
        after = (t if REVERSE else t + 1) * size
        store(history_first + after, at, first, mask)
        if PARTS > 1:
            store(history_second + after, at, second, mask)
        store(hidden + t * size, at, output, mask)
        if step + 1 < end:
            t = time_of(step + 1, steps, not REVERSE)
            z0, z1, z2, z3 = _gates(gates, t, line, own, mask, rows, H, GATES)
            wait(counter, (step + 1 - begin) * tl.num_programs(0))


@triton.jit
def _peephole_weights(recurrent, peephole, k, unit, H, GATE: tl.constexpr, GATES: tl.constexpr,
                      KIND: tl.constexpr):  # fmt: skip
    """W_ga, and P_g where peepholes are full, from all units to those of this program."""
    weights = weights_to(recurrent, k, unit, H, GATE, GATES)
    seen = weights
    if (KIND == "full") & (GATE > 0):
        seen = weights_to(peephole, k, unit, H, GATE - 1, 3)
    return weights, seen


@triton.jit
def _later(operands, row, k, K, GATE: tl.constexpr, GATES: tl.constexpr):
    """Dz of a gate, of all units; of the first if the cell has no such gate."""
    return load_all(operands + (GATE if GATE < GATES else 0) * K, row, k, GATES * K)


@triton.jit
def _through(sums, seen, values, weights, peepholes, GATE: tl.constexpr, GATES: tl.constexpr,
             PEEPHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds dz_g W_ga, and dz_g P_g where peepholes are full, to the sums of the warps."""
    if GATE < GATES:
        sums = tl.dot(values, weights, sums, input_precision=PRECISION)
        if (PEEPHOLE == "full") & (GATE > 0):
            seen = tl.dot(values, peepholes, seen, input_precision=PRECISION)
    return sums, seen


@triton.jit
def _through_pair(
    sums, seen, operands, row, k, K, weights, peepholes, more_weights, more_peepholes,
    GATE: tl.constexpr, GATES: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The same of a gate and the next one."""
    if GATE < GATES:
        values = _later(operands, row, k, K, GATE, GATES)
        if AHEAD:
            more = _later(operands, row, k, K, GATE + 1, GATES)
        sums, seen = _through(
            sums, seen, values, weights, peepholes, GATE, GATES, PEEPHOLE, PRECISION
        )
        if not AHEAD:
            more = _later(operands, row, k, K, GATE + 1, GATES)
        sums, seen = _through(
            sums, seen, more, more_weights, more_peepholes, GATE + 1, GATES, PEEPHOLE, PRECISION
        )
    return sums, seen


@triton.jit
def _states(grad_hidden, history_first, history_second, t, at, mask, size, REVERSE: tl.constexpr):
    """dL/dh at a time, and the state before it."""
    before = (t + 1 if REVERSE else t) * size
    return (
        load(grad_hidden + t * size, at, mask),
        load(history_first + before, at, mask),
        load(history_second + before, at, mask),
    )


@triton.jit
def backward(
    gates, recurrent, peephole, history_first, history_second, grad_hidden, dz, delta_first,
    delta_second, operands, lengths, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr,
    PEEPHOLE: tl.constexpr, OTHER: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Steps `begin` to `end` against the order of time; T stands for what comes before them all.

    Args:
        gates: (T, B, G·H): the activations.
        recurrent: (G·H, H), in the precision of products.
        peephole: as in `forward`.
        history_first: the first part of the state, (T + 1, B, H).
        history_second: the second.
        grad_hidden: (T, B, H): the gradients of the hidden states.
        dz: (T, B, G·H): receives the gradients at the pre-activations.
        delta_first: (B, H): the gradient of the first part of the last state; receives that of
            the first state.
        delta_second: the same of the second part.
        operands: (2, R, G·K): dz as products take it, of the steps with even and odd number.
        lengths: steps of each row, (B,).
        counters: a number for each group of rows, 0, with 31 others between.
        begin: the first step, counted from the end of time.
        end: the step after the last, T + 1 at most: at T the gradient of the first state is made.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `backward`.
        LENGTHS: whether rows have lengths.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, diagonal or full.
        OTHER: whether the cell has its other form.
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
    padded = tl.num_programs(1) * ROWS * GATES * K
    counter = counters + tl.program_id(1) * 32
    w0, v0 = _peephole_weights(recurrent, peephole, k, unit, H, 0, GATES, PEEPHOLE)
    w1, v1 = _peephole_weights(recurrent, peephole, k, unit, H, 1, GATES, PEEPHOLE)
    w2, v2 = _peephole_weights(recurrent, peephole, k, unit, H, 2, GATES, PEEPHOLE)
    w3, v3 = _peephole_weights(recurrent, peephole, k, unit, H, 3, GATES, PEEPHOLE)
    p1, p2, p3 = _peepholes(peephole, unit, H, PEEPHOLE)
    past = load(delta_first, at, mask)
    past_second = load(delta_second, at, mask)
    t = time_of(begin, steps, REVERSE)
    g0, g1, g2, g3 = _gates(gates, t, line, own, mask, rows, H, GATES)
    upstream, first, second = _states(
        grad_hidden, history_first, history_second, t, at, mask, size, REVERSE
    )
    new_second = load(history_second + (t if REVERSE else t + 1) * size, at, mask)
    for step in range(begin, end):
        t = time_of(step, steps, REVERSE)
        place = (step % 2) * padded
        if step > 0:
            written = operands + padded - place
            sums = tl.zeros((SPLIT, ROWS, UNITS), tl.float32)
            seen = sums
            sums, seen = _through_pair(
                sums, seen, written, row, k, K, w0, v0, w1, v1, 0, GATES, PEEPHOLE, PRECISION, AHEAD
            )
            sums, seen = _through_pair(
                sums, seen, written, row, k, K, w2, v2, w3, v3, 2, GATES, PEEPHOLE, PRECISION, AHEAD
            )
            past += total(sums, ROWS, UNITS, SPLIT)
            if PEEPHOLE == "full":
                past_second += total(seen, ROWS, UNITS, SPLIT)
        if step < steps:
            later, later_second = past, past_second
            dz0, dz1, dz2, dz3, past, past_second = CELL(
                g0, g1, g2, g3, first, second, new_second, past + upstream, past_second, OTHER
            )
            past_second += dz1 * p1 + dz2 * p2 + dz3 * p3
            dz0, dz1, dz2, dz3, past, past_second = stopped(
                lengths, line, t, rows, dz0, dz1, dz2, dz3, past, past_second, later, later_second,
                LENGTHS,
            )  # fmt: skip
            _store_gates(operands + place, 0, dz0, dz1, dz2, dz3, line, own, mask, rows, K, GATES)
            if step + 1 < end:
                arrive(counter)
            _store_gates(dz, t, dz0, dz1, dz2, dz3, line, own, mask, rows, H, GATES)
            if step + 1 < end:
                t = time_of(step + 1, steps, REVERSE)
                g0, g1, g2, g3 = _gates(gates, t, line, own, mask, rows, H, GATES)
                new_second = second
                upstream, first, second = _states(
                    grad_hidden, history_first, history_second, t, at, mask, size, REVERSE
                )
                wait(counter, (step + 1 - begin) * tl.num_programs(0))
    store(delta_first, at, past, mask)
    if PARTS > 1:
        store(delta_second, at, past_second, mask)
