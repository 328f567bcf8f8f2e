"""Tests of every registered cell; a new cell is covered once it is registered."""

import itertools

import pytest
import torch
from every_cell import CELLS, each_cell
from numerics import assert_same
from torch import Tensor

from lmtrain import device
from lmtrain.cells import Cell, CellState, DifferentiatedCell, cell_names, create
from lmtrain.kernels import plain, reference

SHAPES = [(1, 1, 1, 1), (5, 3, 4, 7), (2, 1, 3, 13), (13, 7, 1, 2)]


def make(name: str, options: dict[str, str], input_size: int, hidden_size: int) -> Cell:
    cell = create(name, input_size, hidden_size, options).double()
    cell.initialize(device.generator(3), 0.6, 0.5)
    return cell


def random_tensor(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=device.generator(seed))


def random_state(cell: Cell, batch_size: int) -> CellState:
    return tuple(
        random_tensor(batch_size, cell.hidden_size, seed=10 + part).requires_grad_()
        for part in range(len(cell.state_names))
    )


def results(engine, cell, inputs, state, lengths=None, reverse=False) -> list[Tensor]:
    """Outputs, final state and all gradients, for upstream gradients into outputs and state."""
    hidden, last = engine.scan(cell, inputs, state, lengths, reverse=reverse)
    outputs = [hidden, *last]
    upstream = [random_tensor(*output.shape, seed=20 + i) for i, output in enumerate(outputs)]
    leaves = [inputs, *state, *cell.parameters()]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [*outputs, *gradients]


@each_cell
def test_every_cell_has_its_equation_in_its_docstring(name, options):
    cell = make(name, options, 2, 3)

    assert " = " in (type(cell).__doc__ or "")
    assert "Source:" in (type(cell).__doc__ or "")


@each_cell
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_the_hand_derived_backward_equals_autograd(name, options, shape, reverse, has_lengths):
    steps, rows, input_size, hidden_size = shape
    cell = make(name, options, input_size, hidden_size)
    inputs = random_tensor(steps, rows, input_size).requires_grad_()
    lengths = torch.tensor([1 + row % steps for row in range(rows)]) if has_lengths else None
    state = random_state(cell, rows)

    expected = results(reference, cell, inputs, state, lengths, reverse)
    actual = results(plain, cell, inputs, state, lengths, reverse)

    for index, (tensor, reference_tensor) in enumerate(zip(actual, expected, strict=True)):
        assert_same(tensor, reference_tensor, f"result {index}")


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_pass_gradcheck(name, options, engine, reverse):
    cell = make(name, options, 2, 3)
    inputs = random_tensor(4, 2, 2).requires_grad_()
    state = random_state(cell, 2)
    names = [name for name, _ in cell.named_parameters()]

    def run(inputs: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parts = len(cell.state_names)
        weights = dict(zip(names, rest[parts:], strict=True))
        module = _ScanModule(cell, engine, reverse)
        parameters = {f"cell.{name}": weight for name, weight in weights.items()}
        return torch.func.functional_call(module, parameters, (inputs, rest[:parts]))

    assert torch.autograd.gradcheck(run, (inputs, *state, *cell.parameters()))


class _ScanModule(torch.nn.Module):
    def __init__(self, cell, engine, reverse):
        super().__init__()
        self.cell, self.engine, self.reverse = cell, engine, reverse

    def forward(self, inputs, state):
        hidden, last = self.engine.scan(self.cell, inputs, state, None, reverse=self.reverse)
        return (hidden, *last)


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
def test_a_scan_in_two_parts_with_the_state_carried_equals_the_whole_scan(name, options, engine):
    cell = make(name, options, 3, 5)
    inputs, state = random_tensor(7, 2, 3), random_state(cell, 2)

    whole, last = engine.scan(cell, inputs, state, None, reverse=False)
    first, carried = engine.scan(cell, inputs[:4], state, None, reverse=False)
    second, last_of_second = engine.scan(cell, inputs[4:], carried, None, reverse=False)

    assert_same(torch.cat([first, second]), whole)
    for part, expected in zip(last_of_second, last, strict=True):
        assert_same(part, expected)


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
def test_a_reverse_scan_equals_the_scan_of_the_flipped_sequence(name, options, engine):
    cell = make(name, options, 3, 5)
    inputs, state = random_tensor(6, 2, 3), random_state(cell, 2)

    hidden, last = engine.scan(cell, inputs, state, None, reverse=True)
    flipped, flipped_last = engine.scan(cell, inputs.flip(0), state, None, reverse=False)

    assert_same(hidden, flipped.flip(0))
    for part, expected in zip(last, flipped_last, strict=True):
        assert_same(part, expected)


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_with_a_length_equals_a_scan_of_that_length(name, options, engine, reverse):
    cell = make(name, options, 3, 5)
    inputs, state = random_tensor(6, 3, 3), random_state(cell, 3)
    lengths = torch.tensor([6, 2, 4])

    hidden, last = engine.scan(cell, inputs, state, lengths, reverse=reverse)

    for row, length in enumerate(lengths.tolist()):
        row_state = tuple(part[row : row + 1] for part in state)
        short, short_last = engine.scan(
            cell, inputs[:length, row : row + 1], row_state, None, reverse=reverse
        )
        assert_same(hidden[:length, row : row + 1], short)
        assert not hidden[length:, row].any()
        for part, expected in zip(last, short_last, strict=True):
            assert_same(part[row : row + 1], expected)


@each_cell
def test_two_scans_are_bitwise_equal(name, options):
    cell = make(name, options, 17, 63)
    inputs = random_tensor(9, 5, 17).requires_grad_()
    state = random_state(cell, 5)

    first, second = (results(plain, cell, inputs, state) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_cell
def test_float32_equals_float64_within_tolerance(name, options):
    cell = make(name, options, 7, 13)
    inputs, state = random_tensor(6, 3, 7), random_state(cell, 3)
    hidden, _ = plain.scan(cell, inputs, state, None, reverse=False)

    single, _ = plain.scan(
        cell.float(), inputs.float(), tuple(p.float() for p in state), None, reverse=False
    )

    assert_same(single, hidden.float())


def test_all_cells_of_the_notes_are_registered_with_a_hand_derived_backward():
    names = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")

    assert set(names) <= set(cell_names())
    assert all(isinstance(create(name, 2, 3, {}), DifferentiatedCell) for name in names)


def test_the_tested_options_are_those_that_cells_declare():
    for name, options in itertools.groupby(CELLS, key=lambda pair: pair[0]):
        declared = set(create(name, 1, 1, {}).options)

        assert all(set(tested) == declared for _, tested in options)
