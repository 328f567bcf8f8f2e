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
def load_rows(pointer, row, k, rows, H, stride):
    """What other programs wrote just now of all units, (ROWS, K).

    It is read past the nearest cache, which does not see what they write.
    """
    mask = (row < rows)[:, None] & (k < H)[None, :]
    at = row[:, None] * stride + k[None, :]
    return tl.load(pointer + at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def weights_from(matrix, k, unit, block, H, BLOCKS: tl.constexpr):
    """The weights from all units to a unit in a block of a matrix, for each column, (K, N).

    Args:
        matrix: (BLOCKS·H, H).
        k: all units, (K).
        unit: of each column, (N).
        block: of each column, (N); there are no weights in one that does not exist.
        H: units.
        BLOCKS: blocks.
    """
    is_there = (unit < H) & (block >= 0) & (block < BLOCKS)
    at = (block * H + unit)[None, :] * H + k[:, None]
    return tl.load(matrix + at, mask=(k < H)[:, None] & is_there[None, :], other=0.0)


@triton.jit
def weights_to(matrix, k, unit, H, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The weights from a block of all units to some units, (K, UNITS); 0 if there is no block."""
    mask = (k < H)[:, None] & (unit < H)[None, :] & (BLOCK < BLOCKS)
    return tl.load(matrix + (BLOCK * H + k)[:, None] * H + unit[None, :], mask=mask, other=0.0)


@triton.jit
def meet(counter, arrivals):
    """Waits until so many arrivals were counted; what was written before is seen after."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
