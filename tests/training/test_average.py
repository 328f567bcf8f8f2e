import copy

import pytest
import torch

from lmtrain.errors import CheckpointError
from lmtrain.training.average import Average


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(2))


def average(model, kind, **changes) -> Average:
    return Average(model, **{"kind": kind, "decay": 0.9, "patience": 2, **changes})


def move(model, kept, to):
    with torch.no_grad():
        model.x.fill_(to)
    kept.update()


def averaged(model, kept) -> float:
    with kept.in_place():
        return model.x[0].item()


def test_without_an_average_the_last_weights_are_kept():
    model = Line()
    kept = average(model, None)

    move(model, kept, 3.0)

    assert averaged(model, kept) == 3.0
    assert kept.state_dict() == {"count": 0, "costs": []}


def test_ema_is_the_average_written_out():
    model = Line()
    kept = average(model, "ema", decay=0.25)
    expected = 0.0

    for update, to in enumerate([1.0, 2.0, 5.0, 3.0]):
        move(model, kept, to)
        decay = min(0.25, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * to

    assert averaged(model, kept) == pytest.approx(expected)
    assert model.x[0].item() == 3.0


def test_nt_asgd_begins_when_validation_is_worse_than_long_before():
    model = Line()
    kept = average(model, "nt-asgd")

    for loss, is_active in [(5, 0), (4, 0), (4.5, 0), (4.6, 0), (4.2, 1), (1, 1)]:
        kept.validated(loss)
        assert kept.is_active is bool(is_active)


def test_nt_asgd_is_the_mean_from_then_on():
    model = Line()
    kept = average(model, "nt-asgd", patience=1)
    move(model, kept, 100.0)
    for loss in (1.0, 1.5):
        kept.validated(loss)
    move(model, kept, 4.0)
    kept.validated(2.0)

    move(model, kept, 7.0)
    move(model, kept, 1.0)

    assert averaged(model, kept) == pytest.approx(4.0)
    assert model.x[0].item() == 1.0


@pytest.mark.parametrize("kind", ["ema", "nt-asgd"])
def test_a_restored_average_goes_on_as_if_never_stopped(kind):
    model = Line()
    kept = average(model, kind, patience=1)
    for to, loss in ((4.0, 1.0), (7.0, 2.0), (6.0, 3.0)):
        move(model, kept, to)
        kept.validated(loss)
    again = Line()
    again.load_state_dict(kept.weights(model))
    state = copy.deepcopy(kept.state_dict())
    restored = average(again, kind, patience=1)

    restored.load_state_dict(state)

    assert again.x[0].item() == 6.0
    for each, its in ((model, kept), (again, restored)):
        move(each, its, 9.0)
    assert averaged(again, restored) == averaged(model, kept)


def test_weights_that_do_not_fit_are_refused():
    kept = average(Line(), "ema")

    with pytest.raises(CheckpointError, match="do not fit"):
        kept.load_state_dict({"count": 1, "costs": [], "last/x": torch.zeros(3)})
