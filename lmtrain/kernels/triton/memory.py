"""What the kernels of both schedules load, store and wait for; matrices lie row after row."""

import triton
import triton.language as tl


@triton.jit
def load(pointer, at, mask):
    """Numbers as fp32; 0 where there are none."""
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, at, values, mask):
    """Puts numbers there in the precision that is kept there."""
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(gates, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr):
    """What stands at a gate; 0 if the cell has no such gate."""
    return load(gates, row * GATES * H + GATE * H + unit, mask & (GATE < GATES))


@triton.jit
def store_gate(gates, values, row, unit, mask, H, GATE: tl.constexpr, GATES: tl.constexpr,
               COUNT: tl.constexpr):  # fmt: skip
    """Puts numbers at a gate, if it is one of the first COUNT."""
    if GATE < COUNT:
        store(gates, row * GATES * H + GATE * H + unit, values, mask)


@triton.jit
def time_of(step, steps, IS_ONWARD: tl.constexpr):
    """The time of a step, counted from the first, or from the last back; never outside of both.

    It has 64 bits: places in tensors of T steps take more than 32.
    """
    step = tl.minimum(step, steps - 1)
    return tl.cast(step if IS_ONWARD else steps - 1 - step, tl.int64)


@triton.jit
def all_units(K: tl.constexpr, SPLIT: tl.constexpr):
    """All units in SPLIT equal parts, (SPLIT, K/SPLIT): each warp multiplies one part of them.

    A product of few rows and columns is one long chain of sums otherwise, the same in each warp.
    """
    return tl.arange(0, SPLIT)[:, None] * (K // SPLIT) + tl.arange(0, K // SPLIT)[None, :]


@triton.jit
def load_all(pointer, row, k, stride):
    """What programs wrote just now of all units, (SPLIT, ROWS, K/SPLIT); all of it can be read.

    It is read past the nearest cache, which does not see what they write.
    """
    return tl.load(pointer + row[None, :, None] * stride + k[:, None, :], cache_modifier=".cg")


@triton.jit
def total(product, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr):
    """The sum of the warps' products (SPLIT, ROWS, COLUMNS): halves of them, brought together."""
    rest = tl.permute(product, (1, 2, 0))
    for halving in tl.static_range(SPLIT.bit_length() - 1):
        one, other = tl.split(tl.reshape(rest, (ROWS, COLUMNS, SPLIT >> (halving + 1), 2)))
        rest = one + other
    return tl.reshape(rest, (ROWS, COLUMNS))


@triton.jit
def weights_from(matrix, k, unit, block, H, BLOCKS: tl.constexpr):
    """The weights from all units to a unit in a block of a matrix, for each column, (·, ·, N).

    Args:
        matrix: (BLOCKS·H, H).
        k: all units, (SPLIT, K/SPLIT).
        unit: of each column, (N).
        block: of each column, (N); there are no weights in one that does not exist.
        H: units.
        BLOCKS: blocks.
    """
    is_there = (unit < H) & (block >= 0) & (block < BLOCKS)
    at = (block * H + unit)[None, None, :] * H + k[:, :, None]
    return tl.load(matrix + at, mask=(k < H)[:, :, None] & is_there[None, None, :], other=0.0)


@triton.jit
def weights_to(matrix, k, unit, H, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The weights from a block of all units to some, (·, ·, UNITS); 0 if there is no block."""
    mask = (k < H)[:, :, None] & (unit < H)[None, None, :] & (BLOCK < BLOCKS)
    at = (BLOCK * H + k)[:, :, None] * H + unit[None, None, :]
    return tl.load(matrix + at, mask=mask, other=0.0)


@triton.jit
def arrive(counter):
    """Counts this program, and with it all that it wrote before."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, arrivals):
    """Waits until so many arrivals were counted; what was written before them is seen after."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
