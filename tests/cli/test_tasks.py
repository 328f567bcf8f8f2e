"""The commands on taggers, translators, models of frames and classifiers of vectors.

What is refused is tried in this process, which takes no seconds to import torch.
"""

import contextlib
import io
import json
import shutil
import signal

import mido
import numpy as np
import pytest
from example_tasks import CASES, settings, write

from lmtrain.cli.main import app
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.training.run import run_training

OPTIONS = (
    "--hidden-size", "6", "--num-layers", "1", "--epochs", "2", "--batch-size", "5",
    "--set", "train.threads=1", "--out", "run", "--json",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a few steps of each of some tasks, by name, with their data beside them."""
    found = {}
    for name in ("tag", "frames", "translate-dot", "vectors", "labelled"):
        folder = tmp_path_factory.mktemp(name)
        run_training(settings(name, write(name, folder)), folder / "run", is_quiet=True)
        found[name] = folder / "run"
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """`lmtrain` in this process: what it prints; the error that would end it is raised."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGPIPE)

    def call(*words):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            app([str(word) for word in words], standalone_mode=False)
        return printed.getvalue()

    yield call
    signal.signal(signal.SIGPIPE, before)


def places(name, folder):
    return {split.partition(".")[2]: path for split, (path,) in write(name, folder).items()}


def test_a_tagger_is_trained_used_and_evaluated(lmtrain, parsed, parsed_lines, tmp_path):
    data = places("tag", tmp_path)

    done = lmtrain("train", data["train"], "--valid", data["valid"], "--task", "tag", *OPTIONS)
    predicted = lmtrain("predict", "run", "--json", stdin="w1 w2\n\nw3 new w4\n")
    evaluated = lmtrain("evaluate", "run", data["test"], "--json")

    assert done.returncode == 0, done.stderr
    summary = parsed(done.stdout)
    assert (summary["metric"], summary["labels"], summary["steps"]) == ("span_f1", 4, 6)
    assert summary["valid"].keys() == summary["baseline"].keys() >= {"span_f1", "precision"}
    assert summary["tokens"] > 0
    found = parsed_lines(predicted.stdout)
    assert [each["tokens"] for each in found] == [["w1", "w2"], [], ["w3", "new", "w4"]]
    assert all(len(each["tags"]) == len(each["tokens"]) for each in found)
    (result,) = parsed(evaluated.stdout)["results"]
    assert result["metric"] == "span_f1"
    assert result["value"] == result["span_f1"]


def test_a_translator_is_trained_used_and_evaluated(lmtrain, parsed, tmp_path):
    pairs = [
        line.split("\t")
        for line in (tmp_path / places("translate-dot", tmp_path)["train"]).read_text().splitlines()
    ]
    for name, side in (("all.de", 0), ("all.en", 1)):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in pairs))

    done = lmtrain("train", "all.de", "--target", "all.en", "--task", "translate", *OPTIONS)
    predicted = lmtrain("predict", "run", "--nbest", 2, stdin="w1 w2\nw3\n")
    evaluated = lmtrain("evaluate", "run", "train.tsv", "--json")

    assert done.returncode == 0, done.stderr
    summary = parsed(done.stdout)
    assert summary["metric"] == "bleu"
    assert {"vocab_size", "target_vocab_size"} <= summary.keys()
    rows = [line.split("\t") for line in predicted.stdout.splitlines()]
    assert len(rows) == 4, predicted.stderr
    for first, second in (rows[:2], rows[2:]):
        assert float(first[0]) >= float(second[0])
        assert first[1] != second[1]
    (result,) = parsed(evaluated.stdout)["results"]
    assert result["metric"] == "bleu"
    assert 0 <= result["value"] <= 100


def test_music_is_written_as_midi(runs, lmtrain, tmp_path):
    done = lmtrain("sample", runs["frames"], "--out", "tune.mid", "--max-tokens", 32)

    assert [done.returncode, done.stderr] == [0, ""]
    assert done.stdout == "tune.mid: 32 steps\n"
    assert 0 < mido.MidiFile(tmp_path / "tune.mid").length <= 8


def test_a_tagger_writes_no_text(runs, lmtrain, assert_refused):
    refused = lmtrain("sample", runs["tag"])

    assert_refused(refused, 2, "data.task = tag: sampling text does not", "lmtrain predict")


def test_music_is_written_as_arrays_and_as_a_picture(runs, here, tmp_path):
    for name in ("tune.npz", "tune.png"):
        here("sample", runs["frames"], "--out", name, "--max-tokens", 5, "--seed", 3)

    arrays = np.load(tmp_path / "tune.npz")
    assert arrays["inputs"].shape == (5, 4)
    assert arrays["lengths"].tolist() == [5]
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    evaluated = json.loads(here("evaluate", runs["frames"], "tune.npz", "--json"))["results"]
    assert (evaluated[0]["metric"], evaluated[0]["count"]) == ("nats_per_step", 5)


def test_labels_of_vectors_are_predicted_of_a_file(runs, here):
    found = here("predict", runs["vectors"], runs["vectors"].parent / "test.npz")

    rows = [line.split("\t") for line in found.splitlines()]
    assert len(rows) == 3
    assert all(label in "01" and 0.5 <= float(likelihood) <= 1 for label, likelihood in rows)


def test_tags_are_predicted_of_columns_and_read_again(runs, here, tmp_path):
    (tmp_path / "new.conll").write_text("w1\nw2\n\nw3\n")

    (tmp_path / "tagged.conll").write_text(here("predict", runs["tag"], "new.conll"))

    found = json.loads(here("evaluate", runs["tag"], "tagged.conll", "--json"))["results"]
    assert (found[0]["count"], found[0]["accuracy"]) == (3, 1)


def test_info_names_the_task_and_its_sizes(runs, here):
    found = {name: json.loads(here("info", run, "--json")) for name, run in runs.items()}

    tasks = ["tag", "frames", "translate", "classify", "language-model"]
    assert [each["task"] for each in found.values()] == tasks
    assert (found["tag"]["labels"], found["frames"]["outputs"]) == (4, 4)
    assert (found["vectors"]["input_size"], found["vectors"]["labels"]) == (3, 2)
    assert {"vocab_size", "target_vocab_size"} <= found["translate-dot"].keys()


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("tag", ("sample", "{run}", "--out", "a.mid"), "task = tag: --out does not work with it"),
        ("translate-dot", ("sample", "{run}"), "task = translate: sampling text does not work"),
        ("frames", ("sample", "{run}"), "task = frames: sampling text does not work with it\n"
            "  try: lmtrain sample --out tune.mid"),
        ("frames", ("sample", "{run}", "--out", "a.txt"), "must end in .mid, .png or .npz"),
        ("frames", ("sample", "{run}", "--out", "a.mid", "--num", "2"), "--out writes one sample"),
        ("frames", ("sample", "{run}", "--out", "a.mid", "--temperature", "-1"), "0 or more"),
        ("frames", ("predict", "{run}"), "task = frames: predict does not work with it"),
        ("vectors", ("predict", "{run}", "--beam", "2"), "are for translation models"),
        ("tag", ("predict", "{run}", "--nbest", "2"), "are for translation models"),
        ("translate-dot", ("predict", "{run}", "{file}", "--nbest", "9"), "nbest 9 must be from 1"),
        ("tag", ("score", "{run}"), "task = tag: score does not work with it"),
        ("labelled", ("score", "{run}"), "with data.labelled = true: score does not work with it"),
        ("frames", ("tokenize", "{run}", "a"), "was trained on vectors: it has no tokenizer"),
        ("vectors", ("tokenize", "{run}", "a"), "was trained on vectors: it has no tokenizer"),
        ("labelled", ("gradients", "{file}", "--cell", "gru", "--set", "data.labelled=true"),
            "gradients does not work with data.labelled = true"),
        ("tag", ("evaluate", "{run}", "--cache", "9,1,1"), "task = tag: --cache does not work"),
        ("tag", ("train", "--resume", "{run}", "--task", "classify"), "cannot change data.task"),
        ("translate-dot", ("train", "--resume", "{run}", "--target", "x"),
            "cannot change data.target"),
    ],
)  # fmt: skip
def test_what_a_task_has_no_use_for_is_refused(runs, here, tmp_path, name, words, told):
    before = sorted(tmp_path.iterdir())
    file = runs[name].parent / "test.tsv"

    with pytest.raises(ConfigError) as caught:
        here(*(word.format(run=runs[name], file=file) for word in words))

    assert caught.value.exit_code == 2
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert sorted(tmp_path.iterdir()) == before


def test_music_is_not_written_by_a_model_of_text(word_model, here):
    with pytest.raises(ConfigError, match=r"task = language-model: --out does not work with it"):
        here("sample", word_model.run, "--out", "a.mid")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("tag", ("--level", "char"), "data.level = char means nothing with data.task = tag"),
        ("tag", ("--target", "x"), "means nothing with data.task = tag"),
        ("frames", ("--set", "model.embedding_size=5"), "model.embedding_size = 5 means nothing"),
        ("frames", ("--vocab-size", "50"), "data.vocab_size = 50 means nothing with data.task"),
        ("vectors", ("--vocab-size", "50"), "data.vocab_size = 50 does not apply to vectors"),
        ("vectors", ("--set", "model.word_dropout=0.1"), "model.word_dropout = 0.1 does not apply"),
        ("vectors", ("--level", "byte"), "data.level = byte does not apply to vectors"),
        ("translate-dot", ("--set", "model.pooling=max"), "model.pooling = max means nothing"),
        ("translate-dot", ("--bptt", "9"), "train.seq_len = 9 means nothing with data.task"),
    ],
)
def test_settings_without_a_meaning_are_refused(here, tmp_path, name, options, told):
    task = CASES[name].settings["data.task"]

    with pytest.raises(ConfigError) as caught:
        here("train", places(name, tmp_path)["train"], "--task", task, *options, "--out", "run")

    assert caught.value.exit_code == 2
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("tag", "a\n", "line 1: expected a token and a tag"),
        ("frames", "a\n", "is not a .npz file of NumPy"),
        ("translate", "a\n", "line 1: expected source, tab and target"),
        ("classify", "a\n", "line 1: no tab between label and text"),
    ],
)
def test_data_of_another_form_is_refused(here, tmp_path, name, text, told):
    (tmp_path / "train.txt").write_text(text)

    with pytest.raises(TextError) as caught:
        here("train", "train.txt", "--task", name, "--out", "run")

    assert caught.value.exit_code == 3
    assert told in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_label_or_a_width_that_training_does_not_have_is_refused(runs, here, tmp_path):
    np.savez(tmp_path / "new.npz", inputs=np.ones((2, 3)), lengths=[2], labels=["new"])
    np.savez(tmp_path / "wide.npz", inputs=np.ones((2, 4)), lengths=[2])

    with pytest.raises(TextError, match=r"new\.npz: the label 'new' is not in the training data"):
        here("evaluate", runs["vectors"], "new.npz")
    with pytest.raises(TextError, match=r"vectors of 4 numbers, the model takes 3"):
        here("predict", runs["vectors"], "wide.npz")


@pytest.mark.parametrize("name", ["frames", "vectors"])
def test_a_damaged_vocabulary_is_refused(runs, here, tmp_path, name):
    shutil.copytree(runs[name], tmp_path / "run")
    file = {"frames": "frames.json", "vectors": "vectors.json"}[name]
    for path in (tmp_path / "run").rglob(file):
        path.write_text("{}")

    with pytest.raises(CheckpointError, match="damaged"):
        here("evaluate", "run")
