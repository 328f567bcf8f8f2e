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
PATHS = st.lists(st.text(), max_size=3).map(tuple)
# A strategy for every setting; the test of completeness names a missing one.
VALUES = {
    "data.task": st.sampled_from(["language-model", "classify", "tag", "frames", "translate"]),
    "data.train": PATHS.filter(bool),
    "data.valid": PATHS,
    "data.test": PATHS,
    "data.labelled": st.booleans(),
    "data.target": PATHS,
    "data.valid_target": PATHS,
    "data.test_target": PATHS,
    "data.valid_fraction": FRACTION,
    "data.test_fraction": FRACTION,
    "data.level": st.sampled_from(["word", "char", "byte"]),
    "data.splitter": st.sampled_from(["whitespace", "words"]),
    "data.vocabulary": st.none() | st.text(min_size=1).filter(lambda name: name.lower() != "none"),
    "data.vocab_size": st.integers(3, 10**9),
    "data.min_count": POSITIVE,
    "data.lowercase": st.booleans(),
    "data.nfc": st.booleans(),
    # The word none means None, so that no cell can have this name.
    "model.cell": st.text().filter(lambda name: name.lower() != "none"),
    "model.embedding_size": st.none() | st.integers(1, 10**6),
    "model.embeddings": st.none() | st.text(min_size=1).filter(lambda name: name.lower() != "none"),
    "model.freeze_embeddings": st.booleans(),
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
    "model.frequency_bias": st.booleans(),
    "model.init_scale": st.none() | st.floats(0, 1000, exclude_min=True),
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
    "optimizer.max_embedding_grad_norm": st.none() | RATE,
    "optimizer.average": st.sampled_from([None, "ema", "nt-asgd"]),
    "optimizer.average_decay": FRACTION,
    "optimizer.average_patience": POSITIVE,
    "train.batch_size": POSITIVE,
    "train.seq_len": POSITIVE,
    "train.state_reset": FRACTION,
    "train.noise": FRACTION,
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
    "train.threads": st.none() | st.integers(1, 1000),
    "train.eval_every": st.none() | POSITIVE,
    "train.save_every": st.none() | POSITIVE,
    "train.log_every": POSITIVE,
    "train.log_gradients": st.none() | POSITIVE,
    "train.patience": st.none() | POSITIVE,
    "train.keep_checkpoints": POSITIVE,
}
# A few settings at a time: many at once would rarely be compatible.
VALID = st.sets(st.sampled_from(sorted(VALUES))).flatmap(
    lambda paths: st.fixed_dictionaries({path: VALUES[path] for path in sorted(paths)})
)


def message(text: str, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "my.toml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def value(loaded: Config, path: str) -> object:
    section, name = path.split(".")
    return getattr(getattr(loaded, section), name)


def with_required_settings(overrides: dict[str, object]) -> dict[str, object]:
    """The settings together with those that they require, directly or indirectly."""
    assume("model.samples" not in overrides or "model.tied_embeddings" not in overrides)
    while True:
        required: dict[str, set[object]] = {}
        for path, field in schema._fields():
            for condition in field.metadata:
                if isinstance(condition, schema.For) and path in overrides:
                    # A user-defined cell may have any option.
                    is_cell = condition.path == "model.cell"
                    values = {"own"} if is_cell else set(condition.values)
                    required.setdefault(condition.path, values).intersection_update(values)
        assume(all(required.values()))
        more = {path: min(values) for path, values in required.items()}
        if more.items() <= overrides.items():
            return overrides
        overrides = overrides | more


@settings(deadline=None)
@given(VALID)
def test_settings_are_unchanged_by_writing_and_reading(overrides):
    assume(overrides.get("data.valid_fraction", 0.1) + overrides.get("data.test_fraction", 0) < 1)
    for split in ("valid", "test"):
        if overrides.get(f"data.{split}_target"):
            overrides |= {f"data.{split}": ("sources",)}
    if "model.tied_embeddings" in overrides:
        overrides |= {"model.embedding_size": None, "model.softmax": "full"}
        overrides.pop("model.freeze_embeddings", None)
    if overrides.get("data.vocabulary") is not None:
        overrides |= {"data.vocab_size": 10_000, "data.min_count": 1}
        assume(overrides.get("data.task") != "translate")
    if "model.freeze_embeddings" in overrides:
        overrides |= {"model.embeddings": "vectors.txt"}
    overrides = with_required_settings(overrides)
    loaded = config.load(overrides=overrides)

    assert parse(to_toml(loaded), "written") == loaded
    assert {path: value(loaded, path) for path in overrides} == overrides


def test_every_setting_is_tested():
    assert VALUES.keys() == SETTINGS.keys()


@pytest.mark.parametrize("path", SETTINGS)
def test_every_setting_is_described_by_a_sentence(path):
    assert re.fullmatch(r"[A-Z`].{8,}\.", SETTINGS[path])


def test_defaults_are_the_defaults_of_the_fields():
    loaded = config.load()

    assert loaded == Config() == parse("", "nothing")
    assert {path: value(loaded, path) for path in SETTINGS} == {
        path: schema.default(path) for path in SETTINGS
    }


def test_files_take_precedence_over_defaults_and_overrides_over_files(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("format = 1\n[train]\nseq_len = 70\nbatch_size = 7\n[model]\ncell = 'gru'\n")

    loaded = config.load(path, {"train.seq_len": 71, "optimizer.name": "sgd"})

    assert loaded == Config.model_validate({
        "train": {"seq_len": 71, "batch_size": 7},
        "model": {"cell": "gru"},
        "optimizer": {"name": "sgd"},
    })  # fmt: skip


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_is_loaded_by_name(name):
    loaded = config.load(name)

    assert loaded != Config()
    assert parse(to_toml(loaded), "written") == loaded


def test_documented_recipes_exist():
    documented = {
        "python-docs", "shakespeare-char-3min", "shakespeare-char-best", "ptb-small", "ptb-20min",
        "ptb-best-cpu", "ptb-medium", "ptb-large",
    }  # fmt: skip

    assert documented <= set(config.recipes())


def test_a_path_is_loaded_even_if_a_recipe_has_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ptb-small.toml").write_text("[train]\nseed = 417\n")

    assert config.load("ptb-small.toml").train.seed == 417
    assert config.load("ptb-small").train.seed == schema.default("train.seed")


@pytest.mark.parametrize(
    ("text", "unknown", "suggestion"),
    [
        ("[train]\nseqlen = 3", "train.seqlen", "train.seq_len"),
        ("[train]\nhidden_size = 3", "train.hidden_size", "model.hidden_size"),
        ("[optimiser]\nname = 'sgd'", "optimiser", "optimizer"),
        ("[model]\nhidden = 3", "model.hidden", "model.hidden_size"),
        ("seed = 3", "seed", "train.seed"),
    ],
)
def test_an_unknown_setting_is_refused_with_a_suggestion(text, unknown, suggestion):
    assert message(text) == f"my.toml: unknown setting {unknown!r}: did you mean {suggestion!r}?"


def test_an_unknown_setting_without_similar_names_has_no_suggestion():
    assert message("[zzzzz]\nqqqq = 1") == "my.toml: unknown setting 'zzzzz'"


@pytest.mark.parametrize("path", ["seq_len", "train", "train.seqlen", "train.seq_len.more"])
def test_an_unknown_override_is_refused(path):
    assert f"unknown setting '{path}'" in message("", {path: 3})


def test_an_override_in_an_unknown_section_is_refused():
    assert "unknown setting 'tran': did you mean 'train'?" in message("", {"tran.seq_len": 3})


def test_an_override_of_a_section_does_not_suggest_the_section():
    assert "did you mean 'train'?" not in message("", {"train": 3})


def test_two_problems_are_reported_together():
    problems = message("[train]\nseq_len = -417\n[model]\nhiden_size = 3\n")

    assert problems.startswith("my.toml: 2 invalid settings\n")
    assert "train.seq_len = -417: input should be greater than or equal to 1" in problems
    assert "unknown setting 'model.hiden_size': did you mean 'model.hidden_size'?" in problems


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("model.bidirectional", "maybe", "'maybe': input should be true or false"),
        ("data.train", [], "[]: input should not be empty"),
    ],
)
def test_reasons_are_plain(setting, value, told):
    assert f"{setting} = {told}" in message("", {setting: value})


def test_every_problem_is_reported():
    problems = message("[train]\nseq_len = 0\nseed = -1\nbatch = 3\nlog_every = 'x'\n")

    assert "4 invalid settings" in problems
    for name in ("train.seq_len", "train.seed", "train.batch", "train.log_every"):
        assert name in problems


@pytest.mark.parametrize(
    ("path", "invalid"),
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
def test_an_invalid_value_is_refused_and_shown(path, invalid):
    text = message("", {path: invalid})

    assert text.startswith(f"my.toml: {path} = {None if invalid == 'none' else invalid!r}: ")


@pytest.mark.parametrize(
    "path",
    [path for path in SETTINGS if isinstance(schema.default(path), float)]
    + ["model.init_scale", "train.max_seconds"],
)
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_no_setting_accepts_infinity_or_nan(path, number):
    section, name = path.split(".")

    assert f"{path} = {number}: " in message(f"[{section}]\n{name} = {number}\n")


@pytest.mark.parametrize("number", ["true", "false"])
def test_booleans_are_not_accepted_as_numbers(number):
    assert "train.seq_len" in message(f"[train]\nseq_len = {number}\n")


@pytest.mark.parametrize("seed", [2**64, 10**400], ids=["one too many", "huge"])
def test_a_seed_above_64_bits_is_refused(seed):
    assert "train.seed" in message("", {"train.seed": seed})


def test_fractions_that_leave_no_training_text_are_refused():
    text = message("[data]\nvalid_fraction = 0.5\ntest_fraction = 0.5\n")

    assert text == "my.toml: data.valid_fraction and data.test_fraction leave no training text"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_translations_without_their_sources_are_refused(split):
    text = message(f"[data]\ntask = 'translate'\n{split}_target = 'a.en'\n")

    assert text == f"my.toml: data.{split}_target needs data.{split}, the sources"


def test_tied_embeddings_of_a_single_layer_need_its_size():
    sizes = "[model]\ntied_embeddings = true\nembedding_size = {}\nhidden_size = 418\n"
    text = message(sizes.format(417) + "num_layers = 1\n")
    equal = parse(sizes.format(418) + "num_layers = 1\n", "")
    deep = parse(sizes.format(417) + "num_layers = 2\n", "")
    translator = parse("[data]\ntask = 'translate'\n" + sizes.format(417) + "num_layers = 1\n", "")

    assert "needs embedding_size 417 to equal hidden_size 418" in text
    assert equal.embedding_size == 418
    assert deep.embedding_size == translator.embedding_size == 417


def test_the_embedding_size_defaults_to_the_hidden_size():
    assert parse("[model]\nhidden_size = 417\n", "").embedding_size == 417
    assert parse("[model]\nembedding_size = 30\n", "").embedding_size == 30


def test_the_word_none_means_no_value():
    loaded = parse("[optimizer]\nmax_grad_norm = 'none'\n", "", {"train.patience": "none"})

    assert loaded.optimizer.max_grad_norm is None
    assert loaded.train.patience is None
    assert 'max_grad_norm = "none"' in to_toml(loaded)
    assert "\npatience" not in to_toml(loaded)


NAMES = [
    (path, name) for path, field in schema._fields() for name in schema._names(field)
]  # fmt: skip


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_names_are_understood_in_any_case(path, name):
    section, setting = path.split(".")
    kind = Config.model_fields[section].annotation
    for written in (name, name.upper(), name.title(), name.replace("-", "_")):
        assert getattr(kind.model_validate({setting: written}), setting) == name


def test_the_settings_with_names_are_those_promised():
    paths = {path for path, _ in NAMES}

    assert {"model.cell", "data.task", "data.level", "optimizer.average", "train.device"} <= paths
    assert "data.train" not in paths


def test_what_is_recorded_has_the_names_as_they_are_written_here():
    text = "[model]\ncell = 'Peephole_LSTM'\npeephole = 'DIAGONAL'\n"
    found = parse(text, "", assignments(["optimizer.average=NT_ASGD", "train.patience=None"]))

    written = to_toml(found)

    assert 'cell = "peephole-lstm"' in written
    assert 'average = "nt-asgd"' in written
    assert "patience" not in written.replace("average_patience", "")


def test_options_of_a_cell_of_lmtrain_are_checked_in_any_case():
    assert "unknown setting 'model.leak'" in message("[model]\ncell = 'GRU'\nleak = 1\n")


def test_cells_of_ones_own_are_told_apart_by_case():
    assert parse("[model]\ncell = 'my.py:LSTM'\n", "").model.cell == "my.py:LSTM"
    assert parse("[model]\ncell = 'Leaky'\n", "").model.cell == "Leaky"


def test_a_file_may_be_called_none():
    assert parse("[data]\ntrain = ['none']\n", "").data.train == ("none",)


def test_settings_cannot_be_changed():
    loaded = Config()

    with pytest.raises(ValidationError, match="frozen"):
        loaded.train.seq_len = 3
    with pytest.raises(ValidationError, match="frozen"):
        loaded.train = loaded.train


@pytest.mark.parametrize(
    "text", ["[train", "seq_len", "[train]\nseq_len = 3\nseq_len = 4\n", "a = " + "[" * 9000]
)
def test_invalid_toml_is_refused(text):
    assert message(text).startswith("my.toml is not valid TOML: ")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 4000], ids=["decimal", "hexadecimal"])
@pytest.mark.parametrize("text", ["[train]\nseed = {}\n", "[model]\nown = [{}]\n", "format = {}\n"])
def test_a_number_with_too_many_digits_is_refused(text, number):
    assert "my.toml is not valid TOML: " in message(text.format(number))


def test_a_hexadecimal_number_with_too_many_digits_is_refused_on_the_command_line():
    (value,) = config.assignments(["train.seed=0x" + "f" * 4000]).values()

    assert isinstance(value, str)


@pytest.mark.parametrize("version", ["2", '"1"', "[1]"])
def test_another_format_is_refused(version):
    text = message(f"format = {version}\n")

    assert text.startswith("my.toml has configuration format ")
    assert text.endswith("this version of lmtrain reads format 1")


@pytest.mark.parametrize("section", ["train", "model"])
def test_a_section_that_is_a_value_is_refused(section):
    assert f"{section} = 5" in message(f"{section} = 5")
    assert section in message(f"{section} = 5", {f"{section}.seed": 3})


def test_a_missing_file_is_reported_with_a_similar_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no configuration ptb-smal: No such file") as caught:
        config.load("ptb-smal")
    with pytest.raises(ConfigError, match=r"zzz\.toml: No such file.*\n.*recipes: .*ptb-small"):
        config.load(tmp_path / "zzz.toml")

    assert str(caught.value).endswith("did you mean ptb-small?")


def test_a_file_that_is_too_large_or_not_utf8_is_refused(tmp_path):
    large, latin = tmp_path / "large.toml", tmp_path / "latin.toml"
    large.write_bytes(b"#" * 1_000_001)
    latin.write_bytes(b"# caf\xe9")

    with pytest.raises(ConfigError, match=r"large\.toml is too large .*1,000,000 bytes"):
        config.load(large)
    with pytest.raises(ConfigError, match=r"latin\.toml is not UTF-8 text"):
        config.load(latin)
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_a_file_of_the_maximum_size_is_read(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"#" * 1_000_000)

    assert config.load(tmp_path / "my.toml") == Config()


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_assigned_values_are_toml_or_bare_words(text, expected):
    assert assignments([text]) == {"train.seq_len": expected}


def test_the_last_assignment_wins():
    assert assignments(["train.seed=1", "train.seed=2"]) == {"train.seed": 2}


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--set train\.seq_len: no value\n.*section\.key=value"):
        assignments(["train.seq_len"])


@pytest.mark.parametrize("text", ["[" * 9000, "9" * 5000], ids=["too deep", "too long"])
def test_an_assignment_that_is_not_valid_toml_is_refused(text):
    with pytest.raises(ConfigError):
        config.load(overrides=assignments([f"train.seq_len={text}"]))


def test_a_long_value_is_abbreviated():
    text = message("", {"train.seq_len": "x" * 100_000})

    assert len(text) < 200


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"model.cell": "gru", "model.peephole": "diagonal"},
            "model.peephole = diagonal means nothing with model.cell = gru: it is for "
            "peephole-lstm",
        ),
        ({"model.samples": 7}, "with model.softmax = full: it is for sampled"),
        ({"optimizer.decay": 0.1}, "with optimizer.schedule = cosine: it is for step"),
        ({"optimizer.average_decay": 0.1}, "with optimizer.average = none: it is for ema"),
        ({"model.bidirectional": True}, "with data.task = language-model: it is for classify"),
        (
            {"data.task": "classify", "model.tied_embeddings": True},
            "with data.task = classify: it is for language-model",
        ),
        ({"model.cell": "lstm", "model.leak": 1}, "unknown setting 'model.leak'"),
        (
            {"data.vocabulary": "v.txt", "data.level": "char"},
            "data.vocabulary = v.txt means nothing with data.level = char: it is for word",
        ),
        (
            {"data.vocabulary": "v.txt", "data.task": "translate"},
            "data.vocabulary is one vocabulary, and data.task = translate has one for each",
        ),
        (
            {"data.vocabulary": "v.txt", "data.vocab_size": 417},
            "data.vocab_size = 417 cannot be combined with data.vocabulary",
        ),
        (
            {"data.vocabulary": "v.txt", "data.min_count": 3},
            "data.min_count = 3 cannot be combined with data.vocabulary",
        ),
        ({"model.embeddings": "v.txt", "data.task": "frames"}, "with data.task = frames"),
        ({"model.embeddings": "v.txt", "data.level": "byte"}, "with data.level = byte"),
        ({"model.freeze_embeddings": True}, "model.freeze_embeddings needs model.embeddings"),
        (
            {
                "model.embeddings": "v.txt",
                "model.freeze_embeddings": True,
                "model.tied_embeddings": True,
            },
            "model.freeze_embeddings cannot be combined with model.tied_embeddings",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_reason(overrides, expected):
    assert expected in message("", overrides)


def test_default_values_are_never_refused():
    defaults = {path: schema.default(path) for path in SETTINGS}

    assert parse("", "nothing", {**defaults, "model.cell": "gru"}).model.cell == "gru"


def test_a_user_defined_cell_may_have_any_option():
    loaded = config.load(overrides={"model.cell": "cells.py:leaky", "model.leak": 0.5})

    assert loaded.model.model_extra == {"leak": 0.5}
    assert parse(to_toml(loaded), "written") == loaded
    none = config.load(overrides={"model.cell": "cells.py:leaky", "model.leak": "none"})
    assert none.model.model_extra == {"leak": None}
    assert parse(to_toml(none), "written") == none


@pytest.mark.parametrize(
    ("path", "value"), [("data.train", ["\udcfe.tsv"]), ("model.cell", "\udcfe")]
)
def test_values_that_are_not_unicode_are_refused(path, value):
    text = f"my.toml: {path} = {value!r}: not valid Unicode"

    assert message("", {path: value}) == text
