"""`lmtrain verify`: whether checkpoints are whole."""

import shutil


def test_an_intact_run_is_said_to_be_intact(word_model, fresh_lmtrain):
    outcome = fresh_lmtrain("verify", word_model.run)

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert outcome.stdout.splitlines() == [
        f"{word_model.run}/checkpoints/step-00000020: intact",
        f"{word_model.run}/checkpoints/step-00000040: intact",
    ]


def test_one_changed_byte_is_found(word_model, lmtrain, parsed, tmp_path):
    run = shutil.copytree(word_model.run, tmp_path / "run")
    damaged = run / "checkpoints" / "step-00000040" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    outcome = lmtrain("verify", run, "--json")

    assert outcome.returncode == 4
    assert outcome.stderr == "error: 1 of 2 checkpoints are damaged or cannot be read\n"
    report = parsed(outcome.stdout)
    assert report["schema"] == "lmtrain.verify/1"
    older, newer = report["results"]
    assert older == {"checkpoint": str(damaged.parent.with_name("step-00000020")), "problem": None}
    assert str(damaged) in newer["problem"]


def test_nothing_to_verify_is_an_error(lmtrain, assert_refused):
    outcome = lmtrain("verify", "nowhere")

    assert_refused(outcome, 4, "no run or checkpoint nowhere")
