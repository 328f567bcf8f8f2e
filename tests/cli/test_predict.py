"""`lmtrain predict`, and the other commands on a classifier."""

import re
from functools import partial

import pytest

from corpora import LABELLED
from lmtrain import checkpoint


@pytest.fixture(scope="session")
def options():
    return (
        "--task", "classify", "--hidden-size", "8", "--num-layers", "1", "--batch-size", "4",
        "--lr", "0.05", "--epochs", "3", "--set", "train.threads=1",
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(lmtrain_in, tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "train.tsv").write_text(LABELLED * 20)
    (folder / "valid.tsv").write_text(LABELLED * 2)
    words = ("train", "train.tsv", "--valid", "valid.tsv", *options, "--out", "run")
    done = lmtrain_in(folder, *words)
    assert done.returncode == 0, done.stderr
    assert "validation  accuracy 1.0000" in done.stdout
    assert "baseline    accuracy 0.5000" in done.stdout
    assert "next        lmtrain predict run" in done.stdout
    return folder / "run"


def test_labels_are_predicted_from_a_file_and_from_standard_input(
    run, lmtrain, fresh_lmtrain, parsed_lines, tmp_path
):
    (tmp_path / "new.txt").write_text("a cat\n\nthe blue\n")

    from_file = fresh_lmtrain("predict", run, "new.txt")
    piped = lmtrain("predict", run, stdin="red\n")
    objects = parsed_lines(lmtrain("predict", run, "-", "--json", stdin="a cat\n").stdout)

    rows = [line.split("\t") for line in from_file.stdout.splitlines()]
    assert [text for _, text, _ in rows] == ["a cat", "", "the blue"]
    assert [label for label, _, _ in rows[::2]] == ["animal", "colour"]
    assert all(0.5 <= float(probability) <= 1 for _, _, probability in rows)
    assert piped.stdout.startswith("colour\tred\t")
    (found,) = objects
    assert (found["schema"], found["label"]) == ("lmtrain.predict/1", "animal")
    assert found["probability"] == found["probabilities"]["animal"]
    assert sum(found["probabilities"].values()) == pytest.approx(1)


def test_evaluate_info_and_verify_know_the_task(run, lmtrain_in, parsed):
    lmtrain = partial(lmtrain_in, run.parent)

    results = parsed(lmtrain("evaluate", run, "--json").stdout)["results"]
    info = parsed(lmtrain("info", run, "--json").stdout)

    (result,) = results
    assert (result["metric"], result["value"], result["count"]) == ("accuracy", 1.0, 8)
    assert info["task"] == "classify"
    assert info["labels"] == 2
    assert info["best_accuracy"] == 1
    assert lmtrain("verify", run).returncode == 0
    assert "accuracy" in lmtrain("evaluate", run, "valid.tsv").stdout


def test_metrics_and_dashboard_have_the_names_of_the_task(run, parsed_lines):
    lines = parsed_lines((run / "metrics.jsonl").read_text())

    train = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "valid"]
    assert all(line["examples_per_second"] > 0 for line in train)
    assert not any("perplexity" in line for line in lines)
    assert valid[-1]["accuracy"] == 1
    assert re.search(r"predicted (animal|colour) \(correct\): ", valid[-1]["preview"])
    assert list((run / "events" / "valid").iterdir())


@pytest.mark.parametrize("command", ["sample", "score", "tune"])
def test_what_labels_have_no_use_for_is_refused(run, lmtrain, assert_refused, command):
    assert_refused(lmtrain(command, run), 2, "data.task = classify", f"lmtrain predict {run}")


def test_a_language_model_predicts_no_labels(word_model, lmtrain, assert_refused):
    assert_refused(lmtrain("predict", word_model.run), 2, f"lmtrain sample {word_model.run}")


def test_two_processes_train_what_one_does(fresh_lmtrain, tmp_path, options):
    command = ("train", "train.tsv", "--valid", "valid.tsv", *options, "--set",
               "train.precision=fp32")  # fmt: skip
    # The last batch of an epoch has fewer examples than there are processes.
    (tmp_path / "train.tsv").write_text(LABELLED * 20 + "animal\ta dog\n")
    (tmp_path / "valid.tsv").write_text(LABELLED * 2)
    for name, more in (("one", ()), ("two", ("--devices", "2"))):
        done = fresh_lmtrain(*command, *more, "--out", name)
        assert done.returncode == 0, done.stderr

    one, two = (
        checkpoint.read(checkpoint.folder(tmp_path / name, 63)).tensors("model.safetensors")
        for name in ("one", "two")
    )
    for name, weight in one.items():
        # Two shards round sums differently; an update moves a weight by about 1e-3.
        assert (two[name] - weight).abs().max() < 1e-5, name


def test_a_line_without_a_label_is_refused(lmtrain, tmp_path, options, assert_refused):
    (tmp_path / "train.tsv").write_text(LABELLED + "no label\n")

    refused = lmtrain("train", "train.tsv", *options)

    assert_refused(refused, 3, "train.tsv, line 5: no tab between label and text")
