"""Training with losses that are not finite, full disks, deleted folders and interrupted starts."""

import errno
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from run_folders import load_settings, untimed_metrics, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

import lmtrain
from corpora import TINY
from lmtrain import checkpoint, device, disk, files
from lmtrain.errors import ConfigError, DivergedError, MachineError, RunInterruptedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks.language_model import LanguageModelling
from lmtrain.tasks.perplexity import Perplexity
from lmtrain.training import logger, run_folder, trainer
from lmtrain.training.run import run_training

SMALL = {
    "data.level": "char", "model.hidden_size": 12, "model.num_layers": 2, "model.dropout": 0.2,
    "train.batch_size": 4, "train.seq_len": 8, "train.max_steps": 24, "train.eval_every": 8,
    "train.save_every": 2, "train.log_every": 4, "train.threads": 1, "train.keep_checkpoints": 30,
    "optimizer.name": "adamw", "optimizer.learning_rate": 0.003,
}  # fmt: skip


def settings(text, **changes):
    return load_settings({**SMALL, "data.train": [str(text)]}, **changes)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("module")


@pytest.fixture
def uninterrupted(module_folder):
    """An uninterrupted run, trained once for all tests of this module."""
    run, text = module_folder / "run", module_folder / "text.txt"
    if not run.exists():
        text.write_text(TINY)
        run_training(settings(text), run, is_quiet=True)
    return run


def inject_nan(monkeypatch, target, steps):
    """Makes loss, gradient or weight infinite or NaN in these steps, counted from 1."""
    real, count = LanguageModelling.loss, iter(range(1, 10**6))

    def loss(self, batch, state):
        bias = self.model.head.bias
        if next(count) not in steps:
            return real(self, batch, state)
        if target == "weight":
            bias.data[0] = math.nan
        result = real(self, batch, state)
        if target == "loss":
            result = result._replace(objective=result.objective * math.inf)
        if target == "gradient":
            bias.register_hook(lambda gradient: gradient * math.nan)
        return result

    monkeypatch.setattr(LanguageModelling, "loss", loss)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("target", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("step", [1, 2, 13])
def test_a_loss_gradient_or_weight_that_is_not_finite_ends_training_before_the_update(
    text, tmp_path, uninterrupted, monkeypatch, target, step
):
    inject_nan(monkeypatch, target, {step})

    with pytest.raises(DivergedError, match=f"training diverged at step {step}: .*n[a-z]n|inf"):
        run_training(settings(text), tmp_path / "run", is_quiet=True)

    saved_steps = checkpoint.steps(tmp_path / "run")
    assert saved_steps == list(range(2, step, 2))
    for saved in saved_steps:
        assert weights(tmp_path / "run", saved) == weights(uninterrupted, saved)


@pytest.mark.usefixtures("device_kind")
@pytest.mark.parametrize("target", ["loss", "gradient"])
def test_an_update_that_is_not_finite_can_be_skipped(
    text, tmp_path, uninterrupted, monkeypatch, target, capsys
):
    inject_nan(monkeypatch, target, {1} if target == "loss" else {24})

    run_training(settings(text, train__on_nonfinite="skip"), tmp_path / "run")

    actual, expected = (untimed_metrics(run, "train") for run in (tmp_path / "run", uninterrupted))
    assert sum(line["skipped"] for line in actual) == 1
    # Learning rate and data continue as if the step had been applied.
    for key in ("step", "learning_rate"):
        assert [line[key] for line in actual] == [line[key] for line in expected]
    assert "skipped: " in capsys.readouterr().err
    for step in checkpoint.steps(tmp_path / "run"):
        checkpoint.read(checkpoint.folder(tmp_path / "run", step)).require_intact()


@pytest.mark.slow
@pytest.mark.usefixtures("device_kind")
def test_a_run_whose_first_update_was_skipped_is_resumed_bit_for_bit(text, tmp_path, monkeypatch):
    chosen = settings(text, train__on_nonfinite="skip", train__save_every=1)
    inject_nan(monkeypatch, "loss", {1})
    run_training(chosen, tmp_path / "uninterrupted", is_quiet=True)
    monkeypatch.undo()
    inject_nan(monkeypatch, "loss", {1})
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedError):
        run_training(chosen, tmp_path / "run", is_quiet=True)
    monkeypatch.undo()

    run_training(out=tmp_path / "run", resume=True, is_quiet=True)

    assert weights(tmp_path / "run") == weights(tmp_path / "uninterrupted")
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(tmp_path / "uninterrupted")


@pytest.mark.usefixtures("device_kind")
def test_too_many_skipped_updates_in_a_row_end_training(text, tmp_path, monkeypatch):
    inject_nan(monkeypatch, "loss", set(range(5, 10**4)))

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


def test_an_asynchronous_device_trains_the_same_model(text, tmp_path, monkeypatch):
    chosen = settings(text, optimizer__average="ema", optimizer__max_grad_norm=0.5)
    run_training(chosen, tmp_path / "synchronous", is_quiet=True)
    monkeypatch.setattr(device, "is_asynchronous", lambda device: True)
    run_training(chosen, tmp_path / "asynchronous", is_quiet=True)
    stop_after(monkeypatch, 13)
    with pytest.raises(StoppedError):
        run_training(chosen, tmp_path / "stopped", is_quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr(device, "is_asynchronous", lambda device: True)

    run_training(out=tmp_path / "stopped", resume=True, is_quiet=True)

    assert weights(tmp_path / "stopped") == weights(tmp_path / "asynchronous")
    assert untimed_metrics(tmp_path / "stopped") == untimed_metrics(tmp_path / "asynchronous")
    runs = (tmp_path / "asynchronous", tmp_path / "synchronous")
    for actual, expected in zip(*map(untimed_metrics, runs), strict=True):
        assert actual["step"] == expected["step"]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_run_that_ended_before_its_first_checkpoint_is_resumed_from_the_start(
    text, tmp_path, uninterrupted, monkeypatch
):
    stop_after(monkeypatch, 1)
    with pytest.raises(StoppedError):
        run_training(settings(text), tmp_path / "run", is_quiet=True)
    monkeypatch.undo()
    (tmp_path / "run" / "tokenizer.json").unlink()

    run_training(out=tmp_path / "run", resume=True, is_quiet=True)

    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(uninterrupted)


def test_a_new_run_replaces_what_a_killed_start_left_behind(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / ".aside-1-1-config.toml").write_text("half")

    run_training(settings(text), tmp_path / "run", is_quiet=True)

    assert not [entry for entry in (tmp_path / "run").iterdir() if files.is_leftover(entry)]


def test_an_interrupted_validation_is_repeated_on_resume(text, tmp_path, monkeypatch):
    chosen = settings(text, optimizer__average="nt-asgd", optimizer__average_patience=1)
    run_training(chosen, tmp_path / "uninterrupted", is_quiet=True)

    def stop(self, *_):
        raise StoppedError

    for method in ("log_probs", "hidden"):
        monkeypatch.setattr(LanguageModel, method, stop)
        with pytest.raises(StoppedError):
            run_training(chosen, tmp_path / method, is_quiet=True)
        monkeypatch.undo()
        run_training(out=tmp_path / method, resume=True, is_quiet=True)

        assert weights(tmp_path / method) == weights(tmp_path / "uninterrupted")
        assert untimed_metrics(tmp_path / method) == untimed_metrics(tmp_path / "uninterrupted")


def test_a_finished_run_is_not_validated_again(text, tmp_path, monkeypatch):
    first = run_training(settings(text), tmp_path / "run", is_quiet=True)
    monkeypatch.setattr(LanguageModel, "log_probs", None)

    resumed = run_training(out=tmp_path / "run", resume=True, is_quiet=True)

    assert resumed.progress.best == first.progress.best
    assert resumed.progress.best_step == first.progress.best_step
    assert len(untimed_metrics(tmp_path / "run", "valid")) == 3


def test_training_continues_if_metrics_cannot_be_written(
    text, tmp_path, uninterrupted, monkeypatch, capsys
):
    real, count = files.append_line, iter(range(10**6))

    def append_line(path, line):
        if 2 <= next(count) < 7:
            raise MachineError("could not append: No space left on device")
        real(path, line)

    monkeypatch.setattr(files, "append_line", append_line)
    run_training(settings(text), tmp_path / "run")

    assert untimed_metrics(tmp_path / "run") == untimed_metrics(uninterrupted)
    assert (
        capsys.readouterr().err.count("warning: could not write metrics, training continues") == 1
    )


@pytest.mark.parametrize(("seconds", "failures"), [(0, 3), (60, 1)])
def test_events_that_could_not_be_written_are_written_later(
    text, tmp_path, monkeypatch, capsys, seconds, failures
):
    real, count = tensorboard.SummaryWriter.flush, iter(range(10**6))
    monkeypatch.setattr(logger, "_REBUILD_SECONDS", seconds)

    def flush(self):
        if 2 <= next(count) < 2 + failures:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self)

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", flush)
    run_training(settings(text), tmp_path / "run")

    assert capsys.readouterr().err.count("warning: could not write events, training continues") == 1
    events = EventAccumulator(str(tmp_path / "run" / "events" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("failure", ["deleted", "full"])
def test_training_ends_if_a_checkpoint_cannot_be_saved_and_earlier_ones_stay_intact(
    text, tmp_path, uninterrupted, monkeypatch, failure
):
    run = tmp_path / "run"
    real_step, real_create = trainer.Trainer._step, disk.create

    def create(path):
        if run in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_create(path)

    def step(self):
        if self.optimizer.step == 12 and failure == "deleted":
            shutil.rmtree(run)
        elif self.optimizer.step == 12:
            monkeypatch.setattr(disk, "create", create)
        real_step(self)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    with pytest.raises(MachineError) as caught:
        run_training(settings(text), run, is_quiet=True)
    monkeypatch.undo()

    message = str(caught.value)
    assert {"deleted": "the run folder was deleted", "full": "No space left"}[failure] in message
    assert len(message.splitlines()) == 1
    if failure == "full":
        assert checkpoint.newest_intact(run)[0].state["step"] == 12
        run_training(out=run, resume=True, is_quiet=True)
        assert weights(run) == weights(uninterrupted)


def test_too_little_disk_space_is_refused_before_anything_is_written(text, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_free_bytes", lambda path: 1234)

    with pytest.raises(MachineError, match=r"not enough disk space for .*run: 0\.0 MB free"):
        run_training(settings(text), tmp_path / "run", is_quiet=True)

    assert not (tmp_path / "run").exists()


def test_a_clock_that_jumps_changes_nothing(text, tmp_path, uninterrupted, monkeypatch):
    real, count = logger.time.time, iter(range(10**6))
    year = 365 * 86_400
    monkeypatch.setattr(logger.time, "time", lambda: real() + (-year, year)[next(count) % 2])

    run_training(settings(text, train__keep_checkpoints=2), tmp_path / "run", is_quiet=True)

    assert untimed_metrics(tmp_path / "run") == untimed_metrics(uninterrupted)
    assert checkpoint.steps(tmp_path / "run")[-2:] == [22, 24]


@pytest.mark.slow
def test_ten_thousand_steps_leak_neither_memory_nor_files(text, tmp_path, monkeypatch):
    samples = []
    real = trainer.Trainer._step

    def step(self):
        real(self)
        if self.optimizer.step % 1000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            open_files = len(list(Path("/proc/self/fd").iterdir()))
            samples.append((pages * os.sysconf("SC_PAGE_SIZE"), open_files))

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    chosen = settings(
        text, train__max_steps=10_000, train__max_epochs=10**6, train__save_every=2_000,
        train__eval_every=2_500, train__log_every=100, train__batch_size=1, train__seq_len=2,
        train__keep_checkpoints=2, model__hidden_size=4, model__num_layers=1,
    )  # fmt: skip
    run_training(chosen, tmp_path / "run", is_quiet=True)

    assert len(samples) == 10
    assert samples[-1][0] - samples[1][0] < 20e6
    assert samples[-1][1] <= samples[1][1]
    assert torch.get_num_threads() == 1


def test_a_resume_that_cannot_be_exact_says_what_changed(tmp_path, capsys):
    environment = {"device": "cpu", "processes": 1, "precision": "fp32"}
    run_folder.record_start(tmp_path, None, threads=2, kernels="native", **environment)
    run_folder.record_start(tmp_path, 5, threads=2, kernels="native", **environment)
    assert capsys.readouterr().err == ""

    run_folder.record_start(tmp_path, 9, threads=1, kernels="torch", **environment)

    assert capsys.readouterr().err.splitlines() == [
        "not bit for bit: threads was 2 and is now 1",
        "not bit for bit: kernels was native and is now torch",
    ]


@pytest.mark.parametrize(
    "content", [None, b"{", b'{"step": 24, "metric": "perplexity", "value": 1}']
)
def test_the_best_checkpoint_is_kept_if_best_json_is_lost_or_wrong(
    text, tmp_path, monkeypatch, content
):
    # The loss falls, so that the first validation counts as the best.
    monkeypatch.setattr(Perplexity, "sort_key", lambda figures: -figures["loss"])
    chosen = settings(text, train__keep_checkpoints=1, train__max_steps=16)
    first = run_training(chosen, tmp_path / "run", is_quiet=True)
    assert first.progress.best_step == 8
    best = (tmp_path / "run" / "best.json").read_bytes()
    if content is None:
        (tmp_path / "run" / "best.json").unlink()
    else:
        (tmp_path / "run" / "best.json").write_bytes(content)

    changes = {"train.max_steps": 24}
    run_training(out=tmp_path / "run", resume=True, overrides=changes, is_quiet=True)

    assert (tmp_path / "run" / "best.json").read_bytes() == best
    assert checkpoint.steps(tmp_path / "run") == [8, 24]


def test_a_run_without_a_checkpoint_resumes_with_its_settings(text, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def save(self, *arguments):
        raise MachineError("could not save")

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Checkpoints, "save", save)
        with pytest.raises(MachineError):
            run_training(settings(text), run, is_quiet=True)
    assert not checkpoint.steps(run)

    with pytest.raises(ConfigError, match=r"cannot change model\.hidden_size\n"):
        run_training(out=run, resume=True, overrides={"model.hidden_size": 13}, is_quiet=True)
    run_training(out=run, resume=True, overrides={"train.max_steps": 12}, is_quiet=True)

    assert lmtrain.load_config(run / "config.toml").train.max_steps == 12
    assert checkpoint.steps(run)[-1] == 12


def test_a_signal_during_the_last_validation_is_not_forgotten(text, tmp_path, monkeypatch):
    # As where the time ends a training: it validates after its last step.
    monkeypatch.setattr(trainer.Trainer, "_is_validation_due", lambda self: False)
    real = LanguageModelling.preview

    def preview(self, step):
        if step == 24:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step)

    monkeypatch.setattr(LanguageModelling, "preview", preview)

    with pytest.raises(RunInterruptedError):
        run_training(settings(text), tmp_path / "run", is_quiet=True)

    assert checkpoint.best(tmp_path / "run").step in checkpoint.steps(tmp_path / "run")
