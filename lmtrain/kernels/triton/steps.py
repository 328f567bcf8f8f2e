"""The kernels of the alternating schedule: the elementwise part of a step, for any cell.

The recurrent product of a step is computed by cuBLAS (`scan`), all else by one launch of a kernel
here; the GRU, whose candidate's product needs s of all units, takes two of each. The equations are
functions of the cell's module (`lstm.py`), passed as CELL.

B rows, H units, G gates; matrices are row-major, accumulation is fp32. The caller owns all
buffers.
"""

import triton
import triton.language as tl

from lmtrain.kernels.triton.lengths import keep_ended, mask_ended
from lmtrain.kernels.triton.memory import load, load_gate, store, store_gate


@triton.jit
def _pre_activation(gates, product, bias, row, unit, mask, H, GATE: tl.constexpr,
                    GATES: tl.constexpr, FIRST: tl.constexpr,
                    COUNT: tl.constexpr):  # fmt: skip
    """W_gx x + W_ga a + b_g of a gate below FIRST + COUNT; of another gate, what is stored.

    The columns of `product` are COUNT gates from FIRST on.
    """
    z = load_gate(gates, row, unit, mask, H, GATE, GATES)
    if GATE < FIRST + COUNT:
        z += load(product, row * COUNT * H + (GATE - FIRST) * H + unit, mask)
        z += load(bias, GATE * H + unit, mask)
    return z


@triton.jit
def _peephole_term(peephole_product, peephole, second, row, unit, mask, H, GATE: tl.constexpr,
                   PEEPHOLE: tl.constexpr):  # fmt: skip
    """P_g c′ from the product of full peepholes, or p_g ∘ c′; 0 without peepholes."""
    if PEEPHOLE == "full":
        return load(peephole_product, row * 3 * H + (GATE - 1) * H + unit, mask)
    if PEEPHOLE == "diagonal":
        return load(peephole, (GATE - 1) * H + unit, mask) * second
    return second * 0.0


@triton.jit
def prepare(
    gates, product, bias, before, operand, rows, H, CELL: tl.constexpr, BLOCK: tl.constexpr
):
    """The first half of a GRU step: Γu, Γr, and s for the candidate's product.

    Args:
        gates: (B, 3H): input products; Γu and Γr overwrite theirs.
        product: (B, 2H): recurrent product of update and relevance.
        bias: (3H).
        before: (B, H): the state before the step.
        operand: output s, (B, H).
        rows: B.
        H: units.
        CELL: the cell's `prepare`.
        BLOCK: elements per program.
    """
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < rows * H
    row = offset // H
    unit = offset % H
    z1 = _pre_activation(gates, product, bias, row, unit, mask, H, 1, 3, 1, 2)
    z2 = _pre_activation(gates, product, bias, row, unit, mask, H, 2, 3, 1, 2)
    g1, g2, s = CELL(z1, z2, load(before, offset, mask))
    store_gate(gates, g1, row, unit, mask, H, 1, 3, 3)
    store_gate(gates, g2, row, unit, mask, H, 2, 3, 3)
    store(operand, offset, s, mask)


@triton.jit(do_not_specialize=["t"])
def forward(
    gates, product, peephole_product, bias, peephole, before_first, before_second, after_first,
    after_second, hidden, operand, operand_second, lengths, t, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
    PARTS: tl.constexpr, PEEPHOLE: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Activations and the state after a step, from pre-activations and the state before it.

    Args:
        gates: (B, G·H): input products; overwritten with the activations.
        product: (B, COUNT·H): the recurrent product.
        peephole_product: (B, 3H): the product of full peepholes.
        bias: (G·H).
        peephole: (3H): diagonal peepholes.
        before_first: (B, H): the first part of the state before the step.
        before_second: (B, H): the second part.
        after_first: output, (B, H): the first part of the state after the step.
        after_second: output, (B, H): the second part.
        hidden: output, (B, H): the hidden state, in the dtype of the inputs.
        operand: output, (B, H): the first part, as operand of the next product.
        operand_second: output, (B, H): the second part, as operand of full peepholes.
        lengths: steps of each row, (B,).
        t: time of the step.
        rows: B.
        H: units.
        CELL: the cell's `forward`.
        LENGTHS: whether rows have lengths.
        COUNT: gates of the product, the first ones; the others already are activations.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, full or diagonal.
        TANH: whether the cell's activation is tanh; see `kernels.variant`.
        BLOCK: elements per program.
    """
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < rows * H
    row = offset // H
    unit = offset % H
    first = load(before_first, offset, mask)
    second = load(before_second, offset, mask)
    z0 = _pre_activation(gates, product, bias, row, unit, mask, H, 0, GATES, 0, COUNT)
    z1 = _pre_activation(gates, product, bias, row, unit, mask, H, 1, GATES, 0, COUNT)
    z2 = _pre_activation(gates, product, bias, row, unit, mask, H, 2, GATES, 0, COUNT)
    z3 = _pre_activation(gates, product, bias, row, unit, mask, H, 3, GATES, 0, COUNT)
    z1 += _peephole_term(peephole_product, peephole, second, row, unit, mask, H, 1, PEEPHOLE)
    z2 += _peephole_term(peephole_product, peephole, second, row, unit, mask, H, 2, PEEPHOLE)
    z3 += _peephole_term(peephole_product, peephole, second, row, unit, mask, H, 3, PEEPHOLE)
    g0, g1, g2, g3, new_first, new_second = CELL(z0, z1, z2, z3, first, second, TANH)
    new_first, new_second, output = keep_ended(
        lengths, row, t, rows, new_first, new_second, first, second, LENGTHS
    )
    store_gate(gates, g0, row, unit, mask, H, 0, GATES, COUNT)
    store_gate(gates, g1, row, unit, mask, H, 1, GATES, COUNT)
    store_gate(gates, g2, row, unit, mask, H, 2, GATES, COUNT)
    store_gate(gates, g3, row, unit, mask, H, 3, GATES, COUNT)
    store(after_first, offset, new_first, mask)
    store(hidden, offset, output, mask)
    store(operand, offset, new_first, mask)
    if PARTS > 1:
        store(after_second, offset, new_second, mask)
    if PEEPHOLE == "full":
        store(operand_second, offset, new_second, mask)


@triton.jit(do_not_specialize=["t"])
def backward(
    gates, product, product_second, peephole, before_first, before_second, after_second,
    grad_hidden, dz, delta_first, delta_second, lengths, t, rows, H,
    CELL: tl.constexpr, LENGTHS: tl.constexpr, COUNT: tl.constexpr, GATES: tl.constexpr,
    PARTS: tl.constexpr, PEEPHOLE: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dz of a step and δ of the state before it, from δ of the state after it.

    Args:
        gates: (B, G·H): activations.
        product: (B, H): Σ_g dz_g W_ga of the following step.
        product_second: (B, H): Σ_g dz_g P_g of the following step, with full peepholes.
        peephole: (3H): diagonal peepholes.
        before_first: (B, H): the first part of the state before the step.
        before_second: (B, H): the second part.
        after_second: (B, H): the second part of the state after the step.
        grad_hidden: (B, H): gradient of the hidden state.
        dz: output, (B, G·H): gradients at the pre-activations.
        delta_first: (B, H): δ of the first part of the state after the step, without `product`;
            overwritten with that of the state before it, without the product of this step.
        delta_second: (B, H): the same for the second part.
        lengths: steps of each row, (B,).
        t: time of the step.
        rows: B.
        H: units.
        CELL: the cell's `backward`.
        LENGTHS: whether rows have lengths.
        COUNT: gates whose dz CELL computes, the first ones.
        GATES: G.
        PARTS: parts of the state.
        PEEPHOLE: none, full or diagonal.
        TANH: whether the cell's activation is tanh; see `kernels.variant`.
        BLOCK: elements per program.
    """
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < rows * H
    row = offset // H
    unit = offset % H
    d_after = load(delta_first, offset, mask) + load(product, offset, mask)
    d_after_second = load(delta_second, offset, mask)
    if PEEPHOLE == "full":
        d_after_second += load(product_second, offset, mask)
    g0 = load_gate(gates, row, unit, mask, H, 0, GATES)
    g1 = load_gate(gates, row, unit, mask, H, 1, GATES)
    g2 = load_gate(gates, row, unit, mask, H, 2, GATES)
    g3 = load_gate(gates, row, unit, mask, H, 3, GATES)
    dz0, dz1, dz2, dz3, d_before, d_before_second = CELL(
        g0, g1, g2, g3, load(before_first, offset, mask), load(before_second, offset, mask),
        load(after_second, offset, mask), d_after + load(grad_hidden, offset, mask), d_after_second,
        TANH,
    )  # fmt: skip
    if PEEPHOLE == "diagonal":
        d_before_second += _peephole_term(dz, peephole, dz1, row, unit, mask, H, 1, PEEPHOLE)
        d_before_second += _peephole_term(dz, peephole, dz2, row, unit, mask, H, 2, PEEPHOLE)
        d_before_second += _peephole_term(dz, peephole, dz3, row, unit, mask, H, 3, PEEPHOLE)
    dz0, dz1, dz2, dz3, d_before, d_before_second = mask_ended(
        lengths, row, t, rows, dz0, dz1, dz2, dz3, d_before, d_before_second, d_after,
        d_after_second, LENGTHS,
    )  # fmt: skip
    store_gate(dz, dz0, row, unit, mask, H, 0, GATES, COUNT)
    store_gate(dz, dz1, row, unit, mask, H, 1, GATES, COUNT)
    store_gate(dz, dz2, row, unit, mask, H, 2, GATES, COUNT)
    store_gate(dz, dz3, row, unit, mask, H, 3, GATES, COUNT)
    store(delta_first, offset, d_before, mask)
    if PARTS > 1:
        store(delta_second, offset, d_before_second, mask)


@triton.jit
def finish(gates, product, before, dz, delta, rows, H, CELL: tl.constexpr, BLOCK: tl.constexpr):
    """The second half of a GRU backward step: dz_r.

    Args:
        gates: (B, 3H): activations.
        product: (B, H): ds = dz_c W_cc.
        before: (B, H): the state before the step.
        dz: (B, 3H): output dz_r.
        delta: (B, H): δ of the state before the step; ds ∘ Γr is added.
        rows: B.
        H: units.
        CELL: the cell's `finish`.
        BLOCK: elements per program.
    """
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < rows * H
    row = offset // H
    unit = offset % H
    relevance = load_gate(gates, row, unit, mask, H, 2, 3)
    dz2, ds_relevance = CELL(load(product, offset, mask), relevance, load(before, offset, mask))
    store_gate(dz, dz2, row, unit, mask, H, 2, 3, 3)
    store(delta, offset, load(delta, offset, mask) + ds_relevance, mask)
