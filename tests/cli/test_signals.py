"""Signals and closed streams, as a shell, a scheduler and a terminal send them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lmtrain import checkpoint

pytestmark = pytest.mark.slow

ENDLESS = ("--set", "train.max_steps=1000000", "--set", "train.max_epochs=1000000",
           "--set", "train.eval_every=1000000")  # fmt: skip


def wait_until(condition, process):
    until = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)


def test_sigusr1_saves_and_training_goes_on(start, small, word_model, tmp_path):
    run = tmp_path / "run"
    process = start("train", word_model.corpus, *small, *ENDLESS, "--out", run)
    wait_until(lambda: (run / "metrics.jsonl").exists(), process)

    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: checkpoint.steps(run), process)
    first = checkpoint.steps(run)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(checkpoint.steps(run)) == 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 143
    assert f"step {first[0]:,}: saved in {checkpoint.folder(run, first[0])}" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_text_is_read_leaves_nothing(start, tmp_path, number):
    os.mkfifo(tmp_path / "pipe")
    process = start("train", "pipe", "--out", "run")
    # Opening blocks until the other end is open, too: now it reads.
    with (tmp_path / "pipe").open("wb") as stream:
        stream.write(b"the beginning of a text\n")
        stream.flush()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert (stdout, stderr) == ("", "interrupted\n")
    assert not (tmp_path / "run").exists()


def test_what_nohup_ignores_stays_ignored(small, word_model, tmp_path):
    command = [sys.executable, "-m", "lmtrain", "train", word_model.corpus, *small, *ENDLESS]
    process = subprocess.Popen(
        [*command, "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    try:
        run = tmp_path / "run"
        wait_until(lambda: (run / "metrics.jsonl").exists(), process)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: checkpoint.steps(run), process)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)

    assert code == 143


@pytest.mark.parametrize(
    ("closed", "code"), [(">&- 2>&-", 0), ("<&- >&- 2>&-", 0), ("2>/dev/full >/dev/full", 5)]
)
def test_training_needs_no_streams(small, word_model, tmp_path, closed, code):
    words = " ".join(map(str, ("train", word_model.corpus, *small, "--out", "run")))

    ended = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lmtrain {words} {closed}"],
        cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip

    assert ended.returncode == code
    assert checkpoint.steps(tmp_path / "run")[-1] == 40
    assert all(problem is None for _, problem in checkpoint.verify(tmp_path / "run"))


def test_training_outlives_whoever_reads_its_progress(small, word_model, tmp_path):
    words = " ".join(map(str, ("train", word_model.corpus, *small, "--out", "run")))

    ended = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lmtrain {words} 2>&1 | head -c 1; "
         "exit ${PIPESTATUS[0]}"],
        cwd=tmp_path, timeout=60, check=False, capture_output=True,
    )  # fmt: skip

    # Killed by SIGPIPE when it came to the results, as every command is.
    assert ended.returncode == 128 + signal.SIGPIPE
    assert not ended.stderr
    assert checkpoint.steps(tmp_path / "run")[-1] == 40
