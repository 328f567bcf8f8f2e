import pytest
import torch

from lmtrain.cells import LSTM
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
