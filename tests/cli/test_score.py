"""`lmtrain score`: log P of each line."""

import math

import pytest

LINES = "the cat sat on the mat\nmat the on sat cat the\n"


def test_the_likelier_line_scores_higher(word_model, fresh_lmtrain, tmp_path):
    (tmp_path / "lines.txt").write_text(LINES)

    outcome = fresh_lmtrain("score", word_model.run, "lines.txt")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    (likely, one), (unlikely, other) = (line.split("\t") for line in outcome.stdout.splitlines())
    assert f"{one}\n{other}\n" == LINES
    assert 0 > float(likely) > float(unlikely)


def test_tokens_sum_to_their_line_in_any_base(word_model, lmtrain, parsed_lines):
    words = ("score", word_model.run, "--json")

    natural = lmtrain(*words, stdin=LINES + "a zebra sat")
    binary = lmtrain(*words, "-", "--per-token", "--base", "2", stdin=LINES + "a zebra sat")

    assert [natural.returncode, binary.returncode] == [0, 0]
    assert natural.stderr.startswith("warning: words not in the vocabulary: 1;")
    nats, bits = parsed_lines(natural.stdout), parsed_lines(binary.stdout)
    assert {entry["schema"] for entry in nats + bits} == {"lmtrain.score/1"}
    assert [entry["text"] for entry in bits] == [*LINES.splitlines(), "a zebra sat"]
    assert [entry["tokens"] for entry in bits] == [7, 7, 4]
    assert [entry["oov"] for entry in bits] == [0, 0, 1]
    assert [entry["base"] for entry in (nats[0], bits[0])] == ["e", "2"]
    for each, other in zip(nats, bits, strict=True):
        assert each["log_prob"] == pytest.approx(other["log_prob"] * math.log(2))
        parts = other["per_token"]
        assert math.fsum(part["log_prob"] for part in parts) == pytest.approx(other["log_prob"])
    tokens = [part["token"] for part in bits[2]["per_token"]]
    assert tokens == ["a", "<UNK>", "sat", "<EOS>"]


def test_each_token_is_printed_below_its_line(char_model, lmtrain):
    outcome = lmtrain("score", char_model.run, "--per-token", "--base", "10", stdin="a cat\n")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    total, *parts = outcome.stdout.splitlines()
    assert total.endswith("\ta cat")
    assert [part.split("\t")[1] for part in parts[:5]] == list("a cat")
    values = [float(part.split("\t")[0]) for part in parts if part[:2] == "  "]
    assert len(values) == 6
    assert sum(values) == pytest.approx(float(total.split("\t")[0]), abs=0.001)


def test_unknown_words_are_counted_in_one_warning(word_model, lmtrain):
    outcome = lmtrain("score", word_model.run, stdin="the zebra sat\nno xyzzy\n")

    assert outcome.returncode == 0
    assert outcome.stderr == (
        "warning: words not in the vocabulary: 3; each is scored as <UNK>: compare sentences with "
        "the same number of them\n"
    )


def test_an_empty_line_is_scored_by_its_end(word_model, lmtrain, parsed_lines):
    outcome = lmtrain("score", word_model.run, "--json", stdin="\nthe cat\n")

    assert outcome.returncode == 0
    empty, _ = parsed_lines(outcome.stdout)
    assert empty["tokens"] == 1
    assert empty["log_prob"] < 0


def test_a_missing_file_of_sentences_is_refused(word_model, lmtrain, assert_refused):
    outcome = lmtrain("score", word_model.run, "nothing.txt")

    assert_refused(outcome, 3, "no text file nothing.txt")
