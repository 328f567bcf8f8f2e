import pytest
import torch

from lmtrain import cells, device, schema
from lmtrain.cells import base
from lmtrain.errors import ConfigError
from lmtrain.kernels.scan import engine


@pytest.fixture
def leaky(monkeypatch):
    monkeypatch.setattr(base, "_CELLS", dict(base._CELLS))

    @cells.register("leaky")
    class Leaky(cells.Cell):
        """h = Γf ∘ h′ + (1 − Γf) ∘ c̃"""

        gates = ("candidate", "forget")
        state_names = ("hidden",)

        def step(self, x, state):
            (h,) = state
            forget = torch.sigmoid(self.affine("forget", x, h))
            return (forget * h + (1 - forget) * torch.tanh(self.affine("candidate", x, h)),)

    return Leaky


def test_a_user_defined_cell_is_created_by_name_and_uses_the_reference_engine(leaky):
    cell = cells.create("leaky", 3, 4, {})

    assert isinstance(cell, leaky)
    assert engine(cell) == "reference"


def test_a_registered_name_cannot_be_taken_by_another_class(leaky):
    with pytest.raises(ConfigError, match=r"'lstm' is taken by LSTM"):
        cells.register("lstm")(leaky)
    with pytest.raises(ConfigError, match=r"'Peephole_LSTM' is read as 'peephole-lstm'"):
        cells.register("Peephole_LSTM")


def test_the_error_of_an_unknown_cell_lists_the_cells():
    with pytest.raises(ConfigError, match="no cell 'lsmt'") as caught:
        cells.create("lsmt", 1, 1, {})

    assert "peephole-lstm" in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((-7, 2), "input_size -7: input should be greater than 0"),
        ((2, 0), "hidden_size 0"),
        ((2, "3"), "hidden_size '3': input should be a valid integer"),
    ],
)
def test_sizes_that_are_not_positive_integers_are_refused(sizes, words):
    with pytest.raises(ConfigError, match=words):
        cells.LSTM(*sizes)


@pytest.mark.parametrize(
    ("cell", "options", "words"),
    [
        (cells.RNN, {"activation": "sigmoid"}, "activation 'sigmoid': .*'tanh' or 'relu'"),
        (cells.LSTM, {"cell_output": None}, "cell_output None: .*'tanh' or 'linear'"),
        (cells.PeepholeLSTM, {"cell_output": 3}, "cell_output 3"),
        (cells.PeepholeLSTM, {"peephole": "ful"}, "peephole 'ful': .*'full' or 'diagonal'"),
    ],
)
def test_options_outside_their_values_are_refused(cell, options, words):
    with pytest.raises(ConfigError, match=words):
        cell(2, 3, **options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lstm", {"peephole": "full"}, "the cell lstm has no option peephole\n.*: cell_output"),
        ("gru", {"leak": 1, "x": 2}, "the cell gru has no option leak, x\n.*: none"),
        ("clipped", {}, "the cell clipped: missing a required argument: 'limit'"),
        ("clipped", {"limit": "3"}, "limit '3': input should be a valid number"),
        ("clipped", {"limit": 3.0, "is_hard": 1}, "is_hard 1: input should be a valid boolean"),
    ],
)
def test_unknown_missing_and_mistyped_options_are_refused(name, options, words, monkeypatch):
    monkeypatch.setattr(base, "_CELLS", dict(base._CELLS))

    @cells.register("clipped")
    class Clipped(cells.RNN):
        options = ("limit", "is_hard")

        def __init__(self, input_size, hidden_size, limit: float, is_hard: bool = False):
            super().__init__(input_size, hidden_size)

    assert isinstance(cells.create("clipped", 2, 3, {"limit": 3}), Clipped)
    with pytest.raises(ConfigError, match=words):
        cells.create(name, 2, 3, options)


def test_initial_recurrent_weights_are_orthogonal_and_the_forget_bias_is_one():
    cell = cells.PeepholeLSTM(6, 6)
    cell.initialize(device.generator(1), None, 1.0)

    for block in (*cell.weight_recurrent.chunk(4), *cell.weight_peephole.chunk(3)):
        torch.testing.assert_close(block @ block.T, torch.eye(6), rtol=0, atol=1e-5)
    assert cell.bias[cell.rows("forget")].tolist() == [1.0] * 6
    assert not cell.bias[cell.rows("candidate")].any()


def test_an_init_scale_bounds_every_weight():
    cell = cells.LSTM(6, 40)
    cell.initialize(device.generator(1), 0.05, 0.0)

    for parameter in cell.parameters():
        assert 0.04 < float(parameter.detach().abs().max()) <= 0.05


def test_the_settings_name_every_cell_of_the_package():
    cells = base._CELLS.items()
    own = {name for name, cell in cells if cell.__module__.startswith("lmtrain.cells.")}

    assert own == set(schema.CELLS)
