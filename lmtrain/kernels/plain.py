"""The plain engine: cells with a hand-derived backward over time, in PyTorch operations.

One product for the inputs of all steps, a loop over time with the recurrent product and the gates,
and after the backward loop one product for each weight gradient. Equations: `lmtrain.cells`.

T steps, B rows, I input_size, H hidden_size, G gates.

Kept for backward: activations, T·B·G·H scalars, and states, (T + 1)·B·H for each part; the local
gradients take about as much again during backward. Cost: T·B·G·H·(I + H) multiply-adds forward,
with full peepholes 3·T·B·H·H more, and twice that backward. Not supported: second derivatives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.cells import CellState, DifferentiatedCell, Weights
from lmtrain.kernels.products import linear, matmul


def scan(
    cell: DifferentiatedCell,
    inputs: Tensor,
    state: CellState,
    lengths: Tensor | None,
    *,
    reverse: bool,
    weights: Weights | None = None,
) -> tuple[Tensor, CellState]:
    """See `reference.scan`; differentiated by the hand-derived backward of the cell."""
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
        order = StepOrder(len(inputs), lengths, reverse)
        activations = linear(inputs, weights["weight_input"], weights["bias"])  # (T, B, G·H)
        history, state = forward(cell, activations, tensors[:parts], weights, order)
        ctx.save_for_backward(inputs, activations, *history, *tensors[parts:])
        ctx.cell, ctx.names, ctx.order = cell, names, order
        hidden = order.mask_ended(history[0][order.current])
        return (hidden, *(part.clone() for part in state))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, *grad_state: Tensor) -> tuple[Any, ...]:
        cell, order = ctx.cell, ctx.order
        parts = len(cell.state_names)
        inputs, activations, *rest = ctx.saved_tensors
        history, weights = rest[:parts], dict(zip(ctx.names, rest[parts:], strict=True))
        dz, grad_state = backward(
            cell, activations, history, weights, order, grad_hidden, grad_state
        )
        previous = tuple(states[order.previous] for states in history)
        gradients = cell.recurrent_gradients(dz, activations, previous, weights)
        flat = dz.flatten(0, 1)  # (T·B, G·H)
        gradients["weight_input"] = matmul(flat.T, inputs.flatten(0, 1))
        gradients["bias"] = flat.sum(0)
        grad_inputs = matmul(dz, weights["weight_input"]) if ctx.needs_input_grad[4] else None
        return (
            *(None, None, None, None, grad_inputs),
            *grad_state,
            *(gradients[name] for name in ctx.names),
        )


def forward(
    cell: DifferentiatedCell,
    activations: Tensor,
    state: CellState,
    weights: Weights,
    order: "StepOrder",
) -> tuple[list[Tensor], CellState]:
    """The history of the state, each part (T + 1, B, H), and the final state, each part (B, H).

    Args:
        cell: the cell.
        activations: W_gx x + b_g of all steps, (T, B, G·H); overwritten with the activations.
        state: the initial state, each part (B, H).
        weights: the parameters by name.
        order: the order of the steps.
    """
    history = [part.new_empty(len(activations) + 1, *part.shape) for part in state]
    for states, part in zip(history, state, strict=True):
        states[order.initial] = part
    for t in order.forward:
        next_state = cell.forward_step(activations[t], state, weights)
        state = order.keep_ended(t, next_state, state)
        for states, part in zip(history, state, strict=True):
            states[order.index_after(t)] = part
    return history, state


def backward(
    cell: DifferentiatedCell,
    activations: Tensor,
    history: Sequence[Tensor],
    weights: Weights,
    order: "StepOrder",
    grad_hidden: Tensor,
    grad_state: CellState,
) -> tuple[Tensor, CellState]:
    """Gradients at the pre-activations, (T, B, G·H), and of the initial state, each part (B, H).

    Args:
        cell: the cell.
        activations: activations of the gates, (T, B, G·H).
        history: what `forward` returned.
        weights: the parameters by name.
        order: the order of the steps.
        grad_hidden: gradients of the hidden states, (T, B, H).
        grad_state: gradient of the final state, each part (B, H).
    """
    previous = tuple(states[order.previous] for states in history)
    current = tuple(states[order.current] for states in history)
    local = cell.local_gradients(activations, previous, current)
    grad_hidden = order.mask_ended(grad_hidden)
    for t in reversed(order.forward):
        grad_state = (grad_state[0] + grad_hidden[t], *grad_state[1:])
        local_t = tuple(factor[t] for factor in local)
        grad_previous = cell.backward_step(grad_state, local_t, weights)
        grad_state = order.keep_ended(t, grad_previous, grad_state)
    return order.mask_ended(local[0]), grad_state


class StepOrder:
    """The order of the steps, and the rows that have not ended at each.

    A history has T + 1 states. If time runs forward, step t reads index t and writes index t + 1;
    if it runs backward, step t reads index t + 1 and writes index t.

    Args:
        steps: T.
        lengths: steps of each row, (B,); None for T.
        reverse: whether time runs from T to 1.
    """

    def __init__(self, steps: int, lengths: Tensor | None, reverse: bool) -> None:
        self.forward = range(steps - 1, -1, -1) if reverse else range(steps)
        self.initial = steps if reverse else 0
        self.previous, self.current = slice(0, steps), slice(1, steps + 1)
        if reverse:
            self.previous, self.current = self.current, self.previous
        self._shift = 0 if reverse else 1
        self._is_running: Tensor | None = None
        if lengths is not None:
            times = torch.arange(steps, device=lengths.device)
            self._is_running = (times.unsqueeze(1) < lengths).unsqueeze(2)  # (T, B, 1)

    def index_after(self, t: int) -> int:
        """The index in a history of the state after step t."""
        return t + self._shift

    def keep_ended(self, t: int, new: CellState, old: CellState) -> CellState:
        """`new`, with `old` in the rows that have ended at step t."""
        if self._is_running is None:
            return new
        is_running = self._is_running[t]
        return tuple(torch.where(is_running, *parts) for parts in zip(new, old, strict=True))

    def mask_ended(self, values: Tensor) -> Tensor:
        """`values` (T, B, ·), with 0 where a row has ended."""
        return values if self._is_running is None else torch.where(self._is_running, values, 0)
