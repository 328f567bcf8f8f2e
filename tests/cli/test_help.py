"""Help: there for every command and option, at once, from the same place as the settings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import lmtrain as package
from lmtrain import schema
from lmtrain.cli.main import app
from lmtrain.cli.settings import OPTIONS

COMMANDS = [
    "train", "find-lr", "sweep", "sample", "predict", "evaluate", "tune", "score", "gradients",
    "tokenize", "corpora", "corpora fetch", "info", "verify",
]  # fmt: skip
NO_SETTINGS = {"corpus", "config", "out", "resume", "set_", "json", "devices"}


def command(name):
    found = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word]
    return found


def test_the_script_lists_every_command_without_torch():
    script = Path(sys.executable).with_name("lmtrain")
    words = [sys.executable, "-X", "importtime", str(script), "--help"]

    outcome = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=60, check=True)

    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}
    assert "lmtrain.cli.main" in imported
    assert not imported & {"torch", "numpy", "safetensors", "tensorboard"}
    listed = re.findall(r"^  (\w[\w-]*)  ", outcome.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(name for name in COMMANDS if " " not in name)
    assert "..." not in outcome.stdout.partition("Commands:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(fresh_lmtrain, name):
    outcome = fresh_lmtrain(*name.split(), "--help")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert re.match(rf"Usage: .*lmtrain {name} ", outcome.stdout)
    assert re.search(rf"^  lmtrain {name}", outcome.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_has_help(name):
    parameters = command(name).params

    assert parameters
    assert all(parameter.help for parameter in parameters)


def test_options_of_train_are_settings_and_say_so():
    options = {p.name: p for p in command("train").params if p.name not in NO_SETTINGS}
    sentences = schema.settings()

    assert options.keys() == OPTIONS.keys()
    for name, path in OPTIONS.items():
        assert options[name].help.startswith(sentences[path])


def test_there_are_at_most_fifteen_named_settings():
    assert len(OPTIONS) <= 15


def test_no_two_options_stand_for_one_setting():
    assert len(set(OPTIONS.values())) == len(OPTIONS)


def test_every_setting_has_a_sentence():
    assert all(re.search(r"\w.*\.$", sentence) for sentence in schema.settings().values())


def test_bptt_is_another_name_for_seq_len(lmtrain, assert_refused):
    outcome = lmtrain("train", "--bptt", "0")

    assert_refused(outcome, 2, "train.seq_len = 0")


def test_the_version_is_that_of_the_package(fresh_lmtrain):
    outcome = fresh_lmtrain("--version")

    assert [outcome.returncode, outcome.stderr] == [0, ""]
    assert outcome.stdout == f"lmtrain {package.__version__}\n"
