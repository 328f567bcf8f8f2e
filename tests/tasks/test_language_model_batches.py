"""The task of a language model: its batches, first predictions, noise and validation."""

import dataclasses

import numpy as np
import pytest
import torch

from corpora import TINY
from lmtrain import config
from lmtrain.tasks import perplexity
from lmtrain.tasks.base import Shard
from lmtrain.tasks.language_model import LanguageModelling


@pytest.fixture
def make_task(tmp_path):
    """A function that makes a task from a text and settings."""

    def make(text: str = TINY, shard: Shard | None = None, **changes):
        path = tmp_path / "text.txt"
        path.write_text(text)
        overrides = {
            "data.train": str(path), "model.hidden_size": 6, "train.batch_size": 4,
            "train.seq_len": 5, **{name.replace("__", "."): changes[name] for name in changes},
        }  # fmt: skip
        chosen = config.load(overrides=overrides)
        data = LanguageModelling.read(chosen)
        model = LanguageModelling.build(chosen, data)
        return LanguageModelling(chosen, data, model, shard or Shard())

    return make


@pytest.mark.parametrize("level", ["word", "char"])
def test_windows_after_the_end_of_a_line_start_with_a_zero_state(make_task, level):
    task = make_task(data__level=level, train__state_reset=0.999999)

    for step in range(task.steps_per_epoch):
        inputs, _, is_kept = task.batch(step).tensors
        assert torch.equal(is_kept, inputs[:1] != task.data.tokenizer.start_id)


@pytest.mark.parametrize("text", [TINY, TINY.replace("\n", " ")], ids=["lines", "no lines"])
def test_as_many_windows_as_set_start_with_a_zero_state(make_task, text):
    task = make_task(text * 9, data__level="char", train__state_reset=0.02)

    is_kept = torch.cat([task.batch(step).tensors[2] for step in range(4 * task.steps_per_epoch)])

    # Six standard deviations of a binomial count.
    count, expected = int((~is_kept).sum()), 0.02 * is_kept.numel()
    assert abs(count - expected) < 6 * expected**0.5


def test_streams_that_are_reset_do_not_use_their_state(make_task):
    task = make_task(train__state_reset=0.999999)
    batch = next(batch for batch in map(task.batch, range(99)) if not batch.tensors[2].all())
    is_kept = batch.tensors[2].T
    before = task.zero_state(4).map(lambda part: torch.ones_like(part))

    expected = task.loss(batch, before.map(lambda part: part * is_kept))

    assert torch.equal(task.loss(batch, before).objective, expected.objective)


def test_noise_replaces_inputs_but_no_targets(make_task):
    noised, plain = make_task(train__noise=0.9), make_task()
    batches = [(noised.batch(step).tensors, plain.batch(step).tensors) for step in range(30)]

    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in batches)
    differing = [float((ours[0] != theirs[0]).float().mean()) for ours, theirs in batches]
    assert 0.01 < np.mean(differing) < 0.5


def test_noise_and_resets_depend_on_the_step_alone(make_task):
    changes = {"train__noise": 0.5, "train__state_reset": 0.3}
    whole = make_task(**changes)
    parts = [make_task(shard=Shard(rank, 2), **changes) for rank in range(2)]

    for step in (7, 0, 7):
        shards = zip(*(part.batch(step).tensors for part in parts), strict=True)
        for tensor, pair in zip(whole.batch(step).tensors, shards, strict=True):
            assert torch.equal(tensor, torch.cat(pair, 1))


@pytest.mark.parametrize(("seq_len", "num_streams"), [(2, 4), (10, 3), (39, 1)])
def test_the_streams_of_a_validation_are_as_long_as_windows(make_task, seq_len, num_streams):
    task = make_task(data__level="char", train__seq_len=seq_len)
    train = task.data.texts["train"]
    text = task.data.texts["valid"] = dataclasses.replace(train, ids=train.ids[:38])

    result = task.evaluate("valid")

    expected = perplexity.evaluate(task.model, text, task.data.tokenizer, batch_size=num_streams)
    assert result.total_nats == pytest.approx(expected.total_nats)


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_the_first_predictions_are_the_frequencies_of_tokens(make_task, softmax):
    task = make_task(model__frequency_bias=True, model__softmax=softmax)
    task.initialize(task.config, task.model, task.data)
    with torch.no_grad():
        task.model.head.weight.zero_()

    assert task.evaluate("valid").loss == pytest.approx(task.baseline("valid").loss, rel=1e-6)


def test_biases_are_not_frequencies_by_default(make_task):
    task = make_task()
    task.initialize(task.config, task.model, task.data)

    assert not task.model.head.bias.any()
