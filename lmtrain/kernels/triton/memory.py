"""Loads, stores, reductions and grid barriers of the kernels; matrices are row-major."""

import triton
import triton.language as tl


@triton.jit
def load(pointer, offset, mask):
    """Elements as fp32; 0 where `mask` is false."""
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, offset, values, mask):
    """Stores values in the dtype of the tensor."""
    tl.store(pointer + offset, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(gates, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr):
    """Elements of a gate; 0 if the cell has no such gate."""
    return load(gates, row * GATES * H + GATE * H + unit, mask & (GATE < GATES))


@triton.jit
def store_gate(gates, values, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr,
               COUNT: tl.constexpr):  # fmt: skip
    """Stores the elements of a gate, if it is one of the first COUNT."""
    if GATE < COUNT:
        store(gates, row * GATES * H + GATE * H + unit, values, mask)


@triton.jit
def time_index(step, steps, IS_FORWARD: tl.constexpr):
    """The time t of a step, at most T − 1, counted backward from T − 1 unless IS_FORWARD.

    64 bits, since offsets into tensors of T steps exceed 32 bits.
    """
    step = tl.minimum(step, steps - 1)
    return tl.cast(step if IS_FORWARD else steps - 1 - step, tl.int64)


@triton.jit
def split_units(K: tl.constexpr, SPLIT: tl.constexpr):
    """Indices of K units in SPLIT equal parts, (SPLIT, K/SPLIT): split-K, one part per warp.

    Without the split every warp would compute the whole sum of a product with few rows and columns.
    """
    return tl.arange(0, SPLIT)[:, None] * (K // SPLIT) + tl.arange(0, K // SPLIT)[None, :]


@triton.jit
def load_operand(pointer, row, k, stride):
    """The operand that the programs wrote, (SPLIT, ROWS, K/SPLIT); it is padded, so no mask.

    Bypasses the L1 cache, which is not coherent with the stores of other programs.
    """
    return tl.load(pointer + row[None, :, None] * stride + k[:, None, :], cache_modifier=".cg")


@triton.jit
def reduce_splits(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr):
    """The sum over SPLIT of partial products (SPLIT, ROWS, COLUMNS), by a tree of halves."""
    partial = tl.permute(product, (1, 2, 0))
    for halving in tl.static_range(SPLIT.bit_length() - 1):
        even, odd = tl.split(tl.reshape(partial, (ROWS, COLUMNS, SPLIT >> (halving + 1), 2)))
        partial = even + odd
    return tl.reshape(partial, (ROWS, COLUMNS))


@triton.jit
def load_weights(matrix, k, unit, block, H, BLOCKS: tl.constexpr):
    """Rows of a weight matrix as columns, W[block·H + unit, k], (SPLIT, K/SPLIT, N).

    Args:
        matrix: W, (BLOCKS·H, H).
        k: the result of `split_units`, (SPLIT, K/SPLIT).
        unit: unit of each column, (N).
        block: row block of each column, (N); outside 0 to BLOCKS − 1 the weights are 0.
        H: units.
        BLOCKS: row blocks of the matrix.
    """
    is_valid = (unit < H) & (block >= 0) & (block < BLOCKS)
    offset = (block * H + unit)[None, None, :] * H + k[:, :, None]
    mask = (k < H)[:, :, None] & is_valid[None, None, :]
    return tl.load(matrix + offset, mask=mask, other=0.0)


@triton.jit
def load_weights_transposed(matrix, k, unit, H, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """W[BLOCK·H + k, unit], (SPLIT, K/SPLIT, UNITS); 0 if the matrix has no such block."""
    mask = (k < H)[:, :, None] & (unit < H)[None, None, :] & (BLOCK < BLOCKS)
    offset = (BLOCK * H + k)[:, :, None] * H + unit[None, None, :]
    return tl.load(matrix + offset, mask=mask, other=0.0)


@triton.jit
def arrive(counter):
    """Arrives at a grid barrier; releases all that this program stored before."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, arrivals):
    """Waits for `arrivals` programs at a grid barrier; what they stored before is visible after."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
