"""Checkpoints on disks that fail, in processes that die, and after a loss of power.

Every operation on the disk fails in turn; every disk that a loss of power may leave is read.
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
def no_waiting(monkeypatch):
    """The disk of the test outlives it; waiting for it thousands of times would prove nothing."""
    monkeypatch.setattr(disk, "sync", lambda descriptor: None)
    monkeypatch.setattr(disk, "sync_folder", lambda path: None)


def save(run, step):
    """What training does at each save; the third and later ones remove the first."""
    files.append_line(run / "metrics.jsonl", json.dumps({"step": step}))
    files.sync_file(run / "metrics.jsonl")
    checkpoint.save(
        run,
        step,
        texts={"config.toml": "format = 1\n", "tokenizer.json": "{}"},
        weights={"weight": torch.full((3,), float(step))},
        state_tensors={"chance": torch.arange(2)},
        state={
            "step": step,
            "parts": {"progress": {}},
            "data": {"train": {"name": "text", "key": "0" * 64}},
        },
    )
    # The second is the best.
    checkpoint.write_best(run, min(step, 2), "perplexity", 1.0)
    checkpoint.rotate(run, 1)


def trained(run, promise=lambda step: None):
    """A short life of a run folder."""
    files.make_folder(run)
    with files.locked(run / ".lock", "the run"):
        files.write(run / "config.toml", b"format = 1\n")
        for step in (1, 2, 3, 4):
            save(run, step)
            promise(step)


def found(run):
    """The step that training would go on from; 0 if it would begin anew."""
    try:
        saved, problems = checkpoint.newest_intact(run)
    except CheckpointError:
        return 0
    assert not problems
    return saved.state["step"]


@pytest.fixture(scope="module")
def count(tmp_path_factory):
    with Faults() as faults:
        trained(tmp_path_factory.mktemp("whole") / "run")
    return len(faults.calls)


@pytest.mark.parametrize("failure", [*FAILURES, "death"])
def test_whichever_operation_fails_the_old_or_the_new_checkpoint_is_whole(count, failure, tmp_path):
    for at in range(1, count + 1):
        run, reached = tmp_path / str(at), []
        ends = DiedError if failure == "death" else MachineError
        with Faults(at, failure) as faults, contextlib.suppress(ends):
            trained(run, reached.append)

        assert faults.failed
        done = max(reached, default=0)
        assert found(run) in (done, done + 1)
        if best := checkpoint.best(run):
            step = best.step
            assert checkpoint.read(checkpoint.folder(run, step)).state["step"] == step
        # Going on, the folder is as good as new.
        files.remove_leftovers(run)
        files.remove_leftovers(run / "checkpoints")
        for step in range(found(run) + 1, 6):
            files.make_folder(run)
            save(run, step)
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["step-00000002", "step-00000005"][-len(names) :]
        assert found(run) == 5
        shutil.rmtree(run)


def test_short_writes_are_completed(count, tmp_path):
    for at in range(1, count + 1):
        run = tmp_path / str(at)
        problem = ""
        with Faults(at, "short"):
            try:
                trained(run)
            except MachineError as error:
                problem = str(error)

        # A line of a log is written at once or not at all.
        assert "could not append" in problem or (not problem and found(run) == 4)


@pytest.mark.parametrize("pretended", [(), ("sync",), ("sync_folder",)], ids=str)
def test_what_was_promised_survives_a_loss_of_power(pretended, tmp_path):
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    with PowerLoss(recorded, pretended) as power:
        trained(recorded / "run", lambda step: setattr(power, "promised", step))
    broken = tried = 0
    for contents, promised in power.states():
        tried += 1
        place = tmp_path / "after"
        for path, content in contents.items():
            if content is None:
                (place / path).mkdir(parents=True)
            else:
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(content)
        broken += not kept(place / "run", promised)
        shutil.rmtree(place, ignore_errors=True)

    assert tried > 200
    # The model sees what a missing sync does.
    assert bool(broken) == bool(pretended)


def kept(run, promised):
    """Whether a disk after a loss of power holds all that was promised."""
    try:
        step = checkpoint.newest_intact(run)[0].state["step"]
        best = checkpoint.best(run)
        checkpoint.read(checkpoint.folder(run, best.step if best else step))
    except CheckpointError:
        return promised == 0
    recorded, path = [], run / "metrics.jsonl"
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            recorded.append(json.loads(line)["step"])
        except ValueError:
            continue
    return step >= promised and set(range(1, step + 1)) <= set(recorded)


@pytest.mark.parametrize("failure", [errno.ENOSPC, "short", "death"])
def test_no_half_token_file_is_ever_used(failure, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 50)

    def cut(cache):
        monkeypatch.setenv("LMTRAIN_CACHE", str(cache))
        text = corpus.open_text([str(tmp_path / "text.txt")])
        division = Division(text, ("train", "valid"), (0.1,), at_line_ends=True)
        _, texts = tokens.read_tokens(division, DataConfig())
        return [texts[name].ids.tolist() for name in division.names]

    with Faults() as faults:
        right = cut(tmp_path / "whole")
    for at in range(1, len(faults.calls) + 1):
        with Faults(at, failure), contextlib.suppress(MachineError, DiedError):
            assert cut(tmp_path / str(at)) == right

        assert cut(tmp_path / str(at)) == right
