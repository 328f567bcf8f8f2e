"""What the papers say can be typed: commands, options, settings, recipes; the Python runs."""

import itertools
import re
import shlex

import numpy as np
import pytest
from test_architecture import ROOT

import lmtrain
from corpora import LABELLED, SENTENCES
from lmtrain import cells, config, schema
from lmtrain.cells import base
from lmtrain.cli.main import app

PAPERS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted(
    {
        (path.name, line.strip().removeprefix("$ "))
        for path in PAPERS
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"\s+(\$ )?lmtrain [a-z]", line)
    }
)

TEXTS = {
    "classify": LABELLED * 8,
    "tag": "the\tO\ncat\tB-animal\n\na\tO\ndog\tB-animal\n\n" * 8,
    "translate": "die katze\tthe cat\nein hund\ta dog\n" * 8,
}


def options_by_command() -> dict[str, set[str]]:
    import typer

    group = typer.main.get_command(app)
    known: dict[str, set[str]] = {}

    def walk(name, command):
        known[name] = {option for p in command.params for option in p.opts if option[0] == "-"}
        for sub, child in getattr(command, "commands", {}).items():
            walk(f"{name} {sub}".strip(), child)

    walk("", group)
    return known


@pytest.mark.parametrize(("paper", "line"), COMMANDS)
def test_commands_and_options_exist(paper, line):
    known = options_by_command()
    words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
    command = words[0] if f"{words[0]} {words[1] if len(words) > 1 else ''}" not in known else (
        f"{words[0]} {words[1]}"
    )  # fmt: skip

    assert command in known
    for word in words:
        if word.startswith("-") and len(word) > 1:
            assert word.partition("=")[0] in known[command] | {"--help", "-h"}
    for key in re.findall(r"--set (\S+)=", line):
        assert key in schema.settings()
    for name in re.findall(r"--config (\S+)", line):
        assert name in config.recipes()


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_begins_with_a_comment_and_has_only_what_differs(name):
    lines = (ROOT / "configs" / f"{name}.toml").read_text("utf-8").splitlines()
    loaded, defaults = config.load(name).model_dump(), schema.Config().model_dump()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))

    assert len(comment) >= 3
    assert not lines[len(comment)]
    for line in lines[len(comment) :]:
        if "=" in line:
            key = line.partition("=")[0].strip()
            sections = [s for s in loaded if key in loaded[s]]
            assert sections, key
    assert loaded != defaults or name == "python-docs"


@pytest.mark.slow
@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_trains(name, tmp_path):
    data = config.load(name).data
    suffix = ".npz" if data.train[0].endswith(".npz") else ".txt"
    place = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        frames = np.arange(80).reshape(40, 2) % 3 == 0
        np.savez(place, inputs=frames, lengths=[4] * 10, labels=[0, 1] * 5)
    else:
        place.write_text(TEXTS.get("classify" if data.labelled else data.task, SENTENCES * 4))
    small = {
        "data.train": [str(place)], "data.valid": [], "data.test": [], "data.valid_fraction": 0.2,
        "data.target": [], "data.valid_target": [], "data.test_target": [],
        "model.hidden_size": 16, "model.embedding_size": "none", "train.batch_size": 4,
        "train.max_steps": 2, "train.threads": 1,
    }  # fmt: skip

    model = lmtrain.train(config.load(name, small), tmp_path / "run")

    assert model.step == 2


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_CELLS", dict(base._CELLS))
    (tmp_path / "novel.txt").write_text(SENTENCES)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks

    names: dict[str, object] = {}
    for block in blocks:
        quick = block.replace(
            "overrides={", "overrides={'train.max_steps': 3, 'train.batch_size': 4, "
        )
        exec(compile(quick, "README.md", "exec"), names)

    assert capsys.readouterr().out
    assert cells.cell_names()
