import copy
import json
import math

import pytest
import torch

from lmtrain.errors import CheckpointError
from lmtrain.training.average import WeightAverage


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(2))


def weight_average(model, method, **changes) -> WeightAverage:
    return WeightAverage(model, **{"method": method, "decay": 0.9, "patience": 2, **changes})


def update(model, average, value):
    with torch.no_grad():
        model.x.fill_(value)
    average.update()


def averaged_value(model, average) -> float:
    with average.swapped_in():
        return model.x[0].item()


def test_without_a_method_the_last_weights_are_used():
    model = Model()
    average = weight_average(model, None)

    update(model, average, 3.0)

    assert averaged_value(model, average) == 3.0
    assert average.state_dict() == {"count": 0, "costs": []}


def test_ema_matches_its_formula():
    model = Model()
    average = weight_average(model, "ema", decay=0.25)
    expected = 0.0

    for count, value in enumerate([1.0, 2.0, 5.0, 3.0]):
        update(model, average, value)
        decay = min(0.25, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value

    assert averaged_value(model, average) == pytest.approx(expected)
    assert model.x[0].item() == 3.0


def test_nt_asgd_starts_when_a_validation_is_worse_than_the_best_before_the_patience():
    model = Model()
    average = weight_average(model, "nt-asgd")

    for loss, is_active in [(5, 0), (4, 0), (4.5, 0), (4.6, 0), (4.2, 1), (1, 1)]:
        average.record_validation(loss)
        assert average.is_active is bool(is_active)


def test_nt_asgd_is_the_mean_of_the_weights_since_its_start():
    model = Model()
    average = weight_average(model, "nt-asgd", patience=1)
    update(model, average, 100.0)
    for loss in (1.0, 1.5):
        average.record_validation(loss)
    update(model, average, 4.0)
    average.record_validation(2.0)

    update(model, average, 7.0)
    update(model, average, 1.0)

    assert averaged_value(model, average) == pytest.approx(4.0)
    assert model.x[0].item() == 1.0


@pytest.mark.parametrize("method", ["ema", "nt-asgd"])
def test_a_restored_average_continues_exactly(method):
    model = Model()
    average = weight_average(model, method, patience=1)
    for value, loss in ((4.0, 1.0), (7.0, 2.0), (6.0, 3.0)):
        update(model, average, value)
        average.record_validation(loss)
    other = Model()
    other.load_state_dict(average.weights(model))
    state = copy.deepcopy(average.state_dict())
    restored = weight_average(other, method, patience=1)

    restored.load_state_dict(state)

    assert other.x[0].item() == 6.0
    update(model, average, 9.0)
    update(other, restored, 9.0)
    assert averaged_value(other, restored) == averaged_value(model, average)


def test_a_validation_without_metrics_is_saved_as_json():
    average, restored = (weight_average(Model(), "nt-asgd", patience=1) for _ in range(2))
    average.record_validation(math.inf)

    restored.load_state_dict(json.loads(json.dumps(average.state_dict(), allow_nan=False)))
    for cost, is_active in ((3.0, False), (4.0, False), (5.0, True)):
        restored.record_validation(cost)
        assert restored.is_active == is_active


def test_weights_of_another_shape_are_refused():
    average = weight_average(Model(), "ema")

    with pytest.raises(CheckpointError, match="do not match"):
        average.load_state_dict({"count": 1, "costs": [], "last/x": torch.zeros(3)})
