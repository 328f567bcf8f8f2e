import copy
import math

import pytest
import torch
from networks import language_modelling, loss

from lmtrain import device
from lmtrain.errors import CheckpointError
from lmtrain.model.embedding import Embedding
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.lookup import allow_sparse_gradients
from lmtrain.training.optimizer import Optimizer, UpdateResult, schedule


def rates(name: str, steps: int, **changes) -> list[float]:
    arguments = {
        "peak": 2.0, "total_steps": 100, "steps_per_epoch": 10, "warmup_steps": 0, "decay": 0.5,
        "decay_after_epochs": 4, **changes,
    }  # fmt: skip
    learning_rate = schedule(name, **arguments)
    return [learning_rate(step) for step in range(steps)]


def test_the_constant_schedule_is_constant():
    assert set(rates("constant", 100)) == {2.0}


def test_the_step_schedule_decays_each_epoch_after_the_first_epochs():
    by_epoch = rates("step", 100)[::10]

    # Constant for four epochs, then halved at the start of each epoch.
    assert by_epoch == [2.0] * 4 + [2.0 * 0.5**n for n in range(1, 7)]


def test_the_cosine_schedule_falls_from_the_peak_to_zero():
    falling = rates("cosine", 101)

    assert falling[0] == 2.0
    assert falling[50] == pytest.approx(1.0)
    assert falling[100] == pytest.approx(0.0, abs=1e-12)
    assert falling == sorted(falling, reverse=True)


def test_warm_up_is_linear():
    assert rates("constant", 6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


class Linear(torch.nn.Module):
    """loss = Σ a·x + b·y, whose gradient is (a, b)."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.y = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def loss(self, x=(3.0, 0.0), y=4.0):
        return (self.x * torch.tensor(x)).sum() + self.y.sum() * y


def build_optimizer(model, **changes) -> Optimizer:
    arguments = {
        "name": "sgd", "weight_decay": 0.0, "clip": "l2", "max_grad_norm": None,
        "max_embedding_grad_norm": None, "schedule": lambda steps: lambda step: 1.0,
        "total_steps": 100, **changes,
    }  # fmt: skip
    return Optimizer(model, **arguments)


def update(optimizer: Optimizer, objective: torch.Tensor, length: float = 1.0) -> UpdateResult:
    optimizer.start_step(length)
    optimizer.backward(objective)
    return optimizer.apply(objective.isfinite())


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize(
    ("clip", "limit", "norm", "expected", "was_clipped"),
    [
        ("l2", None, 5.0, [-3, 0, -4], False),
        ("l2", 5.0, 5.0, [-3, 0, -4], False),
        ("l2", 2.5, 5.0, [-1.5, 0, -2], True),
        ("l1", 3.5, 7.0, [-1.5, 0, -2], True),
    ],
)
def test_gradients_are_clipped_by_their_norm_together(clip, limit, norm, expected, was_clipped):
    model = Linear()
    optimizer = build_optimizer(model, clip=clip, max_grad_norm=limit)

    result = update(optimizer, model.loss())

    assert result.grad_norm.item() == pytest.approx(norm)
    assert result.was_clipped.item() is was_clipped
    assert result.was_applied
    assert torch.cat([model.x, model.y]).tolist() == pytest.approx(expected)


def nan_loss(model: Linear) -> torch.Tensor:
    return model.loss() + math.nan


def infinite_loss(model: Linear) -> torch.Tensor:
    return model.loss() + math.inf


def infinite_gradient(model: Linear) -> torch.Tensor:
    """A finite loss with an infinite gradient, since √ has no finite slope at 0."""
    return model.loss() + (model.y - model.y.detach()).sqrt().sum()


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("bad_loss", [nan_loss, infinite_loss, infinite_gradient])
def test_a_loss_or_gradient_that_is_not_finite_is_not_applied(bad_loss, name):
    model = Linear()
    optimizer = build_optimizer(model, name=name, max_grad_norm=1.0)
    update(optimizer, model.loss())
    before = {"x": model.x, "y": model.y, **optimizer.state_dict()}
    before = {key: torch.as_tensor(value).detach().clone() for key, value in before.items()}
    loss = bad_loss(model)

    assert not update(optimizer, loss).was_applied

    after = {"x": model.x, "y": model.y, **optimizer.state_dict()}
    assert after.pop("step") == before.pop("step") + 1
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.usefixtures("device_kind")
def test_an_update_with_an_invalid_loss_is_not_applied():
    model = Linear()

    optimizer = build_optimizer(model)
    optimizer.start_step()
    optimizer.backward(model.loss())
    result = optimizer.apply(torch.tensor(data=False))

    assert not result.was_applied
    assert model.x.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_every_optimizer_continues_exactly_from_its_state(name):
    def run_steps(model, optimizer, count):
        generator = device.generator(1)
        for _ in range(count):
            target = torch.randn(2, dtype=torch.float64, generator=generator)
            update(optimizer, ((model.x - target) ** 2).sum() + (model.y**2).sum())

    uninterrupted, resumed = Linear(), Linear()
    optimizer = build_optimizer(uninterrupted, name=name, weight_decay=0.01)
    run_steps(uninterrupted, optimizer, 5)
    run_steps(uninterrupted, optimizer, 5)
    before = build_optimizer(resumed, name=name, weight_decay=0.01)
    run_steps(resumed, before, 5)
    after = build_optimizer(resumed, name=name, weight_decay=0.01)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run_steps(resumed, after, 5)

    assert after.step == 10
    assert torch.equal(uninterrupted.x, resumed.x)
    assert torch.equal(uninterrupted.y, resumed.y)


def test_the_optimizer_state_of_another_model_is_refused():
    for wrong in ({"z/exp_avg": torch.zeros(2)}, {"x/exp_avg": torch.zeros(7)}, {"x/exp_avg": 3}):
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong))} does not match"):
            build_optimizer(Linear()).load_state_dict({"step": 1, **wrong})


def are_sparse(weight: torch.nn.Parameter) -> list[bool]:
    """A list to which each backward adds whether the gradient of a weight is sparse."""
    found: list[bool] = []
    weight.register_post_accumulate_grad_hook(lambda weight: found.append(weight.grad.is_sparse))
    return found


@pytest.mark.parametrize("clip", ["l2", "l1"])
@pytest.mark.parametrize(
    ("is_sparse", "settings"),
    [
        (True, {}),
        (True, {"softmax": "sampled", "samples": 30}),
        (True, {"softmax": "sampled", "samples": 30, "tied_embeddings": True}),
        # The gradient of the full softmax is dense, and so is the sum of both.
        (False, {"tied_embeddings": True}),
    ],
)
def test_sparse_gradients_learn_the_same_weights_as_dense_ones(clip, is_sparse, settings):
    weights, norms = [], []
    for can_be_sparse in (False, True):
        task = language_modelling(
            300, embedding_size=6, hidden_size=6, num_layers=1, optimizer__name="sgd", **settings
        )
        model, embedding = task.model, task.model.encoder.embedding
        if can_be_sparse:
            allow_sparse_gradients(model)
        were_sparse = [are_sparse(layer.weight) for layer in (embedding, model.head)]
        optimizer = build_optimizer(model, clip=clip, max_grad_norm=0.01)
        for step in range(3):
            ids = torch.randint(0, 300, (2, 5, 4), generator=device.generator(step))
            result = update(optimizer, loss(task, *ids).objective)
            assert result.was_clipped
            norms.append(result.grad_norm.item())
        is_head_sparse = can_be_sparse and is_sparse and "softmax" in settings
        assert were_sparse == [3 * [can_be_sparse and is_sparse], 3 * [is_head_sparse]]
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    assert norms[3:] == pytest.approx(norms[:3], rel=1e-5)
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-7)


class Embedded(torch.nn.Module):
    """loss = a · the vector of one token + b·y, whose gradient is (a, b)."""

    def __init__(self, *, is_sparse: bool = False):
        super().__init__()
        self.embedding = Embedding(3, 1, ModelGenerator(1))
        self.embedding.is_sparse = is_sparse
        self.y = torch.nn.Parameter(torch.zeros(1))
        torch.nn.init.zeros_(self.embedding.weight)

    def loss(self, a: float, b: float):
        return (self.embedding(torch.tensor([[2]])) * a).sum() + (self.y * b).sum()

    @property
    def weights(self) -> list[float]:
        return [*self.embedding.weight.flatten().tolist(), self.y.item()]


@pytest.fixture(params=["dense", "sparse", "asynchronous"])
def embedded(request, monkeypatch):
    if request.param == "asynchronous":
        monkeypatch.setattr(device, "is_asynchronous", lambda device: True)
    return Embedded(is_sparse=request.param == "sparse")


@pytest.mark.parametrize("clip", ["l2", "l1"])
@pytest.mark.parametrize(
    ("limit", "own_limit", "expected", "was_clipped"),
    [
        (None, None, [-3, -4], False),
        (2.0, None, None, True),
        (2.0, 5.0, [-3, -2], True),
        (None, 1.0, [-1, -4], False),
        (8.0, 0.5, [-0.5, -4], False),
        (1.0, 1.0, [-1, -1], True),
    ],
)
def test_embeddings_with_a_limit_of_their_own_are_clipped_apart(
    embedded, limit, own_limit, expected, was_clipped, clip
):
    optimizer = build_optimizer(
        embedded, clip=clip, max_grad_norm=limit, max_embedding_grad_norm=own_limit
    )

    result = update(optimizer, embedded.loss(3.0, 4.0))

    together = 5.0 if clip == "l2" else 7.0
    assert result.grad_norm.item() == pytest.approx(4.0 if own_limit else together)
    assert result.was_clipped.item() is was_clipped
    first, second = expected or (-6 / together, -8 / together)
    assert embedded.weights == pytest.approx([0, 0, first, second])


@pytest.mark.usefixtures("device_kind")
def test_adam_clips_embeddings_apart_too():
    model, scaled = Embedded(), Embedded()
    optimizer = build_optimizer(model, name="adam", max_grad_norm=2.0, max_embedding_grad_norm=0.5)
    plain = build_optimizer(scaled, name="adam")
    for factor in (1.0, 3.0):
        update(optimizer, model.loss(factor, 4.0 * factor))
        update(plain, scaled.loss(0.5, 2.0))

    assert model.weights == pytest.approx(scaled.weights)


def test_an_infinite_gradient_of_an_embedding_that_is_clipped_apart_is_not_applied(embedded):
    optimizer = build_optimizer(embedded, max_grad_norm=1.0, max_embedding_grad_norm=1.0)
    optimizer.start_step()
    optimizer.backward(embedded.loss(math.inf, 1.0))

    assert not optimizer.apply(torch.tensor(data=True)).was_applied
    assert embedded.weights == [0, 0, 0, 0]


class Vectors(torch.nn.Module):
    """loss = Σ of the vectors of some tokens."""

    def __init__(self, num_tokens: int, *, is_sparse: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_tokens, 2, dtype=torch.float64))
        self._is_sparse = is_sparse

    def loss(self, tokens: list[int]):
        ids = torch.tensor(tokens)
        return torch.nn.functional.embedding(ids, self.weight, sparse=self._is_sparse).sum()


@pytest.mark.parametrize("num_tokens", [5, 50])
def test_weight_decay_of_rows_with_a_sparse_gradient_adds_up_to_that_of_dense_ones(num_tokens):
    sparse, dense = (Vectors(num_tokens, is_sparse=is_sparse) for is_sparse in (True, False))
    for model in (sparse, dense):
        optimizer = build_optimizer(
            model, weight_decay=0.02, schedule=lambda total: lambda step: 0.5
        )
        for _ in range(32):
            update(optimizer, model.loss([1, 3, 1]))

    # Each row is decayed twice, by 16 updates each; for rows with gradients the order matters.
    others = [row for row in range(num_tokens) if row not in {1, 3}]
    assert torch.allclose(sparse.weight[others], dense.weight[others])
    assert torch.allclose(sparse.weight[[1, 3]], dense.weight[[1, 3]], rtol=0.1)
    assert dense.weight[0, 0].item() == pytest.approx(0.99**32)


def test_too_much_weight_decay_of_sparse_gradients_diverges_without_an_error():
    model = Vectors(50, is_sparse=True)

    update(build_optimizer(model, weight_decay=1e30), model.loss([1, 3, 1]))

    assert not model.weight.isfinite().all()


def test_weight_decay_of_sparse_gradients_continues_exactly_from_its_state():
    uninterrupted, resumed = (Vectors(50, is_sparse=True) for _ in range(2))
    optimizer = build_optimizer(uninterrupted, weight_decay=0.02)
    for _ in range(20):
        update(optimizer, uninterrupted.loss([1, 3, 1]))
    before = build_optimizer(resumed, weight_decay=0.02)
    for _ in range(5):
        update(before, resumed.loss([1, 3, 1]))
    after = build_optimizer(resumed, weight_decay=0.02)
    after.load_state_dict(before.state_dict())
    for _ in range(15):
        update(after, resumed.loss([1, 3, 1]))

    assert torch.equal(uninterrupted.weight, resumed.weight)


def test_the_learning_rate_of_adam_is_proportional_to_the_length_of_a_batch():
    half, full = Linear(), Linear()

    update(build_optimizer(half, name="adam"), half.loss(), length=0.5)
    update(build_optimizer(full, name="adam"), full.loss())

    assert half.y.item() == pytest.approx(full.y.item() / 2)
