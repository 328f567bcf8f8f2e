"""The scan of cells with kernels and its backward.

In traced programs they are the PyTorch operators `lmtrain::scan` and `lmtrain::scan_backward`.

Input products and weight gradients are single products over all time steps; the kernels (C++ on the
CPU, Triton on CUDA) run the loop over time. Without kernels the plain engine runs it, so that
compiled and exported models work everywhere. With bf16 inputs, the operands of all products and the
stored activations are bf16; accumulation, states and weight gradients are fp32.

Rows with lengths are packed for the CPU kernels (`layout`), in tensors of the padded size; the CUDA
kernels take padded rows and skip the padding.

T steps, B rows, I input_size, H hidden_size, G gates, S parts of the state.

Kept for backward: activations, T·B·G·H scalars of the inputs' dtype, and states, (T + 1)·B·H fp32
scalars for each part. Cost: T·B·G·H·(I + H) multiply-adds forward, with full peepholes 3·T·B·H·H
more, and twice that backward. Not supported: second derivatives.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.cells import Cell, CellState, DifferentiatedCell, Weights
from lmtrain.errors import ConfigError
from lmtrain.kernels import plain
from lmtrain.kernels.custom_op import CustomOp
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.layout import Layout, Packed, Padded
from lmtrain.kernels.native import scan as native_scan
from lmtrain.kernels.products import matmul, operand
from lmtrain.kernels.triton import scan as triton_scan
from lmtrain.kernels.variant import VARIANTS, index_of

_KERNELS: dict[str, Callable[..., None]] = {
    "native": native_scan.scan, "triton": triton_scan.scan
}  # fmt: skip


def scan(
    cell: Cell,
    inputs: Tensor,
    state: CellState,
    lengths: Tensor | None,
    *,
    reverse: bool,
    weights: Weights | None = None,
) -> tuple[Tensor, CellState]:
    """See `reference.scan`; for a cell with a variant in VARIANTS.

    The hidden states have the dtype of the inputs.

    Raises:
        ConfigError: a cell without a kernel; with native kernels also a length outside 1 to T.
    """
    variant = index_of(cell)
    if variant is None:
        raise ConfigError(f"the cell {type(cell).__name__} has no kernel")
    weights = weights or dict(cell.named_parameters())
    hidden, last, _, _ = _scan(
        inputs.contiguous(),
        torch.stack(state),
        operand(weights["weight_input"], inputs.dtype),
        weights["bias"],
        weights["weight_recurrent"],
        weights.get("weight_peephole"),
        lengths,
        variant,
        reverse,
    )
    return hidden, last.unbind()


def _forward(
    inputs: Tensor,
    state: Tensor,
    weight_input: Tensor,
    bias: Tensor,
    weight_recurrent: Tensor,
    weight_peephole: Tensor | None,
    lengths: Tensor | None,
    variant: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (T, B, H), final state (S, B, H), activations and history of the state.

    Activations are stored in a tensor (T, B, G·H), the history in one of (S, T + 1, B, H), both in
    the layout that `_layout` selects.
    """
    engine = kernels_for(inputs, bias)
    if engine is None:
        cell = _cell(variant, weight_recurrent)
        order = plain.StepOrder(len(inputs), lengths, reverse)
        gates = F.linear(inputs.to(bias.dtype), weight_input.to(bias.dtype), bias)
        weights = _recurrent(weight_recurrent, weight_peephole)
        states, final = plain.forward(cell, gates, state.unbind(), weights, order)
        hidden = order.mask_ended(states[0][order.current]).to(inputs.dtype, copy=True)
        return hidden, torch.stack(final), gates.to(inputs.dtype), torch.stack(states)
    layout = _layout(engine, lengths, len(inputs), reverse=reverse)
    gates = layout.linear(inputs, weight_input)
    history = state.new_empty(len(state), len(inputs) + 1, *state.shape[1:])
    states = [layout.initialize(*pair) for pair in zip(history, state, strict=True)]
    lines = layout.view(gates)
    hidden = inputs.new_empty(*lines.shape[:-1], weight_recurrent.shape[1])
    kernel = _kernel(engine, variant, weight_recurrent, weight_peephole)
    kernel(gates=lines, bias=bias.contiguous(), history=states, hidden=hidden, **layout.options)
    last = torch.stack([layout.final(part) for part in states])
    return layout.pad(hidden), last, gates, history


def _layout(engine: str, lengths: Tensor | None, steps: int, *, reverse: bool) -> Layout:
    """Packed for native kernels and rows with lengths; CUDA would have to synchronize for it."""
    if engine == "native" and lengths is not None:
        return Packed(lengths, steps, reverse=reverse)
    return Padded(steps, lengths, reverse=reverse)


def _kernel(
    engine: str, variant: int, weight_recurrent: Tensor, weight_peephole: Tensor | None
) -> Callable[..., None]:
    """The kernel of a variant, with its recurrent weights bound."""
    return functools.partial(
        _KERNELS[engine],
        VARIANTS[variant],
        recurrent=weight_recurrent.contiguous(),
        peephole=None if weight_peephole is None else weight_peephole.contiguous(),
    )


def _cell(variant: int, weight_recurrent: Tensor) -> DifferentiatedCell:
    return VARIANTS[variant].instance(weight_recurrent.shape[1])


def _recurrent(weight_recurrent: Tensor, weight_peephole: Tensor | None) -> dict[str, Tensor]:
    """The recurrent parameters by name."""
    weights = {"weight_recurrent": weight_recurrent}
    if weight_peephole is not None:
        weights["weight_peephole"] = weight_peephole
    return weights


def _fake_forward(
    inputs: Tensor,
    state: Tensor,
    weight_input: Tensor,
    bias: Tensor,
    weight_recurrent: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del weight_input, bias, others
    steps, rows, _ = inputs.shape
    return (
        inputs.new_empty(steps, rows, weight_recurrent.shape[1]),
        state.new_empty(state.shape),
        inputs.new_empty(steps, rows, weight_recurrent.shape[0]),
        state.new_empty(len(state), steps + 1, *state.shape[1:]),
    )


def _gradients(
    grad_hidden: Tensor,
    grad_last: Tensor,
    inputs: Tensor,
    activations: Tensor,
    history: Tensor,
    weight_input: Tensor,
    weight_recurrent: Tensor,
    weight_peephole: Tensor | None,
    lengths: Tensor | None,
    variant: int,
    reverse: bool,
    needs_inputs: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of the initial state, (S, B, H); of the parameters; of the inputs.

    The parameters are weight_input, bias, weight_recurrent and, if there is one, weight_peephole.
    The last list is empty unless `needs_inputs`.
    """
    weights = _recurrent(weight_recurrent, weight_peephole)
    engine = kernels_for(activations, weight_recurrent)
    if engine is None:
        cell = _cell(variant, weight_recurrent)
        order = plain.StepOrder(len(inputs), lengths, reverse)
        dtype = weight_recurrent.dtype
        gates, upstream = activations.to(dtype), grad_hidden.to(dtype)
        dz, initial = plain.backward(
            cell, gates, history.unbind(), weights, order, upstream, grad_last.unbind()
        )
        grad_bias, grad_state = dz.sum((0, 1)), torch.stack(initial)
        dz = dz.to(activations.dtype)
        layout: Layout = Padded(len(inputs), lengths, reverse=reverse)
        states = list(history)
    else:
        layout = _layout(engine, lengths, len(inputs), reverse=reverse)
        activations, states = layout.view(activations), [layout.view(part) for part in history]
        dz = torch.empty_like(activations)
        initial = tuple(layout.sort(part) for part in grad_last)
        grad_bias = weight_recurrent.new_zeros(activations.shape[-1])
        _kernel(engine, variant, weight_recurrent, weight_peephole)(
            gates=activations,
            history=states,
            grad_hidden=layout.pack(grad_hidden),
            dz=dz,
            grad_bias=grad_bias,
            grad_state=initial,
            **layout.options,
        )
        grad_state = torch.stack([layout.unsort(part) for part in initial])
    grad_inputs = [layout.pad(matmul(dz, weight_input))] if needs_inputs else []
    dz, activations = dz.flatten(0, -2), activations.flatten(0, -2)
    previous = tuple(layout.previous(part).flatten(0, -2).unsqueeze(0) for part in states)
    gradients = VARIANTS[variant].cell.recurrent_gradients(
        dz.unsqueeze(0), activations.unsqueeze(0), previous, weights
    )
    grad_recurrent = [gradients[name] for name in weights]
    flat = layout.pack(inputs).flatten(0, -2)
    grad_weight = matmul(dz.T, flat, dtype=weight_input.dtype)
    return grad_state, [grad_weight, grad_bias, *grad_recurrent], grad_inputs


def _fake_gradients(
    grad_hidden: Tensor,
    grad_last: Tensor,
    inputs: Tensor,
    activations: Tensor,
    history: Tensor,
    weight_input: Tensor,
    weight_recurrent: Tensor,
    weight_peephole: Tensor | None,
    lengths: Tensor | None,
    variant: int,
    reverse: bool,
    needs_inputs: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    del grad_hidden, activations, history, lengths, variant, reverse
    parameters = [weight_input, weight_recurrent[:, 0], weight_recurrent]
    parameters += [] if weight_peephole is None else [weight_peephole]
    return (
        grad_last.new_empty(grad_last.shape),
        [weight.new_empty(weight.shape) for weight in parameters],
        [inputs.new_empty(inputs.shape)] if needs_inputs else [],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, _, weight_input, _, recurrent, peephole, lengths, ctx.variant, ctx.reverse = inputs
    hidden, _, activations, history = output
    ctx.save_for_backward(x, weight_input, recurrent, peephole, lengths, activations, history)
    # Activations and history are not differentiable; autograd need not materialize zeros for them.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(activations, history)
    ctx.hidden_shape = hidden.shape


@once_differentiable
def _backward(
    ctx: Any, grad_hidden: Tensor | None, grad_last: Tensor | None, *_unused: None
) -> tuple[Tensor | None, ...]:
    x, weight_input, recurrent, peephole, lengths, activations, history = ctx.saved_tensors
    if grad_hidden is None:
        grad_hidden = activations.new_zeros(ctx.hidden_shape)
    if grad_last is None:
        grad_last = torch.zeros_like(history[:, 0])
    grad_state, (grad_weight, grad_bias, *grad_recurrent), grad_inputs = _scan_backward(
        *(grad_hidden, grad_last, x, activations, history, weight_input, recurrent, peephole),
        *(lengths, ctx.variant, ctx.reverse, ctx.needs_input_grad[0]),
    )
    return (
        grad_inputs[0] if grad_inputs else None,
        grad_state,
        *(grad_weight, grad_bias, grad_recurrent[0]),
        grad_recurrent[1] if len(grad_recurrent) > 1 else None,
        *(None, None, None),  # lengths, variant, reverse
    )


_scan = CustomOp("scan", _forward, _fake_forward)
_scan.differentiate(_setup_context, _backward)
_scan_backward = CustomOp("scan_backward", _gradients, _fake_gradients)
