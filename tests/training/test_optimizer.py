import copy
import math

import pytest
import torch
from networks import language_modelling, loss

from lmtrain import device
from lmtrain.errors import CheckpointError
from lmtrain.training.optimizer import Optimizer, Update, schedule


def rates(kind: str, steps: int, **changes) -> list[float]:
    arguments = {
        "peak": 2.0, "total_steps": 100, "steps_per_epoch": 10, "warmup_steps": 0, "decay": 0.5,
        "decay_after_epochs": 4, **changes,
    }  # fmt: skip
    rate = schedule(kind, **arguments)
    return [rate(step) for step in range(steps)]


def test_constant_stays():
    assert set(rates("constant", 100)) == {2.0}


def test_step_is_the_schedule_of_zaremba():
    by_epoch = rates("step", 100)[::10]

    # Full for four epochs, then halved at the start of each.
    assert by_epoch == [2.0] * 4 + [2.0 * 0.5**n for n in range(1, 7)]


def test_cosine_falls_from_the_peak_to_almost_nothing():
    falling = rates("cosine", 101)

    assert falling[0] == 2.0
    assert falling[50] == pytest.approx(1.0)
    assert falling[100] == pytest.approx(0.0, abs=1e-12)
    assert falling == sorted(falling, reverse=True)


def test_warm_up_rises_in_a_line():
    assert rates("constant", 6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


class Bowl(torch.nn.Module):
    """loss = Σ a·x + b·y, whose gradient is (a, b)."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.y = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def loss(self, x=(3.0, 0.0), y=4.0):
        return (self.x * torch.tensor(x)).sum() + self.y.sum() * y


def optimizer(model, **changes) -> Optimizer:
    arguments = {
        "name": "sgd", "weight_decay": 0.0, "clip": "l2", "max_grad_norm": None,
        "schedule": lambda steps: lambda step: 1.0, "total_steps": 100, **changes,
    }  # fmt: skip
    return Optimizer(model, **arguments)


def update(rule: Optimizer, objective: torch.Tensor, length: float = 1.0) -> Update:
    rule.begin(length)
    rule.backward(objective)
    return rule.apply(objective.isfinite())


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("clip", "limit", "norm", "expected", "was_clipped"),
    [
        ("l2", None, 5.0, [-3, 0, -4], False),
        ("l2", 5.0, 5.0, [-3, 0, -4], False),
        ("l2", 2.5, 5.0, [-1.5, 0, -2], True),
        ("l1", 3.5, 7.0, [-1.5, 0, -2], True),
    ],
)
def test_gradients_are_limited_over_all_parameters(clip, limit, norm, expected, was_clipped):
    model = Bowl()
    rule = optimizer(model, clip=clip, max_grad_norm=limit)

    found = update(rule, model.loss())

    assert found.grad_norm.item() == pytest.approx(norm)
    assert found.was_clipped.item() is was_clipped
    assert found.is_made
    assert torch.cat([model.x, model.y]).tolist() == pytest.approx(expected)


def nan_loss(model: Bowl) -> torch.Tensor:
    return model.loss() + math.nan


def infinite_loss(model: Bowl) -> torch.Tensor:
    return model.loss() + math.inf


def infinite_slope(model: Bowl) -> torch.Tensor:
    """Finite itself, but √ has no finite slope at 0."""
    return model.loss() + (model.y - model.y.detach()).sqrt().sum()


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("bad_loss", [nan_loss, infinite_loss, infinite_slope])
def test_numbers_that_are_not_finite_update_nothing(bad_loss, name):
    model = Bowl()
    rule = optimizer(model, name=name, max_grad_norm=1.0)
    update(rule, model.loss())
    before = {"x": model.x, "y": model.y, **rule.state_dict()}
    before = {key: torch.as_tensor(value).detach().clone() for key, value in before.items()}
    bad = bad_loss(model)

    assert not update(rule, bad).is_made

    after = {"x": model.x, "y": model.y, **rule.state_dict()}
    assert after.pop("step") == before.pop("step") + 1
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.usefixtures("reading")
def test_a_step_that_is_not_sound_updates_nothing():
    model = Bowl()

    rule = optimizer(model)
    rule.begin()
    rule.backward(model.loss())
    found = rule.apply(torch.tensor(data=False))

    assert not found.is_made
    assert model.x.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_rule_goes_on_exactly_from_its_state(name):
    def steps(model, rule, count):
        chance = device.generator(1)
        for _ in range(count):
            target = torch.randn(2, dtype=torch.float64, generator=chance)
            update(rule, ((model.x - target) ** 2).sum() + (model.y**2).sum())

    straight, stopped = Bowl(), Bowl()
    rule = optimizer(straight, name=name, weight_decay=0.01)
    steps(straight, rule, 5)
    steps(straight, rule, 5)
    first = optimizer(stopped, name=name, weight_decay=0.01)
    steps(stopped, first, 5)
    second = optimizer(stopped, name=name, weight_decay=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(stopped, second, 5)

    assert second.step == 10
    assert torch.equal(straight.x, stopped.x)
    assert torch.equal(straight.y, stopped.y)


def test_a_state_of_another_model_is_refused():
    for wrong in ({"z/exp_avg": torch.zeros(2)}, {"x/exp_avg": torch.zeros(7)}, {"x/exp_avg": 3}):
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong))} does not fit"):
            optimizer(Bowl()).load_state_dict({"step": 1, **wrong})


@pytest.mark.parametrize("clip", ["l2", "l1"])
def test_a_sparse_embedding_learns_what_a_dense_one_does(clip):
    weights, norms = [], []
    for is_sparse in (False, True):
        task = language_modelling(
            300, embedding_size=6, hidden_size=8, num_layers=1, optimizer__name="sgd"
        )
        model, embedding = task.model, task.model.encoder.embedding
        embedding.is_sparse = is_sparse
        rule = optimizer(model, clip=clip, max_grad_norm=0.01)
        for step in range(3):
            ids = torch.randint(0, 300, (2, 5, 4), generator=device.generator(step))
            found = update(rule, loss(task, *ids).objective)
            assert found.was_clipped
            norms.append(found.grad_norm.item())
        assert embedding.weight.grad.is_sparse is is_sparse
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    assert norms[3:] == pytest.approx(norms[:3], rel=1e-5)
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-7)


def test_the_rate_of_adaptive_rules_follows_the_steps_of_a_loss():
    half, full = Bowl(), Bowl()

    update(optimizer(half, name="adam"), half.loss(), length=0.5)
    update(optimizer(full, name="adam"), full.loss())

    assert half.y.item() == pytest.approx(full.y.item() / 2)
