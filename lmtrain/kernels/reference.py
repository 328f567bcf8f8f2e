"""The reference engine: a Python loop over `Cell.step`, differentiated by autograd.

Runs every cell; tests compare the other engines with it. autograd keeps every intermediate tensor
of every step.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from lmtrain.cells import Cell, CellState, Weights


def scan(
    cell: Cell,
    inputs: Tensor,
    state: CellState,
    lengths: Tensor | None,
    *,
    reverse: bool,
    weights: Weights | None = None,
) -> tuple[Tensor, CellState]:
    """Hidden states of a cell over time, and its final state.

    Args:
        cell: the cell.
        inputs: (T, B, I).
        state: the initial state, each part (B, H).
        lengths: steps of each row, (B,), 1 to T; None for T. In padding the state does not change
            and the hidden state is 0.
        reverse: whether time runs from T to 1.
        weights: all parameters by name, used in place of those of the cell.

    Returns:
        Hidden states (T, B, H) in the order of the inputs, and the final state, each part (B, H).
    """
    steps = range(len(inputs))
    hidden: list[Tensor] = [inputs.new_empty(0)] * len(inputs)
    for t in reversed(steps) if reverse else steps:
        next_state: CellState
        if weights is None:
            next_state = cell(inputs[t], state)
        else:
            next_state = functional_call(cell, dict(weights), (inputs[t], state))
        if lengths is None:
            state = next_state
            hidden[t] = state[0]
        else:
            is_running = (t < lengths).unsqueeze(1)
            state = tuple(
                torch.where(is_running, new, old)
                for new, old in zip(next_state, state, strict=True)
            )
            hidden[t] = torch.where(is_running, state[0], 0)
    return torch.stack(hidden), state
