"""A cell over time: shapes are checked and the engine is chosen here, once."""

from typing import Literal, cast

import torch
from torch import Tensor

from lmtrain.cells import Cell, CellState, DifferentiatedCell, Weights
from lmtrain.errors import ConfigError
from lmtrain.kernels import operator, plain, reference
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.variant import index_of

Engine = Literal["native", "triton", "operator", "plain", "reference"]


def engine(cell: Cell, inputs: Tensor | None = None, *, is_stepwise: bool = False) -> Engine:
    """The engine that runs a cell.

    Args:
        cell: the cell.
        inputs: (T, B, I); None for inputs of the cell's own precision, where the cell is.
        is_stepwise: whether there is a single step, for which packing the weights costs a kernel
            more than it saves.

    Returns:
        native and triton are kernels; plain is the hand-derived backward in torch; reference is
        autograd, for a cell without one. While a model is compiled or exported, operator stands for
        what has a kernel, and chooses when it runs; all else is then reference.
    """
    has_kernel = not is_stepwise and index_of(cell) is not None
    if torch.compiler.is_compiling():
        return "operator" if has_kernel else "reference"
    if has_kernel:
        kernels = kernels_for(cell.weight_input if inputs is None else inputs, cell.bias)
        if kernels is not None:
            return kernels
    return "plain" if cell.is_differentiated else "reference"


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
    # Not len, which makes a constant of T in an exported program.
    chosen = engine(cell, inputs, is_stepwise=inputs.shape[0] == 1)
    if chosen in {"native", "triton", "operator"}:
        return operator.scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
    if inputs.dtype == torch.bfloat16:
        inputs = inputs.float()
        hidden, state = scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
        return hidden.bfloat16(), state
    if chosen == "plain":
        by_hand = cast("DifferentiatedCell", cell)
        return plain.scan(by_hand, inputs, state, lengths, reverse=reverse, weights=weights)
    return reference.scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
