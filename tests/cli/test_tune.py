"""`lmtrain tune`: the numbers that evaluate takes."""

import pytest


def test_the_numbers_printed_are_those_that_evaluate_takes(word_model, lmtrain, parsed):
    outcome = lmtrain("tune", word_model.run, "--max-tokens", "200", "--json")

    assert outcome.returncode == 0
    found = parsed(outcome.stdout)
    assert found["schema"] == "lmtrain.tune/1"
    assert found["best"].keys() == {"--cache", "--dynamic"}
    for option, numbers in found["best"].items():
        tried = [trial for trial in found["trials"] if trial["option"] == option]
        best = min(tried, key=lambda trial: trial["loss"])
        assert best["numbers"] == numbers
        assert f"{option} {numbers}: perplexity" in outcome.stderr
        evaluated = lmtrain("evaluate", word_model.run, option, numbers, "--json")
        (result,) = parsed(evaluated.stdout)["results"]
        if option == "--cache":
            # The other was tuned on the beginning of the text.
            assert result["loss"] == pytest.approx(best["loss"], rel=1e-4)


def test_one_of_both_is_tuned_alone(word_model, fresh_lmtrain):
    outcome = fresh_lmtrain("tune", word_model.run, "--no-dynamic")

    assert outcome.returncode == 0
    best, after = outcome.stdout.splitlines()
    assert best.startswith("--cache  ")
    assert after == f"next  lmtrain evaluate {word_model.run} --cache {best.split()[1]}"


def test_one_of_both_has_to_be_tuned(word_model, lmtrain, assert_refused):
    outcome = lmtrain("tune", word_model.run, "--no-cache", "--no-dynamic")

    assert_refused(outcome, 2, "--no-cache and --no-dynamic leave nothing to tune")
