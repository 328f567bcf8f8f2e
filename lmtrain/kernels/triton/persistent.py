"""A whole scan in one launch: the kernel pair of the persistent schedule.

A program owns some units with all their gates, and some rows. It loads its share of the recurrent
weights once and keeps it in registers; its part of the state never leaves them. After each step it
writes what the others need and meets the programs of the same rows at a counter in memory.

For cells whose step has one product: not the GRU, not full peepholes.

T steps, B rows, H units, G gates; matrices lie row after row. All sums are fp32.

Source: persistent RNNs (Diamos et al. 2016); FlashRNN's fused kernels (Pöppel et al. 2024).
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, values, mask):
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _gate(pointer, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr):
    """What stands at a gate, (ROWS, UNITS); 0 if the cell has no such gate."""
    at = row[:, None] * GATES * H + GATE * H + unit[None, :]
    return _load(pointer, at, mask & (GATE < GATES))


@triton.jit
def _store_gate(pointer, values, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr):
    if GATE < GATES:
        at = row[:, None] * GATES * H + GATE * H + unit[None, :]
        _store(pointer, at, values, mask)


@triton.jit
def _meet(counter, arrivals):
    """Waits until so many arrivals were counted; what was written before is seen after."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _peepholes(peephole, unit, H, KIND: tl.constexpr):
    """p_u, p_f and p_o, (1, UNITS) each; 0 without peepholes."""
    mask = (unit < H) & (KIND == "diagonal")
    return (
        _load(peephole, unit, mask)[None, :],
        _load(peephole, H + unit, mask)[None, :],
        _load(peephole, 2 * H + unit, mask)[None, :],
    )


@triton.jit
def forward(
    gates, recurrent, bias, peephole, history_first, history_second, hidden, operands, counters,
    begin, end, steps, rows, H,
    CELL: tl.constexpr, GATES: tl.constexpr, PARTS: tl.constexpr, PEEPHOLE: tl.constexpr,
    OTHER: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Steps `begin` to `end` in the order of time; the state before them is in the history.

    Args:
        gates: (T, B, G·H): the inputs' share of the pre-activations; receives the activations.
        recurrent: (G·H, H), in the precision of products.
        bias: (G·H).
        peephole: (3H): diagonal peepholes.
        history_first: the first part of the state, (T + 1, B, H).
        history_second: the second.
        hidden: (T, B, H): receives the hidden states.
        operands: (2, B, H): what products take, of the steps with even and odd number.
        counters: a number for each group of rows, 0.
        begin: the first step.
        end: the step after the last.
        steps: T.
        rows: B.
        H: units.
        CELL: the cell's `forward`.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none or diagonal.
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
    at = row[:, None] * H + unit[None, :]
    # Columns: the four gates of a unit side by side, so that halving twice tells them apart.
    column = tl.arange(0, 4 * UNITS)
    owner = tl.program_id(0) * UNITS + column // 4
    gate = column % 4
    is_there = (k < H)[:, None] & ((owner < H) & (gate < GATES))[None, :]
    weights = tl.load(
        recurrent + (gate * H + owner)[None, :] * H + k[:, None], mask=is_there, other=0.0
    )
    p1, p2, p3 = _peepholes(peephole, unit, H, PEEPHOLE)
    b0 = _load(bias, unit, unit < H)[None, :]
    b1 = _load(bias, H + unit, (unit < H) & (GATES > 1))[None, :]
    b2 = _load(bias, 2 * H + unit, (unit < H) & (GATES > 2))[None, :]
    b3 = _load(bias, 3 * H + unit, (unit < H) & (GATES > 3))[None, :]
    start = (steps - begin if REVERSE else begin) * rows * H
    first = _load(history_first + start, at, mask)
    second = _load(history_second + start, at, mask)
    for step in range(begin, end):
        t = steps - 1 - step if REVERSE else step
        here = gates + t * rows * GATES * H
        z0 = _gate(here, row, unit, mask, H, 0, GATES) + b0
        z1 = _gate(here, row, unit, mask, H, 1, GATES) + b1 + p1 * second
        z2 = _gate(here, row, unit, mask, H, 2, GATES) + b2 + p2 * second
        z3 = _gate(here, row, unit, mask, H, 3, GATES) + b3 + p3 * second
        # Past the nearest cache, which does not see what other programs write.
        state = tl.load(
            operands + (step % 2) * rows * H + row[:, None] * H + k[None, :],
            mask=(row < rows)[:, None] & (k < H)[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        product = tl.dot(state, weights, input_precision=PRECISION)
        halves = tl.reshape(product, (ROWS, UNITS, 2, 2))
        even, odd = tl.split(halves)
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        g0, g1, g2, g3, first, second = CELL(
            z0 + s0, z1 + s1, z2 + s2, z3 + s3, first, second, OTHER
        )
        _store_gate(here, g0, row, unit, mask, H, 0, GATES)
        _store_gate(here, g1, row, unit, mask, H, 1, GATES)
        _store_gate(here, g2, row, unit, mask, H, 2, GATES)
        _store_gate(here, g3, row, unit, mask, H, 3, GATES)
        after = (t if REVERSE else t + 1) * rows * H
        _store(history_first + after, at, first, mask)
        if PARTS > 1:
            _store(history_second + after, at, second, mask)
        _store(hidden + t * rows * H, at, first, mask)
        _store(operands + ((step + 1) % 2) * rows * H, at, first, mask)
        if step + 1 < end:
            _meet(counters + tl.program_id(1), (step + 1 - begin) * tl.num_programs(0))


@triton.jit
def _part(dz, weights, row, k, rows, H, GATE: tl.constexpr, GATES: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """dz_g W_ga for the units of this program."""
    at = row[:, None] * GATES * H + GATE * H + k[None, :]
    values = tl.load(
        dz + at, mask=(row < rows)[:, None] & (k < H)[None, :], other=0.0, cache_modifier=".cg"
    )
    return tl.dot(values, weights, input_precision=PRECISION)


@triton.jit
def _share(recurrent, k, unit, H, GATE: tl.constexpr, GATES: tl.constexpr):
    """The weights from a gate of all units to the units of this program, (K, UNITS)."""
    mask = (k < H)[:, None] & (unit < H)[None, :] & (GATE < GATES)
    return tl.load(recurrent + (GATE * H + k)[:, None] * H + unit[None, :], mask=mask, other=0.0)


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
        peephole: (3H): diagonal peepholes.
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
        PEEPHOLE: none or diagonal.
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
    at = row[:, None] * H + unit[None, :]
    w0 = _share(recurrent, k, unit, H, 0, GATES)
    w1 = _share(recurrent, k, unit, H, 1, GATES)
    w2 = _share(recurrent, k, unit, H, 2, GATES)
    w3 = _share(recurrent, k, unit, H, 3, GATES)
    p1, p2, p3 = _peepholes(peephole, unit, H, PEEPHOLE)
    past = _load(delta_first, at, mask)
    past_second = _load(delta_second, at, mask)
    for step in range(begin, end):
        t = step if REVERSE else steps - 1 - step
        later = dz + (t - 1 if REVERSE else t + 1) * rows * GATES * H
        if step > 0:
            past += _part(later, w0, row, k, rows, H, 0, GATES, PRECISION)
            if GATES > 1:
                past += _part(later, w1, row, k, rows, H, 1, GATES, PRECISION)
            if GATES > 2:
                past += _part(later, w2, row, k, rows, H, 2, GATES, PRECISION)
            if GATES > 3:
                past += _part(later, w3, row, k, rows, H, 3, GATES, PRECISION)
        if step < steps:
            here = gates + t * rows * GATES * H
            before = (t + 1 if REVERSE else t) * rows * H
            after = (t if REVERSE else t + 1) * rows * H
            past += _load(grad_hidden + t * rows * H, at, mask)
            dz0, dz1, dz2, dz3, past, past_second = CELL(
                _gate(here, row, unit, mask, H, 0, GATES),
                _gate(here, row, unit, mask, H, 1, GATES),
                _gate(here, row, unit, mask, H, 2, GATES),
                _gate(here, row, unit, mask, H, 3, GATES),
                _load(history_first + before, at, mask),
                _load(history_second + before, at, mask),
                _load(history_second + after, at, mask),
                past, past_second, OTHER,
            )  # fmt: skip
            past_second += dz1 * p1 + dz2 * p2 + dz3 * p3
            target = dz + t * rows * GATES * H
            _store_gate(target, dz0, row, unit, mask, H, 0, GATES)
            _store_gate(target, dz1, row, unit, mask, H, 1, GATES)
            _store_gate(target, dz2, row, unit, mask, H, 2, GATES)
            _store_gate(target, dz3, row, unit, mask, H, 3, GATES)
        if step + 1 < end:
            _meet(counters + tl.program_id(1), (step + 1 - begin) * tl.num_programs(0))
    _store(delta_first, at, past, mask)
    if PARTS > 1:
        _store(delta_second, at, past_second, mask)
