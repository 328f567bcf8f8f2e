"""scripts/prepare_data.py, on data in the form that its authors published."""

import subprocess
import sys

import pytest
from test_architecture import ROOT

from lmtrain.data import labelled


def prepared(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, arguments)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_commands_get_their_intents(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.seq.in").write_text("play jazz \nrate this book\n")
        (tmp_path / f"{split}.label").write_text("PlayMusic\nRateBook\n")

    done = prepared(tmp_path, "snips", tmp_path)

    assert done.returncode == 0, done.stderr
    found = list(labelled.read([str(tmp_path / "snips" / "valid.tsv")]))
    assert [(each.label, each.text) for each in found] == [
        ("PlayMusic", "play jazz"), ("RateBook", "rate this book"),
    ]  # fmt: skip


def test_each_language_is_in_every_split(tmp_path):
    for language, count in (("Korean", 20), ("Irish", 40)):
        (tmp_path / f"{language}.txt").write_text("".join(f"name{i}\n" for i in range(count)))

    prepared(tmp_path, "names", tmp_path, "--out", "out")

    counts = {}
    for split in ("train", "valid", "test"):
        for example in labelled.read([str(tmp_path / "out" / f"{split}.tsv")]):
            counts[example.label, split] = counts.get((example.label, split), 0) + 1
    assert counts["Korean", "train"] == 16
    assert counts["Irish", "valid"] == counts["Irish", "test"] == 4


@pytest.mark.parametrize("name", ["snips", "names"])
def test_what_is_not_there_is_said(tmp_path, name):
    done = prepared(tmp_path, name, tmp_path / "nowhere")

    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
