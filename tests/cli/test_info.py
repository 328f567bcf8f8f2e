"""`lmtrain info`: what a run is."""

import pytest

from lmtrain import schema


def test_json_has_progress_size_and_every_setting(word_model, lmtrain, parsed):
    outcome = lmtrain("info", word_model.run, "--json")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    facts, trained = parsed(outcome.stdout), parsed(word_model.outcome.stdout)
    assert facts["schema"] == "lmtrain.info/1"
    assert facts["step"] == trained["best_step"]
    assert facts["checkpoint_steps"] == [20, 40]
    assert facts["parameters"] == trained["parameters"]
    assert facts["vocab_size"] == 11
    assert facts["best_perplexity"] == pytest.approx(trained["valid"]["perplexity"])
    shown = {f"{section}.{key}" for section, part in facts["settings"].items() for key in part}
    assert shown == set(schema.settings())
    assert facts["settings"]["model"]["hidden_size"] == 16


def test_a_checkpoint_folder_is_described_in_plain_text(word_model, fresh_lmtrain):
    outcome = fresh_lmtrain("info", word_model.run / "checkpoints" / "step-00000020")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    rows = dict(line.split(maxsplit=1) for line in outcome.stdout.splitlines() if " " in line)
    assert rows["step"] == "20"
    assert [rows[name] for name in ("train.patience", "data.nfc")] == ["none", "false"]
    assert rows["tokens"] == "640"
    assert rows["train.seq_len"] == "8"
    assert rows["optimizer.schedule"] == "constant"


def test_a_folder_that_is_no_run_is_refused(lmtrain, assert_refused, tmp_path):
    outcome = lmtrain("info", tmp_path)

    assert_refused(outcome, 4, f"{tmp_path} has no checkpoint")
