"""Numbers that are not finite, disks that fill, folders that go away, starts cut short."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

from corpora import TINY
from lmtrain import checkpoint, config, device, disk, files
from lmtrain.errors import DivergedError, MachineError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks.language_model import LanguageModelling
from lmtrain.training import logger, trainer
from lmtrain.training.run import run_training

SMALL = {
    "data.level": "char", "model.hidden_size": 12, "model.num_layers": 2, "model.dropout": 0.2,
    "train.batch_size": 4, "train.seq_len": 8, "train.max_steps": 24, "train.eval_every": 8,
    "train.save_every": 2, "train.log_every": 4, "train.threads": 1, "train.keep_checkpoints": 30,
    "optimizer.name": "adamw", "optimizer.learning_rate": 0.003,
}  # fmt: skip
TIMES = {"time", "tokens_per_second", "save_seconds"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TINY)
    return path


def settings(text, **changes):
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return config.load(overrides={**SMALL, "data.train": [str(text)], **changed})


def lines(run, kind=None):
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in parsed
        if kind in (None, line["kind"])
    ]


def weights(run, step=24):
    return (checkpoint.folder(run, step) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def straight(kept):
    """A run that nothing happened to, trained once for all tests here."""
    run, text = kept / "run", kept / "text.txt"
    if not run.exists():
        text.write_text(TINY)
        run_training(settings(text), run, is_quiet=True)
    return run


def poison(monkeypatch, what, steps):
    """Spoils a number in the steps given, counted from 1."""
    real, count = LanguageModelling.loss, iter(range(1, 10**6))

    def loss(self, batch, state):
        bias = self.model.head.bias
        if next(count) not in steps:
            return real(self, batch, state)
        if what == "weight":
            bias.data[0] = math.nan
        result = real(self, batch, state)
        if what == "loss":
            result = result._replace(objective=result.objective * math.inf)
        if what == "gradient":
            bias.register_hook(lambda gradient: gradient * math.nan)
        return result

    monkeypatch.setattr(LanguageModelling, "loss", loss)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("at", [1, 2, 13])
def test_a_number_that_is_not_finite_stops_before_the_update(
    text, tmp_path, straight, monkeypatch, what, at
):
    poison(monkeypatch, what, {at})

    with pytest.raises(DivergedError, match=f"training diverged at step {at}: .*n[a-z]n|inf"):
        run_training(settings(text), tmp_path / "run", is_quiet=True)

    saved = checkpoint.steps(tmp_path / "run")
    assert saved == list(range(2, at, 2))
    for step in saved:
        assert weights(tmp_path / "run", step) == weights(straight, step)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_batch_can_be_left_out(text, tmp_path, straight, monkeypatch, what, capsys):
    poison(monkeypatch, what, {1} if what == "loss" else {24})

    run_training(settings(text, train__on_nonfinite="skip"), tmp_path / "run")

    ours, undisturbed = (lines(run, "train") for run in (tmp_path / "run", straight))
    assert sum(line["skipped"] for line in ours) == 1
    # The learning rate and the text went on as if nothing had been.
    for key in ("step", "learning_rate"):
        assert [line[key] for line in ours] == [line[key] for line in undisturbed]
    assert "skipped: " in capsys.readouterr().err
    for step in checkpoint.steps(tmp_path / "run"):
        checkpoint.read(checkpoint.folder(tmp_path / "run", step)).require_whole()


@pytest.mark.slow
@pytest.mark.usefixtures("reading")
def test_a_run_whose_first_batch_was_left_out_is_resumed_bit_for_bit(text, tmp_path, monkeypatch):
    chosen = settings(text, train__on_nonfinite="skip", train__save_every=1)
    poison(monkeypatch, "loss", {1})
    run_training(chosen, tmp_path / "straight", is_quiet=True)
    monkeypatch.undo()
    poison(monkeypatch, "loss", {1})
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedError):
        run_training(chosen, tmp_path / "run", is_quiet=True)
    monkeypatch.undo()

    run_training(out=tmp_path / "run", resume=True, is_quiet=True)

    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")


@pytest.mark.usefixtures("reading")
def test_too_many_bad_batches_end_training(text, tmp_path, monkeypatch):
    poison(monkeypatch, "loss", set(range(5, 10**4)))

    with pytest.raises(DivergedError, match="step 14: 10 updates skipped in a row"):
        run_training(settings(text, train__on_nonfinite="skip"), tmp_path / "run", is_quiet=True)


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, step):
    real = trainer.Trainer._step

    def step_or_stop(self):
        if self.optimizer.step == step:
            raise StoppedError
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_step", step_or_stop)


def test_a_device_that_runs_ahead_trains_the_same_model(text, tmp_path, monkeypatch):
    chosen = settings(text, optimizer__average="ema", optimizer__max_grad_norm=0.5)
    run_training(chosen, tmp_path / "waited", is_quiet=True)
    monkeypatch.setattr(device, "runs_ahead", lambda place: True)
    run_training(chosen, tmp_path / "ahead", is_quiet=True)
    stop_after(monkeypatch, 13)
    with pytest.raises(StoppedError):
        run_training(chosen, tmp_path / "stopped", is_quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr(device, "runs_ahead", lambda place: True)

    run_training(out=tmp_path / "stopped", resume=True, is_quiet=True)

    assert weights(tmp_path / "stopped") == weights(tmp_path / "ahead")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "ahead")
    for ours, theirs in zip(*(lines(tmp_path / n) for n in ("ahead", "waited")), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(
    text, tmp_path, straight, monkeypatch
):
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedError):
        run_training(settings(text), tmp_path / "run", is_quiet=True)
    monkeypatch.undo()
    (tmp_path / "run" / "tokenizer.json").unlink()

    run_training(out=tmp_path / "run", resume=True, is_quiet=True)

    assert weights(tmp_path / "run") == weights(straight)
    assert lines(tmp_path / "run") == lines(straight)


def test_what_a_killed_start_left_is_in_nobodys_way(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / ".aside-1-1-config.toml").write_text("half")

    run_training(settings(text), tmp_path / "run", is_quiet=True)

    assert not [entry for entry in (tmp_path / "run").iterdir() if files.is_leftover(entry)]


def test_a_validation_that_was_cut_short_is_made_up_for(text, tmp_path, monkeypatch):
    chosen = settings(text, optimizer__average="nt-asgd", optimizer__average_patience=1)
    run_training(chosen, tmp_path / "straight", is_quiet=True)

    def stop(self, *_):
        raise StoppedError

    for at in ("log_probs", "hidden"):
        monkeypatch.setattr(LanguageModel, at, stop)
        with pytest.raises(StoppedError):
            run_training(chosen, tmp_path / at, is_quiet=True)
        monkeypatch.undo()
        run_training(out=tmp_path / at, resume=True, is_quiet=True)

        assert weights(tmp_path / at) == weights(tmp_path / "straight")
        assert lines(tmp_path / at) == lines(tmp_path / "straight")


def test_a_finished_run_is_not_validated_again(text, tmp_path, monkeypatch):
    first = run_training(settings(text), tmp_path / "run", is_quiet=True)
    monkeypatch.setattr(LanguageModel, "log_probs", None)

    again = run_training(out=tmp_path / "run", resume=True, is_quiet=True)

    assert again.progress.best == first.progress.best
    assert again.progress.best_step == first.progress.best_step
    assert len(lines(tmp_path / "run", "valid")) == 3


def test_a_log_that_cannot_be_written_ends_nothing(text, tmp_path, straight, monkeypatch, capsys):
    real, count = files.append_line, iter(range(10**6))

    def append_line(path, line):
        if 2 <= next(count) < 7:
            raise MachineError("could not append: No space left on device")
        real(path, line)

    monkeypatch.setattr(files, "append_line", append_line)
    run_training(settings(text), tmp_path / "run")

    assert lines(tmp_path / "run") == lines(straight)
    assert capsys.readouterr().err.count("metrics cannot be written; training goes on") == 1


def test_events_that_cannot_be_written_come_back(text, tmp_path, monkeypatch, capsys):
    real, count = tensorboard.SummaryWriter.flush, iter(range(10**6))

    def flush(self):
        if 2 <= next(count) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self)

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", flush)
    run_training(settings(text), tmp_path / "run")

    assert capsys.readouterr().err.count("events cannot be written; training goes on") == 1
    events = EventAccumulator(str(tmp_path / "run" / "events" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("trouble", ["gone", "full"])
def test_a_checkpoint_that_cannot_be_saved_ends_training_and_spoils_nothing(
    text, tmp_path, straight, monkeypatch, trouble
):
    run = tmp_path / "run"
    real_step, real_create = trainer.Trainer._step, disk.create

    def create(path):
        if run in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_create(path)

    def step(self):
        if self.optimizer.step == 12 and trouble == "gone":
            shutil.rmtree(run)
        elif self.optimizer.step == 12:
            monkeypatch.setattr(disk, "create", create)
        real_step(self)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    with pytest.raises(MachineError) as caught:
        run_training(settings(text), run, is_quiet=True)
    monkeypatch.undo()

    message = str(caught.value)
    assert {"gone": "the run folder is gone", "full": "No space left"}[trouble] in message
    assert len(message.splitlines()) == 1
    if trouble == "full":
        assert checkpoint.newest_intact(run)[0].state["step"] == 12
        run_training(out=run, resume=True, is_quiet=True)
        assert weights(run) == weights(straight)


def test_a_disk_too_small_is_refused_before_anything_is_written(text, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_free_bytes", lambda path: 1234)

    with pytest.raises(MachineError, match=r"too little room at .*run: 0\.0 MB free"):
        run_training(settings(text), tmp_path / "run", is_quiet=True)

    assert not (tmp_path / "run").exists()


def test_a_clock_set_back_changes_nothing(text, tmp_path, straight, monkeypatch):
    real, count = logger.time.time, iter(range(10**6))
    year = 365 * 86_400
    monkeypatch.setattr(logger.time, "time", lambda: real() + (-year, year)[next(count) % 2])

    run_training(settings(text, train__keep_checkpoints=2), tmp_path / "run", is_quiet=True)

    assert lines(tmp_path / "run") == lines(straight)
    assert checkpoint.steps(tmp_path / "run")[-2:] == [22, 24]


@pytest.mark.slow
def test_ten_thousand_steps_grow_neither_memory_nor_open_files(text, tmp_path, monkeypatch):
    seen = []
    real = trainer.Trainer._step

    def step(self):
        real(self)
        if self.optimizer.step % 1000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            open_files = len(list(Path("/proc/self/fd").iterdir()))
            seen.append((pages * os.sysconf("SC_PAGE_SIZE"), open_files))

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    chosen = settings(
        text, train__max_steps=10_000, train__max_epochs=10**6, train__save_every=2_000,
        train__eval_every=2_500, train__log_every=100, train__batch_size=1, train__seq_len=2,
        train__keep_checkpoints=2, model__hidden_size=4, model__num_layers=1,
    )  # fmt: skip
    run_training(chosen, tmp_path / "run", is_quiet=True)

    assert len(seen) == 10
    assert seen[-1][0] - seen[1][0] < 20e6
    assert seen[-1][1] <= seen[1][1]
    assert torch.get_num_threads() == 1
