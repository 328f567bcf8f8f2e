"""`lmtrain train`: what it prints and leaves, where text comes from, stopping and going on."""

import gzip
import json
import math
import re
import signal
import time
import tomllib

import pytest
from run_folders import untimed_metrics, weights

from corpora import TINY


def test_json_sums_the_training_up(word_model, parsed):
    summary = parsed(word_model.outcome.stdout)

    assert word_model.outcome.returncode == 0
    assert summary["schema"] == "lmtrain.train/1"
    assert summary["run"] == "run"
    assert summary["steps"] == 40
    assert summary["tokens"] == 40 * 4 * 8
    assert summary["vocab_size"] == 11
    assert summary["best_step"] in {20, 40}
    valid, baseline = summary["valid"], summary["baseline"]
    assert (summary["metric"], summary["value"]) == ("perplexity", valid["perplexity"])
    assert valid["perplexity"] == pytest.approx(math.exp(valid["loss"]))
    assert 1 < valid["perplexity"] < baseline["perplexity"]
    assert 0 < summary["seconds"] < 60
    assert summary["tokens_per_second"] > summary["tokens"] / summary["seconds"]


def test_a_training_ends_with_its_figures_and_what_to_type_next(char_model):
    outcome = char_model.outcome

    assert outcome.returncode == 0
    rows = [line.split(maxsplit=1) for line in outcome.stdout.splitlines()]
    assert [row[0] for row in rows] == [
        "trained", "validation", "baseline", "run", "next", "lmtrain", "tensorboard",
    ]  # fmt: skip
    assert rows[0][1].startswith("40 steps, 1,280 tokens in ")
    assert rows[1][1].startswith("perplexity ")
    assert rows[3][1] == "run"
    assert rows[4][1] == "lmtrain sample run"


def test_progress_stays_out_of_the_results(word_model, char_model):
    for outcome in (word_model.outcome, char_model.outcome):
        assert "step 20, epoch 1: validation perplexity" in outcome.stderr
        assert "step 40, " in outcome.stderr
        assert "40/40" in outcome.stderr
        assert "validation perplexity" not in outcome.stdout
        assert "error" not in outcome.stderr
        assert "Warning" not in outcome.stderr


def test_options_go_before_set_and_set_before_the_file(word_model):
    settings = tomllib.loads((word_model.run / "config.toml").read_text())

    assert settings["model"]["hidden_size"] == 16
    assert settings["train"]["seq_len"] == 8
    assert settings["train"]["keep_checkpoints"] == 3


def test_a_run_folder_is_complete_and_names_no_place_outside(word_model):
    folder = word_model.run

    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "config.toml", "tokenizer.json", "run.json", "metrics.jsonl", "events", "checkpoints",
        "best.json",
    }  # fmt: skip
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert steps == ["step-00000020", "step-00000040"]
    for path in folder.rglob("*.*"):
        if path.suffix in {".toml", ".json", ".jsonl"} and path.name != "run.json":
            assert str(folder.parent) not in path.read_text()


def test_files_globs_and_gzip_together_are_the_same_text(word_model, lmtrain, small, tmp_path):
    lines = TINY.splitlines(keepends=True)
    (tmp_path / "a.txt").write_text("".join(lines[:40]))
    (tmp_path / "b1.txt").write_text("".join(lines[40:80]))
    (tmp_path / "b2.txt").write_text("".join(lines[80:100]))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("".join(lines[100:]).encode()))

    outcome = lmtrain("train", "a.txt", "b*.txt", "c.txt.gz", *small, "--out", "run")

    assert outcome.returncode == 0
    assert weights(tmp_path / "run") == weights(word_model.run)


def test_a_run_from_standard_input_is_the_same_and_goes_on(
    word_model, lmtrain, small, tmp_path, parsed
):
    (tmp_path / "temporary").mkdir()
    place = {"TMPDIR": str(tmp_path / "temporary")}

    first = lmtrain(
        "train", "-", *small, "--set", "train.max_steps=20", "--json", stdin=TINY, **place
    )
    run = tmp_path / json.loads(first.stdout)["run"]
    second = lmtrain("train", "--resume", run, "--set", "train.max_steps=40", "--json", **place)

    assert [first.returncode, second.returncode] == [0, 0]
    assert run.parent == tmp_path / "runs"
    assert parsed(second.stdout)["steps"] == 40
    assert parsed(second.stdout)["tokens"] == 40 * 4 * 8
    assert weights(run) == weights(word_model.run)
    assert untimed_metrics(run) == untimed_metrics(word_model.run)
    assert not list((tmp_path / "temporary").glob("*lmtrain*"))


ENDLESS = ("--epochs", "100000", "--set", "train.max_steps=100000", "--set", "model.dropout=0.1",
           "--set", "train.eval_every=100000")  # fmt: skip


def interrupt(process, run, number):
    """Sends a signal to a process that has trained some steps; what it printed, where it stopped.

    Returns standard output, standard error and the step that was saved.
    """
    patience = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    (saved,) = (run / "checkpoints").iterdir()
    return stdout, stderr, int(saved.name.removeprefix("step-"))


def test_a_run_stopped_by_ctrl_c_goes_on_as_if_never_stopped(
    start, lmtrain, small, word_model, tmp_path, parsed
):
    run, settings = tmp_path / "run", (word_model.corpus, *small, *ENDLESS)
    process = start("train", *settings, "--out", run)
    _, stderr, step = interrupt(process, run, signal.SIGINT)

    end = ("--set", f"train.max_steps={step + 21}")
    resumed = lmtrain("train", "--resume", run, *end, "--json")
    straight = lmtrain("train", *settings, *end, "--out", tmp_path / "straight")

    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert [resumed.returncode, straight.returncode] == [0, 0]
    assert parsed(resumed.stdout)["steps"] == step + 21
    assert weights(run, step + 21) == weights(tmp_path / "straight", step + 21)
    assert untimed_metrics(run) == untimed_metrics(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_ended_by_a_signal_is_saved_and_shows_how_to_resume(
    start, small, word_model, tmp_path, number
):
    run = tmp_path / "run"
    process = start("train", word_model.corpus, *small, *ENDLESS, "--out", run, "--json")
    stdout, stderr, step = interrupt(process, run, number)

    assert process.returncode == 128 + number
    assert not stdout
    assert stderr.splitlines()[-2:] == [
        f"interrupted at step {step:,}; saved in {run}/checkpoints/step-{step:08d}",
        f"  resume with: lmtrain train --resume {run}",
    ]
    assert "Traceback" not in stderr


def test_names_are_understood_in_any_case_and_recorded_as_they_are(lmtrain, small, tmp_path):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "mine.toml").write_text("[optimizer]\nname = 'SGD'\n")

    outcome = lmtrain(
        "train", "text.txt", *small, "--config", "mine.toml", "--cell", "Peephole_LSTM", "--level",
        "Word", "--device", "CPU", "--set", "model.peephole=DIAGONAL", "--out", "run",
    )  # fmt: skip

    assert outcome.returncode == 0, outcome.stderr
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["model"]["cell"] == "peephole-lstm"
    assert settings["model"]["peephole"] == "diagonal"
    assert settings["data"]["level"] == "word"
    assert settings["optimizer"]["name"] == "sgd"
    assert settings["train"]["device"] == "cpu"


def test_a_vocabulary_and_word_vectors_from_files(lmtrain, small, tmp_path, parsed):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "words.txt").write_text("cat\n</s>\nzebra\n")
    (tmp_path / "vectors.vec").write_text("2 16\ncat" + " 0.5" * 16 + "\ndog" + " 1" * 16 + "\n")
    given = ("--set", "data.vocabulary=words.txt", "--set", "model.embeddings=vectors.vec")

    outcome = lmtrain("train", "text.txt", *small, *given, "--out", "run", "--json")

    assert outcome.returncode == 0, outcome.stderr
    assert "vectors.vec has vectors of 1 of the 4 words of the vocabulary\n" in outcome.stderr
    assert parsed(outcome.stdout)["vocab_size"] == 4
    tokens = parsed(lmtrain("tokenize", "run", "cat dog zebra", "--json").stdout)
    assert tokens["ids"] == [1, 0, 3]


def test_a_vocabulary_and_word_vectors_that_cannot_be_used(
    lmtrain, small, tmp_path, assert_refused
):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "words.txt").write_text("cat\ndog\ncat\n")
    (tmp_path / "vectors.txt").write_text("cat 1 2 3\n")
    words = ("train", "text.txt", *small, "--out", "run", "--set")

    assert_refused(
        lmtrain(*words, "data.vocabulary=words.txt"),
        3,
        "words.txt, line 3: 'cat' is also on line 1",
    )
    assert_refused(
        lmtrain(*words, "data.vocabulary=words.txt", "--vocab-size", "9"), 2,
        "data.vocab_size = 9 cannot be combined with data.vocabulary",
    )  # fmt: skip
    assert_refused(
        lmtrain(*words, "model.embeddings=vectors.txt"), 2,
        "vectors of 3 numbers, and model.embedding_size is 16",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_short_text_trains_with_the_defaults_and_resumes_exactly(lmtrain, parsed, tmp_path):
    lines = [f"The {n} sheep of farm {n % 7} eat grass, œufs and {n * n} herbs." for n in range(30)]
    (tmp_path / "short.txt").write_text("\n".join(lines))
    (tmp_path / "other.txt").write_text("A tiny text.")
    fixed = ("--set", "train.threads=1", "--set", "optimizer.schedule=constant")
    given = ("train", "short.txt", "--hidden-size", "8", *fixed)

    whole = lmtrain(*given, "--epochs", "3", "--out", "whole", "--json")
    begun = lmtrain(*given, "--epochs", "3", "--set", "train.max_steps=2", "--out", "cut")
    resumed = lmtrain("train", "--resume", "cut", "--set", "train.max_steps=none", "--json")
    own = lmtrain(
        *given, "--level", "char", "--valid", "other.txt", "--epochs", "1", "--out", "own"
    )

    assert [each.returncode for each in (whole, begun, resumed, own)] == [0, 0, 0, 0], begun.stderr
    (notice,) = [line for line in whole.stderr.splitlines() if "batch size" in line]
    told = re.fullmatch(r"batch size 20 -> (\d+): the training text has only \d+ tokens", notice)
    assert told
    assert f"batch_size = {told[1]}\n" in (tmp_path / "whole/config.toml").read_text()
    assert "batch size" not in resumed.stderr
    assert weights(tmp_path / "whole", 3) == weights(tmp_path / "cut", 3)
    assert "warning: validation text other.txt: 4 characters not in the vocabulary" in own.stderr


def test_a_model_that_is_worse_than_the_baseline_is_reported(lmtrain, tmp_path):
    (tmp_path / "text.txt").write_text(TINY)
    words = ("train", "text.txt", "--hidden-size", "4", "--num-layers", "1", "--epochs", "1")

    worse = lmtrain(*words, "--lr", "1e-9", "--out", "worse")
    better = lmtrain(
        *words, "--lr", "0.05", "--seq-len", "5", "--batch-size", "2", "--out", "better"
    )

    assert [worse.returncode, better.returncode] == [0, 0], worse.stderr + better.stderr
    assert "warning: worse than the baseline: train longer" in worse.stderr
    assert "worse than the baseline" not in better.stderr


def test_the_advice_names_the_limit_that_ended_the_training(lmtrain, small, tmp_path):
    (tmp_path / "text.txt").write_text(TINY)

    outcome = lmtrain("train", "text.txt", *small, "--lr", "1e-9", "--max-seconds", "0.1")

    assert outcome.returncode == 0
    assert "train longer, such as with a larger --max-seconds" in outcome.stderr


def test_new_words_of_validation_text_are_reported_where_unk_is_not_learned(
    lmtrain, small, tmp_path
):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "other.txt").write_text(TINY + "a bird sat on the roof\n" * 9)
    (tmp_path / "rare.txt").write_text(TINY + "one bee\n")
    steps = ("--valid", "other.txt", *small, "--set", "train.max_steps=2")

    told = lmtrain("train", "text.txt", *steps)
    without = lmtrain("train", "text.txt", *steps[2:])
    learned = lmtrain("train", "rare.txt", *steps, "--set", "data.min_count=2")

    assert [told.returncode, without.returncode, learned.returncode] == [0, 0, 0]
    assert "warning: 1.4 % of the validation text are words that" in told.stderr
    assert "try: --set data.min_count=2" in told.stderr
    assert "data.min_count" not in without.stderr + learned.stderr
