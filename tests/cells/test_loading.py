"""User-defined cells: names with files, and running the files."""

import pickle
from pathlib import Path

import pytest
import torch

from lmtrain import cells, device
from lmtrain.cells import base
from lmtrain.errors import ConfigError, RunInterruptedError
from lmtrain.kernels.scan import engine

LEAKY = '''
import torch
from lmtrain.cells import Cell, register


@register("leaky")
class Leaky(Cell):
    """h = λ h′ + (1 − λ) c̃"""

    gates = ("candidate",)
    state_names = ("hidden",)
    options = ("leak",)

    def __init__(self, input_size: int, hidden_size: int, leak: float = 0.5) -> None:
        super().__init__(input_size, hidden_size)
        self.leak = leak

    def step(self, x, state):
        (h,) = state
        candidate = torch.tanh(self.affine("candidate", x, h))
        return (self.leak * h + (1 - self.leak) * candidate,)
'''


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(base, "_CELLS", dict(base._CELLS))


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "my_cells.py") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_a_file_registers_its_cells(write):
    path = write(LEAKY)

    assert cells.load_file(path) == ["leaky"]

    cell = cells.create("leaky", 3, 4, {"leak": 0.25})
    assert cell.leak == 0.25
    assert engine(cell) == "reference"
    assert not list(path.parent.glob("__pycache__"))


def test_a_changed_file_replaces_its_cells(write):
    cells.load_file(write(LEAKY))
    assert cells.load_file(write(LEAKY)) == ["leaky"]

    assert cells.load_file(write(LEAKY.replace("0.5", "0.1"))) == ["leaky"]

    assert cells.create("leaky", 3, 4, {}).leak == 0.1


def test_a_cell_from_a_file_can_be_pickled(write):
    cells.load_file(write(LEAKY))
    cell = cells.create("leaky", 3, 4, {})
    cell.initialize(device.generator(1), None, 0.0)

    copy = pickle.loads(pickle.dumps(cell))  # noqa: S301 - its own bytes

    assert torch.equal(copy.weight_input, cell.weight_input)


def test_two_files_cannot_register_the_same_name(write):
    cells.load_file(write(LEAKY))

    with pytest.raises(ConfigError, match=r"other.py, line 6: ConfigError: the cell name 'leaky'"):
        cells.load_file(write(LEAKY, "other.py"))


def test_a_file_cannot_register_the_name_of_a_built_in_cell(write):
    text = LEAKY.replace("leaky", "lstm").replace("Leaky", "LSTM")

    with pytest.raises(ConfigError, match="the cell name 'lstm' is taken by LSTM of lmtrain"):
        cells.load_file(write(text))

    assert cells.cell_class("lstm") is cells.LSTM


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n\nx / 0\n", r"my_cells.py, line 3: ZeroDivisionError: division by zero"),
        ("def f():\n    raise ValueError('a\\nb')\nf()\n", r"my_cells.py, line 2: ValueError: a$"),
        ("x = 1\ny = (\n", r"my_cells.py, line 2: SyntaxError: '\(' was never closed"),
        ("import no_such_module\n", r"line 1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(3)\n", r"line 2: SystemExit: 3"),
        ("x = 1\n", r"my_cells.py registers no cell"),
    ],
)
def test_errors_in_a_file_name_the_line(text, words, write):
    with pytest.raises(ConfigError, match=words) as caught:
        cells.load_file(write(text))

    assert len(str(caught.value).splitlines()) <= 3


def test_the_error_of_a_missing_file_names_it(tmp_path):
    for path in (tmp_path / "lost.py", tmp_path):
        with pytest.raises(ConfigError, match=f"there is no file {path}"):
            cells.load_file(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lstm", (None, "lstm")),
        ("my_cells.py:leaky", (Path("my_cells.py"), "leaky")),
        ("C:/cells/my.py:leaky", (Path("C:/cells/my.py"), "leaky")),
    ],
)
def test_a_name_is_split_into_file_and_cell(name, expected):
    assert cells.split_name(name) == expected


def test_a_name_with_a_file_does_not_run_the_file(write):
    path = write("raise SystemExit\n" + LEAKY)

    with pytest.raises(ConfigError, match="only run when you name it") as caught:
        cells.create(f"{path}:leaky", 3, 4, {})

    assert f"the cell leaky is Python code in {path}" in str(caught.value)
    assert f"--cells {path}" in str(caught.value)


def test_a_name_with_a_file_finds_the_registered_cell(write):
    path = write(LEAKY)
    cells.load_file(path)

    assert cells.cell_class(f"{path}:leaky") is cells.cell_class("leaky")


def test_a_signal_is_no_fault_of_the_file(write):
    path = write(
        "from lmtrain.errors import RunInterruptedError\nraise RunInterruptedError(2, 'stopped')\n"
    )

    with pytest.raises(RunInterruptedError):
        cells.load_file(path)


def test_a_name_that_is_too_long_is_no_file():
    with pytest.raises(ConfigError, match="there is no file x"):
        cells.load_file(Path("x" * 300))
