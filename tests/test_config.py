import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmtrain import config, schema
from lmtrain.config import assignments, parse, to_toml
from lmtrain.errors import ConfigError
from lmtrain.schema import Config

SETTINGS = schema.settings()
POSITIVE = st.integers(1, 2**31)
FRACTION = st.floats(0, 1, exclude_max=True)
RATE = st.floats(0, exclude_min=True, allow_infinity=False)
PLACES = st.lists(st.text(), max_size=3).map(tuple)
# Every setting's own strategy, so that a new one is missed by name.
VALUES = {
    "data.task": st.sampled_from(["language-model", "classify", "tag", "frames", "translate"]),
    "data.train": PLACES.filter(bool),
    "data.valid": PLACES,
    "data.test": PLACES,
    "data.labelled": st.booleans(),
    "data.target": PLACES,
    "data.valid_target": PLACES,
    "data.test_target": PLACES,
    "data.valid_fraction": FRACTION,
    "data.test_fraction": FRACTION,
    "data.level": st.sampled_from(["word", "char", "byte"]),
    "data.splitter": st.sampled_from(["whitespace", "words"]),
    "data.vocab_size": st.integers(3, 10**9),
    "data.min_count": POSITIVE,
    "data.lowercase": st.booleans(),
    "data.nfc": st.booleans(),
    # The word none stands for no value, so that no cell can be called none.
    "model.cell": st.text().filter(lambda name: name != "none"),
    "model.embedding_size": st.none() | st.integers(1, 10**6),
    "model.hidden_size": st.integers(1, 10**6),
    "model.num_layers": st.integers(1, 1000),
    "model.dropout": FRACTION,
    "model.input_dropout": st.none() | FRACTION,
    "model.output_dropout": st.none() | FRACTION,
    "model.locked_dropout": st.booleans(),
    "model.word_dropout": FRACTION,
    "model.weight_dropout": FRACTION,
    "model.activation_regularization": st.floats(0, allow_infinity=False),
    "model.temporal_regularization": st.floats(0, allow_infinity=False),
    "model.residual": st.booleans(),
    "model.tied_embeddings": st.booleans(),
    "model.bidirectional": st.booleans(),
    "model.pooling": st.sampled_from(["last", "mean", "max"]),
    "model.cell_output": st.sampled_from(["tanh", "linear"]),
    "model.peephole": st.sampled_from(["full", "diagonal"]),
    "model.activation": st.sampled_from(["tanh", "relu"]),
    "model.samples": POSITIVE,
    "model.init_scale": st.none() | RATE,
    "model.forget_bias": st.floats(allow_nan=False, allow_infinity=False),
    "optimizer.name": st.sampled_from(["sgd", "adam", "adamw"]),
    "optimizer.learning_rate": RATE,
    "optimizer.schedule": st.sampled_from(["constant", "step", "cosine"]),
    "optimizer.warmup_steps": st.integers(0, 2**31),
    "optimizer.decay": st.floats(0, 1, exclude_min=True),
    "optimizer.decay_after_epochs": st.integers(0, 2**31),
    "optimizer.weight_decay": st.floats(0, allow_infinity=False),
    "optimizer.clip": st.sampled_from(["l2", "l1"]),
    "optimizer.max_grad_norm": st.none() | RATE,
    "optimizer.average": st.sampled_from([None, "ema", "nt-asgd"]),
    "optimizer.average_decay": FRACTION,
    "optimizer.average_patience": POSITIVE,
    "train.batch_size": POSITIVE,
    "train.seq_len": POSITIVE,
    "train.state_reset": FRACTION,
    "train.random_seq_len": st.booleans(),
    "train.max_epochs": POSITIVE,
    "train.max_steps": st.none() | POSITIVE,
    "train.on_nonfinite": st.sampled_from(["stop", "skip"]),
    "train.max_seconds": st.none() | RATE,
    "train.seed": st.integers(0, 2**63),
    "train.device": st.sampled_from(["auto", "cpu", "cuda"]),
    "model.characters": st.booleans(),
    "model.attention": st.sampled_from([None, "dot", "additive"]),
    "model.softmax": st.sampled_from(["full", "sampled", "adaptive"]),
    "train.precision": st.sampled_from(["auto", "fp32", "bf16"]),
    "train.deterministic": st.booleans(),
    "train.threads": st.none() | POSITIVE,
    "train.eval_every": st.none() | POSITIVE,
    "train.save_every": st.none() | POSITIVE,
    "train.log_every": POSITIVE,
    "train.log_gradients": st.none() | POSITIVE,
    "train.patience": st.none() | POSITIVE,
    "train.keep_checkpoints": POSITIVE,
}
# A few settings at a time, or none would often agree with the others.
VALID = st.sets(st.sampled_from(sorted(VALUES))).flatmap(
    lambda paths: st.fixed_dictionaries({path: VALUES[path] for path in sorted(paths)})
)


def message(text: str, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "my.toml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def value(found: Config, path: str) -> object:
    section, name = path.split(".")
    return getattr(getattr(found, section), name)


def with_what_they_need(overrides: dict[str, object]) -> dict[str, object]:
    """The settings and the values of others that they, and these again, mean something with."""
    assume("model.samples" not in overrides or "model.tied_embeddings" not in overrides)
    while True:
        needed: dict[str, set[object]] = {}
        for path, field in schema._fields():
            for each in (each for each in field.metadata if isinstance(each, schema.For)):
                if path in overrides:
                    # A cell of the user's own may have any option.
                    values = {"own"} if each.path == "model.cell" else set(each.values)
                    needed.setdefault(each.path, values).intersection_update(values)
        assume(all(needed.values()))
        more = {path: min(values) for path, values in needed.items()}
        if more.items() <= overrides.items():
            return overrides
        overrides = overrides | more


@settings(deadline=None)
@given(VALID)
def test_what_is_written_is_read_again(overrides):
    assume(overrides.get("data.valid_fraction", 0.1) + overrides.get("data.test_fraction", 0) < 1)
    if "model.tied_embeddings" in overrides:
        overrides |= {"model.embedding_size": None, "model.softmax": "full"}
    overrides = with_what_they_need(overrides)
    found = config.load(overrides=overrides)

    assert parse(to_toml(found), "written") == found
    assert {path: value(found, path) for path in overrides} == overrides


def test_every_setting_is_tried():
    assert VALUES.keys() == SETTINGS.keys()


@pytest.mark.parametrize("path", SETTINGS)
def test_every_setting_has_a_sentence(path):
    assert re.fullmatch(r"[A-Z`].{8,}\.", SETTINGS[path])


def test_defaults_are_those_of_the_fields():
    found = config.load()

    assert found == Config() == parse("", "nothing")
    assert {path: value(found, path) for path in SETTINGS} == {
        path: schema.default(path) for path in SETTINGS
    }


def test_a_file_goes_before_defaults_and_an_override_before_the_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("format = 1\n[train]\nseq_len = 70\nbatch_size = 7\n[model]\ncell = 'gru'\n")

    found = config.load(path, {"train.seq_len": 71, "optimizer.name": "sgd"})

    assert found == Config.model_validate({
        "train": {"seq_len": 71, "batch_size": 7},
        "model": {"cell": "gru"},
        "optimizer": {"name": "sgd"},
    })  # fmt: skip


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_loads_by_its_name(name):
    found = config.load(name)

    assert found != Config()
    assert parse(to_toml(found), "written") == found


def test_the_recipes_are_those_promised():
    promised = {
        "python-docs", "shakespeare-char-3min", "shakespeare-char-best", "ptb-small", "ptb-20min",
        "ptb-best-cpu", "ptb-medium", "ptb-large",
    }  # fmt: skip

    assert promised <= set(config.recipes())


def test_a_file_goes_by_its_path_even_if_a_recipe_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb-small.toml").write_text("[train]\nseed = 417\n")

    assert config.load("ptb-small.toml").train.seed == 417
    assert config.load("ptb-small").train.seed == schema.default("train.seed")


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("[train]\nseqlen = 3", "train.seqlen", "train.seq_len"),
        ("[train]\nhidden_size = 3", "train.hidden_size", "model.hidden_size"),
        ("[optimiser]\nname = 'sgd'", "optimiser", "optimizer"),
        ("[model]\nhidden = 3", "model.hidden", "model.hidden_size"),
        ("seed = 3", "seed", "train.seed"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(text, unknown, near):
    assert message(text) == f"my.toml: unknown setting {unknown!r}: did you mean {near!r}?"


def test_a_name_like_no_other_is_refused_without_a_guess():
    assert message("[zzzzz]\nqqqq = 1") == "my.toml: unknown setting 'zzzzz'"


@pytest.mark.parametrize("path", ["seq_len", "train", "train.seqlen", "train.seq_len.more"])
def test_an_unknown_override_is_refused(path):
    assert f"unknown setting '{path}'" in message("", {path: 3})


def test_an_override_in_an_unknown_section_is_refused():
    assert "unknown setting 'tran': did you mean 'train'?" in message("", {"tran.seq_len": 3})


def test_an_override_of_a_section_is_not_told_to_be_the_section():
    assert "did you mean 'train'?" not in message("", {"train": 3})


def test_two_problems_are_told_together():
    problems = message("[train]\nseq_len = -417\n[model]\nhiden_size = 3\n")

    assert problems.startswith("my.toml: 2 settings are wrong\n")
    assert "train.seq_len = -417: input should be greater than or equal to 1" in problems
    assert "unknown setting 'model.hiden_size': did you mean 'model.hidden_size'?" in problems


def test_every_problem_is_told():
    problems = message("[train]\nseq_len = 0\nseed = -1\nbatch = 3\nlog_every = 'x'\n")

    assert "4 settings are wrong" in problems
    for name in ("train.seq_len", "train.seed", "train.batch", "train.log_every"):
        assert name in problems


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("data.train", 5),
        ("data.train", ()),
        ("data.level", "sentence"),
        ("data.splitter", "bpe"),
        ("data.vocab_size", 2),
        ("data.min_count", 0),
        ("data.valid_fraction", -0.125),
        ("data.valid_fraction", 1.0),
        ("data.lowercase", "perhaps"),
        ("model.hidden_size", 0),
        ("model.num_layers", 1.5),
        ("model.dropout", 1.0),
        ("model.cell", 3),
        ("model.init_scale", 0.0),
        ("optimizer.name", "adagrad"),
        ("optimizer.learning_rate", 0.0),
        ("optimizer.learning_rate", "fast"),
        ("optimizer.decay", 0.0),
        ("optimizer.decay", 1.5),
        ("optimizer.warmup_steps", -3),
        ("optimizer.max_grad_norm", -0.5),
        ("train.seed", -1),
        ("train.seq_len", "none"),
        ("train.batch_size", [20]),
        ("train.device", "tpu"),
        ("train.max_seconds", 0),
    ],
)
def test_an_impossible_value_is_refused_and_shown(path, wrong):
    told = message("", {path: wrong})

    assert told.startswith(f"my.toml: {path} = {None if wrong == 'none' else wrong!r}: ")


@pytest.mark.parametrize(
    "path",
    [path for path in SETTINGS if isinstance(schema.default(path), float)]
    + ["model.init_scale", "train.max_seconds"],
)
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_no_setting_is_infinite_or_not_a_number(path, number):
    section, name = path.split(".")

    assert f"{path} = {number}: " in message(f"[{section}]\n{name} = {number}\n")


@pytest.mark.parametrize("number", ["true", "false"])
def test_yes_and_no_are_no_numbers(number):
    assert "train.seq_len" in message(f"[train]\nseq_len = {number}\n")


@pytest.mark.parametrize("seed", [2**64, 10**400], ids=["one too many", "huge"])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    assert "train.seed" in message("", {"train.seed": seed})


def test_parts_that_leave_no_training_text_are_refused():
    told = message("[data]\nvalid_fraction = 0.5\ntest_fraction = 0.5\n")

    assert told == "my.toml: data.valid_fraction and data.test_fraction leave no training text"


def test_a_single_layer_needs_the_size_of_tied_embeddings():
    sizes = "[model]\ntied_embeddings = true\nembedding_size = {}\nhidden_size = 418\n"
    told = message(sizes.format(417) + "num_layers = 1\n")
    equal = parse(sizes.format(418) + "num_layers = 1\n", "")
    deep = parse(sizes.format(417) + "num_layers = 2\n", "")

    assert "needs embedding_size 417 to equal hidden_size 418" in told
    assert equal.embedding_size == 418
    assert deep.embedding_size == 417


def test_the_embedding_is_as_wide_as_the_layers_unless_told():
    assert parse("[model]\nhidden_size = 417\n", "").embedding_size == 417
    assert parse("[model]\nembedding_size = 30\n", "").embedding_size == 30


def test_the_word_none_takes_a_value_away():
    found = parse("[optimizer]\nmax_grad_norm = 'none'\n", "", {"train.patience": "none"})

    assert found.optimizer.max_grad_norm is None
    assert found.train.patience is None
    assert 'max_grad_norm = "none"' in to_toml(found)
    assert "\npatience" not in to_toml(found)


def test_a_file_may_be_called_none():
    assert parse("[data]\ntrain = ['none']\n", "").data.train == ("none",)


def test_settings_cannot_be_changed():
    found = Config()

    with pytest.raises(ValidationError, match="frozen"):
        found.train.seq_len = 3
    with pytest.raises(ValidationError, match="frozen"):
        found.train = found.train


@pytest.mark.parametrize(
    "text", ["[train", "seq_len", "[train]\nseq_len = 3\nseq_len = 4\n", "a = " + "[" * 9000]
)
def test_what_is_not_toml_is_refused(text):
    assert message(text).startswith("my.toml is not valid TOML: ")


def test_a_number_with_too_many_digits_is_refused():
    assert "my.toml" in message(f"[train]\nseed = {'9' * 5000}\n")


@pytest.mark.parametrize("version", ["2", '"1"', "[1]"])
def test_another_format_is_refused(version):
    told = message(f"format = {version}\n")

    assert told.startswith("my.toml has configuration format ")
    assert told.endswith("this lmtrain reads 1")


@pytest.mark.parametrize("section", ["train", "model"])
def test_a_section_that_is_a_value_is_refused(section):
    assert f"{section} = 5" in message(f"{section} = 5")
    assert section in message(f"{section} = 5", {f"{section}.seed": 3})


def test_a_missing_file_is_named_with_the_nearest_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no configuration ptb-smal: No such file") as caught:
        config.load("ptb-smal")
    with pytest.raises(ConfigError, match=r"zzz\.toml: No such file.*\n.*recipes: .*ptb-small"):
        config.load(tmp_path / "zzz.toml")

    assert str(caught.value).endswith("did you mean ptb-small?")


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    large, latin = tmp_path / "large.toml", tmp_path / "latin.toml"
    large.write_bytes(b"#" * 1_000_001)
    latin.write_bytes(b"# caf\xe9")

    with pytest.raises(ConfigError, match=r"large\.toml is no configuration: .*1,000,000 bytes"):
        config.load(large)
    with pytest.raises(ConfigError, match=r"latin\.toml is not UTF-8 text"):
        config.load(latin)
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_a_file_just_small_enough_is_read(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"#" * 1_000_000)

    assert config.load(tmp_path / "my.toml") == Config()


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("train.seq_len=70", 70),
        (" train.seq_len = 70 ", 70),
        ("train.seq_len=7_0", 70),
        ("train.seq_len=1e-3", 0.001),
        ("train.seq_len=true", True),
        ("train.seq_len=gru", "gru"),
        ("train.seq_len=", ""),
        ("train.seq_len=none", "none"),
        ("train.seq_len='quoted'", "quoted"),
        ("train.seq_len=a=b", "a=b"),
        ('train.seq_len=["a", "b"]', ["a", "b"]),
        ("train.seq_len=dir/file name.txt", "dir/file name.txt"),
    ],
)
def test_assignments_are_values_as_in_toml_or_bare_words(text, given):
    assert assignments([text]) == {"train.seq_len": given}


def test_the_last_assignment_counts():
    assert assignments(["train.seed=1", "train.seed=2"]) == {"train.seed": 2}


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--set train\.seq_len: no value\n.*section\.key=value"):
        assignments(["train.seq_len"])


@pytest.mark.parametrize("text", ["[" * 9000, "9" * 5000], ids=["too deep", "too long"])
def test_an_assignment_that_toml_cannot_hold_is_refused(text):
    with pytest.raises(ConfigError):
        config.load(overrides=assignments([f"train.seq_len={text}"]))


def test_a_long_value_is_shown_shortened():
    told = message("", {"train.seq_len": "x" * 100_000})

    assert len(told) < 200


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            {"model.cell": "gru", "model.peephole": "diagonal"},
            "model.peephole = diagonal means nothing with model.cell = gru: it is for "
            "peephole-lstm",
        ),
        ({"model.samples": 7}, "with model.softmax = full: it is for sampled"),
        ({"optimizer.decay": 0.1}, "with optimizer.schedule = cosine: it is for step"),
        ({"optimizer.average_decay": 0.1}, "with optimizer.average = None: it is for ema"),
        ({"model.bidirectional": True}, "with data.task = language-model: it is for classify"),
        (
            {"data.task": "classify", "model.tied_embeddings": True},
            "with data.task = classify: it is for language-model",
        ),
        ({"model.cell": "lstm", "model.leak": 1}, "unknown setting 'model.leak'"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_with_the_reason(overrides, told):
    assert told in message("", overrides)


def test_the_default_of_a_setting_is_never_refused():
    defaults = {path: schema.default(path) for path in SETTINGS}

    assert parse("", "nothing", {**defaults, "model.cell": "gru"}).model.cell == "gru"


def test_a_cell_of_ones_own_has_options_of_its_own():
    found = config.load(overrides={"model.cell": "cells.py:leaky", "model.leak": 0.5})

    assert found.model.model_extra == {"leak": 0.5}
    assert parse(to_toml(found), "written") == found
    none = config.load(overrides={"model.cell": "cells.py:leaky", "model.leak": "none"})
    assert none.model.model_extra == {"leak": None}
    assert parse(to_toml(none), "written") == none


@pytest.mark.parametrize(
    ("path", "value"), [("data.train", ["\udcfe.tsv"]), ("model.cell", "\udcfe")]
)
def test_settings_that_cannot_be_written_are_refused(path, value):
    told = f"my.toml: {path} = {value!r}: not valid Unicode"

    assert message("", {path: value}) == told
