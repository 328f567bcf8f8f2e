"""The one door to the engines: shapes are checked here once, and the engine is chosen."""

import torch
from torch import Tensor

from lmtrain.cells import Cell, CellState, DifferentiatedCell, Weights
from lmtrain.errors import ConfigError
from lmtrain.kernels import operator, plain, reference


def engine(cell: Cell) -> str:
    """The engine that runs a cell: native, triton, plain (torch) or reference (autograd)."""
    if _by_hand(cell) is None:
        return "reference"
    has_kernel = operator.kernel(cell, cell.weight_input) is not None
    return operator.engine(cell.weight_input) if has_kernel else "plain"


def _by_hand(cell: Cell) -> DifferentiatedCell | None:
    """The cell if its backward is given by hand for all that it computes."""
    return cell if isinstance(cell, DifferentiatedCell) else None


def scan(
    cell: Cell,
    inputs: Tensor,
    state: CellState | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
    weights: Weights | None = None,
) -> tuple[Tensor, CellState]:
    """The hidden states of a cell over time, and its last state.

    Args:
        cell: the cell.
        inputs: (T, B, I), T and B at least 1; in bf16, hidden states are bf16 too, and products
            take bf16 operands where the engine has them.
        state: the state before the first step, each part (B, H); None for zeros.
        lengths: steps of each row, (B,), 1 to T; None for T. Beyond them the state stands still
            and the hidden state is 0.
        reverse: whether time runs from T to 1.
        weights: all parameters by name, in place of the cell's own: some dropped, for example.

    Returns:
        Hidden states (T, B, H) in the order of the inputs, and the last state.

    Raises:
        ConfigError: a shape that does not fit the cell.

    Example:
        >>> import torch
        >>> from lmtrain.cells import LSTM
        >>> hidden, (a, c) = scan(LSTM(4, 8), torch.zeros(5, 2, 4))
        >>> hidden.shape, c.shape
        (torch.Size([5, 2, 8]), torch.Size([2, 8]))
    """
    if inputs.dim() != 3 or 0 in inputs.shape or inputs.shape[2] != cell.input_size:
        raise ConfigError(
            f"scan: inputs {tuple(inputs.shape)} are not (T, B, I) with I = {cell.input_size}"
        )
    batch_size = inputs.shape[1]
    if state is None:
        state = cell.zero_state(batch_size)
    expected = (batch_size, cell.hidden_size)
    if [part.shape for part in state] != [expected] * len(cell.state_names):
        shapes = [tuple(part.shape) for part in state]
        raise ConfigError(f"scan: state {shapes} is not {len(cell.state_names)} x {expected}")
    if lengths is not None and lengths.shape != (batch_size,):
        raise ConfigError(f"scan: lengths {tuple(lengths.shape)} are not ({batch_size},)")
    by_hand = _by_hand(cell)
    # A single step would pay more for packing its weights than the native scan saves.
    if by_hand is not None and lengths is None and len(inputs) > 1:
        name = operator.kernel(cell, inputs)
        if name is not None:
            return operator.scan(name, by_hand, inputs, state, reverse=reverse, weights=weights)
    if inputs.dtype == torch.bfloat16:
        inputs = inputs.float()
        hidden, state = scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
        return hidden.bfloat16(), state
    if by_hand is not None:
        return plain.scan(by_hand, inputs, state, lengths, reverse=reverse, weights=weights)
    return reference.scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
