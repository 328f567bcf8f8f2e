"""What README and docs say can be typed: commands, options, settings, recipes; the Python runs."""

import functools
import itertools
import re
import runpy
import shlex
import sys
import tomllib

import numpy as np
import pytest
from test_architecture import ROOT

import lmtrain
from corpora import LABELLED, SENTENCES
from lmtrain import config, schema, sweep
from lmtrain.cells import base
from lmtrain.cli.main import app

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = "data|model|optimizer|train"
# What looks like a setting and is a file or an attribute of a model.
NO_SETTINGS = {"train.tsv", "train.de", "train.en", "train.label", "train.conll", "train.npz",
               "model.safetensors", "model.model"}  # fmt: skip


def commands(text: str):
    """The lmtrain commands in indented blocks and in inline code."""
    for line in text.splitlines():
        if line.startswith("    "):
            yield from re.split(r" (?:\||&&) ", line.strip().removeprefix("$ "))
    prose = re.sub(r"^(    .*|```.*?```)$", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        yield " ".join(code.split())


COMMANDS = sorted(
    {
        (path.name, command)
        for path in PAGES
        for command in commands(path.read_text("utf-8"))
        if re.match(r"lmtrain [a-z]", command)
    }
)

GUIDES = ["add-a-cell", "dashboard", "python"]
TEXTS = {
    "classify": LABELLED * 8,
    "tag": "the\tO\ncat\tB-animal\n\na\tO\ndog\tB-animal\n\n" * 8,
    "translate": "die katze\tthe cat\nein hund\ta dog\n" * 8,
}


@functools.cache
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


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_and_options_exist(page, line):
    known = options_by_command()
    words = shlex.split(line, comments=True)[1:]
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
        assert name in config.recipes() or name.endswith(".toml")


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 50


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_settings_exist(page):
    named = set(re.findall(rf"`((?:{SECTIONS})\.[a-z_]+)(?![a-z_(])", page.read_text("utf-8")))

    assert named - NO_SETTINGS <= set(schema.settings())


def test_the_reference_of_settings_is_up_to_date():
    script = runpy.run_path(str(ROOT / "scripts" / "write_settings.py"))

    assert script["PAGE"].read_text("utf-8") == script["page"]()


def test_the_index_links_to_every_page():
    index = ROOT / "docs" / "index.md"
    linked = re.findall(r"\]\(([^)#]+)\)", index.read_text("utf-8"))

    pages = set((ROOT / "docs").rglob("*.md")) - {index}
    assert pages <= {(index.parent / target).resolve() for target in linked}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_toml_of_a_page_is_valid(page):
    for block in re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        if "[space]" in block:
            sweep.Space.model_validate(tomllib.loads(block))
        else:
            config.parse(block, page.name)


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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/guide/{n}.md" for n in GUIDES)])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_CELLS", dict(base._CELLS))
    (tmp_path / "novel.txt").write_text(SENTENCES)
    few = {"train.max_steps": 3, "train.batch_size": 4, "train.threads": 1}
    lmtrain.train(config.load(overrides={"data.train": "novel.txt", **few}), "runs/novel")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks

    names: dict[str, object] = {}
    for block in blocks:
        if file := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / file[1]).write_text(block)
            continue
        exec(compile(block.replace("overrides={", f"overrides={{**{few}, "), page, "exec"), names)

    assert capsys.readouterr().out
    sys.modules.pop("my_cells", None)
