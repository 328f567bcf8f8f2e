"""Any cell over time by its `step` and autograd: the truth that faster engines are held to.

Cost: T steps of Python; autograd keeps every intermediate of every step.
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
    """The hidden states of a cell over time, and its last state.

    Args:
        cell: the cell.
        inputs: (T, B, I).
        state: the state before the first step, each part (B, H).
        lengths: steps of each row, (B,), or None for T; beyond them the state stands still and the
            hidden state is 0.
        reverse: whether time runs from T to 1.
        weights: all parameters by name, in place of the cell's own.

    Returns:
        Hidden states (T, B, H) in the order of the inputs, and the last state.
    """
    steps = range(len(inputs))
    hidden: list[Tensor] = [inputs.new_empty(0)] * len(inputs)
    for t in reversed(steps) if reverse else steps:
        following: CellState
        if weights is None:
            following = cell(inputs[t], state)
        else:
            following = functional_call(cell, dict(weights), (inputs[t], state))
        if lengths is None:
            state = following
            hidden[t] = state[0]
        else:
            alive = (t < lengths).unsqueeze(1)
            state = tuple(
                torch.where(alive, new, old) for new, old in zip(following, state, strict=True)
            )
            hidden[t] = torch.where(alive, state[0], 0)
    return torch.stack(hidden), state
