import torch

from lmtrain.model.dropout import Dropout
from lmtrain.model.generator import ModelGenerator


def test_evaluation_mode_returns_the_inputs():
    inputs = torch.ones(3, 4)

    assert Dropout(0.9, ModelGenerator(1)).eval()(inputs) is inputs


def test_kept_elements_are_scaled_to_keep_the_mean():
    outputs = Dropout(0.25, ModelGenerator(1))(torch.ones(100_000))

    assert outputs.unique().tolist() == torch.tensor([0, 1 / 0.75]).tolist()
    assert abs(float((outputs == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(outputs.mean()) - 1) < 0.01


def test_equal_generators_draw_equal_masks():
    first, second = (Dropout(0.5, ModelGenerator(7))(torch.ones(50)) for _ in range(2))

    assert torch.equal(first, second)
