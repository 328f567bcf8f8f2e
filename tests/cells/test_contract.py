"""What every registered cell promises; a new cell is held to it by being registered."""

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


def chance(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=device.generator(seed))


def state_of(cell: Cell, batch_size: int) -> CellState:
    return tuple(
        chance(batch_size, cell.hidden_size, seed=10 + part).requires_grad_()
        for part in range(len(cell.state_names))
    )


def results(engine, cell, inputs, state, lengths=None, reverse=False) -> list[Tensor]:
    """Outputs, last state, and every gradient with upstream gradients into all of them."""
    hidden, last = engine.scan(cell, inputs, state, lengths, reverse=reverse)
    outputs = [hidden, *last]
    upstream = [chance(*output.shape, seed=20 + i) for i, output in enumerate(outputs)]
    wanted = [inputs, *state, *cell.parameters()]
    gradients = torch.autograd.grad(outputs, wanted, upstream)
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
    inputs = chance(steps, rows, input_size).requires_grad_()
    lengths = torch.tensor([1 + row % steps for row in range(rows)]) if has_lengths else None
    state = state_of(cell, rows)

    expected = results(reference, cell, inputs, state, lengths, reverse)
    actual = results(plain, cell, inputs, state, lengths, reverse)

    for index, (ours, truth) in enumerate(zip(actual, expected, strict=True)):
        assert_same(ours, truth, f"result {index}")


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_pass_gradcheck(name, options, engine, reverse):
    cell = make(name, options, 2, 3)
    inputs = chance(4, 2, 2).requires_grad_()
    state = state_of(cell, 2)
    names = [each for each, _ in cell.named_parameters()]

    def run(inputs: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parts = len(cell.state_names)
        weights = dict(zip(names, rest[parts:], strict=True))
        scanning = _Scanning(cell, engine, reverse)
        renamed = {f"cell.{each}": weight for each, weight in weights.items()}
        return torch.func.functional_call(scanning, renamed, (inputs, rest[:parts]))

    assert torch.autograd.gradcheck(run, (inputs, *state, *cell.parameters()))


class _Scanning(torch.nn.Module):
    def __init__(self, cell, engine, reverse):
        super().__init__()
        self.cell, self.engine, self.reverse = cell, engine, reverse

    def forward(self, inputs, state):
        hidden, last = self.engine.scan(self.cell, inputs, state, None, reverse=self.reverse)
        return (hidden, *last)


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
def test_a_scan_is_the_same_in_two_stretches_with_the_state_carried(name, options, engine):
    cell = make(name, options, 3, 5)
    inputs, state = chance(7, 2, 3), state_of(cell, 2)

    whole, last = engine.scan(cell, inputs, state, None, reverse=False)
    first, middle = engine.scan(cell, inputs[:4], state, None, reverse=False)
    second, end = engine.scan(cell, inputs[4:], middle, None, reverse=False)

    assert_same(torch.cat([first, second]), whole)
    for ours, truth in zip(end, last, strict=True):
        assert_same(ours, truth)


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
def test_reverse_is_the_scan_of_the_flipped_sequence(name, options, engine):
    cell = make(name, options, 3, 5)
    inputs, state = chance(6, 2, 3), state_of(cell, 2)

    hidden, last = engine.scan(cell, inputs, state, None, reverse=True)
    flipped, flipped_last = engine.scan(cell, inputs.flip(0), state, None, reverse=False)

    assert_same(hidden, flipped.flip(0))
    for ours, truth in zip(last, flipped_last, strict=True):
        assert_same(ours, truth)


@each_cell
@pytest.mark.parametrize("engine", [plain, reference], ids=["plain", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_row_with_a_length_is_the_short_row_alone(name, options, engine, reverse):
    cell = make(name, options, 3, 5)
    inputs, state = chance(6, 3, 3), state_of(cell, 3)
    lengths = torch.tensor([6, 2, 4])

    hidden, last = engine.scan(cell, inputs, state, lengths, reverse=reverse)

    for row, length in enumerate(lengths.tolist()):
        own = tuple(part[row : row + 1] for part in state)
        short, short_last = engine.scan(
            cell, inputs[:length, row : row + 1], own, None, reverse=reverse
        )
        assert_same(hidden[:length, row : row + 1], short)
        assert not hidden[length:, row].any()
        for ours, truth in zip(last, short_last, strict=True):
            assert_same(ours[row : row + 1], truth)


@each_cell
def test_the_same_weights_and_inputs_give_the_same_bits(name, options):
    cell = make(name, options, 17, 63)
    inputs = chance(9, 5, 17).requires_grad_()
    state = state_of(cell, 5)

    first, second = (results(plain, cell, inputs, state) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_cell
def test_float32_follows_float64(name, options):
    cell = make(name, options, 7, 13)
    inputs, state = chance(6, 3, 7), state_of(cell, 3)
    hidden, _ = plain.scan(cell, inputs, state, None, reverse=False)

    single, _ = plain.scan(
        cell.float(), inputs.float(), tuple(p.float() for p in state), None, reverse=False
    )

    assert_same(single, hidden.float())


def test_all_cells_of_the_notes_are_registered_and_differentiated_by_hand():
    own = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")

    assert set(own) <= set(cell_names())
    assert all(isinstance(create(name, 2, 3, {}), DifferentiatedCell) for name in own)


def test_options_cover_what_cells_declare():
    for name, options in itertools.groupby(CELLS, key=lambda pair: pair[0]):
        declared = set(create(name, 1, 1, {}).options)

        assert all(set(given) == declared for _, given in options)
