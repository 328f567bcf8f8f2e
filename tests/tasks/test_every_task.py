"""What holds for every task whose data are examples."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_tasks import CASES, settings, task, write
from numerics import assert_same
from run_folders import metrics
from torch.nn.functional import cosine_similarity, cross_entropy, linear

import lmtrain
from lmtrain import checkpoint
from lmtrain.errors import CheckpointError, ConfigError, DivergedError
from lmtrain.tasks.base import Shard
from lmtrain.tasks.registry import task_of
from lmtrain.training import trainer
from lmtrain.training.run import Summary, find_learning_rate, run_training

STEPS = 8
DROPOUT = {"model__dropout": 0.2, "model__weight_dropout": 0.2}
# More settings whose state a resumed run must find again.
MORE = {
    "tag": {"optimizer__average": "ema", "model__word_dropout": 0.2},
    "frames": {"model__locked_dropout": True},
    "classify-last": {"model__word_dropout": 0.2},
    "classify-max": {"optimizer__average": "nt-asgd", "train__patience": 9},
}
PREVIEWS = {
    "tag": r"(w\d(/\S+)?( \(correct: \S+\))?\s?)+",
    "labelled": r"([ab]: .*\n?){4}",
    "frames": r"(-|\d(,\d)*)( (-|\d(,\d)*)){63}",
    "translate": r"(source: .+\nreference: .+\ntranslation: .*\n?){1,2}",
    "classify": r"(predicted [ab] \((correct|wrong, is [ab])\): .+\n?){1,3}",
    "vectors": r"(predicted [01] \((correct|wrong, is [01])\): \d steps\n?){1,3}",
}


@dataclass(frozen=True)
class Run:
    """A run that tests read and none changes."""

    name: str
    places: dict[str, Any]
    summary: Summary

    @property
    def path(self) -> Path:
        return self.summary.run


def trained(name, places, out) -> Summary:
    chosen = settings(name, places, train__save_every=1, **DROPOUT, **MORE.get(name, {}))
    return run_training(chosen, out, is_quiet=True)


@pytest.fixture(scope="module", params=list(CASES))
def run(request, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    places = write(request.param, folder)
    return Run(request.param, places, trained(request.param, places, folder / "run"))


@pytest.fixture(params=list(CASES))
def name(request) -> str:
    return request.param


@pytest.fixture
def places(name, tmp_path) -> dict[str, Any]:
    return write(name, tmp_path)


def everything(run: Path) -> dict[str, bytes]:
    """The tensors of a run's last checkpoint."""
    folder = checkpoint.folder(run, STEPS)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_as_if_never_stopped(run, tmp_path, monkeypatch):
    real = trainer.Trainer._step

    def step(self):
        if self.optimizer.step == 5:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        trained(run.name, run.places, tmp_path / "stopped")
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "stopped")[-1] == 5

    resumed = run_training(out=tmp_path / "stopped", resume=True, is_quiet=True)

    assert everything(tmp_path / "stopped") == everything(run.path)
    assert resumed.best == run.summary.best


def test_the_last_validation_is_measured_again(run):
    model = lmtrain.load(run.path)
    own = model.own_data()

    assert list(own) == ["valid", "test"]
    assert [len(each.inputs) for each in own.values()] == [6, 3]
    found = model.measure(own["valid"], batch_size=2).figures
    validation = dict(run.summary.best)
    if run.name.startswith("translate"):
        # A validation translates with a beam of 1.
        found, validation = {"loss": found["loss"]}, {"loss": validation["loss"]}
    assert found == pytest.approx(validation, rel=1e-5)
    assert model.evaluate(run.places["data.test"]).sums == pytest.approx(
        model.measure(own["test"], batch_size=3).sums, rel=1e-5
    )


def test_metrics_and_events_have_the_names_of_the_task(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = metrics(run.path)
    events = EventAccumulator(str(run.path / "events" / "valid")).Reload()

    kind = run.summary.task
    train, valid = ([line for line in lines if line["kind"] == k] for k in ("train", "valid"))
    assert all(line[f"{kind.unit}_per_second"] > 0 for line in train)
    assert [line["step"] for line in valid] == [4, 8]
    assert {key: valid[-1][key] for key in run.summary.best}.keys() >= {
        "loss",
        kind.metrics.headline,
    }
    form = PREVIEWS.get(run.name) or PREVIEWS[run.name.partition("-")[0]]
    assert all(re.fullmatch(form, line["preview"]) for line in valid), valid[-1]["preview"]
    tags = events.Tags()
    assert set(run.summary.best) <= set(tags["scalars"])
    assert "preview/text_summary" in tags["tensors"]
    assert ("preview" in tags["images"]) == (run.name == "frames")


def shown(prediction):
    """What is predicted, and the numbers that are only nearly the same."""
    fields = prediction.fields()
    numbers = [fields.pop(key, []) for key in ("probability", "scores")]
    likelihoods = fields.pop("probabilities", [])
    values = likelihoods.values() if isinstance(likelihoods, dict) else likelihoods
    return fields, np.array([*values, *np.ravel(numbers[0]), *numbers[1]])


@pytest.mark.parametrize(
    "run", [name for name, case in CASES.items() if case.predicted], indirect=True
)
def test_a_trained_model_predicts_each_example_as_if_alone(run):
    inputs = CASES[run.name].predicted
    model = lmtrain.load(run.path)

    together = list(map(shown, model.predict(inputs)))

    assert len(together) == len(inputs)
    for each, (fields, numbers) in zip(inputs, together, strict=True):
        ((alone, expected),) = map(shown, model.predict([each]))
        assert fields == alone
        assert numbers == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "run", [name for name, case in CASES.items() if case.predicted], indirect=True
)
def test_probabilities_that_are_not_finite_are_no_predictions(run):
    model = lmtrain.load(run.path)
    with torch.no_grad():
        model.model.head.bias[0] = torch.inf

    with pytest.raises(DivergedError, match=r"^the model's probabilities are not finite numbers$"):
        list(model.predict(CASES[run.name].predicted))


def test_loss_is_that_of_a_plain_loop_over_examples(name, places):
    found = task(settings(name, places))
    batch, indices = found.batch(0), found._batches.indices(0)

    loss = found.loss(batch, None)

    parts = [plain(found, index) for index in indices]
    total = sum(nats for nats, _ in parts)
    assert_same(loss.objective, total / len(indices))
    assert_same(loss.total.float(), total)
    assert loss.predictions == sum(count for _, count in parts)


def plain(found, index) -> tuple[torch.Tensor, int]:
    """Nats and predictions of a training example, alone and without padding."""
    model, kind = found.model, found.config.data.task
    examples = found.data.splits["train"]
    inputs, targets = (torch.tensor(each[index]) for each in (examples.inputs, examples.targets))
    lengths, inputs = torch.tensor([len(inputs)]), inputs.unsqueeze(1)
    if kind == "tag":
        return cross_entropy(model(inputs, lengths)[:, 0], targets, reduction="sum"), len(targets)
    if kind == "classify":
        return cross_entropy(model(inputs, lengths)[0], targets), 1
    if kind == "language-model":
        hidden, _ = model.encoder(inputs)
        return cross_entropy(model.head(hidden)[:, 0], targets, reduction="sum"), len(targets)
    if kind == "frames":
        likelihoods = model(inputs.float())[0][:, 0].sigmoid()
        is_on = targets == 1
        likelihoods = torch.where(is_on, likelihoods, 1 - likelihoods)
        return -likelihoods.log().sum(), len(targets)
    memory, state = model.encode(inputs, lengths)
    last, nats = found.data.end_id, torch.zeros(())
    for target in targets.tolist():
        hidden, state = model.decode(torch.tensor([[last]]), memory, state)
        logits = linear(hidden[0, 0], model.head.weight, model.head.bias)
        nats, last = nats - logits.log_softmax(0)[target], target
    return nats, len(targets)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_uneven_shards_have_the_gradient_of_the_whole_batch(name, places, size):
    def gradients(shard):
        part = task(settings(name, places), shard)
        found = part.loss(part.batch(0), None)
        weights = list(part.model.parameters())
        return found, torch.autograd.grad(found.objective, weights)

    whole, expected = gradients(Shard())
    parts = [gradients(Shard(rank, size)) for rank in range(size)]

    assert sum(int(loss.predictions) for loss, _ in parts) == whole.predictions
    assert_same(sum(loss.total for loss, _ in parts).float(), whole.total.float())
    for own, truth in zip(zip(*(each for _, each in parts), strict=True), expected, strict=True):
        dense = [each.to_dense() for each in own]
        assert_same(torch.stack(dense).mean(0), truth.to_dense())


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_metrics_of_shards_add_up(name, places, size):
    whole = task(settings(name, places)).evaluate("valid")

    parts = [task(settings(name, places), Shard(rank, size)) for rank in range(size)]

    sums = [part.evaluate("valid").sums for part in parts]
    assert whole.summed(sums).sums == pytest.approx(whole.sums, rel=1e-5)


def test_an_example_is_measured_the_same_beside_others_and_alone(name, places):
    found = task(settings(name, places, train__batch_size=6))
    one = task(settings(name, places, train__batch_size=1))

    assert found.evaluate("valid").sums == pytest.approx(one.evaluate("valid").sums, rel=1e-5)
    assert found.model.training


def test_bf16_is_near_fp32(name, places):
    exact, rounded = (
        task(settings(name, places, train__precision=precision)) for precision in ("fp32", "bf16")
    )

    losses = [each.loss(each.batch(0), None) for each in (exact, rounded)]
    gradients = [
        torch.cat(
            [
                grad.to_dense().flatten()
                for grad in torch.autograd.grad(loss.objective, list(each.model.parameters()))
            ]
        )
        for loss, each in zip(losses, (exact, rounded), strict=True)
    ]

    assert float(losses[1].total) == pytest.approx(float(losses[0].total), rel=0.01)
    assert cosine_similarity(*gradients, dim=0) > 0.99


def test_batches_are_a_function_of_the_step(name, places):
    one, other = (task(settings(name, places)) for _ in range(2))

    for step in (3, 0, 7):
        assert all(map(torch.equal, one.batch(step).tensors, other.batch(step).tensors))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_data_that_changed_is_refused(name, places, tmp_path, split):
    chosen = settings(name, places)
    kind = task_of(chosen)
    data = kind.read(chosen)
    assert kind.find(chosen, data, data.references()).references() == data.references()
    (tmp_path / "other").mkdir()
    (other,) = write(name, tmp_path / "other", seed=2)[f"data.{split}"]
    Path(other).replace(places[f"data.{split}"][0])

    with pytest.raises(CheckpointError, match=f"^the {split} text .* is not the one this run was"):
        kind.find(chosen, data, data.references())


def change_a_target(kind, path):
    """Changes what is to be predicted of one example, and nothing else."""
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        array = arrays["labels" if kind == "classify" else "inputs"]
        array.flat[-1] = not array.flat[-1]
        np.savez(path, **arrays)
    else:
        old, new = {
            "tag": ("\tO\n", "\tB-X\n"), "classify": ("a\t", "b\t"), "translate": ("W", "X"),
            "language-model": ("a\t", "b\t"),
        }[kind]  # fmt: skip
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))


def test_a_single_target_that_changed_is_refused(name, places):
    chosen = settings(name, places)
    kind = task_of(chosen)
    data = kind.read(chosen)
    change_a_target(chosen.data.task, Path(places["data.train"][0]))

    with pytest.raises(CheckpointError, match=r"the train text .* is not the one this run was"):
        kind.find(chosen, data, data.references(), ("train",))


def test_several_processes_do_not_read_standard_input(name, places, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen = settings(name, {**places, "data.valid": ["-"]})

    with pytest.raises(ConfigError, match=r"^several processes cannot read examples from standard"):
        task_of(chosen).read(chosen)


def test_without_validation_data_a_part_of_the_examples_is_drawn(name, places):
    chosen = settings(name, {"data.train": places["data.train"]}, data__test_fraction=0.25)
    kind = task_of(chosen)

    data = kind.read(chosen)

    sizes = {split: len(examples.inputs) for split, examples in data.splits.items()}
    assert sizes == {"train": 8, "valid": 1, "test": 3}
    again = kind.find(chosen, data, data.references(), ("test",))
    assert {split: each.key for split, each in again.splits.items()} == {
        "test": data.splits["test"].key
    }


def test_a_split_with_a_file_of_its_own_is_found_without_the_training_data(name, places):
    chosen = settings(name, places)
    kind = task_of(chosen)
    data = kind.read(chosen)
    Path(places["data.train"][0]).unlink()

    found = kind.find(chosen, data, data.references(), ("valid", "test"))

    assert [len(each.inputs) for each in found.splits.values()] == [6, 3]


def test_the_baseline_is_that_of_the_split(name, places):
    found = task(settings(name, places))

    baseline = found.baseline("valid")

    assert baseline.count == found.evaluate("valid").count
    assert 0 < baseline.loss < 10
    assert found.baseline("nothing") is None


def test_a_learning_rate_is_found(name, places):
    curve = find_learning_rate(settings(name, places), first=1e-4, last=1.0, steps=10)

    assert len(curve.losses) > 3
