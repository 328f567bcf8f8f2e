"""The scan of a cell over time: checks shapes and selects the engine."""

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
        inputs: (T, B, I); None for inputs of the dtype and on the device of the parameters.
        is_stepwise: whether there is a single step, for which packing the weights costs a kernel
            more time than it saves.

    Returns:
        native or triton: a kernel; plain: the hand-derived backward in PyTorch operations;
        reference: autograd. Under torch.compile and torch.export, operator for a cell with a
        kernel, which selects the kernel at run time, and reference for any other cell.
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
    """Hidden states of a cell over time, and its final state.

    Args:
        cell: the cell.
        inputs: (T, B, I), T and B at least 1; if bf16, hidden states are bf16, and kernels use bf16
            operands in products.
        state: the initial state, each part (B, H); None for zeros.
        lengths: steps of each row, (B,), 1 to T; None for T. In padding the state does not change
            and the hidden state is 0.
        reverse: whether time runs from T to 1.
        weights: all parameters by name, used in place of those of the cell, for example after
            weight dropout.

    Returns:
        Hidden states (T, B, H) in the order of the inputs, and the final state, each part (B, H).

    Raises:
        ConfigError: a shape that does not match the cell; with native kernels also a length
            outside 1 to T.

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
    # inputs.shape, since len(inputs) would make T a constant in an exported program.
    chosen = engine(cell, inputs, is_stepwise=inputs.shape[0] == 1)
    if chosen in {"native", "triton", "operator"}:
        return operator.scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
    if inputs.dtype == torch.bfloat16:
        inputs = inputs.float()
        hidden, state = scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
        return hidden.bfloat16(), state
    if chosen == "plain":
        differentiated = cast("DifferentiatedCell", cell)
        return plain.scan(differentiated, inputs, state, lengths, reverse=reverse, weights=weights)
    return reference.scan(cell, inputs, state, lengths, reverse=reverse, weights=weights)
