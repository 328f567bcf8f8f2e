"""What of a step is no product, for any cell: the kernels of the alternating schedule.

A cell is a page of its own (`lstm.py`) with functions of numbers: up to four pre-activations, up to
two parts of the state. Here these are loaded and stored. Products are done elsewhere, so that a
step is one product and one launch; the GRU's second product, which waits for s of all units, makes
it two of each.

B rows, H units, G gates; matrices lie row after row. All sums are fp32.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.lengths import held, stopped
from lmtrain.kernels.triton.memory import load, load_gate, store, store_gate


@triton.jit
def _sum(gates, product, bias, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr,
         FIRST: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """A pre-activation, W_gx x + W_ga a + b_g, if the product is of this gate; else what is there.

    The product's columns are COUNT gates from FIRST on.
    """
    z = load_gate(gates, row, unit, mask, H, GATE, GATES)
    if GATE < FIRST + COUNT:
        z += load(product, row * COUNT * H + (GATE - FIRST) * H + unit, mask)
        z += load(bias, GATE * H + unit, mask)
    return z


@triton.jit
def _seen(seen, peephole, second, row, unit, mask, H, GATE: tl.constexpr, KIND: tl.constexpr):
    """What the peepholes of a gate see: P_g c′, a product done before, or p_g ∘ c′."""
    if KIND == "full":
        return load(seen, row * 3 * H + (GATE - 1) * H + unit, mask)
    if KIND == "diagonal":
        return load(peephole, (GATE - 1) * H + unit, mask) * second
    return second * 0.0


@triton.jit
def prepare(
    gates, product, bias, before, operand, rows, H, CELL: tl.constexpr, BLOCK: tl.constexpr
):
    """The first half of a GRU's step: update and relevance, and s for the candidate's product.

    Args:
        gates: (B, 3H): the inputs' share of the pre-activations; receives Γu and Γr.
        product: (B, 2H): their recurrent product.
        bias: (3H).
        before: the state before, (B, H).
        operand: (B, H): receives s.
        rows: B.
        H: units.
        CELL: the cell's `prepare`.
        BLOCK: numbers of a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows * H
    row = at // H
    unit = at % H
    z1 = _sum(gates, product, bias, row, unit, mask, H, 1, 3, 1, 2)
    z2 = _sum(gates, product, bias, row, unit, mask, H, 2, 3, 1, 2)
    g1, g2, s = CELL(z1, z2, load(before, at, mask))
    store_gate(gates, g1, row, unit, mask, H, 1, 3, 3)
    store_gate(gates, g2, row, unit, mask, H, 2, 3, 3)
    store(operand, at, s, mask)


@triton.jit(do_not_specialize=["t"])
def forward(
    gates, product, seen, bias, peephole, before_first, before_second, after_first, after_second,
    hidden, operand, operand_second, lengths, t, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
    PARTS: tl.constexpr, PEEPHOLE: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pre-activations become activations, and the state before a step that after it.

    Args:
        gates: (B, G·H): the inputs' share of the pre-activations; receives the activations.
        product: (B, COUNT·H): the recurrent product.
        seen: (B, 3H): what full peepholes see.
        bias: (G·H).
        peephole: (3H): diagonal peepholes.
        before_first: the first part of the state before, (B, H).
        before_second: the second.
        after_first: receives the first part of the state after, (B, H).
        after_second: receives the second.
        hidden: (B, H): receives the first part in the precision of the inputs.
        operand: (B, H): the same, for the next product.
        operand_second: (B, H): the second part, for the product of full peepholes.
        lengths: steps of each row, (B,).
        t: the time of the step.
        rows: B.
        H: units.
        CELL: the cell's `forward`.
        LENGTHS: whether rows have lengths.
        COUNT: gates of the product, the first ones; the others are activations already.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, full or diagonal.
        OTHER: whether the cell has its other form.
        BLOCK: numbers of a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows * H
    row = at // H
    unit = at % H
    first = load(before_first, at, mask)
    second = load(before_second, at, mask)
    z0 = _sum(gates, product, bias, row, unit, mask, H, 0, GATES, 0, COUNT)
    z1 = _sum(gates, product, bias, row, unit, mask, H, 1, GATES, 0, COUNT)
    z2 = _sum(gates, product, bias, row, unit, mask, H, 2, GATES, 0, COUNT)
    z3 = _sum(gates, product, bias, row, unit, mask, H, 3, GATES, 0, COUNT)
    z1 += _seen(seen, peephole, second, row, unit, mask, H, 1, PEEPHOLE)
    z2 += _seen(seen, peephole, second, row, unit, mask, H, 2, PEEPHOLE)
    z3 += _seen(seen, peephole, second, row, unit, mask, H, 3, PEEPHOLE)
    g0, g1, g2, g3, new_first, new_second = CELL(z0, z1, z2, z3, first, second, OTHER)
    new_first, new_second, output = held(
        lengths, row, t, rows, new_first, new_second, first, second, LENGTHS
    )
    store_gate(gates, g0, row, unit, mask, H, 0, GATES, COUNT)
    store_gate(gates, g1, row, unit, mask, H, 1, GATES, COUNT)
    store_gate(gates, g2, row, unit, mask, H, 2, GATES, COUNT)
    store_gate(gates, g3, row, unit, mask, H, 3, GATES, COUNT)
    store(after_first, at, new_first, mask)
    store(hidden, at, output, mask)
    store(operand, at, new_first, mask)
    if PARTS > 1:
        store(after_second, at, new_second, mask)
    if PEEPHOLE == "full":
        store(operand_second, at, new_second, mask)


@triton.jit(do_not_specialize=["t"])
def backward(
    gates, product, product_second, peephole, before_first, before_second, after_second,
    grad_hidden, dz, delta_first, delta_second, lengths, t, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
    PARTS: tl.constexpr, PEEPHOLE: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the state after a step become those at its pre-activations.

    Args:
        gates: (B, G·H): the activations.
        product: (B, H): Σ_g dz_g W_ga of the step after this one.
        product_second: (B, H): Σ_g dz_g P_g of the step after this one, with full peepholes.
        peephole: (3H): diagonal peepholes.
        before_first: the first part of the state before, (B, H).
        before_second: the second.
        after_second: the second part of the state after, (B, H).
        grad_hidden: (B, H): the gradient of the hidden state.
        dz: (B, G·H): receives the gradients at the pre-activations.
        delta_first: (B, H): the gradient of the first part of the state after, without the
            product; receives that of the state before, without this step's.
        delta_second: the same of the second part.
        lengths: steps of each row, (B,).
        t: the time of the step.
        rows: B.
        H: units.
        CELL: the cell's `backward`.
        LENGTHS: whether rows have lengths.
        COUNT: gates whose dz is known now, the first ones.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, full or diagonal.
        OTHER: whether the cell has its other form.
        BLOCK: numbers of a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows * H
    row = at // H
    unit = at % H
    later = load(delta_first, at, mask) + load(product, at, mask)
    later_second = load(delta_second, at, mask)
    if PEEPHOLE == "full":
        later_second += load(product_second, at, mask)
    g0 = load_gate(gates, row, unit, mask, H, 0, GATES)
    g1 = load_gate(gates, row, unit, mask, H, 1, GATES)
    g2 = load_gate(gates, row, unit, mask, H, 2, GATES)
    g3 = load_gate(gates, row, unit, mask, H, 3, GATES)
    dz0, dz1, dz2, dz3, past, past_second = CELL(
        g0, g1, g2, g3, load(before_first, at, mask), load(before_second, at, mask),
        load(after_second, at, mask), later + load(grad_hidden, at, mask), later_second, OTHER,
    )  # fmt: skip
    if PEEPHOLE == "diagonal":
        past_second += _seen(dz, peephole, dz1, row, unit, mask, H, 1, PEEPHOLE)
        past_second += _seen(dz, peephole, dz2, row, unit, mask, H, 2, PEEPHOLE)
        past_second += _seen(dz, peephole, dz3, row, unit, mask, H, 3, PEEPHOLE)
    dz0, dz1, dz2, dz3, past, past_second = stopped(
        lengths, row, t, rows, dz0, dz1, dz2, dz3, past, past_second, later, later_second, LENGTHS
    )
    store_gate(dz, dz0, row, unit, mask, H, 0, GATES, COUNT)
    store_gate(dz, dz1, row, unit, mask, H, 1, GATES, COUNT)
    store_gate(dz, dz2, row, unit, mask, H, 2, GATES, COUNT)
    store_gate(dz, dz3, row, unit, mask, H, 3, GATES, COUNT)
    store(delta_first, at, past, mask)
    if PARTS > 1:
        store(delta_second, at, past_second, mask)


@triton.jit
def finish(gates, product, before, dz, delta, rows, H, CELL: tl.constexpr, BLOCK: tl.constexpr):
    """The second half of a GRU's backward step: the relevance's dz.

    Args:
        gates: (B, 3H): the activations.
        product: (B, H): ds.
        before: the state before, (B, H).
        dz: (B, 3H): receives the relevance's.
        delta: (B, H): what goes on to the state before, added to.
        rows: B.
        H: units.
        CELL: the cell's `finish`.
        BLOCK: numbers of a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows * H
    row = at // H
    unit = at % H
    relevance = load_gate(gates, row, unit, mask, H, 2, 3)
    dz2, through = CELL(load(product, at, mask), relevance, load(before, at, mask))
    store_gate(dz, dz2, row, unit, mask, H, 2, 3, 3)
    store(delta, at, load(delta, at, mask) + through, mask)
