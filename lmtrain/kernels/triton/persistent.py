"""A whole scan in one launch: the kernel pair of the persistent schedule.

A program owns some units with all their gates, and some rows. It loads its share of the recurrent
weights once and keeps it in shared memory; its part of the state never leaves its registers. After
each step it writes what the others need and meets the programs of the same rows at a counter.

For cells whose products take the state alone; the GRU's, which waits for s, is `persistent_gru`.

T steps, B rows, H units, G gates; matrices lie row after row. All sums are fp32.

Source: persistent RNNs (Diamos et al. 2016); FlashRNN's fused kernels (Pöppel et al. 2024).
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
def forward(
    gates, recurrent, bias, peephole, history_first, history_second, hidden, operands,
    operands_second, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr, PEEPHOLE: tl.constexpr,
    OTHER: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
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
        operands: (2, B, H): what products take, of the steps with even and odd number.
        operands_second: the same of the second part, with full peepholes.
        counters: a number for each group of rows, 0.
        begin: the first step.
        end: the step after the last.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `forward`.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, diagonal or full.
        OTHER: whether the cell has its other form.
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
    # Columns: the four gates of a unit side by side, so that halving twice tells them apart.
    column = tl.arange(0, 4 * UNITS)
    owner = tl.program_id(0) * UNITS + column // 4
    gate = column % 4
    weights = weights_from(recurrent, k, owner, gate, H, GATES)
    if PEEPHOLE == "full":
        # The candidate sees no cell.
        weights_second = weights_from(peephole, k, owner, gate - 1, H, 3)
    p1, p2, p3 = _peepholes(peephole, unit, H, PEEPHOLE)
    b0, b1, b2, b3 = _biases(bias, unit, H, GATES)
    start = tl.cast(steps - begin if REVERSE else begin, tl.int64) * size
    first = load(history_first + start, at, mask)
    second = load(history_second + start, at, mask)
    for step in range(begin, end):
        # Places in tensors of T steps take more than 32 bits.
        t = tl.cast(steps - 1 - step if REVERSE else step, tl.int64)
        here = gates + t * size * GATES
        z0 = load_gate(here, line, own, mask, H, 0, GATES) + b0
        z1 = load_gate(here, line, own, mask, H, 1, GATES) + b1 + p1 * second
        z2 = load_gate(here, line, own, mask, H, 2, GATES) + b2 + p2 * second
        z3 = load_gate(here, line, own, mask, H, 3, GATES) + b3 + p3 * second
        place = (step % 2) * size
        state = load_rows(operands + place, row, k, rows, H, H)
        product = tl.dot(state, weights, input_precision=PRECISION)
        if PEEPHOLE == "full":
            state = load_rows(operands_second + place, row, k, rows, H, H)
            product = tl.dot(state, weights_second, product, input_precision=PRECISION)
        halves = tl.reshape(product, (ROWS, UNITS, 2, 2))
        even, odd = tl.split(halves)
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        g0, g1, g2, g3, first, second = CELL(
            z0 + s0, z1 + s1, z2 + s2, z3 + s3, first, second, OTHER
        )
        store_gate(here, g0, line, own, mask, H, 0, GATES, GATES)
        store_gate(here, g1, line, own, mask, H, 1, GATES, GATES)
        store_gate(here, g2, line, own, mask, H, 2, GATES, GATES)
        store_gate(here, g3, line, own, mask, H, 3, GATES, GATES)
        after = (t if REVERSE else t + 1) * size
        store(history_first + after, at, first, mask)
        if PARTS > 1:
            store(history_second + after, at, second, mask)
        store(hidden + t * size, at, first, mask)
        store(operands + size - place, at, first, mask)
        if PEEPHOLE == "full":
            store(operands_second + size - place, at, second, mask)
        if step + 1 < end:
            meet(counters + tl.program_id(1), (step + 1 - begin) * tl.num_programs(0))


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
def _through(past, past_second, dz, weights, seen, row, k, rows, H, GATE: tl.constexpr,
             GATES: tl.constexpr, PEEPHOLE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds dz_g W_ga, and dz_g P_g where peepholes are full, to the parts of the state's."""
    if GATE < GATES:
        values = load_rows(dz + GATE * H, row, k, rows, H, GATES * H)
        past = tl.dot(values, weights, past, input_precision=PRECISION)
        if (PEEPHOLE == "full") & (GATE > 0):
            past_second = tl.dot(values, seen, past_second, input_precision=PRECISION)
    return past, past_second


@triton.jit
def backward(
    gates, recurrent, peephole, history_first, history_second, grad_hidden, dz, delta_first,
    delta_second, counters, begin, end, steps, rows, H,
    CELL: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr, PEEPHOLE: tl.constexpr,
    OTHER: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
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
        counters: a number for each group of rows, 0.
        begin: the first step, counted from the end of time.
        end: the step after the last, T + 1 at most: at T the gradient of the first state is made.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `backward`.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, diagonal or full.
        OTHER: whether the cell has its other form.
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
    w0, v0 = _peephole_weights(recurrent, peephole, k, unit, H, 0, GATES, PEEPHOLE)
    w1, v1 = _peephole_weights(recurrent, peephole, k, unit, H, 1, GATES, PEEPHOLE)
    w2, v2 = _peephole_weights(recurrent, peephole, k, unit, H, 2, GATES, PEEPHOLE)
    w3, v3 = _peephole_weights(recurrent, peephole, k, unit, H, 3, GATES, PEEPHOLE)
    p1, p2, p3 = _peepholes(peephole, unit, H, PEEPHOLE)
    past = load(delta_first, at, mask)
    past_second = load(delta_second, at, mask)
    for step in range(begin, end):
        # Places in tensors of T steps take more than 32 bits.
        t = tl.cast(step if REVERSE else steps - 1 - step, tl.int64)
        later = dz + (t - 1 if REVERSE else t + 1) * size * GATES
        if step > 0:
            past, past_second = _through(
                past, past_second, later, w0, v0, row, k, rows, H, 0, GATES, PEEPHOLE, PRECISION
            )
            past, past_second = _through(
                past, past_second, later, w1, v1, row, k, rows, H, 1, GATES, PEEPHOLE, PRECISION
            )
            past, past_second = _through(
                past, past_second, later, w2, v2, row, k, rows, H, 2, GATES, PEEPHOLE, PRECISION
            )
            past, past_second = _through(
                past, past_second, later, w3, v3, row, k, rows, H, 3, GATES, PEEPHOLE, PRECISION
            )
        if step < steps:
            here = gates + t * size * GATES
            before = (t + 1 if REVERSE else t) * size
            after = (t if REVERSE else t + 1) * size
            past += load(grad_hidden + t * size, at, mask)
            dz0, dz1, dz2, dz3, past, past_second = CELL(
                load_gate(here, line, own, mask, H, 0, GATES),
                load_gate(here, line, own, mask, H, 1, GATES),
                load_gate(here, line, own, mask, H, 2, GATES),
                load_gate(here, line, own, mask, H, 3, GATES),
                load(history_first + before, at, mask),
                load(history_second + before, at, mask),
                load(history_second + after, at, mask),
                past, past_second, OTHER,
            )  # fmt: skip
            past_second += dz1 * p1 + dz2 * p2 + dz3 * p3
            target = dz + t * size * GATES
            store_gate(target, dz0, line, own, mask, H, 0, GATES, GATES)
            store_gate(target, dz1, line, own, mask, H, 1, GATES, GATES)
            store_gate(target, dz2, line, own, mask, H, 2, GATES, GATES)
            store_gate(target, dz3, line, own, mask, H, 3, GATES, GATES)
        if step + 1 < end:
            meet(counters + tl.program_id(1), (step + 1 - begin) * tl.num_programs(0))
    store(delta_first, at, past, mask)
    if PARTS > 1:
        store(delta_second, at, past_second, mask)
