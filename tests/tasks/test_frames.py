"""What is special to frames of yes and no."""

import math

import numpy as np
import pytest
import torch
from example_tasks import settings, task, write

import lmtrain
from lmtrain.errors import CheckpointError, ConfigError, DivergedError, TextError
from lmtrain.tasks.frames import Frames
from lmtrain.training.run import run_training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that has learned that two outputs take turns."""
    folder = tmp_path_factory.mktemp("frames")
    frames = np.tile([[1, 0, 0], [0, 0, 1]], (40, 1))
    np.savez(folder / "train.npz", inputs=frames, lengths=[8] * 10)
    chosen = settings(
        "frames", {"data.train": [str(folder / "train.npz")]}, train__max_steps=100,
        train__eval_every=100, model__num_layers=1,
    )  # fmt: skip
    summary = run_training(chosen, folder / "run", is_quiet=True)
    assert summary.best["accuracy"] == 1
    return lmtrain.load(folder / "run")


def test_what_was_learned_is_composed(model):
    frames = model.compose(num_steps=6, temperature=0.1)

    assert frames.dtype == np.int8
    assert frames.tolist() == [[1, 0, 0], [0, 0, 1]] * 3


def test_greedy_frames_have_what_is_more_likely_on_than_off(model):
    composed = model.compose(num_steps=20, temperature=0, seed=5)
    before = np.concatenate([np.zeros((1, 3)), composed[:-1]]).astype(np.float32)
    with torch.no_grad():
        logits, _ = model.model(torch.from_numpy(before)[:, None])

    np.testing.assert_array_equal(composed, logits[:, 0].numpy() > 0)
    np.testing.assert_array_equal(composed, model.compose(num_steps=20, temperature=0, seed=6))


def test_the_seed_decides_what_is_composed(model):
    first, again, other = (model.compose(temperature=9.0, seed=seed) for seed in (5, 5, 6))

    assert first.shape == (200, 3)
    assert set(np.unique(first)) == {0, 1}
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_frame_is_drawn_from_the_probabilities_after_those_before_it(model):
    composed = model.compose(num_steps=3000, temperature=2.0)
    before = np.concatenate([np.zeros((1, 3)), composed[:-1]]).astype(np.float32)

    with torch.no_grad():
        logits, _ = model.model(torch.tensor(before).unsqueeze(1))

    likelihoods = (logits[:, 0] / 2).sigmoid().numpy()
    spread = np.sqrt((likelihoods * (1 - likelihoods)).sum(0))
    # Four standard deviations: a right program fails once in thousands of seeds, and this is one.
    assert (abs(composed.sum(0) - likelihoods.sum(0)) < 4 * spread).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_steps": 0},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"seed": -1},
    ],
)
def test_what_cannot_be_composed_is_refused(model, arguments):
    with pytest.raises(ConfigError, match="compose: num_steps must be 1 or more, temperature"):
        model.compose(**arguments)


def test_a_diverged_model_composes_nothing(tmp_path):
    found = task(settings("frames", write("frames", tmp_path)))
    with torch.no_grad():
        found.model.head.bias[0] = torch.nan

    with pytest.raises(DivergedError, match="not finite"):
        found.preview(0)


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (np.full((3, 3), 0.5), "new.npz: sequence 1 has a number that is neither 0 nor 1"),
        (np.array([[0, 1, 2]]), "new.npz: sequence 1 has a number that is neither 0 nor 1"),
        (np.ones((3, 4)), "new.npz: frames of 4 numbers, the model has 3"),
    ],
)
def test_what_are_no_frames_is_refused(model, tmp_path, frames, told):
    np.savez(tmp_path / "new.npz", inputs=frames, lengths=[len(frames)])

    with pytest.raises(TextError, match=told):
        model.read([str(tmp_path / "new.npz")])


def test_a_frames_input_is_the_frame_before_it(model, tmp_path):
    frames = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    np.savez(tmp_path / "new.npz", inputs=frames, lengths=[2, 1])

    found = model.read([str(tmp_path / "new.npz")])

    assert [each.tolist() for each in found.inputs] == [[[0, 0, 0], [1, 0, 1]], [[0, 0, 0]]]
    assert np.array_equal(np.concatenate(found.targets), frames)


def test_the_accuracy_counts_what_is_on_alone(tmp_path):
    found = task(settings("frames", write("frames", tmp_path)))
    with torch.no_grad():
        found.model.head.weight.zero_()
        found.model.head.bias.copy_(torch.tensor([1.0, 1, -1, -1]))
    frames = np.concatenate(found.data.splits["valid"].targets)

    metrics = found.evaluate("valid")

    hits = frames[:, :2].sum()
    misses = (1 - frames[:, :2]).sum() + frames[:, 2:].sum()
    assert (metrics.count, metrics.hits, metrics.misses) == (len(frames), hits, misses)
    assert metrics.accuracy == hits / (hits + misses)
    assert metrics.value == metrics.loss


def test_the_baseline_copies_the_last_frame(tmp_path):
    places = {}
    for split, frames in (("train", [[1], [1], [0], [0]]), ("valid", [[0], [1], [1]])):
        np.savez(tmp_path / f"{split}.npz", inputs=frames, lengths=[len(frames)])
        places[f"data.{split}"] = [str(tmp_path / f"{split}.npz")]

    found = task(settings("frames", places)).baseline("valid")

    # In training: off, on, on, off, off; each of the two is followed by either once.
    assert found.total_nats == pytest.approx(3 * math.log(2))
    assert found.count == 3


def test_a_preview_is_drawn_as_a_piano_roll(tmp_path):
    found = task(settings("frames", write("frames", tmp_path)))
    preview = found.preview(3)

    picture = found.picture(preview)

    assert picture.shape == (4 * 4, 6 * 64)
    keys = [[] if word == "-" else list(map(int, word.split(","))) for word in preview.split()]
    assert len(keys) == 64
    for step, on in enumerate(keys):
        column = picture[::-4, 6 * step]
        assert np.flatnonzero(column == 0).tolist() == on


@pytest.mark.parametrize(
    "preview", ["", "0,1 - 99 x 1.5", "1,," * 900, "\u00b2 \u0663 9999999999999999999999"]
)
def test_a_preview_that_was_changed_does_no_harm(tmp_path, preview):
    found = task(settings("frames", write("frames", tmp_path)))

    assert found.picture(preview).shape == (16, 384)


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", '{"outputs": 0}', '{"outputs": "3"}', "[1]", '{"outputs": 1000001}'],
)
def test_a_damaged_number_of_outputs_is_refused(content):
    class Files:
        def text(self, name):
            return content

    with pytest.raises(CheckpointError, match=r"^frames\.json is damaged$"):
        Frames.restore(Files(), settings("frames", {}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__embedding_size": 5}, "model.embedding_size = 5 means nothing with data.task"),
        ({"data__vocab_size": 99}, "data.vocab_size = 99 means nothing with data.task = frames"),
        ({"data__level": "byte"}, "data.level = byte means nothing with data.task = frames"),
        ({"model__bidirectional": True}, "model.bidirectional = true means nothing with"),
        ({"model__word_dropout": 0.1}, "model.word_dropout = 0.1 means nothing with"),
        ({"train__seq_len": 9}, "train.seq_len = 9 means nothing with data.task = frames"),
    ],
)
def test_what_means_nothing_for_frames_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        settings("frames", {}, **changes)
