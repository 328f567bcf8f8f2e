import pytest
import torch

from lmtrain.kernels.native import library
from lmtrain.model.dropout import Dropout
from lmtrain.model.generator import ModelGenerator

KERNELS = ["torch"] if library.unavailable_reason() else ["native", "torch"]


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request, monkeypatch):
    monkeypatch.setenv("LMTRAIN_KERNELS", request.param)


def test_evaluation_mode_returns_the_inputs():
    inputs = torch.ones(3, 4)

    assert Dropout(0.9, ModelGenerator(1)).eval()(inputs) is inputs


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_kept_elements_are_scaled_to_keep_the_mean(p):
    outputs = Dropout(p, ModelGenerator(1))(torch.ones(100, 1000))

    zero, kept = outputs.unique().tolist()
    assert zero == 0
    # Without native kernels p is rounded to 16 bits.
    assert kept == pytest.approx(1 / (1 - p), rel=1e-4)
    assert abs(float((outputs == 0).float().mean()) - p) < 0.01


@pytest.mark.parametrize("is_locked", [False, True])
def test_locked_time_steps_share_one_mask(is_locked):
    outputs = Dropout(0.5, ModelGenerator(1), is_locked=is_locked)(torch.ones(4, 3, 500))

    assert is_locked == bool((outputs == outputs[0]).all())
    assert not torch.equal(outputs[:, 0], outputs[:, 1])


def test_equal_generators_draw_equal_masks():
    first, second = (Dropout(0.5, ModelGenerator(7))(torch.ones(50)) for _ in range(2))

    assert torch.equal(first, second)


def test_a_generator_draws_different_masks():
    dropout = Dropout(0.5, ModelGenerator(7))

    assert not torch.equal(dropout(torch.ones(50)), dropout(torch.ones(50)))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
@pytest.mark.parametrize("is_locked", [False, True])
def test_empty_tensors_stay_empty(shape, is_locked):
    dropout = Dropout(0.5, ModelGenerator(1), is_locked=is_locked)

    assert dropout(torch.ones(shape)).shape == shape
