import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.cells import GRU, LSTM
from lmtrain.errors import ConfigError
from lmtrain.kernels.scan import scan


@pytest.mark.parametrize(
    ("inputs", "state", "lengths", "words"),
    [
        ((5, 2), None, None, r"\(5, 2\) are not \(T, B, I\) with I = 3"),
        ((5, 2, 4), None, None, r"\(5, 2, 4\)"),
        ((0, 2, 3), None, None, r"\(0, 2, 3\)"),
        ((5, 2, 3), [(2, 7)], None, r"2 x \(2, 7\)"),
        ((5, 2, 3), [(2, 7), (1, 7)], None, r"\(1, 7\)"),
        ((5, 2, 3), None, (3,), r"\(3,\) are not \(2,\)"),
    ],
)
def test_the_error_of_a_wrong_shape_names_it(inputs, state, lengths, words):
    parts = None if state is None else tuple(torch.zeros(shape) for shape in state)

    with pytest.raises(ConfigError, match=words):
        scan(
            LSTM(3, 7),
            torch.zeros(inputs),
            parts,
            None if lengths is None else torch.ones(lengths),
        )


def test_the_initial_state_is_zero_by_default():
    cell, inputs = LSTM(3, 7), torch.ones(4, 2, 3)
    for parameter in cell.parameters():
        torch.nn.init.constant_(parameter, 0.1)

    hidden, (a, _) = scan(cell, inputs)

    assert torch.equal(hidden, scan(cell, inputs, cell.zero_state(2))[0])
    assert torch.equal(hidden[-1], a)


class SubclassLSTM(LSTM):
    """The same equation and backward; has no kernel."""


class DoubledGRU(GRU):
    """Another step, differentiated by autograd."""

    def step(self, x, state):
        return tuple(2 * part for part in super().step(x, state))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [LSTM, SubclassLSTM, DoubledGRU])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 1])], ids=["whole", "lengths"])
def test_a_compiled_scan_equals_the_eager_scan(cell, steps, lengths):
    torch._dynamo.reset()
    cell = cell(3, 5)
    cell.initialize(device.generator(1), None, 1.0)
    inputs = torch.randn(steps, 2, 3, generator=device.generator(2)).requires_grad_()

    def run(inputs):
        return scan(cell, inputs, lengths=lengths)

    results = []
    for function in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
        hidden, last = function(inputs)
        leaves = [inputs, *cell.parameters()]
        results.append([hidden, *last, *torch.autograd.grad(hidden.square().sum(), leaves)])

    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)
