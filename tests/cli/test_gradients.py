"""`lmtrain gradients`: how gradients vanish or explode over time."""

import re
import shutil

import pytest

from corpora import LABELLED, TINY

SMALL = ("--set", "model.hidden_size=8", "--set", "model.num_layers=2", "--lags", "5")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TINY)
    return "text.txt"


def test_a_run_is_measured_on_its_validation_text_beside_its_training(word_model, fresh_lmtrain):
    outcome = fresh_lmtrain("gradients", word_model.run, "--lags", "12")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    title, source, _, head, hidden, cell_state, _, other, _, columns, training = (
        outcome.stdout.splitlines()
    )
    assert title == "Median norm of the gradient of −log P of one token, relative to lag 0:"
    assert source.endswith(f"corpus.txt: {word_model.run}")
    assert head.endswith("  half is gone")
    assert [f"lag {lag}" in head for lag in (1, 2, 5, 10, 20)] == [True] * 4 + [False]
    assert hidden.startswith(f"{word_model.run}, layer 1, hidden  ")
    assert cell_state.startswith(f"{word_model.run}, layer 1, cell state  ")
    assert hidden.endswith((" steps", " step"))
    assert other == "Gradient norm in training, before clipping, from metrics.jsonl:"
    assert columns.split()[-3:] == ["limit", "clipped", "updates"]
    assert training.startswith(f"{word_model.run}  ")
    assert training.endswith("  40")


def test_json_holds_quartiles_of_every_lag_and_the_lines_of_the_metrics(
    word_model, lmtrain, parsed, parsed_lines
):
    outcome = lmtrain("gradients", word_model.run, word_model.corpus, "--lags", "6", "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    found = parsed(outcome.stdout)
    assert found["schema"] == "lmtrain.gradients/1"
    assert found["lags"] == list(range(7))
    (network,) = found["networks"]
    assert (network["name"], network["cell"]) == (str(word_model.run), "lstm")
    assert network["text"] == str(word_model.corpus)
    assert network["positions"] == 512
    assert [(s["layer"], s["part"]) for s in network["states"]] == [
        (1, "hidden"),
        (1, "cell_state"),
    ]
    for state in network["states"]:
        assert state["relative"]["median"][0] == 1
        assert state["half_lag"] is None or 1 <= state["half_lag"] <= 6
        for quartiles in (state["norm"], state["relative"]):
            columns = [quartiles[name] for name in ("lower_quartile", "median", "upper_quartile")]
            assert [len(column) for column in columns] == [7] * 3
            assert all(0 <= low <= mid <= high for low, mid, high in zip(*columns, strict=True))
    lines = parsed_lines((word_model.run / "metrics.jsonl").read_text())
    lines = [line for line in lines if line["kind"] == "train"]
    training = network["training"]
    assert training["steps"] == [line["step"] for line in lines]
    assert training["grad_norms"] == [line["grad_norm"] for line in lines]
    assert training["clipped_fractions"] == [line["clipped_fraction"] for line in lines]
    assert (training["clip"], training["max_grad_norm"]) == ("l2", 5.0)


def test_the_updates_of_an_incomplete_line_count_as_they_are(small, text, lmtrain):
    steps = ("--set", "train.max_steps=7", "--set", "train.log_every=5")
    assert lmtrain("train", text, *small, *steps, "--out", "run").returncode == 0

    shown = lmtrain("gradients", "run", text, "--lags", "3").stdout.splitlines()

    assert [shown[-2].split()[-1], shown[-1].split()[-1]] == ["updates", "7"]


def test_a_checkpoint_by_itself_has_no_training(word_model, lmtrain, parsed, tmp_path):
    (checkpoint, *_) = sorted((word_model.run / "checkpoints").iterdir())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "alone").symlink_to(checkpoint)

    outcome = lmtrain(
        "gradients", "runs/alone", word_model.run, word_model.corpus, "--lags", "3", "--json"
    )

    alone, run = parsed(outcome.stdout)["networks"]
    assert alone["training"] is None
    assert run["training"] is not None
    assert alone["text"] == run["text"] == str(word_model.corpus)


def test_damaged_metrics_are_read_as_far_as_they_go(
    word_model, lmtrain, parsed, assert_refused, tmp_path
):
    shutil.copytree(word_model.run, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole, *_ = metrics.read_text().splitlines()
    metrics.write_text(f'{whole}\n{{"kind": "train", "step": 10, "time": 1.0}}\n{whole[:30]}')
    words = ("gradients", "run", word_model.corpus, "--lags", "3", "--json")

    (network,) = parsed(lmtrain(*words).stdout)["networks"]

    assert network["training"]["steps"] == [5]
    metrics.unlink()
    metrics.symlink_to(word_model.run / "metrics.jsonl")
    assert_refused(lmtrain(*words), 4, "metrics.jsonl is not a regular file")


def test_fresh_cells_of_equal_size_are_measured_on_a_text(text, lmtrain, parsed):
    cells = ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"]

    outcome = lmtrain("gradients", "--cell", ",".join(cells), text, *SMALL, "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    networks = parsed(outcome.stdout)["networks"]
    assert [network["name"] for network in networks] == cells
    assert [network["cell"] for network in networks] == cells
    assert [len(network["states"]) for network in networks] == [2, 2, 2, 4, 4]
    assert all(network["training"] is None for network in networks)


def test_fresh_cells_start_as_in_training(text, lmtrain):
    settings = [("--set", f"model.frequency_bias={value}") for value in ("false", "true")]
    outcomes = [lmtrain("gradients", "--cell", "rnn", text, *SMALL, *each) for each in settings]

    assert [each.returncode for each in outcomes] == [0, 0]
    assert outcomes[0].stdout != outcomes[1].stdout


def test_a_cell_of_ones_own_is_measured(text, lmtrain, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from lmtrain.cells import Cell, register\n"
        "@register('halving')\n"
        "class Halving(Cell):\n"
        "    gates = ('candidate',)\n"
        "    state_names = ('memory',)\n"
        "    def step(self, x, state):\n"
        "        return (0.4 * state[0] + self.affine('candidate', x, 0 * state[0]),)\n"
    )

    outcome = lmtrain("gradients", "--cell", "own.py:halving", text, *SMALL)

    assert outcome.returncode == 0
    assert outcome.stderr == "own.py registered: halving\n"
    *_, head, lower, upper = outcome.stdout.splitlines()
    assert head.split() == ["lag", "1", "lag", "2", "lag", "5", "half", "is", "gone"]
    assert lower.startswith("own.py:halving, layer 1, memory")
    assert re.split(" {2,}", upper)[1:] == ["0.4", "0.16", "0.01", "after 1 step"]


def test_the_picture_is_written_as_png_and_svg(word_model, text, lmtrain, tmp_path):
    of_run = lmtrain("gradients", word_model.run, "--lags", "3", "--out", "run.svg")
    of_cells = lmtrain("gradients", "--cell", "rnn,lstm", text, *SMALL, "--out", "new/cells")

    assert [of_run.returncode, of_run.stderr] == [0, ""]
    assert [of_cells.returncode, of_cells.stderr] == [0, ""]
    for name in ("run", "new/cells"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (tmp_path / f"{name}.svg").read_bytes()


def test_without_matplotlib_the_extra_is_named(word_model, fresh_lmtrain, assert_refused, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError\n")

    outcome = fresh_lmtrain(
        "gradients", word_model.run, "--out", "figure", PYTHONPATH=str(tmp_path)
    )

    assert_refused(
        outcome, 2, "--out needs matplotlib, which is not installed", "pip install 'lmtrain[plot]'"
    )


@pytest.mark.parametrize(
    ("words", "exit_code", "parts"),
    [
        ((), 2, ["no run is given", "lmtrain gradients --cell rnn,lstm FILE"]),
        (("nothing",), 4, ["no run or checkpoint nothing"]),
        (("text.txt",), 4, ["text.txt has no checkpoint"]),
        (
            ("--cell", "gur", "text.txt"),
            2,
            ["no cell 'gur'", "cells: gru, lstm, peephole-lstm, rnn"],
        ),
        (("--cell", "rnn", "nothing.txt"), 3, ["no text file nothing.txt"]),
        (("--cell", "rnn", "text.txt", "--lags", "0"), 2, ["--lags"]),
        (
            ("--cell", "rnn", "text.txt", "--lags", "700"),
            3,
            ["text too short: 1,1", "--lags 700 needs at least 1,402", "try: --lags 5"],
        ),
        (
            ("--cell", "rnn", "text.txt", "--set", "data.task=classify"),
            2,
            ["gradients does not work with data.task = classify"],
        ),
        (
            ("--cell", "rnn", "text.txt", "--set", "model.forget_bias=0"),
            2,
            ["model.forget_bias = 0.0 means nothing with model.cell = rnn"],
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(words, exit_code, parts, text, lmtrain, assert_refused):
    assert_refused(lmtrain("gradients", *words), exit_code, *parts)


def test_settings_of_a_run_stay_its_own(word_model, lmtrain, assert_refused):
    outcome = lmtrain("gradients", word_model.run, "--set", "model.hidden_size=9")

    assert_refused(outcome, 2, "--set works with --cell only: a run has its own settings")


def test_a_run_whose_text_is_gone_or_was_never_there_needs_another(
    lmtrain, assert_refused, tmp_path, small
):
    (tmp_path / "text.txt").write_text(TINY)
    words = ("--set", "data.valid_fraction=0", *small, "--set", "train.max_steps=2")
    assert lmtrain("train", "text.txt", *words, "--out", "run").returncode == 0

    assert_refused(
        lmtrain("gradients", "run"), 3,
        "run was trained without validation text", "try: lmtrain gradients run FILE",
    )  # fmt: skip
    assert lmtrain("gradients", "run", "text.txt", "--lags", "3").returncode == 0


def test_a_classifier_is_refused(lmtrain, assert_refused, tmp_path):
    (tmp_path / "train.tsv").write_text(LABELLED * 20)
    options = ("--task", "classify", "--hidden-size", "8", "--epochs", "1", "--batch-size", "4")
    done = lmtrain("train", "train.tsv", *options, "--out", "run")
    assert done.returncode == 0, done.stderr

    assert_refused(
        lmtrain("gradients", "run"), 2,
        "run was trained with data.task = classify: gradients does not work with it",
        "try: lmtrain predict run",
    )  # fmt: skip
