"""Cells in a Python file of the user's, from the command line."""

import pytest

from corpora import TINY

LEAKY = """
import torch
from lmtrain.cells import Cell, register


@register("leaky")
class Leaky(Cell):
    gates = ("candidate", "forget")
    state_names = ("hidden",)
    options = ("floor",)

    def __init__(self, input_size: int, hidden_size: int, floor: float = 0.0) -> None:
        super().__init__(input_size, hidden_size)
        self.floor = floor

    def step(self, x, state):
        (h,) = state
        forget = self.floor + (1 - self.floor) * torch.sigmoid(self.affine("forget", x, h))
        return (forget * h + (1 - forget) * torch.tanh(self.affine("candidate", x, h)),)
"""


@pytest.fixture
def leaky(lmtrain, small, tmp_path):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "my_cells.py").write_text(LEAKY)
    return lmtrain(
        "train", "text.txt", *small, "--cell", "my_cells.py:leaky", "--set", "model.floor=0.1",
        "--out", "run",
    )  # fmt: skip


def test_a_cell_of_ones_own_trains_with_its_own_options(leaky, lmtrain, parsed):
    assert leaky.returncode == 0, leaky.stderr
    assert "my_cells.py registered: leaky" in leaky.stderr

    sampled = lmtrain("--cells", "my_cells.py", "sample", "run")
    info = parsed(lmtrain("--cells", "my_cells.py", "info", "run", "--json").stdout)
    more = ("--set", "train.max_steps=44")
    resumed = lmtrain("--cells", "my_cells.py", "train", "--resume", "run", *more)

    assert sampled.returncode == 0, sampled.stderr
    assert info["settings"]["model"]["floor"] == 0.1
    assert info["engines"] == ["reference"]
    assert "trained     44 steps" in resumed.stdout, resumed.stderr


def test_a_settings_file_never_runs_code(lmtrain, small, tmp_path, assert_refused):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "my_cells.py").write_text(LEAKY)
    (tmp_path / "settings.toml").write_text('[model]\ncell = "my_cells.py:leaky"\n')

    refused = lmtrain("train", "text.txt", "--config", "settings.toml", *small, "--out", "run")
    named = lmtrain(
        "--cells", "my_cells.py", "train", "text.txt", "--config", "settings.toml", *small
    )

    assert_refused(refused, 2, "--cells my_cells.py")
    assert named.returncode == 0, named.stderr


@pytest.mark.parametrize("command", [("sample", "run"), ("train", "--resume", "run")])
def test_a_run_never_runs_code(leaky, lmtrain, tmp_path, assert_refused, command):
    (tmp_path / "my_cells.py").write_text("open('canary', 'w')\n" + LEAKY)

    refused = lmtrain(*command)

    assert_refused(refused, 4 if command[0] == "sample" else 2, "Python code in my_cells.py",
                   "--cells my_cells.py")  # fmt: skip
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--set", "model.flor=0.1"), "has no option flor"),
        (("--set", "model.floor=much"), "floor"),
        (("--cell", "nowhere.py:leaky"), "there is no file nowhere.py"),
    ],
)
def test_what_the_file_does_not_have_is_refused(
    lmtrain, small, tmp_path, assert_refused, options, told
):
    (tmp_path / "text.txt").write_text(TINY)
    (tmp_path / "my_cells.py").write_text(LEAKY)

    refused = lmtrain("train", "text.txt", *small, "--cell", "my_cells.py:leaky", *options)

    assert refused.returncode == 2
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr
