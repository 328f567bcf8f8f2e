"""Cells whose scan has kernels: `lmtrain::scan`, with its backward, as operators of torch.

Input products and weight gradients are single products over all time steps, done by torch; the
kernels, C++ on the processor and Triton on CUDA, run what depends on time. Precision follows the
inputs: with bf16 inputs the operands of all products and the kept activations are bf16; sums, state
and gradients of weights are fp32.

T steps, B rows, I input_size, H hidden_size, G gates.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain import cells
from lmtrain.cells import Cell, CellState, DifferentiatedCell, Weights, product_over_time
from lmtrain.kernels.native import library
from lmtrain.kernels.triton import engine as triton
from lmtrain.kernels.triton import scan as scan_in_triton


def kernel(cell: Cell, inputs: Tensor) -> str | None:
    """The name of the kernel that runs this cell on these inputs; None if none does."""
    registered = cells.name_of(cell)
    if registered is None or cell.bias.dtype != torch.float32:
        return None
    name = " ".join([registered, *(getattr(cell, option) for option in cell.options)])
    if engine(inputs) == "triton":
        return name if triton.runs(inputs) and scan_in_triton.has(name) else None
    if inputs.device.type != "cpu" or library.absence():
        return None
    is_bf16 = inputs.dtype == torch.bfloat16 and library.has_bf16()
    has_kind = is_bf16 or inputs.dtype == torch.float32
    return name if has_kind and library.cell_number(name) >= 0 else None


def engine(inputs: Tensor) -> str:
    """Whose kernels run where these inputs are: native or triton."""
    return "triton" if inputs.is_cuda or library.choice() == "triton" else "native"


def _run(inputs: Tensor) -> Callable[..., None]:
    return scan_in_triton.scan if engine(inputs) == "triton" else library.scan


def scan(
    name: str,
    cell: DifferentiatedCell,
    inputs: Tensor,
    state: CellState,
    *,
    reverse: bool,
    weights: Weights | None = None,
) -> tuple[Tensor, CellState]:
    """As `reference.scan` without lengths, by the kernel of that name.

    The hidden states have the inputs' precision.
    """
    weights = weights or dict(cell.named_parameters())
    # An operator of torch costs a second when it is first called; without gradients none is needed.
    run = _scan if torch.is_grad_enabled() else _forward
    hidden, last, _, _ = run(
        inputs.contiguous(),
        list(state),
        weights["weight_input"].to(inputs.dtype),
        weights["bias"],
        weights["weight_recurrent"],
        weights.get("weight_peephole"),
        name,
        reverse,
    )
    return hidden, tuple(last)


def _forward(
    inputs: Tensor,
    state: list[Tensor],
    weight_input: Tensor,
    bias: Tensor,
    weight_recurrent: Tensor,
    weight_peephole: Tensor | None,
    name: str,
    reverse: bool,
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Hidden states, last state, activations (T, B, G·H) and history, each part (T + 1, B, H)."""
    steps, rows, _ = inputs.shape
    gates = F.linear(inputs, weight_input)
    history = [part.new_empty(steps + 1, *part.shape) for part in state]
    for states, part in zip(history, state, strict=True):
        states[steps if reverse else 0] = part
    hidden = inputs.new_empty(steps, rows, weight_recurrent.shape[1])
    _run(inputs)(
        name,
        gates=gates,
        recurrent=weight_recurrent.contiguous(),
        peephole=None if weight_peephole is None else weight_peephole.contiguous(),
        bias=bias.contiguous(),
        history=history,
        reverse=reverse,
        hidden=hidden,
    )
    last = [states[0 if reverse else steps].clone() for states in history]
    return hidden, last, gates, history


_scan = torch.library.custom_op("lmtrain::scan", _forward, mutates_args=())


@torch.library.custom_op("lmtrain::scan_backward", mutates_args=())
def _scan_backward(
    grad_hidden: Tensor,
    grad_last: list[Tensor],
    activations: Tensor,
    history: list[Tensor],
    weight_recurrent: Tensor,
    weight_peephole: Tensor | None,
    name: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients at the pre-activations (T, B, G·H), of the bias (G·H) and of the first state."""
    dz = torch.empty_like(activations)
    grad_bias = torch.zeros(activations.shape[2], device=activations.device)
    delta = [part.clone(memory_format=torch.contiguous_format) for part in grad_last]
    _run(activations)(
        name,
        gates=activations,
        recurrent=weight_recurrent.contiguous(),
        peephole=None if weight_peephole is None else weight_peephole.contiguous(),
        history=history,
        reverse=reverse,
        grad_hidden=grad_hidden.contiguous(),
        dz=dz,
        grad_bias=grad_bias,
        delta=delta,
    )
    return dz, grad_bias, delta


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, _, weight_input, _, weight_recurrent, weight_peephole, ctx.name, ctx.reverse = inputs
    hidden, _, activations, history = output
    ctx.save_for_backward(
        *(x, weight_input, weight_recurrent, weight_peephole, activations, *history)
    )
    # Nobody differentiates the activations and the history: no zeros are made for them.
    ctx.set_materialize_grads(False)
    ctx.hidden = hidden.shape


def _backward(
    ctx: Any, grad_hidden: Tensor | None, grad_last: list[Tensor | None], *_unused: Any
) -> tuple[Any, ...]:
    x, weight_input, recurrent, peephole, activations, *history = ctx.saved_tensors
    if grad_hidden is None:
        grad_hidden = activations.new_zeros(ctx.hidden)
    dz, grad_bias, grad_state = _scan_backward(
        grad_hidden,
        [
            torch.zeros_like(states[0]) if grad is None else grad
            for grad, states in zip(grad_last, history, strict=True)
        ],
        *(activations, history, recurrent, peephole, ctx.name, ctx.reverse),
    )
    steps = len(x)
    before = slice(1, steps + 1) if ctx.reverse else slice(0, steps)
    previous = tuple(states[before] for states in history)
    weights = {"weight_recurrent": recurrent}
    if peephole is not None:
        weights["weight_peephole"] = peephole
    grad_inputs = dz @ weight_input if ctx.needs_input_grad[0] else None
    # From here on dz only stands in products over time, which take its transpose.
    dz = library.transposed(dz.flatten(0, 1)).T.view_as(dz)
    cell = cast("type[DifferentiatedCell]", cells.cell_class(ctx.name.split()[0]))
    gradients = cell.recurrent_gradients(dz, activations, previous, weights)
    return (
        grad_inputs,
        grad_state,
        product_over_time(dz, x),
        grad_bias,
        gradients["weight_recurrent"].to(recurrent.dtype),
        None if peephole is None else gradients["weight_peephole"].to(peephole.dtype),
        *(None, None),  # name, reverse
    )


torch.library.register_autograd("lmtrain::scan", _backward, setup_context=_setup_context)
