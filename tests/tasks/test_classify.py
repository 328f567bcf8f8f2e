"""Classification, through training, resuming, evaluation and prediction."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_same
from run_folders import load_settings

import lmtrain
from lmtrain import config, untrusted
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.tasks.base import Shard
from lmtrain.tasks.classify import Classification, LabelledData, TrainedClassifier
from lmtrain.tasks.examples import Examples
from lmtrain.tasks.inputs import TextInputs
from lmtrain.tasks.labels import restored_labels
from lmtrain.training.run import run_training

LABELS = ("animal", "number", "colour")
WORDS = {
    "animal": ("cat", "dog", "cow"),
    "number": ("one", "two", "three"),
    "colour": ("red", "blue", "green"),
}
SMALL = {
    "data.task": "classify", "model.embedding_size": 6, "model.hidden_size": 8,
    "model.num_layers": 1, "train.batch_size": 7, "train.max_steps": 60, "train.eval_every": 20,
    "train.log_every": 5, "train.threads": 1, "optimizer.learning_rate": 0.05,
}  # fmt: skip


def examples(count: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        label = LABELS[generator.integers(3)]
        words = ["the", "of", "a", "some"]
        words = [words[i] for i in generator.integers(4, size=generator.integers(1, 6))]
        words.insert(generator.integers(len(words) + 1), WORDS[label][generator.integers(3)])
        lines.append(f"{label}\t{' '.join(words)}\n")
    return "".join(lines)


@pytest.fixture
def places(tmp_path):
    for split, count in (("train", 200), ("valid", 40), ("test", 30)):
        (tmp_path / f"{split}.tsv").write_text(examples(count, len(split)))
    return {
        f"data.{split}": [str(tmp_path / f"{split}.tsv")] for split in ("train", "valid", "test")
    }


def settings(places, **changes):
    return load_settings({**SMALL, **places}, **changes)


def test_labels_are_learned_stored_and_predicted(places, tmp_path):
    summary = run_training(settings(places), tmp_path / "run", is_quiet=True)
    model = lmtrain.load(tmp_path / "run")

    assert summary.best["accuracy"] == 1
    assert summary.baseline.accuracy < 0.6
    found = list(model.predict(["the dog", "some blue of a", "two"]))
    assert [each.label for each in found] == ["animal", "colour", "number"]
    for each in found:
        assert sum(each.probabilities.values()) == pytest.approx(1)
        assert each.probability == max(each.probabilities.values())
    measured = {split: model.measure(data) for split, data in model.own_data().items()}
    assert (measured["valid"].count, measured["test"].count) == (40, 30)
    assert measured["test"].accuracy == 1
    assert model.evaluate(places["data.test"]).sums == pytest.approx(measured["test"].sums)
    assert json.loads((tmp_path / "run" / "labels.json").read_text())["labels"] == sorted(LABELS)


def task(pooling="last", *, bidirectional=False, **network) -> Classification:
    chosen = config.load(
        overrides={
            **SMALL, "model.pooling": pooling, "model.bidirectional": bidirectional,
            "train.precision": "fp32", **{f"model.{key}": value for key, value in network.items()},
        }
    )  # fmt: skip
    generator = np.random.default_rng(2)
    tokens = [generator.integers(0, 9, size) for size in (5, 1, 3, 7, 2)]
    split = Examples(tokens, np.array([0, 1, 2, 1, 0]), "0" * 64, "examples")
    words = Tokenizer([UNK, EOS, *"abcdefg"])
    data = LabelledData(TextInputs(words), LABELS, splits={"train": split, "valid": split})
    return Classification(chosen, data, Classification.build(chosen, data), Shard())


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_pooling_does_not_see_the_padding(pooling, bidirectional):
    classification = task(pooling, bidirectional=bidirectional)
    model, batch = classification.model.eval(), classification.batch(0)
    tokens, lengths, _ = batch.tensors

    together = model(tokens, lengths)

    for row, length in enumerate(lengths.tolist()):
        alone = model(tokens[:length, row : row + 1], lengths[row : row + 1])
        assert_same(together[row], alone[0])


def test_locked_dropout_has_a_mask_for_each_example():
    classification = task(dropout=0.5, locked_dropout=True, hidden_size=64)
    model = classification.model.train()

    pooled = model.pooled(torch.ones(3, 5, dtype=torch.long), torch.full((5,), 3))[0]

    dropped = pooled == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert len({tuple(row) for row in dropped.tolist()}) == 5


def trained() -> TrainedClassifier:
    classification = task()
    parts = classification.config, classification.data, classification.model.eval()
    return TrainedClassifier(Path("checkpoint"), *parts, {"step": 0})


@pytest.mark.slow
def test_texts_are_predicted_in_their_order_with_little_padding():
    model, shapes = trained(), []
    texts = ["b c " * 400 if index % 100 == 0 else "a " * (1 + index % 3) for index in range(600)]
    texts[5] = "a " * 70_000
    alone = {text: next(model.predict([text])).probabilities for text in set(texts)}
    model.model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))

    found = list(model.predict(iter(texts)))

    assert [each.text for each in found] == [text.strip() for text in texts]
    for text, each in zip(texts, found, strict=True):
        assert each.probabilities == pytest.approx(alone[text], rel=1e-5)
    assert sum(steps * rows for steps, rows in shapes) < 130_000
    assert max(steps * rows for steps, rows in shapes) == 70_000


def test_a_text_is_predicted_as_a_file_would_have_it():
    (found,) = trained().predict([" a\nb "])

    assert found.text == "a b"


@pytest.mark.parametrize(
    ("texts", "told"),
    [("ab", "a list of texts, not one text"), (["a", b"b"], "takes texts, not bytes")],
)
def test_what_is_no_list_of_texts_is_refused(texts, told):
    with pytest.raises(ConfigError, match=told):
        list(trained().predict(texts))


def test_the_baseline_is_the_most_frequent_label():
    baseline = task().baseline("valid")

    assert baseline.accuracy == 2 / 5
    frequencies = [3 / 8, 3 / 8, 2 / 8, 3 / 8, 3 / 8]
    assert baseline.total_nats == pytest.approx(-sum(map(math.log, frequencies)))


@pytest.mark.parametrize("count", range(2, 30, 3))
def test_the_only_example_of_a_label_is_never_drawn(tmp_path, count):
    lines = [f"rare-{index}\tone\n" for index in range(count)] + ["common\tone\n"] * (count + 2)
    (tmp_path / "train.tsv").write_text("".join(lines))
    chosen = settings({"data.train": [str(tmp_path / "train.tsv")]}, data__test_fraction=0.3)

    found = Classification.read(chosen)

    drawn = [found.splits[split].targets.tolist() for split in ("valid", "test")]
    assert [len(labels) for labels in drawn] == [
        round(fraction * (2 * count + 2)) or 1 for fraction in (0.1, 0.3)
    ]
    assert {*drawn[0], *drawn[1]} == {found.labels.index("common")}
    assert sum(len(split.targets) for split in found.splits.values()) == 2 * count + 2


def test_examples_with_a_label_each_are_too_few_to_be_split(tmp_path):
    (tmp_path / "train.tsv").write_text("a\tone\nb\ttwo\nc\tthree\n")

    text = str(tmp_path / "train.tsv")
    with pytest.raises(TextError, match=r"too few examples to be split: 3\n.*--valid FILE"):
        Classification.read(settings({"data.train": [text]}))
    with pytest.raises(TextError, match=r"too few examples to be split: 3\n.*data\.test=FILE"):
        Classification.read(
            settings({"data.train": [text], "data.valid": [text]}, data__test_fraction=0.5)
        )


@pytest.mark.parametrize(("label", "shown"), [("plänt", "plänt"), ("x" * 5000, "x" * 39 + "…")])
def test_a_label_that_training_does_not_have_is_refused(places, tmp_path, label, shown):
    (tmp_path / "valid.tsv").write_text(f"{label}\tan oak\n")

    with pytest.raises(TextError) as caught:
        Classification.read(settings(places))

    assert f"valid.tsv: the label '{shown}' is not in the training data\n" in str(caught.value)
    assert str(caught.value).endswith("\n  its labels: animal, colour, number")


def test_of_many_labels_the_first_are_named(places, tmp_path):
    labels = sorted(f"{index:04}" + "x" * 200 for index in range(1200))
    (tmp_path / "train.tsv").write_text("".join(f"{label}\tone\n" for label in labels))

    with pytest.raises(TextError, match=r"0009x{35}… and 1,190 more$") as caught:
        Classification.read(settings(places))

    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_what_is_only_new_in_a_text_is_no_error(places, tmp_path, level, capsys):
    (tmp_path / "valid.tsv").write_text("animal\tżółw\n")

    data = Classification.read(settings(places, data__level=level))

    tokens, unk_id = data.splits["valid"].inputs[0].tolist(), data.inputs.tokenizer.unk_id
    expected = {"word": [unk_id], "char": [unk_id] * 3, "byte": list("żół".encode())}
    assert tokens[: len(expected[level])] == expected[level]
    assert ("'ż' 1" in capsys.readouterr().err) == (level == "char")
    files = type("Files", (), {"text": data.files().__getitem__})
    restored = Classification.restore(files, settings(places))
    assert restored.inputs.tokenizer.vocabulary == data.inputs.tokenizer.vocabulary


def test_a_single_label_teaches_nothing(places, tmp_path):
    (tmp_path / "train.tsv").write_text("plant\tan oak\n" * 9)

    with pytest.raises(TextError, match=r"train\.tsv: all examples have the label 'plant'\n"):
        Classification.read(settings(places))


@pytest.mark.parametrize("name", ["config.toml", "labels.json", "tokenizer.json"])
def test_what_could_not_be_read_again_is_not_trained(places, tmp_path, monkeypatch, name):
    monkeypatch.setitem(untrusted._MAX_BYTES, name, 10)

    with pytest.raises(
        ConfigError, match=rf"^{name} of this run is too large: .*\n  the limit is 10"
    ):
        run_training(settings(places), tmp_path / "run", is_quiet=True)

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [
        "", "{", '{"labels": []}', '{"labels": [1]}', '{"labels": "ab"}', "[" * 9000,
        '{"labels": ["a", "b", "a"]}', '{"labels": ["a", ""]}', '{"labels": ["a\\nb"]}',
        '{"labels": ["\\ud800"]}',
    ],
)  # fmt: skip
def test_labels_that_are_damaged_are_refused(content):
    class Files:
        def text(self, name):
            return content

    with pytest.raises(CheckpointError, match=r"labels\.json is damaged"):
        restored_labels(Files())


def test_what_means_nothing_for_labels_is_refused(places):
    with pytest.raises(ConfigError, match=r"train\.seq_len = 9 means nothing with data\.task"):
        settings(places, train__seq_len=9)


def test_a_preview_says_what_is_predicted_and_what_is_true():
    classification = task()

    lines = classification.preview(0).splitlines()

    assert len(lines) == 3
    for line, truth in zip(lines, ("animal", "number", "colour"), strict=True):
        found = re.fullmatch(r"predicted (\w+) \((correct|wrong, is (\w+))\): .+", line)
        assert found[2] == ("correct" if found[1] == truth else f"wrong, is {truth}")
