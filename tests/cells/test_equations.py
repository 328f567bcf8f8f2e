"""Each cell against a NumPy implementation of the notes' equations, and against torch.nn."""

import numpy as np
import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.cells import GRU, LSTM, RNN, Cell, PeepholeLSTM, SimpleGRU
from lmtrain.kernels import plain

H, IN, B, T = 5, 3, 2, 6


def initialized(cell: Cell) -> Cell:
    cell.double().initialize(device.generator(1), 0.7, 0.0)
    return cell


def inputs() -> torch.Tensor:
    return torch.randn(T, B, IN, dtype=torch.float64, generator=device.generator(2))


def weights(cell: Cell) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each gate W_ga, W_gx and b_g."""
    blocks = {}
    for index, gate in enumerate(cell.gates):
        rows = slice(index * H, (index + 1) * H)
        blocks[gate] = tuple(
            p[rows].detach().numpy() for p in (cell.weight_recurrent, cell.weight_input, cell.bias)
        )
    return blocks


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def affine(block, x, a):
    recurrent, input_, bias = block
    return a @ recurrent.T + x @ input_.T + bias


def run(cell: Cell) -> torch.Tensor:
    hidden, _ = plain.scan(cell, inputs(), cell.zero_state(B), None, reverse=False)
    return hidden.detach()


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn_equals_the_equation_of_the_notes(activation):
    cell = initialized(RNN(IN, H, activation))
    w = weights(cell)
    g = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}[activation]
    a, expected = np.zeros((B, H)), []
    for x in inputs().numpy():
        a = g(affine(w["candidate"], x, a))
        expected.append(a)

    assert_same(run(cell), torch.from_numpy(np.stack(expected)))


def test_simple_gru_equals_the_equations_of_the_notes():
    cell = initialized(SimpleGRU(IN, H))
    w = weights(cell)
    c, expected = np.zeros((B, H)), []
    for x in inputs().numpy():
        candidate = np.tanh(affine(w["candidate"], x, c))
        update = sigmoid(affine(w["update"], x, c))
        c = update * candidate + (1 - update) * c
        expected.append(c)

    assert_same(run(cell), torch.from_numpy(np.stack(expected)))


def test_gru_applies_its_relevance_gate_before_the_product():
    cell = initialized(GRU(IN, H))
    w = weights(cell)
    c, expected = np.zeros((B, H)), []
    for x in inputs().numpy():
        relevance = sigmoid(affine(w["relevance"], x, c))
        update = sigmoid(affine(w["update"], x, c))
        candidate = np.tanh(affine(w["candidate"], x, relevance * c))
        c = update * candidate + (1 - update) * c
        expected.append(c)

    assert_same(run(cell), torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize("cell_output", ["tanh", "linear"])
@pytest.mark.parametrize("peephole", [None, "full", "diagonal"])
def test_lstm_and_peephole_lstm_equal_the_equations_of_the_notes(cell_output, peephole):
    cell = initialized(
        LSTM(IN, H, cell_output) if peephole is None else PeepholeLSTM(IN, H, cell_output, peephole)
    )
    w = weights(cell)
    h = {"tanh": np.tanh, "linear": lambda c: c}[cell_output]
    peepholes = {gate: np.zeros((H, H)) for gate in ("update", "forget", "output")}
    if peephole:
        blocks = (
            cell.weight_peephole.detach().numpy().reshape(3, *cell.weight_peephole.shape[1:], -1)
        )
        for gate, block in zip(peepholes, blocks, strict=True):
            peepholes[gate] = block if peephole == "full" else np.diag(block.ravel())
    a, c, expected = np.zeros((B, H)), np.zeros((B, H)), []
    for x in inputs().numpy():
        candidate = np.tanh(affine(w["candidate"], x, a))
        update, forget, output = (
            sigmoid(affine(w[gate], x, a) + c @ matrix.T) for gate, matrix in peepholes.items()
        )
        c = update * candidate + forget * c
        a = output * h(c)
        expected.append(a)

    assert_same(run(cell), torch.from_numpy(np.stack(expected)))


def copy_into(layer: torch.nn.RNNBase, cell: Cell, order: list[int]) -> None:
    """Copies a cell's weights in torch's gate order; the second of torch's two biases is 0."""
    with torch.no_grad():
        for name, parameter in (
            ("weight_ih_l0", cell.weight_input),
            ("weight_hh_l0", cell.weight_recurrent),
            ("bias_ih_l0", cell.bias),
        ):
            blocks = parameter.chunk(len(cell.gates))
            getattr(layer, name).copy_(torch.cat([blocks[i] for i in order]))
        layer.bias_hh_l0.zero_()


def gradients_of(hidden: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    upstream = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    return torch.autograd.grad(hidden, leaves, upstream)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn_equals_torch(activation):
    cell = initialized(RNN(IN, H, activation))
    layer = torch.nn.RNN(IN, H, nonlinearity=activation, dtype=torch.float64)
    copy_into(layer, cell, [0])
    x = inputs().requires_grad_()

    hidden, _ = plain.scan(cell, x, cell.zero_state(B), None, reverse=False)
    expected, _ = layer(x)

    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    for actual, reference in zip(
        gradients_of(hidden, [x, cell.weight_recurrent]),
        gradients_of(expected, [x, layer.weight_hh_l0]),
        strict=True,
    ):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-12)


def test_lstm_equals_torch():
    cell = initialized(LSTM(IN, H))
    layer = torch.nn.LSTM(IN, H, dtype=torch.float64)
    # torch: i, f, g, o = update, forget, candidate, output.
    copy_into(layer, cell, [1, 2, 0, 3])
    x = inputs().requires_grad_()

    hidden, (a, c) = plain.scan(cell, x, cell.zero_state(B), None, reverse=False)
    expected, (torch_a, torch_c) = layer(x)

    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(a, torch_a[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(c, torch_c[0], rtol=0, atol=1e-12)
    dx, dw = gradients_of(hidden, [x, cell.weight_recurrent])
    torch_dx, torch_dw = gradients_of(expected, [x, layer.weight_hh_l0])
    torch.testing.assert_close(dx, torch_dx, rtol=0, atol=1e-12)
    u, f, g, o = torch_dw.chunk(4)
    torch.testing.assert_close(dw, torch.cat([g, u, f, o]), rtol=0, atol=1e-12)


def torch_gru_of(cell: GRU) -> torch.nn.GRU:
    layer = torch.nn.GRU(IN, H, dtype=torch.float64)
    # torch: r, z, n with z = 1 − Γu, so that the update gate's weights change sign.
    copy_into(layer, cell, [2, 1, 0])
    with torch.no_grad():
        for parameter in (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0):
            parameter[H : 2 * H].neg_()
    return layer


def test_gru_differs_from_torch_unless_relevance_is_one():
    cell = initialized(GRU(IN, H))
    before, _ = torch_gru_of(cell)(inputs())
    difference = (run(cell) - before).abs().max()
    with torch.no_grad():
        cell.bias[2 * H :] = 1000.0
    after, _ = torch_gru_of(cell)(inputs())

    assert difference > 1e-3
    torch.testing.assert_close(run(cell), after.detach(), rtol=0, atol=1e-12)
