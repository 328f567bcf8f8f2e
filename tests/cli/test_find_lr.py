"""`lmtrain find-lr`: the range test as a table, as JSON and as a picture."""

import pytest

from corpora import TINY


@pytest.fixture
def words(tmp_path):
    (tmp_path / "corpus.txt").write_text(TINY)
    small = ["--set", "model.hidden_size=16", "--set", "train.threads=1"]
    return ["find-lr", "corpus.txt", "--steps", "60", *small]


def test_a_table_and_the_two_rates_that_matter(words, fresh_lmtrain, tmp_path):
    outcome = fresh_lmtrain(*words, "--plot", "curve.svg")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    head, *_, last = outcome.stdout.splitlines()
    assert head.split() == ["learning", "rate", "loss"]
    assert last.startswith("The loss falls fastest at ")
    assert (tmp_path / "curve.svg").read_bytes().startswith(b"<?xml")


def test_json_holds_the_curve(words, lmtrain, parsed, tmp_path):
    rates = ("--first", "1e-4", "--last", "1")
    result = parsed(lmtrain(*words, *rates, "--plot", "curve.png", "--json").stdout)

    assert result["schema"] == "lmtrain.find-lr/1"
    rates, losses = result["learning_rates"], result["losses"]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(1e-4)
    assert len(rates) == len(losses) <= 60
    assert result["lowest"] == rates[losses.index(min(losses))]
    assert rates[0] <= result["steepest"] <= result["lowest"]
    assert min(losses) < losses[0] - 0.1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_a_classifier(lmtrain, parsed, tmp_path):
    (tmp_path / "train.tsv").write_text("a\tone two\nb\tthree\n" * 20)
    small = ("--set", "model.hidden_size=4", "--set", "train.threads=1", "--steps", "9")

    outcome = lmtrain("find-lr", "train.tsv", "--task", "classify", *small, "--json")

    assert outcome.returncode == 0, outcome.stderr
    losses = parsed(outcome.stdout)["losses"]
    assert len(losses) == 9
    # Two labels: the loss of a new model is that of a coin.
    assert losses[0] == pytest.approx(0.693, abs=0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--first", "1", "--last", "0.1"], "--first 1 must be above 0 and below --last 0.1"),
        (["--first", "0"], "--first 0 must be above 0 and below --last 10"),
        (["--plot", "curve.doc"], "--plot: Format 'doc' is not supported"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(words, lmtrain, options, told):
    outcome = lmtrain(*words, *options)

    assert outcome.returncode == 2
    assert f"error: {told}" in outcome.stderr
