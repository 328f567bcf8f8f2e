"""The command lmtrain, and one tiny word and one tiny character model for all tests here."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forking import ForkServer

from corpora import TINY

TIMEOUT_SECONDS = 90

Outcome = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Trained:
    """A run that other tests read and none changes.

    Args:
        run: its folder.
        corpus: the text it was trained on.
        outcome: what the command printed.
    """

    run: Path
    corpus: Path
    outcome: Outcome


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """New processes are slow: they import torch."""
    for item in items:
        if {"fresh_lmtrain", "start"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def decoded(ended: subprocess.CompletedProcess[bytes]) -> Outcome:
    return subprocess.CompletedProcess(
        ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode()
    )


def run_fresh(
    folder: Path, *words: object, stdin: str = "", python: tuple[str, ...] = (), **env: str
) -> Outcome:
    """Runs lmtrain in a folder as a user types it; its exit code and both its streams."""
    return decoded(
        subprocess.run(
            [sys.executable, *python, "-m", "lmtrain", *map(str, words)],
            cwd=folder,
            input=stdin.encode(),
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    )


def run_forked(
    server: ForkServer, folder: Path, *words: object, stdin: str = "", **env: str
) -> Outcome:
    """The same in a fork of the server."""
    return decoded(server.run(folder, [*map(str, words)], stdin.encode(), env, TIMEOUT_SECONDS))


def no_constant(name: str) -> None:
    pytest.fail(f"{name} is not JSON")


@pytest.fixture(scope="session")
def fork_server(own_cache: Path) -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def lmtrain_in(fork_server: ForkServer) -> Callable[..., Outcome]:
    """`lmtrain_in(folder, "score", run, stdin="a line")`, in a fork."""
    return partial(run_forked, fork_server)


@pytest.fixture
def lmtrain(lmtrain_in: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """The same in the test's own folder."""
    return partial(lmtrain_in, tmp_path)


@pytest.fixture
def fresh_lmtrain(tmp_path: Path) -> Callable[..., Outcome]:
    """The same in a new process, for what depends on how Python and torch start.

    At least one test of each command uses it, so that each command runs as users run it.
    """
    return partial(run_fresh, tmp_path)


@pytest.fixture(scope="session")
def parsed() -> Callable[[str], Any]:
    """Strict JSON: NaN and Infinity fail the test."""
    return partial(json.loads, parse_constant=no_constant)


@pytest.fixture(scope="session")
def parsed_lines(parsed: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Strict JSON lines."""
    return lambda text: [parsed(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Options that train a tiny model in well under a second."""
    return (
        "--hidden-size", "16", "--num-layers", "1", "--batch-size", "4", "--seq-len", "8",
        "--lr", "0.02", "--set", "optimizer.schedule=constant", "--set", "train.max_steps=40",
        "--set", "train.eval_every=20", "--set", "train.log_every=5", "--set", "train.threads=1",
    )  # fmt: skip


@pytest.fixture(scope="session")
def word_model(tmp_path_factory: pytest.TempPathFactory, small: tuple[str, ...]) -> Trained:
    folder = tmp_path_factory.mktemp("word")
    (folder / "corpus.txt").write_text(TINY)
    (folder / "settings.toml").write_text(
        "[model]\nhidden_size = 99\n[train]\nseq_len = 99\nkeep_checkpoints = 3\n"
    )
    outcome = run_fresh(
        folder, "train", "corpus.txt", "--config", "settings.toml", "--set", "train.seq_len=98",
        *small, "--out", "run", "--json",
    )  # fmt: skip
    return Trained(folder / "run", folder / "corpus.txt", outcome)


@pytest.fixture(scope="session")
def char_model(
    lmtrain_in: Callable[..., Outcome],
    tmp_path_factory: pytest.TempPathFactory,
    small: tuple[str, ...],
) -> Trained:
    folder = tmp_path_factory.mktemp("char")
    (folder / "corpus.txt").write_text(TINY)
    words = ("train", "corpus.txt", "--level", "char", *small, "--out", "run")
    outcome = lmtrain_in(folder, *words)
    return Trained(folder / "run", folder / "corpus.txt", outcome)


@pytest.fixture
def assert_refused() -> Callable[..., None]:
    """Checks that a command ended with a code and one to three plain lines, and nothing else."""

    def check(outcome: Outcome, exit_code: int, *parts: str) -> None:
        lines = outcome.stderr.splitlines()
        assert outcome.returncode == exit_code, outcome.stderr
        assert not outcome.stdout
        assert "Traceback" not in outcome.stderr
        assert lines[0].startswith("error: "), outcome.stderr
        assert len(lines) <= 3
        for part in parts:
            assert part in outcome.stderr

    return check


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts lmtrain in the test's own folder and leaves it running."""
    started = []

    def begin(*words: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmtrain", *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            # A shell that runs the tests in its background has SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=TIMEOUT_SECONDS)
