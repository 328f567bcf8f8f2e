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
def test_wrong_shapes_are_refused_by_name(inputs, state, lengths, words):
    parts = None if state is None else tuple(torch.zeros(shape) for shape in state)

    with pytest.raises(ConfigError, match=words):
        scan(
            LSTM(3, 7),
            torch.zeros(inputs),
            parts,
            None if lengths is None else torch.ones(lengths),
        )


def test_a_scan_starts_from_zeros_without_a_state():
    cell, inputs = LSTM(3, 7), torch.ones(4, 2, 3)
    for parameter in cell.parameters():
        torch.nn.init.constant_(parameter, 0.1)

    hidden, (a, _) = scan(cell, inputs)

    assert torch.equal(hidden, scan(cell, inputs, cell.zero_state(2))[0])
    assert torch.equal(hidden[-1], a)


class OwnLSTM(LSTM):
    """The same equation and backward."""


class OwnGRU(GRU):
    """Another step, which autograd differentiates."""

    def step(self, x, state):
        return tuple(2 * part for part in super().step(x, state))


@pytest.mark.parametrize("cell", [LSTM, OwnLSTM, OwnGRU])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 1])], ids=["whole", "lengths"])
def test_compiled_every_engine_gives_the_same(cell, steps, lengths):
    torch._dynamo.reset()
    cell = cell(3, 5)
    cell.initialize(device.generator(1), None, 1.0)
    inputs = torch.randn(steps, 2, 3, generator=device.generator(2)).requires_grad_()

    def run(inputs):
        return scan(cell, inputs, lengths=lengths)

    results = []
    for each in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
        hidden, last = each(inputs)
        wanted = [inputs, *cell.parameters()]
        results.append([hidden, *last, *torch.autograd.grad(hidden.square().sum(), wanted)])

    for ours, truth in zip(*results, strict=True):
        assert_same(ours, truth)
