"""Cells with a hand-derived backward over time, in plain torch.

One product for the inputs of all steps, a loop with only the recurrent product and the gates, and
after the backward loop one product for each weight gradient. Kept for backward: the gates'
activations, T·B·G·H numbers, and the states, (T+1)·B·H for each part; the local gradients take
about as much again while backward runs. No second derivatives.

T steps, B rows, I input_size, H hidden_size, G gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.cells import CellState, DifferentiatedCell, Weights


def scan(
    cell: DifferentiatedCell,
    inputs: Tensor,
    state: CellState,
    lengths: Tensor | None,
    *,
    reverse: bool,
    weights: Weights | None = None,
) -> tuple[Tensor, CellState]:
    """As `reference.scan`, with the backward that the cell gives by hand."""
    names, tensors = zip(*(weights or dict(cell.named_parameters())).items(), strict=True)
    hidden, *last = _Scan.apply(  # type: ignore[no-untyped-call]
        cell, names, lengths, reverse, inputs, *state, *tensors
    )
    return hidden, tuple(last)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: DifferentiatedCell,
        names: tuple[str, ...],
        lengths: Tensor | None,
        reverse: bool,
        inputs: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        parts = len(cell.state_names)
        weights = dict(zip(names, tensors[parts:], strict=True))
        time = Time(len(inputs), lengths, reverse)
        activations = F.linear(inputs, weights["weight_input"], weights["bias"])  # (T, B, G·H)
        history, state = forward(cell, activations, tensors[:parts], weights, time)
        ctx.save_for_backward(inputs, activations, *history, *tensors[parts:])
        ctx.cell, ctx.names, ctx.time = cell, names, time
        hidden = time.masked(history[0][time.current])
        return (hidden, *(part.clone() for part in state))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, *grad_state: Tensor) -> tuple[Any, ...]:
        cell, time = ctx.cell, ctx.time
        parts = len(cell.state_names)
        inputs, activations, *rest = ctx.saved_tensors
        history, weights = rest[:parts], dict(zip(ctx.names, rest[parts:], strict=True))
        dz, grad_state = backward(
            cell, activations, history, weights, time, grad_hidden, grad_state
        )
        previous = tuple(states[time.previous] for states in history)
        gradients = cell.recurrent_gradients(dz, activations, previous, weights)
        flat = dz.flatten(0, 1)  # (T·B, G·H)
        gradients["weight_input"] = flat.T @ inputs.flatten(0, 1)
        gradients["bias"] = flat.sum(0)
        grad_inputs = dz @ weights["weight_input"] if ctx.needs_input_grad[4] else None
        return (
            *(None, None, None, None, grad_inputs),
            *grad_state,
            *(gradients[name] for name in ctx.names),
        )


def forward(
    cell: DifferentiatedCell, activations: Tensor, state: CellState, weights: Weights, time: "Time"
) -> tuple[list[Tensor], CellState]:
    """The states before and after each step, each part (T + 1, B, H), and the last state.

    Args:
        cell: the cell.
        activations: W_gx x + b_g of all steps, (T, B, G·H); become the gates' activations.
        state: the state before the first step.
        weights: the parameters by name.
        time: the order of the steps.
    """
    history = [part.new_empty(len(activations) + 1, *part.shape) for part in state]
    for states, part in zip(history, state, strict=True):
        states[time.begin] = part
    for t in time.forward:
        following = cell.forward_step(activations[t], state, weights)
        state = time.held(t, following, state)
        for states, part in zip(history, state, strict=True):
            states[time.after(t)] = part
    return history, state


def backward(
    cell: DifferentiatedCell,
    activations: Tensor,
    history: Sequence[Tensor],
    weights: Weights,
    time: "Time",
    grad_hidden: Tensor,
    grad_state: CellState,
) -> tuple[Tensor, CellState]:
    """Gradients at the pre-activations, (T, B, G·H), and of the first state.

    Args:
        cell: the cell.
        activations: as `forward` leaves them.
        history: as `forward` gives it.
        weights: the parameters by name.
        time: the order of the steps.
        grad_hidden: the gradients of the hidden states, (T, B, H).
        grad_state: the gradients of the last state.
    """
    previous = tuple(states[time.previous] for states in history)
    current = tuple(states[time.current] for states in history)
    local = cell.local_gradients(activations, previous, current)
    grad_hidden = time.masked(grad_hidden)
    for t in reversed(time.forward):
        grad_state = (grad_state[0] + grad_hidden[t], *grad_state[1:])
        local_t = tuple(factor[t] for factor in local)
        grad_state = time.held(t, cell.backward_step(grad_state, local_t, weights), grad_state)
    return time.masked(local[0]), grad_state


class Time:
    """The order of the steps, and which rows take part in each.

    States are kept in T + 1 places; a step at t reads the place before it and writes the one
    after it, in the direction of time.
    """

    def __init__(self, steps: int, lengths: Tensor | None, reverse: bool) -> None:
        self.forward = range(steps - 1, -1, -1) if reverse else range(steps)
        self.begin = steps if reverse else 0
        self.previous, self.current = slice(0, steps), slice(1, steps + 1)
        if reverse:
            self.previous, self.current = self.current, self.previous
        self._shift = 0 if reverse else 1
        self._alive: Tensor | None = None
        if lengths is not None:
            times = torch.arange(steps, device=lengths.device)
            self._alive = (times.unsqueeze(1) < lengths).unsqueeze(2)  # (T, B, 1)

    def after(self, t: int) -> int:
        """The place of the state that step t leaves."""
        return t + self._shift

    def held(self, t: int, following: CellState, state: CellState) -> CellState:
        """`following`, but `state` in the rows that have ended."""
        if self._alive is None:
            return following
        alive = self._alive[t]
        return tuple(
            torch.where(alive, new, old) for new, old in zip(following, state, strict=True)
        )

    def masked(self, values: Tensor) -> Tensor:
        """`values` (T, B, ·), 0 in the rows that have ended."""
        return values if self._alive is None else torch.where(self._alive, values, 0)
