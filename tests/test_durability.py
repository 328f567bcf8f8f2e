"""Checkpoints when the disk fails, the process dies or the power is lost.

Every disk operation fails in turn; every disk content that a power loss can leave is read.
"""

import contextlib
import errno
import json
import shutil

import pytest
import torch
from faulty_disk import DiedError, Faults, PowerLoss

from lmtrain import checkpoint, disk, files
from lmtrain.data import corpus, tokens
from lmtrain.data.division import Division
from lmtrain.errors import CheckpointError, MachineError
from lmtrain.schema import DataConfig

FAILURES = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS]


@pytest.fixture(autouse=True)
def skip_sync(monkeypatch):
    """Thousands of real syncs would only take time."""
    monkeypatch.setattr(disk, "sync", lambda descriptor: None)
    monkeypatch.setattr(disk, "sync_folder", lambda path: None)


def save(run, step):
    """What training does at each save; the third and later ones delete the first."""
    files.append_line(run / "metrics.jsonl", json.dumps({"step": step}))
    files.sync_file(run / "metrics.jsonl")
    checkpoint.save(
        run,
        step,
        texts={"config.toml": "format = 1\n", "tokenizer.json": "{}"},
        weights={"weight": torch.full((3,), float(step))},
        state_tensors={"generator": torch.arange(2)},
        state={
            "step": step,
            "parts": {"progress": {}},
            "data": {"train": {"name": "text", "key": "0" * 64}},
        },
    )
    # The second checkpoint stays the best.
    checkpoint.write_best(run, min(step, 2), "perplexity", 1.0)
    checkpoint.rotate(run, 1)


def train(run, on_saved=lambda step: None):
    """A short training: creates a run folder and saves four checkpoints."""
    files.make_folder(run)
    with files.locked(run / ".lock", "the run"):
        files.write(run / "config.toml", b"format = 1\n")
        for step in (1, 2, 3, 4):
            save(run, step)
            on_saved(step)


def resumable_step(run):
    """The step that training would resume from; 0 if it would start again."""
    try:
        saved, problems = checkpoint.newest_intact(run)
    except CheckpointError:
        return 0
    assert not problems
    return saved.state["step"]


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    with Faults() as faults:
        train(tmp_path_factory.mktemp("whole") / "run")
    return len(faults.calls)


@pytest.mark.slow
@pytest.mark.parametrize("failure", [*FAILURES, "death"])
def test_whichever_operation_fails_the_old_or_the_new_checkpoint_is_intact(
    count, failure, tmp_path
):
    for operation in range(1, count + 1):
        run, saved_steps = tmp_path / str(operation), []
        error = DiedError if failure == "death" else MachineError
        with Faults(operation, failure) as faults, contextlib.suppress(error):
            train(run, saved_steps.append)

        assert faults.failed
        last = max(saved_steps, default=0)
        assert resumable_step(run) in (last, last + 1)
        if best := checkpoint.best(run):
            step = best.step
            assert checkpoint.read(checkpoint.folder(run, step)).state["step"] == step
        # Training can be resumed in the folder.
        files.remove_leftovers(run)
        files.remove_leftovers(run / "checkpoints")
        for step in range(resumable_step(run) + 1, 6):
            files.make_folder(run)
            save(run, step)
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["step-00000002", "step-00000005"][-len(names) :]
        assert resumable_step(run) == 5
        shutil.rmtree(run)


def test_short_writes_are_completed(count, tmp_path):
    for operation in range(1, count + 1):
        run = tmp_path / str(operation)
        problem = ""
        with Faults(operation, "short"):
            try:
                train(run)
            except MachineError as error:
                problem = str(error)

        # A line of metrics.jsonl is written completely or not at all.
        assert "could not append" in problem or (not problem and resumable_step(run) == 4)


@pytest.mark.slow
@pytest.mark.parametrize("no_ops", [(), ("sync",), ("sync_folder",)], ids=str)
def test_saved_checkpoints_survive_a_power_loss(no_ops, tmp_path):
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    with PowerLoss(recorded, no_ops) as power:
        train(recorded / "run", lambda step: setattr(power, "saved_step", step))
    broken = tried = 0
    for contents, saved_step in power.states():
        tried += 1
        disk_root = tmp_path / "after"
        for path, content in contents.items():
            if content is None:
                (disk_root / path).mkdir(parents=True)
            else:
                (disk_root / path).parent.mkdir(parents=True, exist_ok=True)
                (disk_root / path).write_bytes(content)
        broken += not is_intact(disk_root / "run", saved_step)
        shutil.rmtree(disk_root, ignore_errors=True)

    assert tried > 200
    # The simulation detects a missing sync.
    assert bool(broken) == bool(no_ops)


def is_intact(run, saved_step):
    """Whether a run after a power loss has the checkpoint and the metrics of the saved step."""
    try:
        step = checkpoint.newest_intact(run)[0].state["step"]
        best = checkpoint.best(run)
        checkpoint.read(checkpoint.folder(run, best.step if best else step))
    except CheckpointError:
        return saved_step == 0
    logged, path = [], run / "metrics.jsonl"
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            logged.append(json.loads(line)["step"])
        except ValueError:
            continue
    return step >= saved_step and set(range(1, step + 1)) <= set(logged)


@pytest.mark.parametrize("failure", [errno.ENOSPC, "short", "death"])
def test_an_incomplete_token_file_is_never_used(failure, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 50)

    def tokenize(cache):
        monkeypatch.setenv("LMTRAIN_CACHE", str(cache))
        text = corpus.open_text([str(tmp_path / "text.txt")])
        division = Division(text, ("train", "valid"), (0.1,), at_line_ends=True)
        _, texts = tokens.read_tokens(division, DataConfig())
        return [texts[name].ids.tolist() for name in division.names]

    with Faults() as faults:
        expected = tokenize(tmp_path / "whole")
    for operation in range(1, len(faults.calls) + 1):
        with Faults(operation, failure), contextlib.suppress(MachineError, DiedError):
            assert tokenize(tmp_path / str(operation)) == expected

        assert tokenize(tmp_path / str(operation)) == expected
