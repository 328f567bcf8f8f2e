"""A cell over time by an engine and by the reference, for tests that compare both."""

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.cells import Cell, create
from lmtrain.kernels import reference


def make(name: str, options: dict[str, str], input_size: int, hidden_size: int) -> Cell:
    cell = create(name, input_size, hidden_size, options)
    # This scale keeps the state of 33 steps of order 1 for any hidden size.
    cell.initialize(device.generator(3), 0.5 / hidden_size**0.5, 0.5)
    return cell


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=device.generator(seed))


def results(
    run, cell: Cell, inputs: Tensor, state: list[Tensor], reverse: bool, lengths=None
) -> list[Tensor]:
    """Outputs, final state and all gradients, for upstream gradients into outputs and state."""
    inputs = inputs.clone().requires_grad_()
    state = [part.clone().requires_grad_() for part in state]
    hidden, last = run(cell, inputs, tuple(state), reverse, lengths)
    outputs = [hidden, *last]
    upstream = [randn(*out.shape, seed=20 + i).to(out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [inputs, *state, *cell.parameters()], upstream)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def by_reference(cell, inputs, state, reverse, lengths):
    return reference.scan(cell, inputs, state, lengths, reverse=reverse)
