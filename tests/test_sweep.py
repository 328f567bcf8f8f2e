import json
from dataclasses import replace

import numpy as np
import pytest

from corpora import TINY
from lmtrain import checkpoint, sweep
from lmtrain.errors import ConfigError, TextError

SPACE = """
search = {{method = "{method}", trials = {trials}, factor = 2, rounds = 2, max_seconds = 600}}
[fixed]
"data.train" = ["corpus.txt"]
"data.level" = "char"
"train.max_steps" = 20
"train.batch_size" = 4
"train.seq_len" = 8
"train.threads" = 1
"model.num_layers" = 1
[space]
"model.hidden_size" = {{values = [4, 8]}}
"optimizer.learning_rate" = {{low = 0.001, high = 0.1, scale = "log"}}
"model.dropout" = {{low = 0.0, high = 0.5}}
"""


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(TINY)

    def written(method="random", trials=4):
        (tmp_path / "space.toml").write_text(SPACE.format(method=method, trials=trials))
        return sweep.load_space(tmp_path / "space.toml")

    return written


def test_a_random_search_trains_and_ranks_all_trials(space, tmp_path):
    messages = []

    trials = sweep.run_sweep(space(), tmp_path / "out", report=messages.append)

    assert len(trials) == len(messages) == 4
    losses = [trial.cost for trial in trials]
    assert losses == sorted(losses)
    assert len({trial.settings["optimizer.learning_rate"] for trial in trials}) == 4
    for trial in trials:
        assert trial.settings["model.hidden_size"] in (4, 8)
        best = json.loads((tmp_path / "out" / trial.name / "best.json").read_text())
        assert best["value"] == trial.value


def test_halving_trains_the_best_half_longer(space, tmp_path):
    trials = sweep.run_sweep(space("halving"), tmp_path / "out")

    rounds = [[t for t in trials if t.name.endswith(f"round-{n}")] for n in (1, 2)]
    assert [len(trials) for trials in rounds] == [4, 2]
    assert trials[:2] == rounds[1]
    best = sorted(rounds[0], key=lambda trial: trial.cost)[:2]
    settings = [sorted(str(t.settings) for t in trials) for trials in (best, rounds[1])]
    assert settings[0] == settings[1]
    for number, steps in ((1, 10), (2, 20)):
        for trial in rounds[number - 1]:
            lines = (tmp_path / "out" / trial.name / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["step"] == steps


@pytest.mark.slow
def test_an_interrupted_search_continues_with_the_missing_trials(space, tmp_path, monkeypatch):
    uninterrupted = sweep.run_sweep(space(), tmp_path / "uninterrupted")
    real, trained = sweep.run_training, []

    def interrupt_third(*arguments, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(sweep, "run_training", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_sweep(space(), tmp_path / "stopped")
    trained.clear()

    resumed = sweep.run_sweep(space(), tmp_path / "stopped")

    assert len(trained) == 2
    assert [(t.name, t.settings, t.cost) for t in resumed] == [
        (t.name, t.settings, t.cost) for t in uninterrupted
    ]


def with_max_seconds(space, seconds):
    search = space.search.model_copy(update={"max_seconds": seconds})
    return space.model_copy(update={"search": search})


@pytest.mark.slow
def test_a_trial_cut_short_ranks_last_and_is_resumed_when_there_is_time(
    space, tmp_path, monkeypatch
):
    uninterrupted = sweep.run_sweep(space("halving"), tmp_path / "uninterrupted")
    real = sweep.run_training

    def take_a_second(*arguments, **options):
        # Each trial counts as a second, so that no time is left for the last one.
        return replace(real(*arguments, **options), seconds=1.0)

    monkeypatch.setattr(sweep, "run_training", take_a_second)
    messages = []
    cut = sweep.run_sweep(
        with_max_seconds(space("halving"), 5.000001), tmp_path / "out", report=messages.append
    )
    monkeypatch.setattr(sweep, "run_training", real)
    resumed = sweep.run_sweep(space("halving"), tmp_path / "out")

    assert [trial.is_cut for trial in cut] == [False] * 5 + [True]
    assert "cut short" in messages[-1]
    assert {trial.name for trial in cut} == {trial.name for trial in uninterrupted}
    assert not any(trial.is_cut for trial in resumed)
    assert [(t.name, t.cost) for t in resumed] == [(t.name, t.cost) for t in uninterrupted]


@pytest.mark.parametrize("epochs", [1, 2])
def test_each_round_trains_longer_than_the_previous_one(space, tmp_path, epochs):
    search = space("halving", trials=2)
    fixed = {**search.fixed, "train.max_epochs": epochs, "train.batch_size": 8}
    del fixed["train.max_steps"]

    trials = sweep.run_sweep(search.model_copy(update={"fixed": fixed}), tmp_path / "out")

    steps = [checkpoint.steps(tmp_path / "out" / trial.name)[-1] for trial in trials]
    assert steps[0] in (2 * steps[1], 2 * steps[1] + 1)


def test_no_trial_starts_after_the_time_limit(space, tmp_path):
    limited = space().model_copy(update={"search": sweep.Search(trials=4, max_seconds=1e-6)})

    assert len(sweep.run_sweep(limited, tmp_path / "out")) == 1


def test_diverged_trials_rank_last(space, tmp_path, monkeypatch):
    def diverge(config, *arguments, **options):
        if config.model.hidden_size == 4:
            raise sweep.DivergedError("the loss is inf")
        return real(config, *arguments, **options)

    real = sweep.run_training
    monkeypatch.setattr(sweep, "run_training", diverge)
    trials = sweep.run_sweep(space(), tmp_path / "out")

    sizes = [trial.settings["model.hidden_size"] for trial in trials]
    assert sizes == sorted(sizes, reverse=True)
    assert [trial.cost is None for trial in trials] == [size == 4 for size in sizes]


def test_complete_trials_rank_before_cut_before_diverged():
    def trial(divisor, cost, is_cut):
        return sweep.Trial("a", {}, divisor, "perplexity", cost, cost, 1.0, is_cut)

    best_first = [
        trial(1, 2.0, False), trial(1, 3.0, False), trial(3, 1.0, False), trial(1, 1.5, True),
        trial(1, None, False),
    ]  # fmt: skip

    shuffled = [best_first[index] for index in (3, 0, 4, 2, 1)]
    assert sorted(shuffled, key=lambda trial: trial.rank) == best_first


def test_a_search_that_failed_before_its_first_trial_can_be_corrected(space, tmp_path):
    chosen = space(trials=1)
    (tmp_path / "corpus.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(TextError):
        sweep.run_sweep(chosen, tmp_path / "out")

    corrected = chosen.model_copy(update={"fixed": {**chosen.fixed, "data.train": ["moved.txt"]}})
    trials = sweep.run_sweep(corrected, tmp_path / "out")

    assert len(trials) == 1


def test_a_folder_of_another_search_is_refused(space, tmp_path):
    sweep.run_sweep(space(trials=1), tmp_path / "out")

    with pytest.raises(ConfigError, match="contains another search"):
        sweep.run_sweep(space(trials=2), tmp_path / "out")


def test_the_first_of_two_rounds_has_half_the_time(space, tmp_path, monkeypatch):
    seconds = []

    def record_seconds(config, *arguments, **options):
        seconds.append(config.train.max_seconds)
        return real(config, *arguments, **options)

    real = sweep.run_training
    monkeypatch.setattr(sweep, "run_training", record_seconds)
    search = space("halving", trials=2)
    limited = search.model_copy(update={"fixed": {**search.fixed, "train.max_seconds": 100}})
    sweep.run_sweep(limited, tmp_path / "out")

    assert seconds == [50, 50, 100]


def test_an_invalid_setting_of_any_trial_is_refused_before_training(space, tmp_path):
    space(trials=20)
    path = tmp_path / "space.toml"
    path.write_text(path.read_text().replace("values = [4, 8]", "values = [4, -8]"))

    with pytest.raises(ConfigError, match=r"model\.hidden_size = -8"):
        sweep.load_space(path)


def test_sampled_values_are_between_their_bounds():
    generator = np.random.default_rng(1)
    log_range = sweep.Range(low=1e-5, high=1.0, scale="log")
    integers = sweep.Range(low=1, high=9, integer=True)

    values = [log_range.sample(generator) for _ in range(300)]

    assert all(0.99e-5 <= value <= 1.0 for value in values)
    assert 100 < sum(value < 10**-2.5 for value in values) < 200
    assert {integers.sample(generator) for _ in range(300)} == set(range(1, 10))


def test_rounding_does_not_leave_the_bounds():
    generator = np.random.default_rng(1)
    fractions = sweep.Range(low=0.99951, high=0.9999)

    assert {fractions.sample(generator) for _ in range(300)} == {0.9999}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[space]\n'model.cell' = {}", "space.model.cell: value error, must have either"),
        ("[space]\n'model.dropout' = {low = 1, high = 0}", "low 1 is not below high 0"),
        (
            "[space]\n'model.dropout' = {low = 0, high = 1, scale = 'log'}",
            "must be above 0 on a log scale",
        ),
        ("[space]\n'model.dropot' = {values = [0.1]}", "unknown setting 'model.dropot'"),
        ("[space]\n'model.dropout' = {values = [7]}", "model.dropout = 7"),
        ("[search]\ntrials = 0\n[space]", "search.trials"),
        ("[spaces]", "space: field required"),
        ("space = ", "not valid TOML"),
    ],
)
def test_an_invalid_search_is_refused(tmp_path, text, expected):
    (tmp_path / "space.toml").write_text(text)

    with pytest.raises(ConfigError) as caught:
        sweep.load_space(tmp_path / "space.toml")

    assert expected in str(caught.value)


def test_a_missing_search_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        sweep.load_space(tmp_path / "none.toml")


def test_a_metric_that_is_not_finite_is_shown():
    trial = sweep.Trial("a", {}, 1, "perplexity", None, 800.0, 1.0)

    assert sweep.describe(trial).startswith("a: perplexity inf in")
