"""Layer normalization and mogrifier rounds, for every cell."""

import pytest
import torch
from numerics import assert_same
from torch.func import functional_call

from lmtrain import device
from lmtrain.cells import Cell, create
from lmtrain.kernels.scan import engine, scan

CELLS = ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"]


def extended(name, **options) -> Cell:
    cell = create(name, 3, 5, options).double()
    cell.initialize(device.generator(1), 0.8, 1.0)
    return cell


def inputs() -> torch.Tensor:
    return torch.randn(6, 2, 3, dtype=torch.float64, generator=device.generator(2))


def normalized(z):
    z = z - z.mean(-1, keepdim=True)
    return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def test_layer_norm_is_that_of_its_equation():
    cell = extended("rnn", layer_norm=True)
    with torch.no_grad():
        cell.gain_input.uniform_(0.5, 1.5, generator=device.generator(3))
        cell.gain_recurrent.uniform_(0.5, 1.5, generator=device.generator(4))
    a = torch.randn(2, 5, dtype=torch.float64, generator=device.generator(5))
    x = inputs()[0]

    (found,) = cell(x, (a,))

    from_input = cell.gain_input * normalized(x @ cell.weight_input.T)
    from_state = cell.gain_recurrent * normalized(a @ cell.weight_recurrent.T)
    assert_same(found, torch.tanh(from_input + from_state + cell.bias))


@pytest.mark.parametrize("name", CELLS)
def test_each_gate_is_normalized_by_itself(name):
    cell = extended(name, layer_norm=True)
    plain, _ = scan(cell, inputs())
    with torch.no_grad():
        for block in cell.weight_input.split(5):
            block.mul_(7.0)

    scaled, _ = scan(cell, inputs())

    # What a gate gets is as large as before, but for the 10⁻⁵ beside the variance.
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-3)
    assert set(cell.gain_input.tolist()) == {1.0}


def test_the_mogrifier_is_that_of_its_equations():
    cell = extended("lstm", mogrifier=3)
    q1, r2, q3 = cell.mogrifier
    a, c = torch.randn(2, 2, 5, dtype=torch.float64, generator=device.generator(5))
    x = inputs()[0]

    found = cell(x, (a, c))

    x = 2 * torch.sigmoid(a @ q1.T) * x
    a = 2 * torch.sigmoid(x @ r2.T) * a
    x = 2 * torch.sigmoid(a @ q3.T) * x
    for part, expected in zip(found, cell.step(x, (a, c)), strict=True):
        assert_same(part, expected)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("options", [{"layer_norm": True}, {"mogrifier": 4}])
def test_every_cell_is_differentiable_with_either(name, options):
    cell = extended(name, **options)
    names, weights = zip(*cell.named_parameters(), strict=True)

    def run(x, *weights):
        return scan(cell, x, weights=dict(zip(names, weights, strict=True)))[0]

    assert engine(cell) == "reference"
    assert torch.autograd.gradcheck(run, (inputs().requires_grad_(), *weights))


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"mogrifier": 2}])
def test_weights_in_place_of_the_cells_own_are_those_used(options):
    cell, other = extended("gru", **options), extended("gru", **options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)

    found, _ = scan(cell, inputs(), weights=dict(other.named_parameters()))

    assert_same(found, scan(other, inputs())[0])
    state = cell.zero_state(2)
    (one,) = functional_call(cell, dict(other.named_parameters()), (inputs()[0], state))
    assert_same(found[0], one)
