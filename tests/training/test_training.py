"""Training through the API: learning, exact resume, early stopping, logs."""

import errno
import math
import os
import re
from pathlib import Path

import pytest
import torch
from run_folders import load_settings, metrics, untimed_metrics, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lmtrain
from lmtrain import checkpoint, config
from lmtrain.errors import ConfigError, DivergedError, RunBusyError, UnreadableError
from lmtrain.kernels.native import library
from lmtrain.tasks.base import Shard
from lmtrain.tasks.gradient_norms import gradient_norms
from lmtrain.tasks.language_model import LanguageModelling
from lmtrain.training import trainer
from lmtrain.training.run import build_task, run_training

SMALL = {
    "data.level": "char", "model.hidden_size": 12, "model.num_layers": 2, "model.dropout": 0.2,
    "train.batch_size": 4, "train.seq_len": 8, "train.max_steps": 30, "train.eval_every": 10,
    "train.log_every": 4, "train.threads": 1,
}  # fmt: skip


def settings(text, **changes):
    return load_settings({**SMALL, "data.train": [str(text)]}, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("rnn", {}),
        ("simple-gru", {}),
        ("gru", {}),
        ("lstm", {}),
        ("peephole-lstm", {"model.peephole": "full"}),
        ("peephole-lstm", {"model.peephole": "diagonal"}),
    ],
)
def test_every_cell_beats_token_frequencies_on_real_text(cell, options, shakespeare, tmp_path):
    chosen = config.load(
        overrides={
            "data.train": [str(shakespeare)], "data.level": "char", "model.cell": cell,
            "model.hidden_size": 48, "model.num_layers": 1, "train.batch_size": 32,
            "train.seq_len": 25, "train.max_steps": 80, "optimizer.learning_rate": 0.02,
            "train.threads": 1, "data.valid_fraction": 0.02, **options,
        }
    )  # fmt: skip

    summary = run_training(chosen, tmp_path / "run", is_quiet=True)

    assert summary.best["loss"] < summary.baseline.loss - 0.2


@pytest.mark.parametrize(
    ("name", "num_processes", "is_sparse"),
    [("sgd", 1, True), ("sgd", 2, False), ("adamw", 1, False)],
)
def test_sgd_in_one_process_has_sparse_gradients(text, name, num_processes, is_sparse):
    chosen = settings(
        text, optimizer__name=name, model__softmax="sampled", model__samples=3,
        train__batch_size=2, train__seq_len=2,
    )  # fmt: skip
    task = build_task(chosen, LanguageModelling.read(chosen), Shard(0, num_processes))

    task.loss(task.batch(0), None).objective.backward()

    for module in (task.model.encoder.embedding, task.model.head):
        assert module.weight.grad.is_sparse is is_sparse


@pytest.mark.slow
@pytest.mark.skipif(not library.has_bf16(), reason="no bf16 products on this processor")
@pytest.mark.parametrize("cell", ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"])
def test_bf16_reaches_the_loss_of_fp32_on_real_text(cell, shakespeare, tmp_path):
    losses = {}
    # At 0.005 the gates of full peepholes saturate, and even two fp32 runs differ by 2 %.
    rate = 0.002 if cell == "peephole-lstm" else 0.005
    for precision in ("fp32", "bf16"):
        chosen = config.load(
            overrides={
                "data.train": [str(shakespeare)], "data.level": "char", "model.cell": cell,
                "model.hidden_size": 64, "model.num_layers": 2, "train.batch_size": 32,
                "train.seq_len": 25, "train.max_steps": 150, "optimizer.learning_rate": rate,
                "train.threads": 1, "data.valid_fraction": 0.02, "train.precision": precision,
            }
        )  # fmt: skip
        summary = run_training(chosen, tmp_path / precision, is_quiet=True)
        losses[precision] = summary.best["loss"]

    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_a_run_without_native_kernels_shows_a_warning(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LMTRAIN_KERNELS", "torch")

    run_training(settings(text, train__max_steps=2), tmp_path / "run")

    warning = "warning: recurrent layers run without native kernels: LMTRAIN_KERNELS=torch"
    assert warning in capsys.readouterr().err


EVERYTHING = {
    "model__tied_embeddings": True, "model__embedding_size": 6, "model__residual": True,
    "model__num_layers": 3, "model__locked_dropout": True, "model__word_dropout": 0.1,
    "model__weight_dropout": 0.3, "model__activation_regularization": 2.0,
    "model__temporal_regularization": 1.0, "model__softmax": "sampled", "model__samples": 5,
    "train__random_seq_len": True, "optimizer__warmup_steps": 4, "train__state_reset": 0.3,
    "train__noise": 0.4, "train__log_gradients": 7,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        # Fewer tokens in a batch than in the vocabulary: the gradients of embeddings are sparse.
        {
            "optimizer__name": "sgd", "optimizer__weight_decay": 1e-3, "train__batch_size": 1,
            "train__seq_len": 4,
        },
        {"optimizer__name": "adamw"},
        {"optimizer__average": "ema", **EVERYTHING},
        {
            "optimizer__name": "sgd", "optimizer__average": "nt-asgd",
            "optimizer__learning_rate": 20, "optimizer__average_patience": 1,
            "optimizer__weight_decay": 1e-3, "train__eval_every": 2, **EVERYTHING,
            "train__batch_size": 1, "train__seq_len": 4,
        },
    ],
    ids=["sgd", "adamw", "ema", "nt-asgd"],
)  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    text, tmp_path, monkeypatch, changes
):
    chosen = settings(text, train__save_every=1, **changes)
    uninterrupted = tmp_path / "uninterrupted"
    run_training(chosen, uninterrupted, is_quiet=True)

    for stop in (1, 7, 10, 13, 29):
        stopped = tmp_path / f"stopped-{stop}"
        kill_after(monkeypatch, stop)
        with pytest.raises(KilledError):
            run_training(chosen, stopped, is_quiet=True)
        monkeypatch.undo()

        run_training(out=stopped, resume=True, is_quiet=True)

        for name in ("model.safetensors", "state.safetensors"):
            actual, expected = (
                checkpoint.folder(run, 30) / name for run in (stopped, uninterrupted)
            )
            assert actual.read_bytes() == expected.read_bytes(), stop
        assert untimed_metrics(stopped) == untimed_metrics(uninterrupted), stop


class KilledError(Exception):
    pass


def kill_after(monkeypatch, step):
    real = trainer.Trainer._step

    def step_or_die(self):
        if self.optimizer.step == step:
            raise KilledError
        real(self)

    monkeypatch.setattr(trainer.Trainer, "_step", step_or_die)


def test_steps_after_the_last_checkpoint_are_repeated_and_logged_once(text, tmp_path, monkeypatch):
    chosen = settings(text)
    run_training(chosen, tmp_path / "uninterrupted", is_quiet=True)
    kill_after(monkeypatch, 18)
    with pytest.raises(KilledError):
        run_training(chosen, tmp_path / "stopped", is_quiet=True)
    monkeypatch.undo()

    run_training(out=tmp_path / "stopped", resume=True, is_quiet=True)

    assert weights(tmp_path / "uninterrupted") == weights(tmp_path / "stopped")
    assert untimed_metrics(tmp_path / "uninterrupted") == untimed_metrics(tmp_path / "stopped")
    events = EventAccumulator(str(tmp_path / "stopped" / "events" / "train"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [
        line["step"] for line in metrics(tmp_path / "uninterrupted", "train")
    ]


def test_the_state_is_carried_within_an_epoch_and_zero_at_its_start(text, tmp_path, monkeypatch):
    is_nonzero = []
    real = LanguageModelling.loss

    def loss(self, batch, state):
        is_nonzero.append(any(part.any() for parts in state for part in parts))
        return real(self, batch, state)

    monkeypatch.setattr(LanguageModelling, "loss", loss)
    chosen = settings(text, train__max_steps=None, train__max_epochs=2, train__seq_len=200)
    summary = run_training(chosen, tmp_path / "run", is_quiet=True)

    per_epoch = summary.steps // 2
    assert is_nonzero == ([False] + [True] * (per_epoch - 1)) * 2


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        ("a a a a a a a a\n" * 50, {}),
        ("\n" * 2000, {}),
        ("a\n" * 2000, {"data__level": "char"}),
        ("one two three\n" * 400, {"data__vocab_size": 3}),
    ],
    ids=["one word", "empty lines", "one character", "all unknown"],
)
def test_degenerate_texts_can_be_trained_on(text, tmp_path, content, changes):
    text.write_text(content)

    summary = run_training(settings(text, **{"data__level": "word", **changes}), tmp_path / "run")

    assert summary.steps == 30
    assert checkpoint.steps(tmp_path / "run")[-1] == 30


def test_patience_ends_a_run_that_does_not_improve(text, tmp_path):
    # With a learning rate this small no float32 weight changes.
    chosen = settings(text, optimizer__learning_rate=1e-30, train__patience=2, train__eval_every=2)

    summary = run_training(chosen, tmp_path / "run", is_quiet=True)

    assert summary.steps == 6
    assert [line["step"] for line in metrics(tmp_path / "run", "valid")] == [2, 4, 6]


@pytest.mark.slow
def test_training_ends_at_max_seconds(text, tmp_path, capsys):
    chosen = settings(text, train__max_steps=10**6, train__max_epochs=10**6, train__max_seconds=2)

    summary = run_training(chosen, tmp_path / "run")

    assert 0 < summary.steps < 10**6
    done, expected = re.findall(r"\| (\d+)/(\d+),", capsys.readouterr().err)[-1]
    assert int(done) == summary.steps <= int(expected) < 10**6
    assert checkpoint.steps(tmp_path / "run")[-1] == summary.steps
    assert summary.best is not None


def test_resuming_a_finished_run_shows_a_message(text, tmp_path, capsys):
    run = tmp_path / "run"
    run_training(settings(text, train__max_steps=3), run, is_quiet=True)

    summary = run_training(out=run, resume=True)

    assert summary.steps == 3
    assert "nothing left to train: the run has made its 3 steps" in capsys.readouterr().err


def test_resuming_without_time_left_shows_a_message(text, tmp_path, capsys):
    run, longer = tmp_path / "run", {"train.max_steps": 99, "train.max_seconds": 0.001}
    run_training(settings(text, train__max_steps=3), run, is_quiet=True)

    summary = run_training(out=run, resume=True, overrides=longer)

    assert summary.steps == 3
    stderr = capsys.readouterr().err
    assert "no time left to train: " in stderr
    assert "train.max_seconds = 0.001 are used" in stderr
    assert "--set train.max_seconds=none" in stderr


@pytest.mark.parametrize("eval_every", [10**6, 1])
def test_the_last_steps_before_max_seconds_are_logged(text, tmp_path, eval_every):
    chosen = settings(
        text, train__max_steps=10**6, train__max_epochs=10**6, train__max_seconds=1,
        train__log_every=10**5, train__eval_every=eval_every,
    )  # fmt: skip
    run = tmp_path / "run"
    first = run_training(chosen, run, is_quiet=True)

    more = {"train.max_seconds": None, "train.max_steps": first.steps + 3, "train.eval_every": 10}
    run_training(out=run, resume=True, overrides=more, is_quiet=True)

    assert [line["step"] for line in metrics(run, "train")] == [first.steps, first.steps + 3]
    saved = checkpoint.read(checkpoint.folder(run, first.steps + 3))
    assert saved.state["parts"]["log"]["steps"] == 0


@pytest.mark.slow
def test_the_learning_rate_schedule_ends_at_max_seconds(text, tmp_path):
    chosen = settings(
        text, train__max_steps=10**6, train__max_epochs=10**6, train__max_seconds=3,
        train__eval_every=10**6, train__log_every=1,
    )  # fmt: skip

    run_training(chosen, tmp_path / "run", is_quiet=True)

    learning_rates = [line["learning_rate"] for line in metrics(tmp_path / "run", "train")]
    assert learning_rates[0] == chosen.optimizer.learning_rate
    assert learning_rates[-1] < 0.1 * learning_rates[0]


def test_max_seconds_changes_nothing_if_all_steps_fit(text, tmp_path):
    run_training(settings(text), tmp_path / "unlimited", is_quiet=True)
    run_training(settings(text, train__max_seconds=1000), tmp_path / "limited", is_quiet=True)

    assert weights(tmp_path / "unlimited") == weights(tmp_path / "limited")


@pytest.fixture
def restore_determinism():
    yield
    torch.use_deterministic_algorithms(mode=False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.slow
@pytest.mark.usefixtures("restore_determinism")
@pytest.mark.parametrize("changes", [
    {"optimizer__name": "sgd"}, {"optimizer__name": "adam"},
    {"model__softmax": "sampled", "model__samples": 5},
])  # fmt: skip
def test_deterministic_operations_train_the_same_model(changes, text, tmp_path):
    run_training(settings(text, **changes), tmp_path / "default", is_quiet=True)
    chosen = settings(text, train__deterministic=True, **changes)
    run_training(chosen, tmp_path / "deterministic", is_quiet=True)

    assert torch.are_deterministic_algorithms_enabled()
    assert weights(tmp_path / "deterministic") == weights(tmp_path / "default")


def test_a_run_that_diverges_keeps_only_finite_checkpoints(text, tmp_path):
    chosen = settings(
        text,
        optimizer__name="sgd",
        optimizer__learning_rate=1e30,
        optimizer__max_grad_norm="none",
        train__eval_every=1,
    )

    with pytest.raises(DivergedError, match=r"diverged(.*\n)*.* a smaller --lr than 1e\+30"):
        run_training(chosen, tmp_path / "run", is_quiet=True)

    for step in checkpoint.steps(tmp_path / "run"):
        tensors = checkpoint.read(checkpoint.folder(tmp_path / "run", step))
        assert all(t.isfinite().all() for t in tensors.tensors("model.safetensors").values())


def test_a_folder_that_is_not_empty_is_refused(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")

    with pytest.raises(RunBusyError, match="already exists and is not empty"):
        run_training(settings(text), tmp_path / "run", is_quiet=True)

    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_run_folder_whose_name_is_not_unicode_is_refused(text, tmp_path):
    run = tmp_path / os.fsdecode(b"run\xff")

    with pytest.raises(ConfigError, match=r"run\\udcff' is not valid Unicode$"):
        run_training(settings(text), run, is_quiet=True)

    assert not run.exists()


def test_a_resumed_run_may_train_longer_but_keeps_its_model(text, tmp_path):
    run = tmp_path / "run"
    run_training(settings(text), run, is_quiet=True)

    longer = run_training(out=run, resume=True, overrides={"train.max_steps": 34}, is_quiet=True)
    for changes in (
        {"model.hidden_size": 13}, {"train.seq_len": 16}, {"train.random_seq_len": True},
        {"data.task": "classify"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"cannot change {re.escape(next(iter(changes)))}\n"):
            run_training(out=run, resume=True, overrides=changes, is_quiet=True)

    assert longer.steps == 34


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume": True}, "resume needs a run folder"),
        ({"resume": True, "out": "run", "config": config.load()}, "resume takes no config"),
        ({"out": "run", "overrides": {"train.max_steps": 3}}, "overrides need resume"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run_training(**arguments)

    assert not list(tmp_path.iterdir())


def test_a_run_json_that_cannot_be_read_is_not_replaced(text, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run_training(settings(text), run, is_quiet=True)
    original, real = (run / "run.json").read_bytes(), Path.read_bytes

    def stale(path):
        if path.name == "run.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(UnreadableError, match=r"run\.json: Stale file handle"):
        run_training(out=run, resume=True, overrides={"train.max_steps": 31}, is_quiet=True)

    assert real(run / "run.json") == original


def test_a_run_is_resumed_from_the_token_cache_if_its_text_was_deleted(text, tmp_path):
    run = tmp_path / "run"
    run_training(settings(text), run, is_quiet=True)
    text.unlink()

    longer = run_training(out=run, resume=True, overrides={"train.max_steps": 31}, is_quiet=True)

    assert longer.steps == 31


def test_metrics_are_finite_means_over_their_steps(text, tmp_path):
    run_training(settings(text), tmp_path / "run", is_quiet=True)

    train, valid = metrics(tmp_path / "run", "train"), metrics(tmp_path / "run", "valid")
    assert [line["step"] for line in train] == [*range(4, 29, 4), 30]
    assert [line["step"] for line in valid] == [10, 20, 30]
    for line in train:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["bits_per_char"] == pytest.approx(line["loss"] / math.log(2))
        assert 0 <= line["clipped_fraction"] <= 1
        assert line["grad_norm"] > 0
    assert all(line["preview"] for line in valid)


def test_tensorboard_events_match_the_metrics(text, tmp_path):
    run = tmp_path / "run"
    run_training(settings(text), run, is_quiet=True)

    for kind in ("train", "valid"):
        events = EventAccumulator(str(run / "events" / kind))
        events.Reload()
        expected = [(line["step"], line["loss"]) for line in metrics(run, kind)]
        actual = [(event.step, event.value) for event in events.Scalars("loss")]
        assert [step for step, _ in actual] == [step for step, _ in expected]
        assert [v for _, v in actual] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert "preview/text_summary" in events.Tags()["tensors"]
    assert "settings/text_summary" in events.Tags()["tensors"]


def test_gradient_norms_are_logged_and_change_nothing_else(text, tmp_path):
    run, without = tmp_path / "run", tmp_path / "without"
    run_training(settings(text, train__log_gradients=15), run, is_quiet=True)
    run_training(settings(text), without, is_quiet=True)

    logged = metrics(run, "gradients")
    assert [line["step"] for line in logged] == [15, 30]
    model = lmtrain.load(checkpoint.folder(run, 30))
    norms = gradient_norms(model.model, model.own_data(("valid",))["valid"].ids, 50, positions=32)
    expected = {
        f"gradient/layer_{part.layer}_{part.part}_lag_{lag}": part.relative.median[lag]
        for part in norms
        for lag in (1, 10, 50)
    }
    assert len(expected) == 12
    for name, value in expected.items():
        assert logged[-1][name] == pytest.approx(value, rel=1e-5)
        events = EventAccumulator(str(run / "events" / "train"))
        events.Reload()
        assert [event.step for event in events.Scalars(name)] == [15, 30]
    assert weights(run) == weights(without)
    others = [line for line in untimed_metrics(run) if line["kind"] != "gradients"]
    assert others == untimed_metrics(without)


def test_lags_longer_than_the_text_are_not_logged(text, tmp_path):
    valid = tmp_path / "valid.txt"
    valid.write_text("the cat sat on the mat\n")
    chosen = settings(text, data__valid=[str(valid)], train__log_gradients=30)

    run_training(chosen, tmp_path / "run", is_quiet=True)

    (line,) = metrics(tmp_path / "run", "gradients")
    names = [name.rpartition("_")[2] for name in line if name.startswith("gradient/")]
    assert names == ["1", "10"] * 4


def test_training_neither_reads_nor_changes_the_global_generator(text, tmp_path):
    run_training(settings(text), tmp_path / "one", is_quiet=True)
    torch.rand(5)
    before = torch.get_rng_state()
    run_training(settings(text), tmp_path / "two", is_quiet=True)

    assert torch.equal(before, torch.get_rng_state())
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_averaged_weights_are_validated_and_saved(text, tmp_path):
    run = tmp_path / "run"
    summary = run_training(settings(text, optimizer__average="ema"), run, is_quiet=True)

    model = lmtrain.load(run)
    last = checkpoint.read(checkpoint.folder(run, 30)).tensors("state.safetensors")

    metrics = model.measure(model.own_data()["valid"], batch_size=4)
    assert metrics.loss == pytest.approx(summary.best["loss"])
    name = "encoder.embedding.weight"
    assert not torch.equal(last[f"average/last/{name}"], model.model.get_parameter(name))
