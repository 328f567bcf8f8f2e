"""`lmtrain evaluate`: every token of a text counted once."""

import math
import re

import pytest

from corpora import TINY
from lmtrain.cli import evaluate
from lmtrain.errors import TextError
from lmtrain.tasks.language_model import TrainedLanguageModel


def test_every_token_of_each_text_counts_once(word_model, lmtrain, parsed, tmp_path):
    text = "the cat sat\n" * 150 + "a zebra"
    (tmp_path / "text.txt").write_text(text)

    outcome = lmtrain("evaluate", word_model.run, "text.txt", "-", "--json", stdin=text)

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    result = parsed(outcome.stdout)
    assert result["schema"] == "lmtrain.evaluate/1"
    file, stdin = result["results"]
    assert [file["file"], stdin["file"]] == ["text.txt", "-"]
    assert file["count"] == 150 * 4 + 3
    assert file["characters"] == len(text)
    assert [file["oov"], file["oov_rate"]] == [1, pytest.approx(1 / 603)]
    nats = file["loss"]
    assert file["perplexity"] == pytest.approx(math.exp(nats))
    assert file["bits_per_token"] == pytest.approx(nats / math.log(2))
    assert file["bits_per_char"] == pytest.approx(nats * 603 / math.log(2) / len(text))
    assert file["perplexity_without_oov"] < file["perplexity"]
    del file["file"], file["seconds"], stdin["file"], stdin["seconds"]
    assert file == stdin


def test_without_a_text_the_runs_own_validation_text_is_judged(word_model, lmtrain, parsed):
    tail = TINY[TINY.index("\n", int(0.9 * len(TINY))) + 1 :]

    outcome = lmtrain("evaluate", word_model.run, "--batch-size", "4", "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    (result,) = parsed(outcome.stdout)["results"]
    trained = parsed(word_model.outcome.stdout)
    assert result["file"] == "valid: corpus.txt"
    assert result["count"] == len(tail.split()) + tail.count("\n")
    assert result["characters"] == len(tail)
    assert result["loss"] == pytest.approx(trained["valid"]["loss"], rel=1e-6)


def test_unknown_characters_are_counted_and_named_once(char_model, lmtrain, parsed, tmp_path):
    (tmp_path / "other.txt").write_text("the cœur\r\nœ — ZQXY!" * 2)

    outcome = lmtrain("evaluate", char_model.run, "other.txt", "--json")

    assert outcome.returncode == 0
    assert outcome.stderr == (
        "warning: other.txt: 20 characters not in the vocabulary, counted as <UNK>: "
        "'œ' 4, '!' 2, 'Q' 2, 'X' 2, 'Y' 2 and 4 others\n"
    )
    (file,) = parsed(outcome.stdout)["results"]
    assert [file["oov"], file["count"], file["characters"]] == [20, 36, 36]
    assert file["bits_per_char_without_oov"] < file["bits_per_char"]
    known = math.log2(file["perplexity_without_oov"])
    assert file["bits_per_char_without_oov"] == pytest.approx(known)


def test_a_character_model_prints_a_table(char_model, fresh_lmtrain, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat\n")

    outcome = fresh_lmtrain("evaluate", char_model.run, "text.txt")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    name, *rows = outcome.stdout.splitlines()
    figures = dict(re.split(r"\s{2,}", row.strip(), maxsplit=1) for row in rows)
    assert name == "text.txt"
    assert figures["tokens"] == figures["characters"] == "12"
    assert figures["out of vocabulary"] == "0 (0.00 %)"
    assert figures["bits per token"] == figures["bits per character"]
    loss = float(figures["loss (nats per token)"])
    assert float(figures["perplexity"]) == pytest.approx(math.exp(loss), abs=0.002)


def test_a_model_that_adapts_predicts_a_repeating_text_better(
    word_model, lmtrain, parsed, tmp_path
):
    (tmp_path / "text.txt").write_text("cat on the sat dog\n" * 60)
    losses = {}
    for options in ((), ("--cache", "50,0.5,0.4"), ("--dynamic", "0.001,0.01,5")):
        outcome = lmtrain("evaluate", word_model.run, "text.txt", "--json", *options)
        assert [outcome.returncode, outcome.stderr] == [0, ""]
        (result,) = parsed(outcome.stdout)["results"]
        losses[options[:1]] = result["loss"]

    assert losses[("--cache",)] < losses[()]
    assert losses[("--dynamic",)] < losses[()]


def test_nothing_is_predicted_before_all_texts_are_read(word_model, monkeypatch):
    monkeypatch.setattr(TrainedLanguageModel, "measure", lambda *_, **__: pytest.fail("did"))

    with pytest.raises(TextError, match=r"no text file nothing\.txt"):
        evaluate.command(str(word_model.run), [str(word_model.corpus), "nothing.txt"])


def test_a_run_without_held_out_text_wants_a_file(lmtrain, small, assert_refused, tmp_path):
    (tmp_path / "text.txt").write_text(TINY)
    words = ("train", "text.txt", *small, "--set", "data.valid_fraction=0", "--out", "run")
    assert lmtrain(*words).returncode == 0

    outcome = lmtrain("evaluate", "run")

    assert_refused(outcome, 3, "without validation or test data", "lmtrain evaluate run FILE")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--cache=50,x,0.4", "--cache 50,x,0.4: expected INTEGER,NUMBER,NUMBER"),
        ("--dynamic=0.1,0", "--dynamic 0.1,0: expected NUMBER,NUMBER,INTEGER"),
        ("--cache=0,1,0.4", "a cache of 0 steps, sharpness 1, weight 0.4"),
        (f"--cache={10**19},1,0.4", f"a cache of {10**19} steps, sharpness 1, weight 0.4"),
        ("--dynamic=0.1,nan,5", "dynamic evaluation with rate 0.1, decay nan, pieces of 5"),
    ],
)
def test_numbers_that_say_nothing_are_refused(word_model, lmtrain, option, told):
    outcome = lmtrain("evaluate", word_model.run, option)

    assert outcome.returncode == 2
    assert f"error: {told}" in outcome.stderr
